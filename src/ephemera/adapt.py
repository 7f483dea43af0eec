"""The loop: K steps on the prompt's own NLL, each projection at its own rate. Everything adapts through here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from ephemera.backbone import Backbone, Forward
from ephemera.depth import Lower
from ephemera.flat import FlatLora
from ephemera.lora import LoraBatch
from ephemera.objective import TokenBatch
from ephemera.rates import Rate


@dataclass(frozen=True, eq=False)
class Trace:
    """What a batch's adaptation left: adapters at both ends, and each step's loss and rates.

    `prompt_nll_BK[:, k-1]` is the prompt NLL (nats per token) seen by step k, before its update.
    `steps_B`: steps that each row took, K where none stopped early; beyond them its rates are 0 and its losses NaN.
    `fallback_B` marks rows whose losses or updates were not finite: their `lora` is `initial_lora`.
    `grads` holds each step's gradients, where they were kept. `lower`: the layers below the lowest adapted one, run once
    for all steps; `prefill` takes them too. `reading`: the base model's own pass over the prompts, as far as the first
    step went, if it was kept. `h_BH`: the first step's h(x), if the rate looked at it.
    """

    lora: LoraBatch
    initial_lora: LoraBatch
    prompt_nll_BK: Tensor
    rates_BKM: Tensor
    steps_B: Tensor
    fallback_B: Tensor
    grads: list[FlatLora] = field(default_factory=list)
    lower: Lower | None = None
    reading: Lower | None = None
    h_BH: Tensor | None = None


def adapt(
    backbone: Backbone,
    batch: TokenBatch,
    initial_lora: LoraBatch,
    rate: Rate | None,
    steps: int,
    *,
    keep_grads: bool = False,
    second_order: bool = False,
    stop_below: float | None = None,
    keep_reading: bool = False,
    after_step: Callable[[int], None] | None = None,
) -> Trace:
    """K times: forward, prompt NLL, rates from h(x), backward, update (LDTTA Fig. 1, Eq. 13-15).

    The cost is K forward and backward passes, from the lowest adapted layer to where the rate's objective reads the
    loss. `keep_grads` stores what first-order training needs and lets `rates_BKM` carry ScaleNet's graph;
    `second_order` builds the graph through every step instead (Eq. 18; its memory grows with every step, and attention
    takes no fused kernel). `stop_below`: a row whose rates of a step are all below this share of the rule's base rate
    takes neither that step nor a later one; when all rows have stopped the loop ends, before that step's loss and
    backward pass. `keep_reading`: the first step's forward leaves its keys and values (reach `answer`); only for a start
    with B = 0, where that forward is the base model's. With `stop_below` steps wait for the device; else none does.
    `after_step` is called with k when step k is done; no adapter is attached then, so it may run the model, and what it
    raises ends the loop.
    """
    if stop_below is not None and not 0 <= stop_below < float("inf"):
        raise ValueError(f"stop_below={stop_below}: give a share of the base rate, 0 or more (e.g. 0.01), or none.")
    assert stop_below is None or not (keep_grads or second_order), "training takes every step"
    start = flat = FlatLora.of(initial_lora)
    B, M, like = batch.ids_BT.shape[0], len(initial_lora.projections), start.A_BN.detach()
    nlls, rates, grads_of_steps = [], [], []
    wants_h = rate is not None and rate.uses_representation != "no"
    lower, reading, first_h_BH = backbone.lower(batch) if steps else None, None, None
    moving_B = torch.ones(B, dtype=torch.bool, device=like.device)
    steps_B = moving_B.long() * (steps if stop_below is None else 0)
    if steps and backbone.device.type != "cpu":
        batch.ready()
    for k in range(1, steps + 1):
        assert rate is not None
        current = flat if second_order and k > 1 else flat.leaves()
        with torch.enable_grad():
            out = backbone.forward(
                batch,
                current.lora,
                embedded=wants_h,
                lower=lower,
                stop=rate.objective.exit_layer,
                keep=keep_reading and k == 1,
                twice_differentiable=second_order,
            )
        reading = reading or _reading(backbone, batch, out, rate)
        h_BH = out.representation_BH(batch) if wants_h else None
        first_h_BH = h_BH if first_h_BH is None else first_h_BH
        h_BH = first_h_BH if rate.uses_representation == "first" else h_BH
        with torch.set_grad_enabled(keep_grads or second_order):
            rates_BM = rate.rates_BM(h_BH, k, steps, like=like, projections=M)
        if stop_below is not None:
            # Not "any at least": a rate that is no number does not stop a row, it makes it fall back
            moving_B = moving_B & ~(rates_BM < stop_below * rate.base_rate).all(1)
            if not bool(moving_B.any()):
                break
            rates_BM = torch.where(moving_B[:, None], rates_BM, 0.0)
        with torch.enable_grad():
            nll_B = rate.objective.nll_B(backbone, out, batch, twice_differentiable=second_order)
            grads = current.with_tensors(
                torch.autograd.grad(
                    nll_B.sum(), current.tensors, create_graph=second_order, allow_unused=True, materialize_grads=True
                )
            )
            grads = grads if rate.trains == "both" else grads.without_A()
        with torch.set_grad_enabled(second_order):
            flat = current.step(grads, rates_BM if second_order else rates_BM.detach())
        if stop_below is not None:
            flat, steps_B = flat.where(moving_B, current), steps_B + moving_B
        nlls.append(nll_B.detach())
        rates.append(rates_BM)
        if keep_grads:
            grads_of_steps.append(grads)
        if after_step is not None:
            after_step(k)
    if not second_order:
        flat = flat.detach()
    taken_BK = torch.arange(steps, device=like.device) < steps_B[:, None]
    nll_BK = _columns(nlls, like.new_zeros(B, steps))
    finite_B = (nll_BK.isfinite() | ~taken_BK).all(1) & flat.finite_B()
    return Trace(
        lora=flat.where(finite_B, start).lora if steps else initial_lora,
        initial_lora=initial_lora,
        prompt_nll_BK=torch.where(taken_BK, nll_BK, torch.nan),
        rates_BKM=_columns(rates, like.new_zeros(B, steps, M)),
        steps_B=steps_B,
        fallback_B=~finite_B,
        grads=grads_of_steps,
        lower=lower,
        reading=reading,
        h_BH=first_h_BH,
    )


def _reading(backbone: Backbone, batch: TokenBatch, out: Forward, rate: Rate) -> Lower | None:
    if not isinstance(out.cache, DynamicCache):
        return None
    layers, hidden_BTD = rate.objective.exit_layer, out.hidden_BTD.detach()
    if layers == backbone.layers:  # an exit at the top stops before the final norm
        assert backbone.final_norm is not None
        with torch.no_grad():
            hidden_BTD = backbone.decoder.get_submodule(backbone.final_norm)(hidden_BTD)
    return Lower(batch.ids_BT, layers or backbone.layers, hidden_BTD, out.cache)


def _columns(columns: Sequence[Tensor], zero_BK: Tensor) -> Tensor:
    """One column [B] or [B,M] a step; zero for steps that no row took."""
    if not columns:
        return zero_BK
    taken = torch.stack(list(columns), 1)
    return torch.cat([taken, zero_BK[:, len(columns) :].to(taken.dtype)], 1)


def meta_gradient(answer_grads: FlatLora, step_grads: Sequence[FlatLora]) -> Tensor:
    """dL/drate_BKM of first-order training: -< dL_answer/dphi_m at Phi^(K), g_m^(k) > (LDTTA Eq. 17-19).

    Prompt gradients count as constants, so Phi^(K) = Phi^(0) - sum_k rate^(k) g^(k), and no graph has
    to be unrolled.
    """
    return -torch.stack([grads.dot_BM(answer_grads) for grads in step_grads], 1)
