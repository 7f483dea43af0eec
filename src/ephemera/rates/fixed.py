"""One rate for everything: naive test-time adaptation; or one that decays from step to step by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from ephemera.llm.frozen_lm import FrozenLM
from ephemera.made_for import Reach
from ephemera.prompt_loss import PROMPT, PromptLoss
from ephemera.rates.protocol import Trains

# Hand-made schedules: the share of the first step's rate that step k of K takes
DECAYS: dict[str, Callable[[int, int], float]] = {
    "first": lambda k, K: float(k == 1),  # later steps stand still
    "linear": lambda k, K: 1 - (k - 1) / K,
    "cosine": lambda k, K: (1 + math.cos(math.pi * (k - 1) / K)) / 2,
    "exponential": lambda k, K: 0.5 ** (k - 1),
}
# Where the best uniform rate is looked for: from the paper's 1e-2 to well past what diverges
UNIFORM_GRID = (0.01, 0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.5, 3.0, 6.0, 9.0, 13.0, 18.0, 27.0, 40.0, 60.0)


@dataclass(frozen=True)
class FixedRate:
    """One rate for every prompt, step and projection (naive TTA; the paper's baseline is 5e-2)."""

    rate: float
    objective: PromptLoss = PROMPT
    reach: Reach = "all"
    made_for: None = None
    trained_for: None = None
    gate: None = None
    trains: Trains = "both"

    def __post_init__(self):
        if not 0 <= self.rate < float("inf"):
            raise ValueError(f"a rate is a number >= 0; got {self.rate}.")

    @property
    def label(self) -> Literal["fixed"]:
        return "fixed"

    @property
    def max_steps(self) -> None:
        return None

    @property
    def uses_representation(self) -> Literal["no", "step"]:
        return "no"

    def rates_BM(self, h_BH: Tensor | None, k: int, K: int, *, like: Tensor, projections: int) -> Tensor:
        return like.new_full((like.shape[0], projections), self.rate)

    def check(self, backbone: FrozenLM) -> None:
        """Fits every model; its objective may not."""
        self.objective.check(backbone)


@dataclass(frozen=True)
class DecayedRate(FixedRate):
    """`rate` at the first step of every prompt and projection, and what DECAYS[`decay`] leaves of it later."""

    decay: str = "first"

    def rates_BM(self, h_BH: Tensor | None, k: int, K: int, *, like: Tensor, projections: int) -> Tensor:
        return like.new_full((like.shape[0], projections), self.rate * DECAYS[self.decay](k, K))
