"""Constant rates, one per projection and step: ScaleNet without its input."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ephemera import artifact
from ephemera.gate import Gate
from ephemera.llm.frozen_lm import FrozenLM
from ephemera.made_for import MadeFor, Reach
from ephemera.prompt_loss import PROMPT, PromptLoss
from ephemera.rates.on_hub import RateOnHub
from ephemera.rates.protocol import NAME, Trains


class PerProjectionRate(RateOnHub, nn.Module):
    """The same rates for every prompt: `exp(log_rates_KM[k-1])` at step k, whatever K (ours).

    The control that ScaleNet must beat, and where it may start. Trained as ScaleNet is, by Eq. 17-19.
    """

    def __init__(
        self,
        *,
        projections: int,
        base_rates: Sequence[float],
        trained_for: dict[str, Any] | None = None,
        objective: PromptLoss = PROMPT,
        made_for: MadeFor | None = None,
        trains: Trains = "both",
    ):
        super().__init__()
        self.projections, self.trained_for = projections, trained_for
        self.objective, self.made_for = objective, made_for
        self.gate: Gate | None = None
        self.trains: Trains = trains
        logs_K = torch.tensor([math.log(max(rate, 1e-8)) for rate in base_rates])
        self.log_rates_KM = nn.Parameter(logs_K[:, None].repeat(1, projections))

    @classmethod
    def from_file(cls, config: dict[str, Any], state: dict[str, Tensor]) -> PerProjectionRate:
        network = cls(**config)
        network.load_state_dict(state)
        return network.eval().requires_grad_(False)

    @property
    def label(self) -> Literal["constant"]:
        return "constant"

    @property
    def max_steps(self) -> int:
        return self.log_rates_KM.shape[0]

    @property
    def base_rates(self) -> tuple[float, ...]:
        """Each step's geometric mean over projections."""
        return tuple(self.log_rates_KM.detach().mean(1).exp().tolist())

    @property
    def uses_representation(self) -> Literal["no", "step"]:
        return "no" if self.gate is None else "step"  # which the gate looks at

    @property
    def reach(self) -> Reach:
        return "all" if self.made_for is None else self.made_for.reach

    def rates_BM(self, h_BH: Tensor | None, k: int, K: int, *, like: Tensor, projections: int) -> Tensor:
        return self.log_rates_KM[k - 1].exp().expand(like.shape[0], -1)

    def check(self, backbone: FrozenLM) -> None:
        """ValueError if it was made for another model."""
        if self.trained_for is not None:
            artifact.check_model(self.trained_for, backbone, "per-projection rate")
        self.objective.check(backbone)
        if self.projections != len(backbone.projections):
            raise ValueError(
                f"these rates are for {self.projections} projections; {backbone.name} has {len(backbone.projections)}."
            )

    def save_pretrained(self, folder: str | Path) -> None:
        """Write rate.json and rate.safetensors."""
        config = {
            "kind": "per-projection",
            "projections": self.projections,
            "base_rates": list(self.base_rates),
            "trained_for": self.trained_for,
            "objective": self.objective.describe(),
            "trains": self.trains,
            "made_for": None if self.made_for is None else self.made_for.describe(),
        }
        artifact.save(Path(folder), NAME, config, self.state_dict())
        self.objective.save_lens(folder)
        if self.gate is not None:
            self.gate.save(folder)
