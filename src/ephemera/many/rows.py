"""Rows of a file, a window at a time: never the whole file in memory."""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from ephemera.files import MARK, kind_of
from ephemera.llm.tokenize import Prompt
from ephemera.messages import check_unicode

Lines = list[tuple[int, bytes]]  # numbers from 1, and bytes


@dataclass(frozen=True)
class Row:
    """A prompt; `number` is its line in the file, and its `id` if it names none."""

    number: int
    id: str | int
    prompt: Prompt
    answer: str | None = None


@dataclass(frozen=True)
class BadRow:
    """A line that holds no prompt, and why."""

    number: int
    id: str | int
    error: str


@dataclass(frozen=True)
class Window:
    """Where some lines of a file begin, and how many of them are not blank."""

    offset: int
    number: int
    rows: int


class Source:
    """A file of prompts. Opening it reads it once: its digest, its rows, and where each window begins.

    ValueError if it is missing, unreadable, empty, or of a kind that cannot be read line by line.
    """

    def __init__(self, path: Path, size: int):
        """`size`: rows of a window."""
        if not path.is_file():
            raise ValueError(f"--input {path} does not exist or is not a file; give a .jsonl or .txt file.")
        if path.name.lower().removesuffix(".gz").endswith(".json"):
            raise ValueError(f"--input {path}: a .json file is read whole; give .jsonl, one JSON object per line.")
        self.path, self.size, self.kind = path, size, kind_of(path)
        self.rows = 0
        self._offsets, self._numbers = array("Q"), array("Q")
        digest = hashlib.sha256()
        try:
            with opened(path) as file:
                for number, offset, line in _lines(file):
                    digest.update(line)
                    if line.strip():
                        if self.rows % size == 0:
                            self._offsets.append(offset)
                            self._numbers.append(number)
                        self.rows += 1
        except (gzip.BadGzipFile, zlib.error, EOFError) as error:
            raise ValueError(f"--input {path} is not a readable .gz file: {error}.") from error
        if not self.rows:
            raise ValueError(f"--input {path} holds no rows; give one prompt a line.")
        self.sha256 = digest.hexdigest()
        self._file: IO[bytes] | None = None

    @property
    def windows(self) -> int:
        return len(self._offsets)

    def window(self, n: int) -> Window:
        rows = min(self.size, self.rows - n * self.size)
        return Window(self._offsets[n], self._numbers[n], rows)

    def read(self, n: int) -> Lines:
        """The lines of a window; the file stays open, because seeking in a .gz file reads it from its beginning."""
        if self._file is None:
            self._file = opened(self.path)
        return read_window(self._file, self.window(n))

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def opened(path: Path) -> IO[bytes]:
    """A file's bytes, without gzip's compression."""
    return cast(IO[bytes], gzip.open(path, "rb")) if path.suffix.lower() == ".gz" else path.open("rb")


def read_window(file: IO[bytes], window: Window) -> Lines:
    file.seek(window.offset)
    found: Lines = []
    for number, _, line in _lines(file, window.number):
        if line.strip():
            found.append((number, line))
        if len(found) == window.rows:
            break
    return found


def _lines(file: IO[bytes], number: int = 1) -> Iterator[tuple[int, int, bytes]]:
    """(number, offset, bytes) of each line; the offset counts from where the file stands."""
    offset = 0
    for line in file:
        yield number, offset, line
        number, offset = number + 1, offset + len(line)


def parse(number: int, line: bytes, *, kind: str, scored: bool) -> Row | BadRow:
    """`kind`: rows or text. `scored`: the row needs an `answer`."""
    row_id: str | int = number
    try:
        text = line.decode().removeprefix(MARK).rstrip("\r\n")
        value = _object(text) if kind == "rows" else {"prompt": text}
        row_id = _id(value, number)
        answer = value.get("answer")
        if scored and not isinstance(answer, str):
            raise ValueError('no "answer" text to score; give the expected answer')
        if isinstance(answer, str):
            check_unicode(answer, "the answer")
        return Row(number, row_id, _prompt(value), answer if isinstance(answer, str) else None)
    except UnicodeDecodeError as error:
        return BadRow(number, row_id, f"line {number}: not UTF-8 at byte {error.start + 1}; save the file as UTF-8.")
    except ValueError as error:
        return BadRow(number, row_id, f"line {number}: {str(error).rstrip('.')}.")


def _object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON ({error.msg} at column {error.colno}); give one JSON object") from None
    except (RecursionError, ValueError):
        raise ValueError("JSON that is nested too deeply, or a number too long to read") from None
    if not isinstance(value, dict):
        raise ValueError(f'a JSON {type(value).__name__}; give an object with a "prompt" text or "messages"')
    return value


def _id(value: dict[str, Any], number: int) -> str | int:
    found = value.get("id")
    if found is None:
        return number
    if isinstance(found, bool) or not isinstance(found, str | int):
        raise ValueError(f'"id" is a {type(found).__name__}; give a text or a whole number')
    if isinstance(found, str):
        check_unicode(found, "the id")
    return found


def _prompt(value: dict[str, Any]) -> Prompt:
    prompt, messages = value.get("prompt"), value.get("messages")
    if prompt is None and messages is None:
        raise ValueError('no "prompt" text and no "messages"; give one of them')
    if prompt is not None and messages is not None:
        raise ValueError('both a "prompt" and "messages"; give one of them')
    if prompt is not None:
        if not isinstance(prompt, str):
            raise ValueError(f'"prompt" is a {type(prompt).__name__}; give a text')
        check_unicode(prompt, "the prompt")
        return prompt
    return _messages(messages)


def _messages(messages: Any) -> Prompt:
    if not isinstance(messages, list) or not messages:
        raise ValueError('"messages" is not a list of messages; give objects with "role" and "content"')
    for message in messages:
        parts = [message.get(key) for key in ("role", "content")] if isinstance(message, dict) else [None]
        if not all(isinstance(part, str) for part in parts):
            raise ValueError('a message lacks a "role" or a "content" text; give both')
        check_unicode(message["content"], "a message")
    return [{"role": message["role"], "content": message["content"]} for message in messages]
