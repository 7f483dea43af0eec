"""ScaleNet: rates predicted from the prompt (LDTTA 3.2)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ephemera import artifact
from ephemera.gate import Gate
from ephemera.llm.frozen_lm import FrozenLM
from ephemera.made_for import MadeFor, Reach
from ephemera.prompt_loss import PROMPT, PromptLoss
from ephemera.rates.on_hub import RateOnHub
from ephemera.rates.protocol import MAX_STEPS, NAME, Trains


class ScaleNet(RateOnHub, nn.Module):
    """Rates from the prompt's representation: eta_k * s(h(x), k, K) (LDTTA Eq. 13-16).

    A two-layer MLP over [normalised h(x), k/Kmax, K/Kmax]. Its output a is clamped from above and made
    positive by `s = exp(a) if a <= 0 else 1 + a + a^2/2` (Eq. 16). The last layer starts at zero, so that
    s = 1. Layer-wise: one output per adapted projection; step-wise: one for all.

    The base rate eta may differ by step. The paper has one (1e-2); the best first step is hundreds of
    times bolder than what any later step bears, so s = 1 should mean a schedule that already works.
    """

    def __init__(
        self,
        *,
        hidden_size: int,
        projections: int,
        granularity: Literal["layer", "step"] = "layer",
        base_rates: Sequence[float] = (1e-2,) * MAX_STEPS,
        mlp_size: int = 128,
        max_log_scale: float = 4.0,
        trained_for: dict[str, Any] | None = None,
        objective: PromptLoss = PROMPT,
        made_for: MadeFor | None = None,
        trains: Trains = "both",
    ):
        super().__init__()
        self.config = {
            "hidden_size": hidden_size,
            "projections": projections,
            "granularity": granularity,
            "base_rates": list(base_rates),
            "mlp_size": mlp_size,
            "max_log_scale": max_log_scale,
            "trained_for": trained_for,
            "trains": trains,
        }
        self.objective = objective
        self.made_for = made_for
        self.gate: Gate | None = None
        self.trains: Trains = trains
        self.base_rates = tuple(base_rates)
        self.max_log_scale = max_log_scale
        self.trained_for = trained_for
        self.projections = projections
        self.hidden = nn.Linear(2 * hidden_size + 2, mlp_size)
        self.out = nn.Linear(mlp_size, projections if granularity == "layer" else 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)
        self.mean_H: Tensor
        self.std_H: Tensor
        self.register_buffer("mean_H", torch.zeros(2 * hidden_size))
        self.register_buffer("std_H", torch.ones(2 * hidden_size))

    @classmethod
    def from_file(cls, config: dict[str, Any], state: dict[str, Tensor]) -> ScaleNet:
        network = cls(**config)
        network.load_state_dict(state)
        return network.eval().requires_grad_(False)

    @property
    def label(self) -> Literal["layerwise", "stepwise"]:
        return "layerwise" if self.config["granularity"] == "layer" else "stepwise"

    @property
    def reach(self) -> Reach:
        return "all" if self.made_for is None else self.made_for.reach

    @property
    def max_steps(self) -> int:
        return len(self.base_rates)

    @property
    def uses_representation(self) -> Literal["step"]:
        return "step"

    @torch.no_grad()
    def start_from(self, rates_KM: Tensor) -> None:
        """Begin with these constant rates [K,M], one per step and projection, whatever the prompt.

        Each step's base rate becomes its projections' geometric mean; the last layer's bias says how the projections
        differ from it, on average over the steps, as far as the clamp lets it.
        """
        if rates_KM.shape != (self.max_steps, self.projections) or self.config["granularity"] != "layer":
            raise ValueError(
                f"constants for {tuple(rates_KM.shape)} steps and projections cannot start a ScaleNet for "
                f"{(self.max_steps, self.projections)}; train both with the same max_steps and target_modules, by layer."
            )
        log_KM = rates_KM.clamp(min=1e-8).log()
        self.base_rates = tuple(log_KM.mean(1).exp().tolist())
        self.config["base_rates"] = list(self.base_rates)
        log_s_M = (log_KM - log_KM.mean(1, keepdim=True)).mean(0)
        above_M = (2 * log_s_M.clamp(0, 30).exp() - 1).sqrt() - 1  # s = 1 + a + a^2/2, solved for a
        self.out.bias.copy_(torch.where(log_s_M <= 0, log_s_M, above_M).clamp(max=self.max_log_scale))

    def fit_normalization(self, h_NH: Tensor) -> None:
        """Take mean and deviation of each feature from training prompts [N,2D]."""
        self.mean_H.copy_(h_NH.mean(0))
        self.std_H.copy_(h_NH.std(0, correction=int(len(h_NH) > 1)).clamp(min=1e-6))

    def _normalized(self, h_BH: Tensor) -> Tensor:
        # Clamped: a feature far outside the training prompts should not decide alone.
        return ((h_BH - self.mean_H) / self.std_H).clamp(-5, 5)

    def scales(self, h_BH: Tensor, k: int, K: int) -> Tensor:
        """Multipliers s [B,M] of step k of K (Eq. 13 and 16)."""
        # A diverged row has no h(x): its gradient is zero, but zero times NaN would spoil the whole batch's.
        h_BH = h_BH.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
        # Filled where they are: numbers from the host would have it wait for the device
        schedule_B2 = torch.stack([h_BH.new_full(h_BH.shape[:1], n / self.max_steps) for n in (k, K)], 1)
        x_BI = torch.cat([self._normalized(h_BH), schedule_B2], dim=1)
        a = self.out(F.gelu(self.hidden(x_BI))).clamp(max=self.max_log_scale)
        s = torch.where(a <= 0, a.clamp(max=0).exp(), 1 + a + a.square() / 2)
        return s.expand(-1, self.projections)

    def rates_BM(self, h_BH: Tensor | None, k: int, K: int, *, like: Tensor, projections: int) -> Tensor:
        assert h_BH is not None
        return self.base_rates[k - 1] * self.scales(h_BH.to(self.out.weight.dtype), k, K)

    def check(self, backbone: FrozenLM) -> None:
        if self.trained_for is not None:
            artifact.check_model(self.trained_for, backbone, "ScaleNet")
        self.objective.check(backbone)
        if (self.config["hidden_size"], self.projections) != (backbone.hidden_size, len(backbone.projections)):
            raise ValueError(
                f"this ScaleNet is for hidden size {self.config['hidden_size']} and {self.projections} projections; "
                f"{backbone.name} has {backbone.hidden_size} and {len(backbone.projections)}."
            )

    def save_pretrained(self, folder: str | Path) -> None:
        made_for = None if self.made_for is None else self.made_for.describe()
        config = {"kind": "scalenet", **self.config, "objective": self.objective.describe(), "made_for": made_for}
        artifact.save(Path(folder), NAME, config, self.state_dict())
        self.objective.save_lens(folder)
        if self.gate is not None:
            self.gate.save(folder)
