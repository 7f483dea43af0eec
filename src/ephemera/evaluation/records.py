"""Per-prompt records of a run: appended batch by batch, so that a stopped run resumes and loses nothing."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel

RECORDS, RUN = "records.jsonl", "run.json"


class Record(BaseModel):
    """One prompt under one method with K steps."""

    method: str
    K: int
    id: str
    nll: float  # mean over the answer's tokens, nats
    tokens: int  # of the answer
    prompt_nll: list[float]  # seen by each step, before its update
    seconds: float  # this prompt's share of its batch: adaptation and prefill
    fallback: bool = False  # something was not finite: answered by the unadapted model
    rates: list[list[float]] | None = None  # [K][M], ScaleNet's only
    text: str | None = None
    rouge_lsum: float | None = None


class RecordFile:
    """records.jsonl of a run folder. Lines of an interrupted write are dropped on reading."""

    def __init__(self, folder: Path):
        self.path = folder / RECORDS
        self.records: list[Record] = []
        if self.path.exists():
            self.records = _readable(self.path)
            self._rewrite()
        self.done = {(r.method, r.K, r.id) for r in self.records}

    def has(self, method: str, K: int, ids: Iterable[str]) -> bool:
        return all((method, K, i) in self.done for i in ids)

    def add(self, records: Sequence[Record]) -> None:
        """Append what is new, in one write."""
        new = [r for r in records if (r.method, r.K, r.id) not in self.done]
        try:
            with self.path.open("a") as file:
                file.write("".join(_line(r) for r in new))
        except OSError as error:
            raise ValueError(
                f"cannot write {self.path}: {error.strerror}. The {len(self.records)} finished records are kept; free "
                "some space and run the same command again."
            ) from error
        self.records += new
        self.done |= {(r.method, r.K, r.id) for r in new}

    def _rewrite(self) -> None:
        scratch = self.path.with_suffix(".partial")
        scratch.write_text("".join(_line(r) for r in self.records))
        scratch.replace(self.path)


def _line(record: Record) -> str:
    return record.model_dump_json(exclude_none=True) + "\n"


def _readable(path: Path) -> list[Record]:
    records = []
    lines = path.read_text().splitlines()
    for number, line in enumerate(lines, 1):
        try:
            records.append(Record.model_validate_json(line))
        except ValueError as error:
            if number < len(lines):  # only the last line can be a write that was cut off
                raise ValueError(f"{path}:{number} is not a record of an evaluation: {error}") from error
    return records


def write_json(path: Path, value: Any) -> None:
    """The file appears whole or not at all."""
    scratch = path.with_suffix(".partial")
    scratch.write_text(json.dumps(value, indent=1) + "\n")
    scratch.replace(path)
