"""What adapting to some prompts gives: their adapters, and how those came about."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ephemera.depth import Lower
from ephemera.export import export_peft
from ephemera.lora import LoraBatch
from ephemera.made_for import Reach

UNCHANGED = "one-token prompt: nothing to learn from, answered unadapted"
FELL_BACK = "non-finite loss or update: answered unadapted"


@dataclass(frozen=True, eq=False)
class Adaptation:
    """The adapters of some prompts, and how they came about. A value: keep it, reuse it, or drop it.

    `prompt_nll_BK` [B,K]: prompt NLL in nats per token seen by step k, before its update (a training
    loss, not a result). `rates_BKM` [B,K,M]: learning rate of each step and projection, in the order of
    `lora.projections`. `lora`, `initial_lora`: the adapters after and before. `notes[b]` says what a user should know of
    row b's answer, or is None. `steps_B`: steps that each row took; where that is fewer than K (`stop_below`),
    the losses of the others are NaN and their rates 0. `seconds`: wall time of the whole adaptation.

    `reach`: where the adapters act (made_for.py). With "answer", `readings` holds the base model's keys and values of the
    prompts, by batch, so that every answer to them, adapted or not, begins there. Dropping the adaptation frees them.
    """

    prompts: tuple[str, ...]
    lora: LoraBatch
    initial_lora: LoraBatch
    prompt_nll_BK: Tensor
    rates_BKM: Tensor
    notes: tuple[str | None, ...]
    seconds: float
    steps_B: Tensor
    base_model: str = field(default="")
    reach: Reach = "all"
    readings: dict[tuple[int, ...], Lower] = field(default_factory=dict, repr=False)

    @property
    def fallback_B(self) -> Tensor:
        """Rows that fell back to the unadapted model because something was not finite: bool [B]."""
        return torch.tensor([(note or "").startswith(FELL_BACK.partition(":")[0]) for note in self.notes])

    def export_peft(self, folder: str | Path, row: int = 0) -> Path:
        """Write one row's adapter in PEFT's format; PEFT opens it with the same logits."""
        return export_peft(self.lora, row, Path(folder), base_model=self.base_model)
