"""What every task makes of a row: a prompt, a gold answer, and how an answer is judged."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Example:
    """One prompt and its gold answer. `id` is stable across runs.

    `choices` holds every allowed answer of a choice task, the gold one (`answer`) among them. `tests` is
    a program that judges generated code. `place` says where its row stands (file:line), for messages.
    """

    id: str
    prompt: str
    answer: str
    choices: tuple[str, ...] = ()
    tests: str = ""
    place: str = ""


@dataclass(frozen=True)
class Task:
    """How a task's rows become examples, and where they come from.

    `prompt` and `answer` read a row; an empty answer means the row is dropped, as in the paper.
    `hub` is (hub id, config); `hub_splits` maps train/validation/test to the hub's names. `wheel` maps
    splits to files of the data wheel, for machines that reach no hub.

    `choices` lists a row's allowed answers, and `choices_field` is where a row has them. `correct(text, example)` judges a generated text where that
    needs no code to be run; `tests` gives the program that judges generated code, and `program(text, example)`
    the whole of what is to be run: the code in a generated text, then its tests. `reshape` turns a row of
    another published layout into the one with `fields`. `system` is the system message in the chat format.
    `long_field`: a text that may be cut without harm to the answer.
    """

    name: str
    fields: tuple[str, ...]
    prompt: Callable[[Row], str]
    answer: Callable[[Row], str]
    max_new_tokens: int
    hub: tuple[str, str | None] | None
    hub_splits: Mapping[str, str]
    wheel: Mapping[str, str]
    choices: Callable[[Row], list[str]] | None = None
    choices_field: str = ""
    correct: Callable[[str, Example], bool] | None = None
    tests: Callable[[Row], str] | None = None
    program: Callable[[str, Example], str] | None = None
    reshape: Callable[[Row], Row] | None = None
    system: str | None = None
    long_field: str | None = None


def bare_prompt(task: Task) -> str:
    """A task's template: its prompt with every field empty. ValueError if the task has no words of its own, or lists."""
    try:
        text = task.prompt(dict.fromkeys(task.fields, ""))
    except ValueError:
        text = ""
    if not text.strip():
        raise ValueError(
            f"task {task.name!r} has no template that stands without its fields: leave the method template out, or take a "
            "task whose prompt is words around texts, e.g. nq-open."
        )
    return text
