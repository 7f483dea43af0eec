"""Words for a user's mistakes: the nearest allowed name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(given: str, allowed: Iterable[str]) -> str:
    """`Did you mean 'x'?` or the empty string."""
    close = difflib.get_close_matches(given, list(allowed), n=1, cutoff=0.5)
    return f"Did you mean {close[0]!r}?" if close else ""


def unknown(what: str, given: str, allowed: Iterable[str]) -> ValueError:
    """An error that names what was given, the nearest allowed name, and all of them."""
    allowed = list(allowed)
    hint = nearest(given, allowed)
    return ValueError(f"unknown {what} {given!r}. {hint + ' ' if hint else ''}Known: {', '.join(allowed)}.")
