"""Offload: accelerate keeps weights in host memory or on disk, and brings a module's in while it runs (`device_map`).

A step would keep every weight that its backward pass needs; so each layer is run again there, and its weights come in twice.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from accelerate.utils import align_module_device
from torch import Tensor
from transformers.cache_utils import Cache

from ephemera.batch import TokenBatch
from ephemera.llm.cached_layers import CachedLayers
from ephemera.llm.frozen_lm import Forward, FrozenLM
from ephemera.llm.recompute import recomputed
from ephemera.lora import LoraBatch


class OffloadLM(FrozenLM):
    """A model whose weights come in while they are needed. Hooks do it, so modules are called and weights never read."""

    parallel = "offload"

    @property
    def device(self) -> torch.device:
        """Where the model computes; a weight that is not in memory has no device."""
        hook = getattr(self.embedding, "_hf_hook", None)
        found = [getattr(one, "execution_device", None) for one in getattr(hook, "hooks", [hook])]
        device = next((device for device in found if device is not None), None)
        return self.vocabulary_VD.device if device is None else torch.device(device)

    @property
    def plain_head(self) -> bool:
        return False

    def named_weights(self) -> dict[str, Tensor]:
        """A tied head that is not in memory shares nothing with the embedding, but it is the same weight."""
        tied = self.model.all_tied_weights_keys or {}
        return {key: weight for key, weight in super().named_weights().items() if key not in tied}

    def weight(self, name: str, rows: int | None = None) -> Tensor:
        path, _, own = name.rpartition(".")
        module = self.model.get_submodule(path)
        with align_module_device(module, torch.device("cpu")):
            return module.get_parameter(own).detach()[:rows].clone()

    def forward(
        self,
        batch: TokenBatch,
        lora: LoraBatch | None = None,
        *,
        cache: Cache | None = None,
        lower: CachedLayers | None = None,
        keep: bool = False,
        twice_differentiable: bool = False,
        **asked: Any,
    ) -> Forward:
        """As `FrozenLM.forward`. A pass that a gradient is taken of keeps each layer's input only, and leaves no cache."""
        known = self.final_norm is not None and not twice_differentiable
        again = known and cache is None and torch.is_grad_enabled()
        prefix = f"{self.model.base_model_prefix}.layers"
        with recomputed(self.decoder, prefix, lora, self.adapted) if again else nullcontext():
            out = super().forward(
                batch,
                None if again else lora,
                cache=cache,
                lower=lower,
                keep=keep and not again,  # a layer that runs twice would write twice
                twice_differentiable=twice_differentiable,
                **asked,
            )
        return Forward(out.hidden_BTD.to(self.device), out.embedded_BTD, out.cache)
