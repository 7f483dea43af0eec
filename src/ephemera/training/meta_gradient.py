"""The first-order meta-gradient of the answer's NLL after adaptation (LDTTA 3.3, Eq. 17-19)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ephemera.adapt import adapt, meta_gradient
from ephemera.adaptation import Adaptation
from ephemera.early_exit.lens import Lens
from ephemera.inits import Init
from ephemera.llm.frozen_lm import FrozenLM
from ephemera.lora import LoraBatch
from ephemera.rates import PerProjectionRate, ScaleNet
from ephemera.scoring import Encoded, answer_gradient, prompt_batch
from ephemera.second_order import adapt_exactly


def scalenet_backward(
    backbone: FrozenLM,
    init: Init,
    network: ScaleNet | PerProjectionRate,
    rows: Sequence[Encoded],
    K: int,
    *,
    seed: int,
    clip: float | None = None,
    through_gradients: bool = False,
) -> dict[str, float]:
    """Adapt K steps, score the answers, and leave the batch's mean meta-gradient in the network.

    K + 1 forward and backward passes; besides one pass's memory only the K prompt gradients are kept.
    `clip` bounds each prompt's own gradient (by log rates): a prompt that diverged should not
    drown the others. Rows that are not finite give no gradient.
    `through_gradients`: the prompt gradients are not constants but functions of the lens, which gets its share.
    """
    batch = prompt_batch(backbone, rows)
    lora = init(backbone, batch, [seed] * len(rows))
    keeps = network.reach == "answer" and init.zero  # else the first forward is not the base model's
    if through_gradients:
        trace = adapt_exactly(backbone, batch, lora, network, K)
    else:
        trace = adapt(backbone, batch, lora, network, K, keep_grads=True, keep_reading=keeps)
    nll_B, answer_grads = answer_gradient(backbone, rows, trace.lora, reach=network.reach, reading=trace.reading)
    if through_gradients:
        lens_backward(trace, nll_B, answer_grads, clip=clip, lens=network.objective.lens)
    used = rates_backward(trace, nll_B, answer_grads, clip=clip)
    return {
        "K": K,
        "nll": nll_B[used].mean().item() if bool(used.any()) else float("nan"),
        "prompt_nll_first": trace.prompt_nll_BK[:, 0].mean().item(),
        "non_finite": len(rows) - int(used.sum()),
    }


def rates_backward(
    trace: Adaptation,
    nll_B: Tensor,
    answer_grads: LoraBatch,
    *,
    clip: float | None,
) -> Tensor:
    """Leave the batch's mean meta-gradient in ScaleNet; which rows were usable: bool [B]."""
    drates_BKM = meta_gradient(answer_grads, trace.grads)
    usable_B = ~trace.fallback_B & nll_B.isfinite() & drates_BKM.isfinite().flatten(1).all(1)
    drates_BKM = torch.where(usable_B[:, None, None], drates_BKM, 0.0)
    if clip is not None:
        norm_B = (drates_BKM * trace.rates_BKM.detach()).flatten(1).norm(dim=1)
        drates_BKM = drates_BKM * (clip / norm_B.clamp(min=clip))[:, None, None]
    rates_BKM = torch.where(usable_B[:, None, None], trace.rates_BKM, 0.0)
    rates_BKM.backward(drates_BKM.to(rates_BKM.dtype) / len(nll_B))
    return usable_B


def lens_backward(
    trace: Adaptation, nll_B: Tensor, answer_grads: LoraBatch, *, clip: float | None, lens: Lens | None
) -> None:
    """Leave dL_answer/dlens, through the steps' gradients, in the lens: each prompt clipped as its rates' gradient is."""
    assert lens is not None
    with torch.no_grad():
        drates_BKM = meta_gradient(answer_grads, trace.grads)
        norm_B = (drates_BKM * trace.rates_BKM).flatten(1).norm(dim=1)
        usable_B = ~trace.fallback_B & nll_B.isfinite() & norm_B.isfinite()
        factor_B = torch.ones_like(norm_B) if clip is None else clip / norm_B.clamp(min=clip)
        by_lora = answer_grads.scaled((factor_B / len(nll_B))[:, None].expand_as(drates_BKM[:, 0])).where(
            usable_B, None
        )
    leaves = list(lens.parameters())
    grads = torch.autograd.grad(trace.lora.buffers, leaves, by_lora.buffers, retain_graph=True)
    for leaf, grad in zip(leaves, grads, strict=True):
        leaf.grad = grad if leaf.grad is None else leaf.grad + grad
