"""From token ids to text as it may be shown: whole characters only, and nothing of a stop sequence."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from ephemera.serving.engine.vocabulary import HALF


class Detokenizer:
    """Text of a growing answer. What it has given never changes: a piece ends where the characters so far are whole.

    Decoding starts at the tokens of the piece before, because a token's text may depend on what precedes it.
    `context`: tokens whose text the answer is to follow.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, context: Sequence[int] = ()):
        self.tokenizer = tokenizer
        self.ids: list[int] = list(context)
        self.before, self.given = 0, len(self.ids)

    def push(self, token: int) -> str:
        self.ids.append(token)
        return self._piece(last=False)

    def finish(self) -> str:
        """What was held back, as the decoder shows it."""
        return self._piece(last=True)

    def _piece(self, *, last: bool) -> str:
        known = self._decode(self.ids[self.before : self.given])
        whole = self._decode(self.ids[self.before :])
        if not last and (whole.endswith(HALF) or len(whole) <= len(known)):
            return ""
        self.before, self.given = self.given, len(self.ids)
        return whole[len(known) :]

    def _decode(self, ids: Sequence[int]) -> str:
        text = self.tokenizer.decode(list(ids), skip_special_tokens=True)
        assert isinstance(text, str)
        return text


class Stop:
    """Holds back the end of a text while it may be the beginning of a stop sequence."""

    def __init__(self, sequences: Sequence[str]):
        self.sequences = tuple(sequences)
        self.held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """(text that may be shown, whether a stop sequence came): the sequence itself is never shown."""
        if not self.sequences:
            return text, False
        self.held += text
        places = [place for s in self.sequences if (place := self.held.find(s)) >= 0]
        if places:
            shown, self.held = self.held[: min(places)], ""
            return shown, True
        keep = max(self._begun(s) for s in self.sequences)
        cut = len(self.held) - keep
        shown, self.held = self.held[:cut], self.held[cut:]
        return shown, False

    def finish(self) -> str:
        shown, self.held = self.held, ""
        return shown

    def _begun(self, sequence: str) -> int:
        longest = min(len(sequence) - 1, len(self.held))
        return next((n for n in range(longest, 0, -1) if self.held.endswith(sequence[:n])), 0)
