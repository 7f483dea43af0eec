"""Prompts, chats and answers to token ids. A text that spells a special token stays text."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from itertools import pairwise, takewhile
from threading import Lock
from typing import Any
from weakref import WeakKeyDictionary

from jinja2 import TemplateError
from transformers import AddedToken, PreTrainedTokenizerBase

from ephemera.messages import check_unicode

Tokens = Mapping[int, AddedToken]
Prompt = str | Sequence[Mapping[str, Any]]  # a text, or a chat's messages of role and content
WORDS = ("a", "The mill", "7 - 3")  # texts that begin and end with different tokens
PRIVATE_USE = (range(0xE000, 0xF900), range(0xF0000, 0xFFFFE))

# A fast tokenizer keeps `split_special_tokens` of the last call as its state, and a server's threads share it
_LOCK = Lock()
_RESERVED: WeakKeyDictionary[PreTrainedTokenizerBase, tuple[object, Tokens, Tokens]] = WeakKeyDictionary()


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    *,
    chat: bool = False,
    system: str | None = None,
    special_tokens: bool = False,
) -> list[int]:
    """Token ids of a prompt, with the tokenizer's own special tokens, never two BOS.

    With `chat` the prompt becomes a user message in the model's chat template, after the `system` message
    if there is one, up to the assistant's turn. A prompt that is a list of messages is the whole chat, and needs `chat`. Special tokens that the prompt spells stay text;
    `special_tokens` makes them tokens. ValueError for text that is not valid Unicode, and as in `encode_chat`.
    """
    if chat:
        return encode_chat(tokenizer, _messages(prompt, system), special_tokens=special_tokens)
    encoder = _Encoder(tokenizer, prompt, special_tokens)
    return encoder.encode(encoder.mark(_plain(prompt)), add_special_tokens=True)


def encode_chat(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, Any]], *, special_tokens: bool = False
) -> list[int]:
    """Token ids of messages in the model's chat template, up to the assistant's turn.

    Only the template writes special tokens: those that a message spells stay text. So do, outside of the
    assistant's turns, tokens that are added but not special, if the template uses them.
    `special_tokens` makes all of them tokens. ValueError without a template, and where it refuses the messages.
    """
    encoder = _Encoder(tokenizer, messages, special_tokens)
    return encoder.encode(encoder.render(messages), add_special_tokens=False)


def encode_answer(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    answer: str,
    *,
    chat: bool = False,
    system: str | None = None,
    special_tokens: bool = False,
) -> list[int]:
    """Token ids of an answer as it continues a prompt, without an end token.

    A space joins the two only where neither has white space there. The prompt's own ids stay a strict
    prefix of the whole: where tokenising the joined text would merge across the border, the answer
    is tokenised on its own. Special tokens that the answer spells stay text, as in `encode_prompt`.
    ValueError for an answer that has no tokens.
    """
    messages = _messages(prompt, system)
    encoder = _Encoder(tokenizer, [messages, answer], special_tokens)
    text = encoder.render(messages) if chat else encoder.mark(_plain(prompt))
    joint = encoder.mark(answer if text[-1:].isspace() or answer[:1].isspace() else f" {answer}")
    prompt_ids = encoder.encode(text, add_special_tokens=not chat)
    whole = encoder.encode(text + joint, add_special_tokens=not chat)
    if whole[: len(prompt_ids)] == prompt_ids and len(whole) > len(prompt_ids):
        return whole[len(prompt_ids) :]
    ids = encoder.encode(joint, add_special_tokens=False)
    if not ids:
        raise ValueError(
            f"the answer {answer[:40]!r} has no tokens: this model's tokenizer drops all of its characters."
        )
    return ids


def chat_beginning(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that every chat of one user message begins with: its template's own. Empty without a template."""
    if not tokenizer.chat_template:
        return []
    try:
        chats = [encode_prompt(tokenizer, words, chat=True) for words in WORDS]
    except ValueError:  # it wants other messages
        return []
    return chats[0][: _alike(chats)]


def frame(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], *, chat: bool = False) -> tuple[int, int]:
    """How many of a prompt's first and last token ids are the template's or the tokenizer's own, not the text's."""
    if chat:  # what all chats of one message share
        all_ids = [ids, *(encode_prompt(tokenizer, words, chat=True) for words in WORDS)]
        before = _alike(all_ids)
        return before, _alike([one[before:][::-1] for one in all_ids])
    with _LOCK:
        empty: Any = tokenizer("")["input_ids"]
    before = _alike([ids, empty])
    after = empty[before:]
    return before, len(after) if after and list(ids[-len(after) :]) == after else 0


def _alike(sequences: Sequence[Sequence[int]]) -> int:
    """How many first ids all of them share."""
    return sum(1 for _ in takewhile(lambda ids: len(set(ids)) == 1, zip(*sequences, strict=False)))


def without_row(tokenizer: PreTrainedTokenizerBase, token: int, model: str, rows: int) -> str:
    """What to say of a token that the model's embedding does not have."""
    return (
        f"token {tokenizer.convert_ids_to_tokens(token)!r} has id {token}, and the embedding of {model} has {rows} rows. "
        "Leave it out of the text; or take the model's own tokenizer, or the weights saved after resize_token_embeddings."
    )


