"""The loop with a graph through every step: exact second order, for tiny models and for training a lens through its step."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ephemera.adapt import finish, gradient, unchanged
from ephemera.adaptation import Adaptation
from ephemera.batch import TokenBatch
from ephemera.llm.frozen_lm import FrozenLM
from ephemera.lora import LoraBatch
from ephemera.rates import Rate


@torch.enable_grad()
def adapt_exactly(backbone: FrozenLM, batch: TokenBatch, initial_lora: LoraBatch, rate: Rate, steps: int) -> Adaptation:
    """`adapt` where prompt gradients are functions of the adapters, not constants (LDTTA Eq. 18).

    Memory grows with every step, and attention takes no fused kernel. `lora`, `grads` and `rates_BKM` carry the graph.
    """
    if steps == 0:
        return unchanged(initial_lora)
    lora, kept, nlls, rates = initial_lora.leaves(), list[LoraBatch](), list[Tensor](), list[Tensor]()
    wants_h, stop = rate.uses_representation != "no", rate.objective.exit_layer
    for k in range(1, steps + 1):
        out = backbone.forward(batch, lora, embedded=wants_h, stop=stop, twice_differentiable=True)
        h_BH = out.representation_BH(batch) if wants_h else None
        nll_B = rate.objective.nll_B(backbone, out, batch, twice_differentiable=True)
        grads = gradient(nll_B, lora, rate, create_graph=True)
        rates_BM = rate.rates_BM(h_BH, k, steps, like=lora.A_BN.detach(), projections=len(lora.projections))
        lora = lora.step(grads, rates_BM)
        nlls.append(nll_B.detach())
        rates.append(rates_BM)
        kept.append(grads)
    return replace(finish(initial_lora, lora, nlls, rates), grads=kept)
