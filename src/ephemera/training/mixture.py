"""Rows of several tasks in chosen proportions."""

from __future__ import annotations

import random
from collections.abc import Sequence

from ephemera.config import MixtureSettings, TasksSettings, source_of
from ephemera.llm.frozen_lm import FrozenLM
from ephemera.rows import rows_of
from ephemera.scoring import Encoded


def task_rows(backbone: FrozenLM, settings: MixtureSettings | TasksSettings) -> dict[str, list[Encoded]]:
    """Each task's rows as token ids; what was left out is said."""
    return {
        entry.task: rows_of(backbone, entry.task, source_of(entry, settings.source), settings).rows
        for entry in settings.tasks
    }


def mix(rows: dict[str, list[Encoded]], settings: MixtureSettings, samples: int) -> list[Encoded]:
    """One pass of training rows: drawn task by task with the given weights, each task's rows shuffled.

    A task that is used up starts over. `stop` says when the pass ends: after `samples` rows, or when the first, or
    every, task has been used up once.
    """
    rng = random.Random(f"mixture:{settings.seed}")
    names = [entry.task for entry in settings.tasks]
    weights = [entry.weight for entry in settings.tasks]
    orders: dict[str, list[int]] = {name: [] for name in names}
    exhausted: set[str] = set()
    mixed: list[Encoded] = []
    while not _done(settings.stop, mixed, exhausted, names, samples):
        name = rng.choices(names, weights)[0]
        if not orders[name]:
            orders[name] = rng.sample(range(len(rows[name])), len(rows[name]))
        mixed.append(rows[name][orders[name].pop()])
        if not orders[name]:
            exhausted.add(name)
    return mixed


def _done(stop: str, mixed: Sequence[Encoded], exhausted: set[str], names: Sequence[str], samples: int) -> bool:
    if stop == "first_exhausted":
        return bool(exhausted)
    if stop == "all_exhausted":
        return len(exhausted) == len(names)
    return len(mixed) >= samples
