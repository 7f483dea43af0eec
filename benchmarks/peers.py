"""Other ways to adapt a batch of prompts, each with its own adapter: torch.func.vmap, and a three-operand einsum.

Both see right-padded prompts without a mask: with causal attention, padding behind a prompt reaches none of its tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from ephemera.batch import pad
from ephemera.bench.contenders import RATE, PeftLoop
from ephemera.llm.frozen_lm import FrozenLM
from ephemera.lora import LoraBatch

PEERS = ("peft", "vmap", "einsum")


def _padded(backbone: FrozenLM, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Token ids [B,T], and the labels of the tokens before them: -100 where there is none."""
    batch = pad(prompts, side="right", pad_id=backbone.pad_id).to(backbone.device)
    return batch.ids_BT, batch.ids_BT.masked_fill(~batch.mask_BT, -100)[:, 1:]


class VmapLoop:
    """PEFT's own layers, called as a function of one prompt's adapter; gradient and batch by torch.func."""

    def __init__(self, backbone: FrozenLM, loop: PeftLoop):
        self.backbone = backbone
        self.model = loop.model
        self.names = [
            f"base_model.model.{p.module}.lora_{matrix}.default.weight" for matrix in "AB" for p in backbone.projections
        ]

    def adapt_all(self, prompts: Sequence[Sequence[int]], initial: LoraBatch, steps: int) -> LoraBatch:
        ids_BT, labels_BS = _padded(self.backbone, prompts)

        def loss(adapter: dict[str, Tensor], ids_T: Tensor, labels_S: Tensor) -> Tensor:
            output = functional_call(self.model, adapter, (), {"input_ids": ids_T[None], "use_cache": False})
            return F.cross_entropy(output.logits[0, :-1].float(), labels_S)

        gradients = vmap(grad(loss))
        adapters = dict(zip(self.names, initial.tensors, strict=True))
        for _ in range(steps):
            found = gradients(adapters, ids_BT, labels_BS)
            adapters = {name: t - RATE * found[name] for name, t in adapters.items()}
        return initial.with_tensors([adapters[name] for name in self.names])


class _EinsumLora(nn.Module):
    """The operands in the order of the seed's public code, which makes B A of every prompt before it meets x."""

    def __init__(self, base: nn.Module, A_BRI: Tensor, B_BOR: Tensor, scaling: float):
        super().__init__()
        self.base, self.A_BRI, self.B_BOR, self.scaling = base, A_BRI, B_BOR, scaling

    def forward(self, x_BTI: Tensor) -> Tensor:
        A_BRI, B_BOR = self.A_BRI.to(x_BTI.dtype), self.B_BOR.to(x_BTI.dtype)
        return self.base(x_BTI) + self.scaling * torch.einsum("bri,bor,bti->bto", A_BRI, B_BOR, x_BTI)


class EinsumLoop:
    """A batched loop as one writes it first: einsum layers, all logits at once, autograd, plain updates."""

    def __init__(self, backbone: FrozenLM):
        self.backbone = backbone

    def adapt_all(self, prompts: Sequence[Sequence[int]], initial: LoraBatch, steps: int) -> LoraBatch:
        ids_BT, labels_BS = _padded(self.backbone, prompts)
        lora = initial
        for _ in range(steps):
            lora = lora.leaves()
            with self._attached(lora):
                logits_BTV = self.backbone.model(input_ids=ids_BT, use_cache=False).logits
            # Not with the vocabulary in the middle: there the softmax sums less exactly, and adapters differ by 4e-3
            losses_N = F.cross_entropy(logits_BTV[:, :-1].float().flatten(0, 1), labels_BS.flatten(), reduction="none")
            losses_BS = losses_N.view_as(labels_BS)
            (losses_BS.sum(1) / (labels_BS != -100).sum(1)).sum().backward()
            lora = lora.with_buffers(*(t.detach() - RATE * t.grad for t in lora.buffers if t.grad is not None))
        return lora

    @contextmanager
    def _attached(self, lora: LoraBatch) -> Iterator[None]:
        model = self.backbone.model
        replaced: list[tuple[nn.Module, str, nn.Module]] = []
        try:
            for p, A_BRI, B_BOR in zip(lora.projections, lora.A, lora.B, strict=True):
                parent_path, _, child = p.module.rpartition(".")
                parent = model.get_submodule(parent_path)
                base = parent.get_submodule(child)
                setattr(parent, child, _EinsumLora(base, A_BRI, B_BOR, lora.scaling))
                replaced.append((parent, child, base))
            yield
        finally:
            for parent, child, base in replaced:
                setattr(parent, child, base)
