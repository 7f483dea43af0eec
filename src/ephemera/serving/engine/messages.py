"""What the engine is given and what it gives back."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ephemera.adaptation import LeftAlone
from ephemera.made_for import Format
from ephemera.serving.engine.logprobs import TokenLogprob
from ephemera.serving.engine.methods import Method
from ephemera.serving.engine.sampling import Sampling


@dataclass(frozen=True)
class Adapting:
    step: int
    steps: int


@dataclass(frozen=True)
class Text:
    """New text of one answer, and what is told of its tokens; `tokens` counts them."""

    choice: int
    text: str
    tokens: int
    logprobs: list[TokenLogprob] = field(default_factory=list)


@dataclass(frozen=True)
class Finished:
    choice: int
    reason: str  # stop or length


@dataclass(frozen=True)
class Report:
    """How the adaptation went: the `ephemera` object of a response, and the adapter where it was asked for."""

    facts: dict[str, Any]
    adapter: bytes | None = None


@dataclass(frozen=True)
class Failed:
    status: int
    message: str
    code: str


Event = Adapting | Text | Finished | Report | Failed


class Busy(Exception):
    """The queue is full (or closed); `seconds` is when to try again."""

    def __init__(self, message: str, seconds: int, *, closed: bool = False):
        super().__init__(message)
        self.seconds = seconds
        self.closed = closed


@dataclass(eq=False)
class Job:
    """One prompt to adapt to and answer `n` times; with n = 0 to adapt to alone."""

    ids: list[int]
    method: Method
    steps: int
    emit: Callable[[Event], None]
    format: Format = "plain"  # of the prompt
    echo: str | None = None  # the prompt's text, if answers are to begin with it
    shows_special: bool = False  # whether that text shows special tokens: those of a prompt given as token ids
    sampling: Sampling = field(default_factory=Sampling)
    n: int = 1
    seed: int = 0  # of the adapter's start
    trace: bool = False
    adapter: bool = False
    seconds: float = math.inf  # until the deadline
    arrived: float = field(default_factory=time.perf_counter)
    cancelled: bool = False

    @property
    def late(self) -> bool:
        return time.perf_counter() - self.arrived > self.seconds

    @property
    def scored(self) -> bool:
        """Whether the log-probabilities of the prompt's own tokens are asked for."""
        return self.echo is not None and self.sampling.logprobs is not None

    @property
    def rows(self) -> int:
        return max(self.n, 1)

    def tell(self, event: Event) -> None:
        """An event to whoever asked; someone who is gone is no reason to stop."""
        if not self.cancelled:
            try:
                self.emit(event)
            except RuntimeError:  # its event loop is closed
                self.cancelled = True


class Observer:
    """Told what the engine does, for metrics; this one keeps nothing."""

    def first_token(self, job: Job, seconds: float) -> None: ...

    def adapted(self, job: Job, seconds: float, left: LeftAlone | None) -> None: ...

    def ended(self, job: Job, how: str, tokens: int) -> None: ...

    def out_of_memory(self) -> None: ...
