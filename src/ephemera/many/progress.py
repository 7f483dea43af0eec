"""How far a run is: a line that a terminal shows anew after each batch, and that a log gets twice a minute."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

EVERY = 30.0  # seconds between a log's lines


class Progress:
    def __init__(self, total: int, done: int, *, clock: Callable[[], float] = time.monotonic):
        """`done`: rows that an earlier run has finished; they count as no work of this one."""
        self.total, self.begun_with, self.done = total, done, done
        self.clock = clock
        self.start = self.said = clock()
        self.terminal = sys.stderr.isatty()

    def at(self, done: int) -> None:
        """So many rows are finished."""
        self.done, now = done, self.clock()
        if self.terminal:
            print(f"\r{self.words()}\x1b[K", end="", file=sys.stderr, flush=True)
        elif now - self.said >= EVERY:
            self.said = now
            print(self.words(), file=sys.stderr, flush=True)

    def words(self) -> str:
        head = f"{self.done:,} of {self.total:,} rows"
        new, seconds = self.done - self.begun_with, self.clock() - self.start
        if new == 0 or seconds <= 0:
            return head
        left = (self.total - self.done) * seconds / new
        return f"{head}, {new / seconds:.3g} rows/s, about {duration(left)} left"

    def close(self) -> None:
        if self.terminal:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 90 else f"{minutes / 60:.1f} h"
