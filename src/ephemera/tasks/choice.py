"""Choice tasks: the answer is one of a list, written out. How the list is shown, and how an answer is read."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from ephemera.tasks.base import Example, Row
from ephemera.tasks.fields import label

SYSTEM = "You answer questions by repeating one of the given choices."


def shown(choices: Sequence[str]) -> str:
    """The choices as a list, one a line, without letters: the answer is the text itself."""
    return "\n".join(f"- {choice}" for choice in choices)


def pick(choices: Sequence[str], given: Any, field: str, *, first: int = 0) -> str:
    """The gold choice, from a label that counts from `first`; ValueError where it points outside the choices."""
    try:
        index = int(label(given)) - first
    except ValueError:
        raise ValueError(f"field {field!r} should be a whole number; got {given!r}.") from None
    if not 0 <= index < len(choices):
        raise ValueError(f"field {field!r} is {given!r}, which is none of the {len(choices)} choices.")
    return choices[index]


def texts(values: Any, field: str) -> list[str]:
    """A row's list of texts, e.g. its choices; ValueError where there are none, or one is empty."""
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise ValueError(f"field {field!r} should be a list of texts; got {values!r}.")
    for value in values:
        if not isinstance(value, str | int | float) or isinstance(value, bool):
            raise ValueError(f"field {field!r} should be a list of texts; it holds {value!r}.")
    found = [str(v).strip() for v in values]
    if not found or not all(found):
        raise ValueError(f"field {field!r} {'holds an empty text' if found else 'is empty'}: {list(values)!r}.")
    return found


def lettered_answer(row: Row) -> str:
    """The gold text of a row with `choices: {text, label}` and `answerKey` (ARC, OpenBookQA, CommonsenseQA)."""
    key = row["answerKey"]
    if key is None or key == "":
        return ""
    found, labels = _lettered(row)
    if label(key) not in labels:
        raise ValueError(f"field 'answerKey' is {key!r}, but the choices are labelled {', '.join(labels)}.")
    return found[labels.index(label(key))]


def lettered_choices(row: Row) -> list[str]:
    return _lettered(row)[0]


def _lettered(row: Row) -> tuple[list[str], list[str]]:
    """Texts and labels of `choices`: two lists, or a list of {text, label} as ARC's own files have it."""
    given = row["choices"]
    if (
        isinstance(given, list)
        and given
        and all(isinstance(one, Mapping) and {"text", "label"} <= set(one) for one in given)
    ):
        given = {key: [one[key] for one in given] for key in ("text", "label")}
    if not isinstance(given, Mapping) or not isinstance(given.get("label"), list | tuple) or "text" not in given:
        raise ValueError(f"field 'choices' should be {{'text': [...], 'label': [...]}}; got {given!r}.")
    found = texts(given["text"], "choices.text")
    labels = [label(one) for one in given["label"]]
    if len(found) != len(labels):
        raise ValueError(f"field 'choices' has {len(found)} texts and {len(labels)} labels.")
    if len(set(labels)) < len(labels):
        raise ValueError(f"field 'choices' has two choices with one label: {', '.join(labels)}.")
    return found, labels


def correct(text: str, example: Example) -> bool:
    """Is the choice that the text names the gold one?"""
    return parse(text, example.choices) == example.answer


def parse(text: str, choices: Sequence[str]) -> str | None:
    """The choice that a generated text names: what it begins with, else the only one that it mentions.

    None where it names none, or several without beginning with one. A choice inside a longer one ("wind" in
    "wind power") is mentioned only where it stands outside it.
    """
    said = _plain(text)
    wanted = {choice: _plain(choice) for choice in choices}
    first = [plain for plain in wanted.values() if re.match(rf"{re.escape(plain)}(?!\w)", said)]
    if first:
        return _spelled(text, wanted, max(first, key=len))
    named, rest = set(), said
    for plain in sorted(set(wanted.values()), key=len, reverse=True):
        rest, times = re.subn(rf"(?<!\w){re.escape(plain)}(?!\w)", "|", rest)
        if times:
            named.add(plain)
    return _spelled(text, wanted, named.pop()) if len(named) == 1 else None


def _spelled(text: str, wanted: Mapping[str, str], named: str) -> str | None:
    """The choice whose plain form is `named`; of several ("Rr" and "RR", "-1" and "+1") the one spelled so."""
    alike = [choice for choice, plain in wanted.items() if plain == named]
    if len(alike) > 1:
        alike = [c for c in alike if re.search(rf"(?<![\w+-]){re.escape(c.rstrip('.'))}(?!\w)", text)]
    return alike[0] if len(alike) == 1 else None


def _plain(text: str) -> str:
    """Words alone, in lower case; a text without any stays as it is."""
    words = re.sub(r"[^\w\s']", " ", text.lower().replace("\N{RIGHT SINGLE QUOTATION MARK}", "'"))
    return " ".join(words.split()) or text.strip()
