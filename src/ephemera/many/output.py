"""A run's output: whole windows in the file, and the next window's finished batches in a journal beside it.

A window goes to the output in one piece, and then its journal is removed. So a stopped run knows by the output's length
which window it was in, whatever was cut off.
"""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from typing import IO, Any, Self

from ephemera.evaluation.shared.records import read_json, write_json
from ephemera.many.rows import Source
from ephemera.many.worker import Made


class Output:
    """The output file, opened for one run. ValueError if it belongs to another."""

    def __init__(self, path: Path, source: Source, settings: dict[str, Any]):
        """`settings`: those that change an answer, by name."""
        self.path, self.source = path, source
        self.about = path.with_name(f"{path.name}.run.json")
        self.journal = path.with_name(f"{path.name}.part")
        self.window = self.errors = 0
        self.known: Made = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        identity = {"settings": settings, "input": {"sha256": source.sha256, "rows": source.rows}}
        begun = path.exists() and (path.stat().st_size > 0 or self.journal.exists())
        if begun:
            self._check(identity)
        self._file = path.open("ab")
        try:
            self._lock()
            if begun:
                self._recover()
            else:
                self.journal.unlink(missing_ok=True)
                write_json(self.about, identity)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    @property
    def rows(self) -> int:
        """Rows that are finished, those in the journal included."""
        return min(self.window * self.source.size, self.source.rows) + len(self.known)

    @property
    def finished(self) -> bool:
        return self.window == self.source.windows

    def keep(self, lines: Made) -> None:
        """A batch's lines, until the window is whole."""
        head = "" if self.known else json.dumps({"window": self.window}) + "\n"
        with self.journal.open("ab") as file:
            self._append(file, head + "".join(_entry(number, line) for number, line in lines.items()))
        self.known |= lines

    def finish(self, made: Made | None = None) -> None:
        """The window's lines, by default those that were kept, go to the output in the input's order."""
        self.known = self.known if made is None else made
        lines = [self.known[number] for number in sorted(self.known)]
        assert len(lines) == self.source.window(self.window).rows
        self._append(self._file, "".join(lines))
        self.journal.unlink(missing_ok=True)
        self.errors += sum(_is_error(line) for line in lines)
        self.window, self.known = self.window + 1, {}

    def _append(self, file: IO[bytes], text: str) -> None:
        try:
            file.write(text.encode(errors="backslashreplace"))
            file.flush()
            os.fsync(file.fileno())
        except OSError as error:
            raise ValueError(
                f"cannot write {file.name}: {error.strerror}. {self.rows:,} finished rows are kept; free some space and "
                "run the same command again."
            ) from error

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another run is writing {self.path}; wait for it, or give another --output.") from None

    def _check(self, identity: dict[str, Any]) -> None:
        another = "give another --output, or remove it to begin anew."
        if not self.about.exists():
            raise ValueError(f"{self.path} is there, and no `ephemera run` began it ({self.about.name}); {another}")
        begun = read_json(self.about)
        if begun["input"] != identity["input"]:
            then, now = begun["input"]["rows"], identity["input"]["rows"]
            raise ValueError(
                f"{self.source.path} is not the input that {self.path} was begun with ({then:,} rows then, {now:,} now); "
                + another
            )
        before, now = begun["settings"], identity["settings"]
        changed = [key for key in {**before, **now} if before.get(key) != now.get(key)]
        if changed:
            words = ", ".join(f"{key}={before.get(key)} (now {now.get(key)})" for key in changed)
            raise ValueError(f"{self.path} was begun with {words}; give that again, or {another}")

    def _recover(self) -> None:
        """Drop what was cut off: a line, a window that was not whole, the journal of a window that is."""
        end = lines = errors = offset = 0
        with self.path.open("rb") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    break
                lines, offset = lines + 1, offset + len(line)
                errors += _is_error(line)
                if lines % self.source.size == 0 or lines == self.source.rows:
                    end, self.errors = offset, errors
        if lines > self.source.rows:
            raise ValueError(
                f"{self.path} has more lines than the {self.source.rows:,} rows of {self.source.path}; "
                "give another --output, or remove it to begin anew."
            )
        self._file.truncate(end)
        self.window = self.source.windows if lines == self.source.rows else lines // self.source.size
        self._read_journal()

    def _read_journal(self) -> None:
        if not self.journal.exists():
            return
        whole = self.journal.read_bytes().split(b"\n")[:-1]  # what follows the last line's end was cut off
        if len(whole) > 1 and json.loads(whole[0]) == {"window": self.window}:
            os.truncate(self.journal, sum(len(line) + 1 for line in whole))
            self.known = {entry["row"]: entry["line"] for entry in map(json.loads, whole[1:])}
        else:
            self.journal.unlink()


def _entry(number: int, line: str) -> str:
    return json.dumps({"row": number, "line": line}) + "\n"


def _is_error(line: str | bytes) -> bool:
    try:
        return "error" in json.loads(line)
    except ValueError:
        raise ValueError(
            f"the output holds a line that `ephemera run` did not write: {line[:60]!r}; give another --output."
        ) from None
