"""A row's fields as published data sets and people's own files spell them; ValueError for what has no certain reading."""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from typing import Any


def first_text(given: Any, field: str) -> str:
    """The first answer of a field: a text, or a list of texts of which empty ones are passed over; "" if there is none."""
    if isinstance(given, str):
        if _is_written_list(given):
            raise ValueError(f"field {field!r} is a list written as text: {given!r}. Write a list, or one answer.")
        return given
    if given is None or not isinstance(given, Sequence):
        raise ValueError(f"field {field!r} should be a text or a list of texts; got {given!r}.")
    for one in given:
        if one is not None and not isinstance(one, str):
            raise ValueError(f"field {field!r} should be a text or a list of texts; it holds {one!r}.")
    return next((one for one in given if one and one.strip()), "")


def spans(given: Any, field: str) -> str:
    """The first answer of SQuAD: {"text": [...]}, or a list of {"text": "..."} as its own files have it."""
    if isinstance(given, Mapping):
        if "text" not in given:
            raise ValueError(f"field {field!r} should be {{'text': [...]}}; got {dict(given)!r}.")
        return first_text(given["text"], f"{field}.text")
    if isinstance(given, Sequence) and not isinstance(given, str) and any(isinstance(one, Mapping) for one in given):
        return first_text([one.get("text", one) if isinstance(one, Mapping) else one for one in given], field)
    return first_text(given, field)


def label(given: Any) -> str:
    """A choice's label as text: 0, "0" and 0.0 (a whole number that passed through a table) are one label."""
    if isinstance(given, float) and given.is_integer():
        given = int(given)
    return given.strip() if isinstance(given, str) else str(given)


def _is_written_list(text: str) -> bool:
    """Is it a list that a table has turned into text, as "['Paris']"?"""
    if not (text.startswith("[") and text.endswith("]")):
        return False
    try:
        return isinstance(ast.literal_eval(text), list)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return False
