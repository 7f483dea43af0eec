"""What each token of a vocabulary is in bytes, and a name for it that no other token has."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate, groupby
from typing import Any

from transformers import PreTrainedTokenizerBase

HALF = "\N{REPLACEMENT CHARACTER}"  # how a decoder shows bytes that are no whole character
FALLBACK = re.compile(r"<0x([0-9A-Fa-f]{2})>")  # SentencePiece's tokens of one byte
PLAIN_STEPS = {"Replace", "Metaspace", "ByteFallback", "Fuse", "Strip"}  # decoders whose tokens have bytes of their own


class Vocabulary:
    """Bytes and names of a tokenizer's tokens, worked out when they are first asked for.

    A decoder alone does not tell them: it shows a token that holds part of a character as U+FFFD. Byte-level tokens spell
    bytes by GPT-2's table; SentencePiece's are text with a mark for a space, or `<0xE2>`. Tokens of other decoders have
    the bytes of the text that they add to another token, where that is whole.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer

    def bytes_of(self, token: int) -> bytes | None:
        """A token's bytes; None where the tokenizer does not tell them."""
        return self._bytes[token] if 0 <= token < len(self._bytes) else None

    def name(self, token: int) -> str:
        """A token's text; where that is no whole text or another token has it too, its bytes or its number."""
        return self._names[token] if 0 <= token < len(self._names) else _numbered(token)

    def offsets(self, ids: Sequence[int], text: str, *, special: bool = False) -> list[int]:
        """Where each token's first byte stands in the text that the tokens decode to: the index of its character.

        `special`: whether the text shows special tokens.
        """
        shares = self._shares(ids, special=special)
        decoded = b"".join(shares).decode(errors="replace")
        cut = len(decoded) - len(text) if decoded.endswith(text) else 0  # a decoder may drop the first space
        decoder, seen, places = codecs.getincrementaldecoder("utf-8")("replace"), 0, []
        for share in shares:
            places.append(min(max(seen - cut, 0), len(text)))
            seen += len(decoder.decode(share))
        return places

    def prompt_offsets(self, ids: Sequence[int], text: str, *, special: bool = False) -> list[int]:
        """The same for a prompt as it was given: a normalizer may have made its tokens from another text."""
        if self.tokenizer.is_fast and self.tokenizer.decode(list(ids), skip_special_tokens=not special) != text:
            encoded = self._fast.encode(text)
            if encoded.ids == list(ids):
                return list(accumulate((start for start, _ in encoded.offsets), max))
        return self.offsets(ids, text, special=special)

    def _shares(self, ids: Sequence[int], *, special: bool) -> list[bytes]:
        """Each token's bytes as they go into a decoded text."""
        shares = [b"" if i in self._special and not special else self._share(i) for i in ids]
        if not self._fallback:
            return shares
        shown = [place for place, i in enumerate(ids) if shares[place]]
        for single, run in groupby(shown, lambda place: ids[place] in self._fallback):
            places = list(run)
            if single and _whole(b"".join(shares[place] for place in places)) is None:
                for place in places:  # ByteFallback shows every byte of such a run as U+FFFD
                    shares[place] = HALF.encode()
        return shares

    def _share(self, token: int) -> bytes:
        known = self.bytes_of(token)
        return self._decode([token]).encode() if known is None else known

    @cached_property
    def _pieces(self) -> list[str | None]:
        last = max(self.tokenizer.get_vocab().values(), default=-1)
        pieces = self.tokenizer.convert_ids_to_tokens(list(range(max(last + 1, len(self.tokenizer)))))
        return [piece if isinstance(piece, str) else None for piece in pieces]

    @cached_property
    def _special(self) -> frozenset[int]:
        added = self.tokenizer.added_tokens_decoder.items()
        return frozenset(i for i, token in added if token.special) | frozenset(self.tokenizer.all_special_ids)

    @property
    def _fast(self) -> Any:
        """The `tokenizers` object of a fast tokenizer, which transformers does not type."""
        return self.tokenizer.backend_tokenizer

    @cached_property
    def _steps(self) -> list[dict]:
        """The steps of the tokenizer's decoder, as its file describes them."""
        decoder = self._fast.decoder if self.tokenizer.is_fast else None
        if decoder is None:
            return []
        found = json.loads(decoder.__getstate__())
        return found["decoders"] if found["type"] == "Sequence" else [found]

    @cached_property
    def _fallback(self) -> frozenset[int]:
        """The tokens of one byte each, as SentencePiece has them."""
        if all(step["type"] != "ByteFallback" for step in self._steps):
            return frozenset()
        return frozenset(i for i, piece in enumerate(self._pieces) if piece and FALLBACK.fullmatch(piece))

    @cached_property
    def _bytes(self) -> list[bytes | None]:
        types = {step["type"] for step in self._steps}
        if "ByteLevel" in types:
            table = _byte_table()
            return [piece if piece is None else _from_table(piece, table) for piece in self._pieces]
        if types and types <= PLAIN_STEPS:
            return [piece if piece is None else self._plain(i, piece) for i, piece in enumerate(self._pieces)]
        return [None if piece is None else self._added(i, piece) for i, piece in enumerate(self._pieces)]

    def _plain(self, token: int, piece: str) -> bytes:
        if token in self._fallback:
            return bytes.fromhex(piece[3:5])
        for step in self._steps:
            if step["type"] == "Metaspace":
                piece = piece.replace(step["replacement"], " ")
            elif step["type"] == "Replace" and "String" in step["pattern"]:
                piece = piece.replace(step["pattern"]["String"], step["content"])
        return piece.encode()

    def _added(self, token: int, piece: str) -> bytes | None:
        """The text that a token adds to another one; a single byte by its name, as slow tokenizers have them."""
        anchor, before = self._anchor
        text = self._decode([anchor, token])
        if text.startswith(before) and HALF not in text:
            return text[len(before) :].encode()
        byte = FALLBACK.fullmatch(piece)
        return bytes.fromhex(byte[1]) if byte else None

    @cached_property
    def _anchor(self) -> tuple[int, str]:
        """A word that others may follow, and its text."""
        words = (i for i, piece in enumerate(self._pieces) if piece and piece.isalpha() and i not in self._special)
        word = next(words, 0)
        return word, self._decode([word])

    @cached_property
    def _names(self) -> list[str]:
        names: list[str] = [""] * len(self._bytes)
        taken: set[str] = set()
        fallback = self._fallback
        whole_pieces = [i for i in range(len(names)) if i not in fallback]
        for i in [*whole_pieces, *sorted(fallback)]:  # a whole piece before a byte that spells the same
            raw = self._bytes[i]
            name = None if raw is None else _whole(raw)
            if raw is not None and (name is None or name in taken):
                name = _escaped(raw)
            names[i] = _numbered(i) if name is None or name in taken else name
            taken.add(names[i])
        return names

    def _decode(self, ids: Sequence[int]) -> str:
        text = self.tokenizer.decode(list(ids), skip_special_tokens=False)
        assert isinstance(text, str)
        return text


def _byte_table() -> dict[str, int]:
    """GPT-2's: printable Latin characters are their own byte, the others follow from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


def _from_table(piece: str, table: dict[str, int]) -> bytes:
    try:
        return bytes(map(table.__getitem__, piece))
    except KeyError:
        return piece.encode()


def _whole(raw: bytes) -> str | None:
    """The text that bytes are, if they are one."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return None


def _escaped(raw: bytes) -> str:
    """As OpenAI's completions name tokens that are no text."""
    return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def _numbered(token: int) -> str:
    return f"token_id:{token}"
