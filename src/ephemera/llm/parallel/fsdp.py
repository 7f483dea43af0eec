"""FSDP2: each layer's weights are spread over the processes and meet where the layer runs; each process takes its own rows.

Embedding, last norm and head stay whole on every process. The processes must run equally many passes, with as many layers
each: they share every batch (`Share`), and choose together where a choice depends on their rows (`anywhere`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import PreTrainedModel

from ephemera.llm import processes
from ephemera.llm.architectures import architecture_of
from ephemera.llm.frozen_lm import FrozenLM
from ephemera.llm.share import Share


def shard(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """Spread the weights of each layer over the processes; the rest goes to this process's device as it is.

    ValueError for an architecture whose layers are not known.
    """
    if architecture_of(model.config) is None:
        raise ValueError(
            f"parallel='fsdp': ephemera does not know the layers of a {model.config.model_type}. Use parallel='offload'."
        )
    model.requires_grad_(False)
    mesh = init_device_mesh(device.type, (processes.size(),))
    decoder = model.get_submodule(model.base_model_prefix)
    layers = decoder.get_submodule("layers")
    for layer in layers.children():
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    of_layers = set(layers.parameters())
    fully_shard(decoder, mesh=mesh, ignored_params={p for p in decoder.parameters() if p not in of_layers})
    return model.to(device)  # pyright: ignore[reportArgumentType]


class FsdpLM(FrozenLM):
    """A model whose layers' weights are spread over the processes. Each takes its own rows of a batch."""

    parallel = "fsdp"

    def share(self, rows: Sequence[int]) -> Share:
        return Share.of(rows)

    def anywhere(self, flag: bool) -> bool:
        return processes.anywhere(flag, self.device)

    def check_same(self, what: str, value: object) -> None:
        processes.check_same(what, value, self.device)

    def generation(self, *, sampled: bool) -> dict[str, Any]:
        return {"synced_gpus": True}  # who has finished goes on with the others, and is not heard
