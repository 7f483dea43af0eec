"""Files that people give: what their names say, and what they hold. One rule for all commands."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Literal

from ephemera.messages import check_unicode

ROWS, TEXT = (".jsonl", ".ndjson", ".json"), (".txt", ".text", ".md")
FORMS = (
    f"Rows are in {', '.join(ROWS)}; one text is in {', '.join(TEXT)} or a name without an ending. Each may end in .gz; "
    "upper and lower case are alike."
)
MARK = "\ufeff"  # of byte order, at the beginning of a file or of a part that was appended


def kind_of(path: Path) -> Literal["rows", "text"]:
    """What a file's name says that it holds; ValueError for an ending that is not known."""
    _, ending = _split(path)
    if ending in ROWS:
        return "rows"
    if ending in TEXT or not ending:
        return "text"
    raise ValueError(f"{path}: files that end in {ending} are not read. {FORMS}")


def holds_rows(path: Path) -> bool:
    return _split(path)[1] in ROWS


def named(path: Path) -> str:
    """The name without its ending: test of test.jsonl.gz"""
    return _split(path)[0]


def read_text(path: Path) -> str:
    """A file's text, without a byte order mark and without its last line's end."""
    kind_of(path)
    try:
        with _open(path, errors="surrogateescape") as file:
            text = without_end(file.read())
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise ValueError(f"{path} is not readable text: {error}.") from error
    check_unicode(text, str(path))
    return text


def without_end(text: str) -> str:
    """A text without its byte order mark and its last line's end: what `echo` and editors add is no part of a prompt."""
    return text.removeprefix(MARK).removesuffix("\n").removesuffix("\r")


def read_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """(file:line, value) of each line of a file of rows; blank lines are passed over. A .json file may be a list."""
    if kind_of(path) != "rows":
        raise ValueError(f"{path}: its name says that it holds one text, and rows are needed. {FORMS}")
    number = 0
    try:
        with _open(path) as file:
            text = file.read().removeprefix(MARK) if _split(path)[1] == ".json" else ""
            if text.lstrip().startswith("["):
                yield from _listed(path, text)
                return
            for number, line in enumerate(text.split("\n") if text else file, 1):
                if line.strip():
                    yield f"{path}:{number}", json.loads(line.removeprefix(MARK), parse_int=_whole)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}:{number}: not valid JSON ({error.msg} at column {error.colno}); expected one JSON object per line."
        ) from error
    except (gzip.BadGzipFile, zlib.error, EOFError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a readable {path.suffix} file: {error}. Save it as UTF-8.") from error
    except RecursionError as error:
        raise ValueError(f"{path}:{number}: JSON nested too deeply; expected one JSON object per line.") from error


def _listed(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    """The members of a file that is one JSON list."""
    try:
        rows = json.loads(text, parse_int=_whole)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}:{error.lineno}: not valid JSON ({error.msg} at column {error.colno}); expected a list of objects."
        ) from error
    for number, row in enumerate(rows, 1):
        yield f"{path}: row {number}", row


def _split(path: Path) -> tuple[str, str]:
    """The name, and its ending in lower case, both without .gz."""
    name = path.with_suffix("") if path.suffix.lower() == ".gz" else path
    return name.stem, name.suffix.lower()


def _open(path: Path, errors: str = "strict") -> IO[str]:
    if path.suffix.lower() == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig", errors=errors)
    return path.open(encoding="utf-8-sig", errors=errors)


def _whole(digits: str) -> int | float:
    """A whole number; one of more digits than Python reads is as good as infinite."""
    return int(digits) if len(digits) < 4000 else float(digits)
