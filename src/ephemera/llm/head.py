"""The vocabulary head, and the NLL of tokens behind it by plain cross-entropy."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ephemera.llm.precision import wide_of
from ephemera.llm.quantization import is_plain


@dataclass(frozen=True, eq=False)
class Head:
    """Final hidden states [...,D] -> vocabulary logits [...,V]."""

    module: nn.Module
    softcap: float | None = None

    def __call__(self, h: Tensor) -> Tensor:
        logits = self.module(h).to(h.device)  # a head may lie elsewhere (device_map)
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap

    @property
    def plain(self) -> bool:
        """Whether it is a linear map and no more, whose words can be taken some at a time."""
        return is_plain(self.module)


def token_nll(h_ND: Tensor, head: Head, targets_N: Tensor) -> Tensor:
    """NLL [N] in nats of each target given its hidden state, in float32 (float64 for a float64 model)."""
    logits_NV = head(h_ND)
    return F.cross_entropy(logits_NV.to(wide_of(logits_NV.dtype)), targets_N, reduction="none")
