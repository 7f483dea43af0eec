"""The loop: K steps on the prompt's own NLL, each projection at its own rate. Everything adapts through here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from ephemera.batch import TokenBatch
from ephemera.llm.cached_layers import CachedLayers
from ephemera.llm.frozen_lm import Forward, FrozenLM
from ephemera.lora import LoraBatch
from ephemera.rates import Rate


@dataclass(frozen=True, eq=False)
class Trace:
    """What a batch's adaptation left: adapters at both ends, and each step's loss and rates.

    `prompt_nll_BK[:, k-1]` is the prompt NLL (nats per token) seen by step k, before its update.
    `fallback_B` marks rows whose losses or updates were not finite: their `lora` is `initial_lora`.
    `grads` holds each step's gradients, where they were kept. `lower`: the layers below the lowest adapted one, run once
    for all steps; `prefill` takes them too. `reading`: the base model's own pass over the prompts, as far as the first
    step went, if it was kept. `h_BH`: the first step's h(x), if the rate looked at it.
    """

    lora: LoraBatch
    initial_lora: LoraBatch
    prompt_nll_BK: Tensor
    rates_BKM: Tensor
    fallback_B: Tensor
    grads: list[LoraBatch] = field(default_factory=list)
    lower: CachedLayers | None = None
    reading: CachedLayers | None = None
    h_BH: Tensor | None = None


def adapt(
    backbone: FrozenLM,
    batch: TokenBatch,
    initial_lora: LoraBatch,
    rate: Rate | None,
    steps: int,
    *,
    keep_grads: bool = False,
    second_order: bool = False,
    keep_reading: bool = False,
    after_step: Callable[[int], None] | None = None,
) -> Trace:
    """K times: forward, prompt NLL, rates from h(x), backward, update (LDTTA Fig. 1, Eq. 13-15).

    The cost is K forward and backward passes, from the lowest adapted layer to where the rate's objective reads the
    loss. `keep_grads` stores what first-order training needs and lets `rates_BKM` carry ScaleNet's graph;
    `second_order` builds the graph through every step instead (Eq. 18; its memory grows with every step, and attention
    takes no fused kernel). `keep_reading`: the first step's forward leaves its keys and values (reach `answer`); only for
    a start with B = 0, where that forward is the base model's. No step waits for the device.
    `after_step` is called with k when step k is done; no adapter is attached then, so it may run the model, and what it
    raises ends the loop.
    """
    start = flat = initial_lora
    B, M, like = batch.ids_BT.shape[0], len(initial_lora.projections), start.A_BN.detach()
    nlls, rates, grads_of_steps = [], [], []
    wants_h = rate is not None and rate.uses_representation != "no"
    lower, reading, first_h_BH = backbone.lower(batch) if steps else None, None, None
    if steps:
        backbone.ready(batch)
    for k in range(1, steps + 1):
        assert rate is not None
        current = flat if second_order and k > 1 else flat.leaves()
        with torch.enable_grad():
            out = backbone.forward(
                batch,
                current,
                embedded=wants_h,
                lower=lower,
                stop=rate.objective.exit_layer,
                keep=keep_reading and k == 1,
                twice_differentiable=second_order,
            )
        reading = reading or _reading(backbone, batch, out, rate)
        h_BH = out.representation_BH(batch) if wants_h else None
        first_h_BH = h_BH if first_h_BH is None else first_h_BH
        with torch.set_grad_enabled(keep_grads or second_order):
            rates_BM = rate.rates_BM(h_BH, k, steps, like=like, projections=M)
        with torch.enable_grad():
            nll_B = rate.objective.nll_B(backbone, out, batch, twice_differentiable=second_order)
            grads = current.with_buffers(
                *torch.autograd.grad(
                    nll_B.sum(), current.buffers, create_graph=second_order, allow_unused=True, materialize_grads=True
                )
            )
            grads = grads if rate.trains == "both" else grads.without_A()
        with torch.set_grad_enabled(second_order):
            flat = current.step(grads, rates_BM if second_order else rates_BM.detach())
        nlls.append(nll_B.detach())
        rates.append(rates_BM)
        if keep_grads:
            grads_of_steps.append(grads)
        if after_step is not None:
            after_step(k)
    if not second_order:
        flat = flat.detach()
    nll_BK = torch.stack(nlls, 1) if steps else like.new_zeros(B, 0)
    finite_B = nll_BK.isfinite().all(1) & flat.finite_B()
    return Trace(
        lora=flat.where(finite_B, start) if steps else initial_lora,
        initial_lora=initial_lora,
        prompt_nll_BK=nll_BK,
        rates_BKM=torch.stack(rates, 1) if steps else like.new_zeros(B, 0, M),
        fallback_B=~finite_B,
        grads=grads_of_steps,
        lower=lower,
        reading=reading,
        h_BH=first_h_BH,
    )


def _reading(backbone: FrozenLM, batch: TokenBatch, out: Forward, rate: Rate) -> CachedLayers | None:
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
