"""Prompts and answers to token ids, plain or through the chat template; prompt ids are a strict prefix."""

from __future__ import annotations

from itertools import takewhile

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, prompt: str, *, chat: bool = False, system: str | None = None
) -> list[int]:
    """Token ids of a prompt, with the tokenizer's own special tokens, never two BOS.

    With `chat` the prompt becomes a user message in the model's chat template, after the `system` message
    where there is one, up to the assistant's turn.
    """
    text = chat_text(tokenizer, prompt, system) if chat else prompt
    ids: list[int] = tokenizer(text, add_special_tokens=not chat)["input_ids"]  # pyright: ignore[reportAssignmentType]
    return ids


def chat_text(tokenizer: PreTrainedTokenizerBase, prompt: str, system: str | None = None) -> str:
    if not tokenizer.chat_template:
        raise ValueError("this model has no chat template; use the plain prompt format (format: plain).")
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": prompt})
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert isinstance(text, str)
    return text


def encode_answer(
    tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str, *, chat: bool = False, system: str | None = None
) -> list[int]:
    """Token ids of an answer as it continues a prompt, without an end token.

    A space joins the two only where neither has white space there. The prompt's own ids stay a strict
    prefix of the whole: where tokenising the joined text would merge across the border, the answer
    is tokenised on its own.
    """
    text = chat_text(tokenizer, prompt, system) if chat else prompt
    joint = answer if text[-1:].isspace() or answer[:1].isspace() else f" {answer}"
    prompt_ids = encode_prompt(tokenizer, prompt, chat=chat, system=system)
    whole: list[int] = tokenizer(text + joint, add_special_tokens=not chat)["input_ids"]  # pyright: ignore[reportAssignmentType]
    if whole[: len(prompt_ids)] == prompt_ids and len(whole) > len(prompt_ids):
        return whole[len(prompt_ids) :]
    alone: list[int] = tokenizer(joint, add_special_tokens=False)["input_ids"]  # pyright: ignore[reportAssignmentType]
    return alone


def chat_beginning(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that every chat of one user message begins with: its template's own. Empty without a template."""
    if not tokenizer.chat_template:
        return []
    try:
        chats = [encode_prompt(tokenizer, words, chat=True) for words in ("a", "The mill", "7 - 3")]
    except TemplateError:  # it wants other messages
        return []
    return [ids[0] for ids in takewhile(lambda ids: len(set(ids)) == 1, zip(*chats, strict=False))]
