"""Rows of one task or several, as settings name them, as token ids."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from ephemera.config import DataSettings, RowSettings, fill
from ephemera.llm.frozen_lm import FrozenLM
from ephemera.scoring import Encoded, encode_examples
from ephemera.tasks import Example, Task, load_dataset


@dataclass(frozen=True, eq=False)
class TaskRows:
    """A task's examples by id, and their rows.

    `dropped` had no answer, `long` were longer than allowed, `repeated` were equal to another.
    """

    task: Task
    examples: dict[str, Example]
    rows: list[Encoded]
    source: str
    dropped: int
    long: int
    repeated: int = 0


def load_tasks(backbone: FrozenLM, settings: DataSettings, *, once: bool = False) -> list[TaskRows]:
    """The rows of each task that `settings.task` joins by "+", equal ones `once`; what was left out is said."""
    names = settings.task.split("+")
    return [
        rows_of(backbone, name, settings.sources.get(name) or fill(settings.source, name), settings, once=once)
        for name in names
    ]


def rows_of(
    backbone: FrozenLM,
    name: str,
    source: str | None,
    settings: RowSettings,
    *,
    once: bool = False,
) -> TaskRows:
    """The rows of one task, equal ones `once`; what was left out is said."""
    data = load_dataset(
        name, split=settings.split, source=source, limit=settings.limit, seed=settings.seed, cut=settings.cut
    )
    if once:
        data = data.once()
    equal = f"; {data.repeated} equal to another row and counted once" if data.repeated else ""
    rows, long = encode_examples(
        backbone,
        data.examples,
        chat=settings.format == "chat",
        max_tokens=settings.max_tokens,
        system=data.task.system,
        task=name,
        max_answer_tokens=settings.max_answer_tokens,
        end_token=settings.end_token,
    )
    print(
        f"{name} {settings.split}: {len(rows)} rows from {data.source} "
        f"({data.dropped} without an answer and {long} over {settings.max_tokens} tokens left out{equal})",
        file=sys.stderr,
    )
    return TaskRows(data.task, {e.id: e for e in data.examples}, rows, data.source, data.dropped, long, data.repeated)


def load_rows(backbone: FrozenLM, settings: DataSettings) -> list[Encoded]:
    """All tasks' rows, one task after the other."""
    return [row for task in load_tasks(backbone, settings) for row in task.rows]
