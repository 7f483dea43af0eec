"""How a model is laid over devices and processes, and which rows of a batch each process takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from torch import Tensor

from ephemera.llm import processes

Parallel = Literal["none", "tensor", "fsdp", "offload"]
T = TypeVar("T")


@dataclass(frozen=True)
class Share:
    """One process's rows of a batch.

    `own`: those that it takes, one at least: with fewer rows than processes some take a row that is another's. `order`: all
    rows of the batch, one process's after the other's. `counts[r]`: how many of these are process r's.
    """

    own: list[int]
    order: list[int]
    counts: list[int]

    @staticmethod
    def whole(rows: Sequence[int]) -> Share:
        """All rows, on every process."""
        return Share(list(rows), list(rows), [len(rows)])

    @staticmethod
    def of(rows: Sequence[int]) -> Share:
        """Every n-th row, so that the processes' rows have similar lengths."""
        parts = [list(rows[r :: processes.size()]) for r in range(processes.size())]
        own = parts[processes.rank()] or list(rows[:1])
        return Share(own, [i for part in parts for i in part], [len(part) for part in parts])

    def all_rows(self, own: Tensor) -> Tensor:
        """What every process has for its rows, [b,...] -> [B,...] in `order`."""
        return own if len(self.counts) == 1 else processes.all_rows(own, self.counts)

    def all_values(self, own: Sequence[T]) -> list[T]:
        """The same of small plain values, one for each row."""
        if len(self.counts) == 1:
            return list(own)
        parts = zip(processes.gathered(list(own)), self.counts, strict=True)
        return [value for part, count in parts for value in part[:count]]
