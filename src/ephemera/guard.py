"""What stands between a network's rates and a user's answer: each prompt's share of its adapter, and a trust region.

Both look at the prompt only, after its steps, for the work of one token (reach `answer`). A share of zero is an abstention.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from ephemera.adaptation import Adaptation
from ephemera.batch import TokenBatch
from ephemera.gate import SHARES, Gate
from ephemera.llm.frozen_lm import FrozenLM
from ephemera.llm.prefill import Prefill, prefill, whole_reading
from ephemera.lora import LoraBatch
from ephemera.made_for import Reach


@torch.no_grad()
def guard(
    gate: Gate, backbone: FrozenLM, batch: TokenBatch, made: Adaptation, max_kl: float | None = None
) -> tuple[Adaptation, Prefill]:
    """What the gate leaves of the adapters, and the prompts read with those: no prompt is read a second time.

    `max_kl`: a bound beside the gate's own trust region.
    """
    h_BH = made.h_BH
    assert h_BH is not None, "the rate looks at h(x), or the generator at its own h"
    reading = whole_reading(backbone, batch, made.reading)
    made = made.with_reading(reading)
    base_BV = log_p(backbone, reading.hidden_BTD[:, -1])
    risk_BS = gate.risk_BS(signals(base_BV, batch, made), h_BH)
    share_B = gate.share_B(risk_BS)
    share_B = torch.where(made.fallback_B, 0.0, share_B)
    tau = gate.tau if max_kl is None else min(gate.tau, max_kl)
    read, share_B, kl_B = trusted(backbone, batch, made, share_B, tau, base_BV)
    assert read.lora is not None
    return replace(made, lora=read.lora, share_B=share_B, kl_B=kl_B), read


@torch.no_grad()
def bounded(
    max_kl: float, backbone: FrozenLM, batch: TokenBatch, made: Adaptation, reach: Reach
) -> tuple[Adaptation, Prefill]:
    """Adapters that move the first token's distribution by `max_kl` nats at most, and the prompts read with those.

    Without a gate, for either reach: with reach `all` each try reads the prompts again.
    """
    if reach == "answer":
        made = made.with_reading(whole_reading(backbone, batch, made.reading))
    base_BV = log_p(backbone, read_with(backbone, batch, made, 0.0, reach).hidden_BTD[:, -1])
    whole_B = torch.where(made.fallback_B, 0.0, 1.0)
    read, share_B, kl_B = trusted(backbone, batch, made, whole_B, max_kl, base_BV, reach)
    assert read.lora is not None
    return replace(made, lora=read.lora, share_B=share_B, kl_B=kl_B), read


def trusted(
    backbone: FrozenLM,
    batch: TokenBatch,
    made: Adaptation,
    share_B: Tensor,
    tau: float,
    base_BV: Tensor,
    reach: Reach = "answer",
) -> tuple[Prefill, Tensor, Tensor]:
    """The prompts read with a share of their adapters; rows whose first-token distribution is then further than `tau` from
    the base model's are shrunk until it is not.

    Also the share that is left [B], and KL(adapted || base) [B] at the end, in nats. `base_BV`: the base model's
    log-probabilities.
    """
    while True:
        read = read_with(backbone, batch, made, share_B, reach)
        kl_B = torch.where(share_B > 0, kl(log_p(backbone, read.hidden_BTD[:, -1]), base_BV), 0.0)
        out_B = ~(kl_B <= tau) & (share_B > 0)
        if not backbone.anywhere(bool(out_B.any())):
            return read, share_B, kl_B
        # KL grows with the square of a small share: as many halvings at once as that asks for, one at least
        halvings_B = ((kl_B / tau).log2() / 2).nan_to_num(math.inf, math.inf).ceil().clamp(min=1)
        smaller_B = share_B * 0.5**halvings_B
        share_B = torch.where(out_B, torch.where(smaller_B < SHARES[-1], 0.0, smaller_B), share_B)


def read_with(
    backbone: FrozenLM, batch: TokenBatch, made: Adaptation, share: Tensor | float, reach: Reach = "answer"
) -> Prefill:
    """The prompts with a share of their adapters, for all rows or [B]; with reach `answer` over what was read of them."""
    return prefill(backbone, batch, shrunk(made, share), made.initial_lora, reach=reach, cached=made.reading)


def shrunk(made: Adaptation, share: Tensor | float) -> LoraBatch:
    """The adapters with a share of what the steps did to B: one for all rows, or [B]. A share of 0 is the start."""
    start, end = made.initial_lora, made.lora
    share_B1 = torch.as_tensor(share, dtype=end.B_BN.dtype, device=end.B_BN.device).expand(len(end.B_BN))[:, None]
    B_BN = start.B_BN + (end.B_BN - start.B_BN) * share_B1
    return end.with_buffers(torch.where(share_B1 == 0, start.A_BN, end.A_BN), B_BN)


@torch.no_grad()
def signals(base_BV: Tensor, batch: TokenBatch, made: Adaptation) -> Tensor:
    """`SIGNALS` [B,F], from the prompt only; without a step its NLL and the rates are 0. `base_BV`: the base model's log-probabilities of the first answer token."""
    start, end = made.initial_lora, made.lora
    moved_B = (end.B_BN - start.B_BN).square().sum(1).sqrt()
    steps, zero_B = made.prompt_nll_BK.shape[1], torch.zeros_like(moved_B)
    columns = [
        made.prompt_nll_BK[:, 0] if steps else zero_B,
        batch.lengths_B.log(),
        -(base_BV.exp() * base_BV).sum(1),
        moved_B.clamp(min=1e-6).log(),
        made.rates_BKM[:, 0].clamp(min=1e-6).log().mean(1) if steps else zero_B,
    ]
    return torch.stack([column.float().nan_to_num(0.0, 0.0, 0.0) for column in columns], 1)


@torch.no_grad()
def log_p(backbone: FrozenLM, h_BD: Tensor) -> Tensor:
    return backbone.logits(h_BD).float().log_softmax(-1)


def kl(p_BV: Tensor, q_BV: Tensor) -> Tensor:
    """KL(p || q) [B] in nats, of log-probabilities."""
    return (p_BV.exp() * (p_BV - q_BV)).sum(1)