class _Encoder:
    """Encodes text whose author must not write special tokens.

    `mark` puts a sentinel inside every token that a text spells, so that the tokenizer does not find it.
    The sentinel is a private-use character that no text has. It passes through chat templates, also
    through those that trim texts. `encode` takes every token that it still finds as the template's own,
    and encodes the text between them without its sentinels.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, texts: Any, special_tokens: bool):
        self.tokenizer = tokenizer
        for text in _strings(texts):
            check_unicode(text, "the text")
        self.special, self.reserved = ({}, {}) if special_tokens else _reserved(tokenizer)
        self.after: dict[str, bool] = {}
        used = set("".join(_strings([texts, tokenizer.chat_template])))
        free = (c for c in (chr(code) for codes in PRIVATE_USE for code in codes) if c not in used)
        self.sentinel = next(free, "")
        if not self.sentinel:
            raise ValueError("the text has every private-use character of Unicode; leave one of them out.")

    def mark(self, text: str, tokens: Tokens | None = None) -> str:
        """The text with a sentinel inside each of the tokens (default: all special ones) that it spells."""
        tokens = self.special if tokens is None else tokens
        while spans := self._spans(text, tokens):  # again, because one token may have hidden another
            # after the first character of the token, past the white space that it may take with it
            inside = [min(b - len(text[a:b].lstrip()) + 1, b - 1) for a, b, _ in spans]
            borders = pairwise([0, *inside, len(text)])
            text = self.sentinel.join(text[a:b] for a, b in borders)
        return text

    def render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The chat template's text of marked messages."""
        if not self.tokenizer.chat_template:
            raise ValueError("this model has no chat template; use the plain prompt format (format: plain).")
        marked = []
        for message in messages:
            # What decoding shows, the model may have written itself (such as <think>): its turns keep it
            tokens = self.special if message.get("role") == "assistant" else self.reserved
            marked.append({key: self._mark_field(key, value, tokens) for key, value in message.items()})
        try:
            return self._templated(marked)
        except (TemplateError, TypeError) as error:  # of a template that takes other contents
            why = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
            others = [message for message in marked if message.get("role") != "system"]
            if others != marked and self._takes(others):
                raise ValueError(
                    f"this model's chat template takes no system message ({why}). Leave it out, put its words into the "
                    "first user message, or use the plain prompt format (format: plain)."
                ) from error
            raise ValueError(f"this model's chat template refuses these messages: {why}.") from error

    def _takes(self, marked: Sequence[Mapping[str, Any]]) -> bool:
        try:
            return bool(self._templated(marked))
        except (TemplateError, TypeError):
            return False

    def _templated(self, marked: Sequence[Mapping[str, Any]]) -> str:
        text = self.tokenizer.apply_chat_template([dict(m) for m in marked], tokenize=False, add_generation_prompt=True)
        assert isinstance(text, str)
        return text

    def encode(self, marked: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids of marked text; `add_special_tokens` adds the tokenizer's own, such as BOS."""
        if self.sentinel not in marked:
            return self._ids(marked, add_special_tokens=add_special_tokens)
        ids: list[int] = []
        before, end = "", 0
        for start, next_end, token in self._spans(marked, self.reserved):
            ids += [*self._encode_piece(marked[end:start], before), token]
            before, end = marked[start:next_end], next_end
        ids += self._encode_piece(marked[end:], before)
        if not add_special_tokens:
            return ids
        text = marked.replace(self.sentinel, "")
        body = self._ids(text, split_special_tokens=True)
        framed = self._ids(text, add_special_tokens=True, split_special_tokens=True)
        start = next(i for i in range(len(framed)) if framed[i : i + len(body)] == body)
        return [*framed[:start], *ids, *framed[start + len(body) :]]

    def _mark_field(self, key: str, value: Any, tokens: Tokens) -> Any:
        if isinstance(value, str) and key != "role":
            return self.mark(value, tokens)
        joined = "".join(_strings(value))  # a template may join the parts of a content
        if spans := self._spans(joined, tokens):
            spelled = joined[spans[0][0] : spans[0][1]]
            raise ValueError(
                f"a message's {key} spells the special token {spelled!r}; only a field of one text may, "
                f"and not the role. Give the {key} as one text, or without {spelled!r}."
            )
        return value

    def _spans(self, text: str, tokens: Tokens) -> list[tuple[int, int, int]]:
        """(start, end, id) of each of the tokens that the tokenizer finds in a text."""
        if not tokens or not text:
            return []
        if not self.tokenizer.is_fast:
            found = _search(text, tokens)
        else:
            with _LOCK:
                encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            ids: Any = encoded["input_ids"]
            found = [(a, b, i) for i, (a, b) in zip(ids, encoded["offset_mapping"], strict=True) if i in tokens]
        unknown = self.tokenizer.unk_token_id
        return [
            (a, b, i)
            for a, b, i in found
            if b - a > 1
            and self.sentinel not in text[a:b]  # a normalizer may drop the sentinel
            and (i != unknown or tokens[i].content in text[a:b])  # else it stands for an unknown character
        ]

    def _encode_piece(self, marked: str, before: str) -> list[int]:
        """Token ids of the text after the special token `before` ("" at the beginning), up to the next one."""
        text = marked.replace(self.sentinel, "")
        encode = self._encode_inside if before and self._goes_on(before) else self._encode_apart
        ids = encode([text])
        if text == marked or not self.reserved.keys() & ids:
            return ids
        # Found all the same: it is added but not special, or a piece of the vocabulary. Encode its parts apart
        first, *rest = marked.split(self.sentinel)
        ids = encode([first]) + self._encode_inside(rest)
        if left := self.reserved.keys() & {i for i in ids if i != self.tokenizer.unk_token_id}:
            raise ValueError(
                f"the text spells {self.reserved[min(left)].content!r}, and this tokenizer cannot write that as text. "
                "Take it out of the text, or let it be the token (special_tokens=True)."
            )
        return ids

    def _goes_on(self, before: str) -> bool:
        """Whether text after this token is encoded as inside a text. SentencePiece may begin it with a space."""
        if before not in self.after:
            self.after[before] = self._ids(before + ".")[1:] != self._ids(".")
        return self.after[before]

    def _encode_apart(self, texts: Sequence[str]) -> list[int]:
        """Token ids of texts without special tokens, joined; each as if it stood alone."""
        texts = [text for text in texts if text]
        return [i for ids in self._ids(texts, split_special_tokens=True) for i in ids] if texts else []

    def _encode_inside(self, texts: Sequence[str]) -> list[int]:
        """Token ids of texts without special tokens, joined; each as it is inside a longer text."""
        texts = [text for text in texts if text]
        before, head = self._anchor
        ids = []
        wholes = self._ids([before + text for text in texts], split_special_tokens=True) if texts else []
        for text, whole in zip(texts, wholes, strict=True):
            kept = whole[: len(head)] == head and len(whole) > len(head)  # else the two were joined
            ids += whole[len(head) :] if kept else self._encode_apart([text])
        return ids

    @cached_property
    def _anchor(self) -> tuple[str, list[int]]:
        """What `_encode_inside` puts before texts, and its ids. It should join with no text: the sentinel, if known."""
        anchors = [self.sentinel, ".", "x", "0"]
        heads = zip(anchors, self._ids(anchors, split_special_tokens=True), strict=True)
        # an unknown character may become one token with the next
        return next(((a, ids) for a, ids in heads if ids and self.tokenizer.unk_token_id not in ids), ("", []))

    def _ids(self, text: Any, *, add_special_tokens: bool = False, **options: Any) -> list[Any]:
        """The tokenizer's ids of a text, or of each of several."""
        with _LOCK:
            ids: Any = self.tokenizer(text, add_special_tokens=add_special_tokens, **options)["input_ids"]
        return ids


def _messages(prompt: Prompt, system: str | None) -> list[Mapping[str, Any]]:
    messages: list[Mapping[str, Any]] = [{"role": "system", "content": system}] if system else []
    return [*messages, {"role": "user", "content": prompt}] if isinstance(prompt, str) else [*messages, *prompt]


def _plain(prompt: Prompt) -> str:
    if not isinstance(prompt, str):
        raise ValueError("a prompt of messages needs the model's chat template: load with chat=True (--chat).")
    return prompt


def _reserved(tokenizer: PreTrainedTokenizerBase) -> tuple[Tokens, Tokens]:
    """The special tokens, and these with the other added tokens that the chat template uses."""
    key = (len(tokenizer), tuple(tokenizer.all_special_ids), tokenizer.chat_template)
    known = _RESERVED.get(tokenizer)
    if known is None or known[0] != key:  # kept, because a tokenizer of thousands of tokens takes 20 ms to list them
        template = "".join(_strings(tokenizer.chat_template))
        # One character is left to be a token: it is what any text is made of
        added = {i: token for i, token in tokenizer.added_tokens_decoder.items() if len(token.content) > 1}
        special = {i: token for i, token in added.items() if token.special}
        # A template's white space is ordinary text
        used = {i for i, token in added.items() if token.content in template and not token.content.isspace()}
        known = (key, special, {i: token for i, token in added.items() if token.special or i in used})
        _RESERVED[tokenizer] = known
    return known[1], known[2]


def _search(text: str, tokens: Tokens) -> list[tuple[int, int, int]]:
    """(start, end, id) of each token in a text: the longest where several begin."""
    ids = {token.content: i for i, token in tokens.items()}
    longest_first = sorted(tokens.values(), key=lambda token: -len(token.content))
    spaces = {False: "", True: r"\s*"}
    parts = [f"{spaces[t.lstrip]}({re.escape(t.content)}){spaces[t.rstrip]}" for t in longest_first]
    matches = re.finditer("|".join(parts), text)
    return [(*match.span(), ids[match[match.lastindex or 0]]) for match in matches]


def _strings(value: Any) -> Iterator[str]:
    """Every text in nested lists and mappings."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, part in value.items():
            if key != "type":  # of a part of a content
                yield from _strings(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _strings(part)
