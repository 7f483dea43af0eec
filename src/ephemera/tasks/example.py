"""What every task makes of a row: a prompt, and a gold answer to score against."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Example:
    """One prompt and its gold answer. `id` is stable across runs."""

    id: str
    prompt: str
    answer: str


@dataclass(frozen=True)
class Task:
    """How a task's rows become examples, and where they come from.

    `prompt` and `answer` read a row; an empty answer means the row is dropped, as in the paper.
    `hub` is (hub id, config); `hub_splits` maps train/validation/test to the hub's names. `wheel` maps
    splits to files of the data wheel, for machines that reach no hub.
    """

    name: str
    fields: tuple[str, ...]
    prompt: Callable[[Row], str]
    answer: Callable[[Row], str]
    max_new_tokens: int
    hub: tuple[str, str | None] | None
    hub_splits: Mapping[str, str]
    wheel: Mapping[str, str]
