"""What the loop asks of a rate."""

from __future__ import annotations

from typing import Any, Literal, Protocol

from torch import Tensor

from ephemera.gate import Gate
from ephemera.llm.frozen_lm import FrozenLM
from ephemera.made_for import MadeFor, Reach
from ephemera.prompt_loss import PromptLoss

MAX_STEPS = 5  # LDTTA 4.1
NAME = "rate"  # of its files
RETIRED = {
    "normalize": "none",
    "normalization": "standardize",
    "representation": "step",
}  # in files of earlier versions
Trains = Literal["both", "B"]


class Rate(Protocol):
    """A rule for steps: how far, along which gradient.

    `uses_representation` says whether it wants h(x), anew at each step. `objective` is what the gradient is of.
    """

    @property
    def max_steps(self) -> int | None: ...

    @property
    def uses_representation(self) -> Literal["no", "step"]: ...

    @property
    def objective(self) -> PromptLoss: ...

    @property
    def trains(self) -> Trains:
        """Whether a step moves A and B, as in the papers, or B only (ours)."""
        ...

    @property
    def reach(self) -> Reach:
        """Where the adapters act once the steps are done (made_for.py)."""
        ...

    @property
    def label(self) -> str:
        """What a server calls it: `MODEL:label`."""
        ...

    @property
    def trained_for(self) -> dict[str, Any] | None:
        """The model and projections that it was trained for; None if it fits any."""
        ...

    @property
    def made_for(self) -> MadeFor | None:
        """What it was trained for; None if it was not trained."""
        ...

    @property
    def gate(self) -> Gate | None:
        """When a prompt is left alone (gate.py); None: never."""
        ...

    def rates_BM(self, h_BH: Tensor | None, k: int, K: int, *, like: Tensor, projections: int) -> Tensor:
        """Learning rates [B,M] of step k of K (from 1); `like` is any tensor [B,...] on the right device."""
        ...

    def check(self, backbone: FrozenLM) -> None:
        """ValueError if it was made for another model."""
        ...
