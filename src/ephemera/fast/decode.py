"""Decoding with adapters: a token a row and pass, so that copies and the layout of tiny products decide.

Everything here is for inference: no gradient passes through it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer

from ephemera.llm.quantization import is_plain
from ephemera.llm.replaced import Place, child
from ephemera.lora import LoraBatch, by_module

ROOM = 64  # tokens that a cache has room for where their number is not known


class DecodeLinear(nn.Module):
    """A frozen linear module and the factors of its adapters, cast, scaled and laid out once.

    `factors` holds, for each adapter, the output rows it sits on (None: all), A^T [B,I,R] and scaling * B^T [B,R,O].
    """

    def __init__(self, base: nn.Module, factors: Sequence[tuple[Tensor | None, Tensor, Tensor]]):
        super().__init__()
        self.base = base
        self.factors = tuple(factors)

    def forward(self, x_BTI: Tensor) -> Tensor:
        y_BTO = self.base(x_BTI)
        for rows, A_BIR, B_BRO in self.factors:
            xa_BTR = torch.bmm(x_BTI.to(A_BIR.dtype), A_BIR)
            if rows is not None:
                y_BTO.index_add_(2, rows, torch.bmm(xa_BTR, B_BRO).to(y_BTO.dtype))
            elif y_BTO.dtype == B_BRO.dtype:
                y_BTO.baddbmm_(xa_BTR, B_BRO)
            else:
                y_BTO.add_(torch.bmm(xa_BTR, B_BRO))
        return y_BTO


def decoding(model: nn.Module, lora: LoraBatch | None, *, merge: bool = True) -> list[Place]:
    """What stands in the model while it decodes with these adapters.

    A single row goes into the weights if that loses nothing (`mergeable`), so that it costs nothing per token; adapters
    that do nothing (B = 0) are left out; all others stay factors, prepared once.
    """
    if lora is None or not bool(lora.B_BN.any()):
        return []
    return merged(model, lora) if merge and mergeable(model, lora) else prepared(model, lora)


def mergeable(model: nn.Module, lora: LoraBatch) -> bool:
    """One row, on plain linear modules that are as wide as the adapter.

    Rounded to bfloat16, W + BA keeps W where BA is below half a unit of W's last place: a bold step lost 7 % of its
    adapter so, a small one most of it (docs/performance.md).
    """
    modules = [model.get_submodule(p.module) for p in lora.projections]
    return lora.batch_size == 1 and all(
        is_plain(m) and m.get_parameter("weight").dtype == A_BRI.dtype for m, A_BRI in zip(modules, lora.A, strict=True)
    )


def merged(model: nn.Module, lora: LoraBatch, row: int = 0) -> list[Place]:
    """W + scaling * B A in place of each adapted W. W itself comes back after: nothing is subtracted."""
    factors, r, lora_alpha = lora.peft_factors(row)
    places: list[Place] = []
    for path, (A_RI, B_OR) in factors.items():
        module = model.get_submodule(path)
        with torch.no_grad():
            W_OI = torch.addmm(module.get_parameter("weight"), B_OR, A_RI, alpha=lora_alpha / r)
        places.append((module, "weight", nn.Parameter(W_OI, requires_grad=False)))
    return places


def prepared(model: nn.Module, lora: LoraBatch) -> list[Place]:
    """Every row with its own factors, cast, scaled and laid out for one token a row."""
    places: list[Place] = []
    for path, pairs in by_module(lora.pairs).items():
        parent, name = child(model, path)
        base = parent.get_submodule(name)
        factors = []
        for projection, A_BRI, B_BOR in pairs:
            weight = base.get_parameter("weight")
            # A CPU's small bfloat16 products are several times slower than float32 ones and the casts around them;
            # an accelerator pays by the kernel instead.
            dtype = A_BRI.dtype if weight.device.type == "cpu" or not weight.is_floating_point() else weight.dtype
            rows = None if projection.rows is None else projection.rows.to(A_BRI.device)
            # B^T contiguous: three times faster than as a view of B
            B_BRO = (B_BOR.detach() * lora.scaling).to(dtype).mT.contiguous()
            factors.append((rows, A_BRI.detach().to(dtype).mT, B_BRO))
        places.append((parent, name, DecodeLinear(base, factors)))
    return places


class GrowingLayer(DynamicLayer):
    """Keys and values of one layer in buffers that have room: a new token is written, the old ones are not copied.

    `keys` and `values` are views of what is filled. At 8 prompts of 500 tokens the copies of DynamicLayer
    take half of a decoding step on a CPU (docs/performance.md).
    """

    keys_buffer: Tensor
    values_buffer: Tensor

    @staticmethod
    def of(layer: DynamicLayer, room: int) -> GrowingLayer:
        """The same content with room for `room` more tokens."""
        assert layer.keys is not None
        assert layer.values is not None
        grown = GrowingLayer()
        grown.dtype, grown.device, grown.is_initialized = layer.keys.dtype, layer.keys.device, True
        grown._move(layer.keys, layer.values, room)
        return grown

    def _move(self, keys: Tensor, values: Tensor, room: int) -> None:
        filled = keys.shape[-2]
        self.keys_buffer = keys.new_empty(*keys.shape[:-2], filled + room, keys.shape[-1])
        self.values_buffer = values.new_empty(*values.shape[:-2], filled + room, values.shape[-1])
        self.keys, self.values = self.keys_buffer[..., :filled, :], self.values_buffer[..., :filled, :]
        self.keys.copy_(keys)
        self.values.copy_(values)

    def update(self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object):
        assert self.keys is not None
        assert self.values is not None
        filled = self.keys.shape[-2]
        end = filled + key_states.shape[-2]
        # Whoever reorders or repeats rows leaves tensors of their own in keys and values
        if self.keys.data_ptr() != self.keys_buffer.data_ptr() or end > self.keys_buffer.shape[-2]:
            self._move(self.keys, self.values, room=max(end, ROOM))
        self.keys, self.values = self.keys_buffer[..., :end, :], self.values_buffer[..., :end, :]
        self.keys[..., filled:, :] = key_states
        self.values[..., filled:, :] = value_states
        return self.keys, self.values


def make_room(cache: Cache, tokens: int | None) -> None:
    """Let a filled cache take `tokens` more without copying; layers of other kinds (sliding windows) stay as they are."""
    cache.layers = [GrowingLayer.of(x, tokens or ROOM) if type(x) is DynamicLayer else x for x in cache.layers]
