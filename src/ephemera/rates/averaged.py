"""A network's rates averaged over prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from ephemera import artifact
from ephemera.gate import Gate
from ephemera.llm.frozen_lm import FrozenLM
from ephemera.made_for import MadeFor, Reach
from ephemera.prompt_loss import PROMPT, PromptLoss
from ephemera.rates.on_hub import RateOnHub
from ephemera.rates.protocol import NAME, Trains


class AveragedRate(RateOnHub, nn.Module):
    """ScaleNet's rates averaged over training prompts: no dependence on the prompt (LDTTA 4.3).

    `table_KKM[K-1, k-1]` holds the rates [M] of step k of K.
    """

    def __init__(
        self,
        table_KKM: Tensor,
        trained_for: dict[str, Any],
        objective: PromptLoss = PROMPT,
        made_for: MadeFor | None = None,
        trains: Trains = "both",
    ):
        super().__init__()
        self.table_KKM: Tensor
        self.register_buffer("table_KKM", table_KKM)
        self.trained_for, self.objective, self.made_for = trained_for, objective, made_for
        self.gate: Gate | None = None
        self.trains: Trains = trains

    @classmethod
    def from_file(cls, config: dict[str, Any], state: dict[str, Tensor]) -> AveragedRate:
        return cls(state["table_KKM"], **config)

    @property
    def label(self) -> Literal["averaged"]:
        return "averaged"

    @property
    def reach(self) -> Reach:
        return "all" if self.made_for is None else self.made_for.reach

    @property
    def max_steps(self) -> int:
        return self.table_KKM.shape[0]

    @property
    def uses_representation(self) -> Literal["no", "step"]:
        return "no" if self.gate is None else "step"  # which the gate looks at

    def rates_BM(self, h_BH: Tensor | None, k: int, K: int, *, like: Tensor, projections: int) -> Tensor:
        return self.table_KKM[K - 1, k - 1].to(like.device, like.dtype).expand(like.shape[0], projections)

    def check(self, backbone: FrozenLM) -> None:
        artifact.check_model(self.trained_for, backbone, "averaged rate")
        self.objective.check(backbone)

    def save_pretrained(self, folder: str | Path, *, lens: str = ".") -> None:
        """`lens`: where its lens lies, from `folder`; only there (".") is it written too."""
        config = {
            "kind": "averaged",
            "trained_for": self.trained_for,
            "objective": self.objective.describe(lens),
            "trains": self.trains,
            "made_for": None if self.made_for is None else self.made_for.describe(),
        }
        artifact.save(Path(folder), NAME, config, {"table_KKM": self.table_KKM})
        if lens == ".":
            self.objective.save_lens(folder)
