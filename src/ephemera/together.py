"""One adapter for prompts of a kind: the loop of adapt.py on the mean prompt NLL. What they share is learned once."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ephemera.adapt import gradient
from ephemera.batch import TokenBatch, pad
from ephemera.inits import Init
from ephemera.llm.frozen_lm import FrozenLM
from ephemera.lora import LoraBatch
from ephemera.made_for import Reach
from ephemera.peft_export import export_peft
from ephemera.rates import Rate


@dataclass(frozen=True, eq=False)
class SharedAdapter(Init):
    """One adapter that N prompts made together; as an init it is the start of every other prompt's.

    `lora` holds one row. `prompt_nll_NK` [N,K]: each prompt's NLL in nats per token before step k, in the prompts' order.
    `rates_KM` [K,M]: the learning rates. `reach`: where it acts. `last_token`: what all prompts end with; None if they differ.
    """

    lora: LoraBatch
    prompt_nll_NK: Tensor
    rates_KM: Tensor
    reach: Reach = "all"
    base_model: str = ""
    last_token: int | None = None

    label = "shared"

    def check(self, backbone: FrozenLM) -> None:
        """ValueError if it was made on other projections than the model adapts."""
        mine, theirs = ([(p.name, p.in_features, p.out_features) for p in x.projections] for x in (self.lora, backbone))
        if mine != theirs:
            raise ValueError(
                f"the shared adapter has {len(mine)} projections from {mine[0][0]} on, {backbone.name} adapts {len(theirs)} "
                f"from {theirs[0][0]} on; use the model and the target_modules that it was made with."
            )

    def __call__(self, backbone: FrozenLM, batch: TokenBatch, seeds: Sequence[int]) -> LoraBatch:
        return self.lora.rows([0] * len(seeds))

    def export_peft(self, folder: str | Path) -> Path:
        """Write it in PEFT's format; PEFT and `init=` open it with the same logits.

        With reach `answer` PEFT needs its activated LoRA (the folder's README.md), which begins at one token: ValueError if
        the prompts do not all end with the same one.
        """
        answer, prompts = self.reach == "answer", len(self.prompt_nll_NK)
        if answer and self.last_token is None:
            raise ValueError(
                f"the {prompts} prompts end with different tokens, and with reach answer PEFT needs one common last token. "
                'Use prompts of one template or chat=True, or reach="all".'
            )
        last = self.last_token if answer else None
        return export_peft(self.lora, 0, Path(folder), base_model=self.base_model, last_token=last, prompts=prompts)


def shared_adapter(
    backbone: FrozenLM,
    ids: Sequence[Sequence[int]],
    groups: Sequence[Sequence[int]],
    init: Init,
    rate: Rate,
    steps: int,
    *,
    seed: int,
    reach: Reach,
) -> SharedAdapter:
    """`adapt_together` on prompts as token ids, in batches that `groups` names by place, from the init's first adapter.

    ValueError for a prompt of one token, and for an init that makes each prompt's start from the prompt.
    """
    if init.reads_prompts:
        raise ValueError(
            f"init is {init.label}, which makes another start for each prompt; a shared adapter has one start: "
            'give init="zero" or the folder of a PEFT LoRA.'
        )
    short = next((n for n, own in enumerate(ids, 1) if len(own) < 2), None)
    if short is not None:
        raise ValueError(
            f"prompt {short} of {len(ids)} has {len(ids[short - 1])} token, so there is nothing to learn from; prompts need 2 "
            "tokens or more. Leave it out."
        )
    batches = [pad([ids[i] for i in rows], pad_id=backbone.pad_id) for rows in groups]
    start = init(backbone, pad([ids[0]], pad_id=backbone.pad_id).to(backbone.device), [seed])
    lora, nlls, rates_KM = adapt_together(backbone, batches, start, rate, steps)
    back = torch.tensor([i for rows in groups for i in rows]).argsort()
    last = {own[-1] for own in ids}
    return SharedAdapter(
        lora=lora,
        prompt_nll_NK=torch.cat(nlls)[back],
        rates_KM=rates_KM,
        reach=reach,
        base_model=os.path.abspath(backbone.path) if backbone.path.exists() else str(backbone.path),
        last_token=last.pop() if len(last) == 1 else None,
    )


def adapt_together(
    backbone: FrozenLM, batches: Sequence[TokenBatch], start: LoraBatch, rate: Rate, steps: int
) -> tuple[LoraBatch, list[Tensor], Tensor]:
    """`steps` times: the mean over all prompts of their NLL's gradient, at the mean over them of their rates.

    LDTTA Eq. 13 to 15 with one adapter for N prompts: phi_m <- phi_m - mean_n(rate_nm) * mean_n(grad_m NLL_n). `start` holds
    one row. Batches run one after another, so memory does not grow with N. Returns the adapter, each batch's prompt NLL [B,K]
    and the rates [K,M]. ValueError where a loss or an update is not finite.
    """
    lora, seen, rates, N = start, list[list[Tensor]](), list[Tensor](), sum(len(b.ids_BT) for b in batches)
    for k in range(1, steps + 1):
        at = lora.leaves()
        sums = [torch.zeros_like(t) for t in at.buffers]
        rates_M = at.A_BN.new_zeros(len(at.projections))
        seen.append([])
        for batch in batches:
            nll_B, grads, rates_BM = _one_batch(backbone, batch.to(backbone.device), at, rate, k, steps)
            for total, grad in zip(sums, grads.buffers, strict=True):
                total.add_(grad)
            rates_M += rates_BM.sum(0)
            seen[-1].append(nll_B.cpu())
        mean = at.with_buffers(*(total / N for total in sums))
        with torch.no_grad():
            lora = at.step(mean, rates_M[None] / N)
        rates.append(rates_M.cpu() / N)
        if not (bool(lora.finite_B().all()) and all(bool(nll_B.isfinite().all()) for nll_B in seen[-1])):
            raise ValueError(
                f"step {k} of {steps} gave a loss or an update that is not finite, at a mean rate of "
                f"{float(rates[-1].mean()):.3g}; give a smaller rate or fewer steps."
            )
    return lora, [torch.stack(of_batch, 1) for of_batch in zip(*seen, strict=True)], torch.stack(rates)


def _one_batch(
    backbone: FrozenLM, batch: TokenBatch, at: LoraBatch, rate: Rate, k: int, K: int
) -> tuple[Tensor, LoraBatch, Tensor]:
    """NLL [B] of some prompts, the sum of their gradients by the one adapter `at`, and their rates [B,M]."""
    backbone.ready(batch)
    B, wants_h = len(batch.ids_BT), rate.uses_representation != "no"
    with torch.enable_grad():
        rows = at.rows([0] * B)  # autograd adds up what the rows give
        out = backbone.forward(
            batch, rows, embedded=wants_h, lower=backbone.lower(batch), stop=rate.objective.exit_layer
        )
        nll_B = rate.objective.nll_B(backbone, out, batch)
        grads = gradient(nll_B, at, rate)
    with torch.no_grad():
        h_BH = out.representation_BH(batch) if wants_h else None
        rates_BM = rate.rates_BM(h_BH, k, K, like=rows.A_BN.detach(), projections=len(at.projections))
    return nll_B.detach(), grads, rates_BM.to(at.A_BN.dtype)
