"""Words for a user's mistakes: the nearest allowed name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

# What only some commands need: the modules of each extra (pyproject.toml)
EXTRAS = {
    "train": ("accelerate", "datasets", "peft"),
    "eval": ("rouge_score", "matplotlib", "datasets", "peft"),
    "serve": ("fastapi", "starlette", "uvicorn", "prometheus_client"),
    "lm-eval": ("lm_eval",),
    "ray": ("ray",),
    "bnb": ("bitsandbytes", "accelerate"),
    "torchao": ("torchao",),
}


def nearest(given: str, allowed: Iterable[str]) -> str:
    """`Did you mean 'x'?` or the empty string."""
    close = difflib.get_close_matches(given, list(allowed), n=1, cutoff=0.5)
    return f"Did you mean {close[0]!r}?" if close else ""


def missing_extra(error: ModuleNotFoundError) -> str | None:
    """One line that names a package that is not installed and how to get it; None if no extra brings it."""
    name = (error.name or "").partition(".")[0]
    extra = next((extra for extra, modules in EXTRAS.items() if name in modules), None)
    return None if extra is None else f"{name} is not installed. Get it by: pip install 'ephemera[{extra}]'"


def check_unicode(text: str, what: str) -> None:
    """ValueError if a text holds half a character, which no tokenizer and no file takes; `what` names the text."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        # Python reads a byte that is not UTF-8 as one of these
        byte = f", read from the byte 0x{code - 0xDC00:02x}, which is not UTF-8" if 0xDC80 <= code < 0xDD00 else ""
        raise ValueError(
            f"{what} is not valid Unicode: it has a lone surrogate, \\u{code:04x}, at character {error.start + 1}{byte}. "
            "Take it out, or give the whole character as UTF-8."
        ) from None


def unknown(what: str, given: str, allowed: Iterable[str]) -> ValueError:
    """An error that names what was given, the nearest allowed name, and all of them."""
    allowed = list(allowed)
    hint = nearest(given, allowed)
    return ValueError(f"unknown {what} {given!r}. {hint + ' ' if hint else ''}Known: {', '.join(allowed)}.")
