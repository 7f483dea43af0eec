"""Per-prompt records of a run: appended batch by batch, so that a stopped run resumes and loses nothing."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar

from pydantic import BaseModel, BeforeValidator

from ephemera.llm import processes
from ephemera.saving import json_text, reason

RECORDS, RUN, CROSS_GRADIENTS = "records.jsonl", "run.json", "cross_gradient.jsonl"
# JSON has no NaN and no infinity: a number that is not finite is written as null, and read as NaN
Number = Annotated[float, BeforeValidator(lambda value: math.nan if value is None else value)]


class Record(BaseModel):
    """One prompt under one method with K steps."""

    method: str
    K: int
    id: str
    nll: Number  # mean over the answer's tokens, nats
    tokens: int  # of the answer
    prompt_nll: list[Number]  # seen by each step, before its update
    seconds: float  # this prompt's share of its batch: adaptation and prefill
    fallback: bool = False  # something was not finite: answered by the unadapted model
    rates: list[list[Number]] | None = None  # [K][M], ScaleNet's only
    prompt: str | None = None  # its end, where a text was generated
    answer: str | None = None  # the reference, where a text was generated
    text: str | None = None
    rouge_lsum: float | None = None

    @property
    def key(self) -> tuple[str, int, str]:
        return self.method, self.K, self.id


class AnswerRecord(BaseModel):
    """One prompt of a task under one variant of a model: what it prefers among choices, and what it says."""

    model: str
    variant: str
    task: str
    repeat: int
    id: str
    nll: Number  # of the gold answer, mean over its tokens, nats
    choice_logprobs: list[Number] | None = None  # of each choice, summed over its tokens
    choice_bytes: list[int] | None = None  # length of each choice
    gold: int | None = None  # which choice is right
    texts: list[str] | None = None  # generated answers
    correct: list[bool] | None = None  # of each generated answer
    picked: list[str | None] | None = None  # the choice or number that each comes down to
    seconds: float  # this prompt's share of its batch: adapter, prefill and scoring, without generation
    fallback: bool = False

    @property
    def key(self) -> tuple[str, str, str, int, str]:
        return self.model, self.variant, self.task, self.repeat, self.id


class ControlRecord(BaseModel):
    """One prompt of an analysis: its answer under each kind of adapter; norms and places once all prompts are known."""

    task: str
    id: str
    tokens: int  # of the answer
    nll: dict[str, Number]  # of each control, mean over the answer's tokens, nats
    norms: list[Number] | None = None  # of each projection's update
    places: dict[str, list[Number]] | None = None  # of its update in two dimensions, by method

    @property
    def key(self) -> tuple[str, str]:
        return self.task, self.id


class SurveyRecord(BaseModel):
    """One prompt of a task under one method of a survey."""

    task: str
    method: str
    id: str
    nll: Number  # mean over the answer's tokens, nats
    tokens: int  # of the answer
    share: float = 1.0  # of the adapter that the gate kept; 0: abstained
    kl: float | None = None  # of the first token from the base model's
    prompt: str | None = None  # its end, where a text was generated
    answer: str | None = None
    text: str | None = None
    quality: float | None = None  # 1 or 0 where the task judges answers, else ROUGE-Lsum
    judged: bool = False  # whether quality is right or wrong

    @property
    def key(self) -> tuple[str, str, str]:
        return self.task, self.method, self.id


class CrossGradient(BaseModel):
    """One prompt's cross-gradient with its answer, and the length of both gradients, of each projection."""

    id: str
    cross: list[Number]
    prompt_norm: list[Number]
    answer_norm: list[Number]

    @property
    def key(self) -> str:
        return self.id


R = TypeVar("R", Record, AnswerRecord, ControlRecord, SurveyRecord, CrossGradient)


class RecordFile(Generic[R]):
    """A run folder's file of records. Lines of an interrupted write are dropped on reading.

    Of several processes the first reads and writes it. The others know what it holds, and keep what they find in files of
    their own until `gather`; not with `alike`, where all of them find the same.
    """

    def __init__(self, folder: Path, kind: type[R], *, name: str = RECORDS, alike: bool = False):
        self.path, self.kind, self.alike = folder / name, kind, alike
        self.records: list[R] = processes.by_first(self._begun)
        self.done: set[Any] = {r.key for r in self.records}
        self.begun = len(self.records)

    def _begun(self) -> list[R]:
        """What there is, with what processes of a run that was stopped had found."""
        parts = sorted(self.path.parent.glob(f"{self.path.name}.*.part"))
        files = [path for path in (self.path, *parts) if path.exists()]
        every = [record for path in files for record in read_records(path, self.kind)]
        self.records = list({record.key: record for record in every}.values()) if parts else every
        if files:
            self._rewrite()
        for part in parts:
            part.unlink()
        return self.records

    @property
    def own(self) -> Path:
        """The file that this process writes."""
        return self.path if processes.rank() == 0 else self.path.with_name(f"{self.path.name}.{processes.rank()}.part")

    def gather(self) -> None:
        """What every process found goes to the first one's file. All of them call it."""
        if self.alike or processes.size() == 1:
            return
        for found in processes.gathered(self.records[self.begun :]):
            self.add([record for record in found if record.key not in self.done], write=processes.rank() == 0)
        if processes.rank():
            self.own.unlink(missing_ok=True)

    def has(self, keys: Iterable[Any]) -> bool:
        return all(key in self.done for key in keys)

    def add(self, records: Sequence[R], *, write: bool = True) -> None:
        """Append what is new, in one write. Rows of the data that repeat a prompt and answer count once."""
        unwritten: dict[Any, R] = {}
        for record in records:
            if record.key not in self.done:
                unwritten.setdefault(record.key, record)
        new = list(unwritten.values())
        try:
            if write and not (self.alike and processes.rank()):
                with self.own.open("a", encoding="utf-8") as file:
                    file.write("".join(_line(r) for r in new))
        except OSError as error:
            raise ValueError(
                f"cannot write {self.path}: {error.strerror}. The {len(self.records)} finished records are kept; free "
                "some space and run the same command again."
            ) from error
        self.records += new
        self.done |= {r.key for r in new}

    def replace(self, records: Sequence[R]) -> None:
        """The whole file anew, e.g. with what is known only at the end."""
        self.records, self.done = list(records), {r.key for r in records}
        self._rewrite()

    def _rewrite(self) -> None:
        write_bytes(self.path, "".join(_line(r) for r in self.records).encode())


def _line(record: BaseModel) -> str:
    return record.model_dump_json(exclude_none=True) + "\n"


def read_records(path: Path, kind: type[R]) -> list[R]:
    """Every whole line; ValueError names a line that is no record."""
    records = []
    # A write can be cut off inside a character; and splitlines() would also split at U+2028 inside a text.
    lines = path.read_text(encoding="utf-8", errors="replace").removesuffix("\n").split("\n")
    for number, line in enumerate(lines, 1):
        try:
            records.append(kind.model_validate_json(line))
        except ValueError as error:
            if number < len(lines):  # only the last line can be a write that was cut off
                raise ValueError(f"{path}:{number} is not a record of an evaluation: {error}") from error
    return records


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    """The file appears whole or not at all. Numbers that are not finite become null."""
    write_bytes(path, (json_text(value, indent=1) + "\n").encode())


def write_bytes(path: Path, data: bytes) -> None:
    """The file appears whole or not at all."""
    scratch = path.with_suffix(".partial")
    try:
        scratch.write_bytes(data)
        scratch.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            scratch.unlink()
        raise ValueError(f"cannot write {path}: {reason(error)}.") from error
