"""Two answers to a prompt beside each other, the differing words in bold where a terminal shows it."""

from __future__ import annotations

import re
import sys
from difflib import SequenceMatcher

BOLD, PLAIN = "\x1b[1m", "\x1b[0m"


def compared(base: str, adapted: str, *, bold: bool | None = None) -> list[str]:
    """Lines: the base model's answer, the adapted one, what changed. `bold`: by default where stdout is a terminal."""
    base, adapted = base.strip(), adapted.strip()
    if base == adapted:
        return [f"base:    {base}", "adapted: = the same answer"]
    pieces = [re.findall(r"\S+|\s+", text) for text in (base, adapted)]
    words = [[piece for piece in text if not piece.isspace()] for text in pieces]
    blocks = SequenceMatcher(None, *words, autojunk=False).get_matching_blocks()
    kept = [{block[side] + i for block in blocks for i in range(block.size)} for side in (0, 1)]
    if sys.stdout.isatty() if bold is None else bold:
        base, adapted = (_marked(text, same) for text, same in zip(pieces, kept, strict=True))
    changed, dropped = len(words[1]) - len(kept[1]), len(words[0]) - len(kept[0])
    said = f"{changed} of {len(words[1])} words" if changed else f"{dropped} words left out"
    if not words[1]:
        said = "an empty answer"
    elif not changed and not dropped:
        said = "spaces only"
    return [f"base:    {base}", f"adapted: {adapted}", f"changed: {said}"]


def _marked(pieces: list[str], same: set[int]) -> str:
    place, shown = -1, []
    for piece in pieces:
        place += not piece.isspace()
        shown.append(piece if piece.isspace() or place in same else f"{BOLD}{piece}{PLAIN}")
    return "".join(shown)
