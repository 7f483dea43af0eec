"""ROUGE-Lsum of an answer, for text in any script (Lin 2004, as `rouge_score` computes it)."""

from __future__ import annotations

import unicodedata

from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import Tokenizer

# Scripts that write no spaces between words: each letter, with its marks, is a token of its own.
UNSPACED = (
    *((0x0E00, 0x0EFF), (0x1000, 0x109F), (0x1780, 0x17FF)),  # Thai, Lao, Myanmar, Khmer
    *((0x1950, 0x19DF), (0x1A20, 0x1AAF), (0xA9E0, 0xA9FF), (0xAA60, 0xAA7F)),  # Tai scripts, Myanmar extended
    *((0x3005, 0x3007), (0x3031, 0x3035), (0x3040, 0x30FF), (0x31F0, 0x31FF), (0xFF66, 0xFF9F)),  # Japanese
    *((0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x3FFFF)),  # Han
)


class WordTokenizer(Tokenizer):
    """Words in lower case: runs of letters, their marks and digits; single letters of scripts without spaces.

    Of a text in ASCII these are the tokens of `rouge_score`'s own tokenizer, which knows a-z and 0-9 only.
    """

    def tokenize(self, text: str) -> list[str]:
        tokens: list[str] = []
        inside = False  # may the next character go on with the last token?
        for character in unicodedata.normalize("NFC", text.lower()):
            kind = unicodedata.category(character)
            if kind in ("Mn", "Mc"):  # a vowel sign or an accent; after an emoji it is neither
                if inside and not 0xFE00 <= ord(character) <= 0xFE0F:
                    tokens[-1] += character
            elif kind[0] != "L" and kind not in ("Nd", "Nl"):
                inside = False
            elif inside and not _unspaced(character) and not _unspaced(tokens[-1][0]):
                tokens[-1] += character
            else:
                tokens.append(character)
                inside = True
        return tokens


WORDS = WordTokenizer()
SCORER = RougeScorer(["rougeLsum"], tokenizer=WORDS)


def rouge_lsum(reference: str, text: str) -> float | None:
    """The F-measure between 0 and 1; None if the reference has no words, as an emoji has none."""
    if not WORDS.tokenize(reference):
        return None
    return SCORER.score(reference, text)["rougeLsum"].fmeasure


def _unspaced(character: str) -> bool:
    return any(first <= ord(character) <= last for first, last in UNSPACED)
