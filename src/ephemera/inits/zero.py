"""LoRA's own start: B = 0, A drawn anew for each prompt."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ephemera.batch import TokenBatch
from ephemera.inits.protocol import Init
from ephemera.llm.frozen_lm import FrozenLM
from ephemera.lora import LoraBatch


@dataclass(frozen=True)
class ZeroInit(Init):
    """LoRA's own start (LDTTA 4.1): B = 0 and A = init_std * N(0, 1), drawn anew for each prompt.

    A depends on (seed, prompt ids) alone, not on the place in a batch, the padding or the device.
    """

    r: int = 4
    lora_alpha: float = 16.0
    init_std: float = 1e-2

    zero = True

    @classmethod
    def open(cls, spec: str | Path, **settings: Any) -> ZeroInit | None:
        return cls(**settings) if spec == "zero" else None

    def __call__(self, backbone: FrozenLM, batch: TokenBatch, seeds: Sequence[int]) -> LoraBatch:
        projections = backbone.projections
        sizes = [self.r * p.in_features for p in projections]
        dtype = torch.float64 if backbone.dtype == torch.float64 else torch.float32
        generator = torch.Generator()
        ids, mask = batch.on_host.ids_BT, batch.on_host.mask_BT
        rows = []
        for ids_T, mask_T, seed in zip(ids, mask, seeds, strict=True):
            generator.manual_seed(_seed(seed, ids_T[mask_T]))
            rows.append(torch.randn(sum(sizes), generator=generator) * self.init_std)
        A_all = torch.stack(rows).to(backbone.device, dtype)
        return LoraBatch.of(
            projections,
            A=tuple(
                a.view(len(seeds), self.r, p.in_features)
                for a, p in zip(A_all.split(sizes, 1), projections, strict=True)
            ),
            B=tuple(A_all.new_zeros(len(seeds), p.out_features, self.r) for p in projections),
            r=self.r,
            lora_alpha=self.lora_alpha,
        )


def _seed(seed: int, ids_T: torch.Tensor) -> int:
    digest = hashlib.sha256(f"{seed}:".encode() + ids_T.numpy().tobytes()).digest()
    return int.from_bytes(digest[:8], "little", signed=True)
