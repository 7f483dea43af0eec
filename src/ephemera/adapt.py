"""The loop: K steps on the prompt's own NLL, each projection at its own rate. Everything adapts through here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from ephemera.adaptation import Adaptation
from ephemera.batch import TokenBatch
from ephemera.llm.cached_layers import CachedLayers
from ephemera.llm.frozen_lm import Forward, FrozenLM
from ephemera.lora import LoraBatch
from ephemera.rates import Rate


def adapt(
    backbone: FrozenLM,
    batch: TokenBatch,
    initial_lora: LoraBatch,
    rate: Rate | None,
    steps: int,
    *,
    keep_grads: bool = False,
    keep_reading: bool = False,
    after_step: Callable[[int], None] | None = None,
) -> Adaptation:
    """K times: forward, prompt NLL, rates from h(x), backward, update (LDTTA Fig. 1, Eq. 13-15).

    The cost is K forward and backward passes, from the lowest adapted layer to where the rate's objective reads the loss.
    `keep_grads` stores what first-order training needs and lets `rates_BKM` carry ScaleNet's graph. `keep_reading`: the first
    step's forward leaves its keys and values (reach `answer`); only for a start with B = 0, where that forward is the base
    model's. No step waits for the device. `after_step` is called with k when step k is done; no adapter is attached then, so
    it may run the model, and what it raises ends the loop.
    """
    if rate is None or steps == 0:
        return unchanged(initial_lora)
    backbone.ready(batch)
    lora, nlls, rates, kept, h = initial_lora, list[Tensor](), list[Tensor](), list[LoraBatch](), list[Tensor]()
    cached = lower = backbone.lower(batch)
    for k in range(1, steps + 1):
        at = lora.leaves()
        wants_h, keep, stop = rate.uses_representation != "no", keep_reading and k == 1, rate.objective.exit_layer
        with torch.enable_grad():
            out = backbone.forward(batch, at, embedded=wants_h, lower=lower, stop=stop, keep=keep)
            nll_B = rate.objective.nll_B(backbone, out, batch)  # Eq. 7, 9
            grads = gradient(nll_B, at, rate)
        h_BH = out.representation_BH(batch) if wants_h else None  # Eq. 15
        with torch.set_grad_enabled(keep_grads):
            rates_BM = rate.rates_BM(h_BH, k, steps, like=at.A_BN.detach(), projections=len(at.projections))  # Eq. 13
        with torch.no_grad():
            lora = at.step(grads, rates_BM.detach())  # Eq. 14
        nlls.append(nll_B.detach())
        rates.append(rates_BM)
        cached = (reading_of(backbone, batch, out, rate) if keep else None) or cached
        h += [] if h_BH is None else [h_BH]
        kept += [grads] if keep_grads else []
        if after_step is not None:
            after_step(k)
    finished = finish(initial_lora, lora, nlls, rates)
    return replace(finished, grads=kept, h_BH=h[0] if h else None).with_reading(cached)


def unchanged(lora: LoraBatch) -> Adaptation:
    """No step: the adapters where they start."""
    B, M, like = lora.batch_size, len(lora.projections), lora.A_BN
    none_B = torch.zeros(B, dtype=torch.bool, device=like.device)
    return Adaptation(lora, lora, like.new_zeros(B, 0), like.new_zeros(B, 0, M), none_B)


def gradient(nll_B: Tensor, at: LoraBatch, rate: Rate, *, create_graph: bool = False) -> LoraBatch:
    """The gradient of the sum over prompts: rows do not touch each other, so each gets its own."""
    flat = torch.autograd.grad(
        nll_B.sum(), at.buffers, create_graph=create_graph, allow_unused=True, materialize_grads=True
    )
    grads = at.with_buffers(*flat)
    return grads if rate.trains == "both" else grads.without_A()


def finish(start: LoraBatch, lora: LoraBatch, nlls: Sequence[Tensor], rates: Sequence[Tensor]) -> Adaptation:
    """Rows that are not finite are left at their start."""
    nll_BK = torch.stack(list(nlls), 1)
    finite_B = nll_BK.isfinite().all(1) & lora.finite_B()
    return Adaptation(lora.where(finite_B, start), start, nll_BK, torch.stack(list(rates), 1), ~finite_B)


def reading_of(backbone: FrozenLM, batch: TokenBatch, out: Forward, rate: Rate) -> CachedLayers | None:
    """The first step's forward as the base model's reading of the prompts, as far as it went."""
    if not isinstance(out.cache, DynamicCache):
        return None
    layers, hidden_BTD = rate.objective.exit_layer, out.hidden_BTD.detach()
    if layers == backbone.layers:  # an exit at the top stops before the final norm
        with torch.no_grad():
            hidden_BTD = backbone.norm(hidden_BTD)
    return CachedLayers(batch.ids_BT, layers or backbone.layers, hidden_BTD, out.cache)


def meta_gradient(answer_grads: LoraBatch, step_grads: Sequence[LoraBatch]) -> Tensor:
    """dL/drate_BKM of first-order training: -< dL_answer/dphi_m at Phi^(K), g_m^(k) > (LDTTA Eq. 17-19).

    Prompt gradients count as constants, so Phi^(K) = Phi^(0) - sum_k rate^(k) g^(k), and no graph has
    to be unrolled.
    """
    return -torch.stack([grads.dot_BM(answer_grads) for grads in step_grads], 1)
