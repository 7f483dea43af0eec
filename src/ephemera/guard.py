"""What stands between a network's rates and a user's answer: a trust region, and an abstention where harm is foreseen.

Both look at the prompt only, after its steps, for the work of one token (reach `answer`). A rate of zero is an abstention.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ephemera.adapt import Trace
from ephemera.flat import FlatLora
from ephemera.gate import Gate
from ephemera.lora import LoraBatch
from ephemera.prefill import Prefill, fork, prefill

SHRINK = 0.5  # the adapter's B times this, until the first token is inside the trust region
SHRINKS = 6  # so often at most; then the row is left alone


@dataclass(frozen=True, eq=False)
class Verdict:
    """What the gate did to each row [B]: its predicted risk, the share of the adapter that was kept (0: abstained)."""

    risk_B: Tensor
    share_B: Tensor
    kl_B: Tensor
    signals_BF: Tensor

    @property
    def abstained_B(self) -> Tensor:
        return self.share_B == 0


def guard(gate: Gate, read: Prefill, trace: Trace) -> tuple[Prefill, Verdict]:
    """Shrink adapters into the trust region, then leave alone whom the risk says; prompts are read no second time.

    A `read` with `shrunk(trace, gate.most)` spares the reading of the last token with the whole adapter.
    """
    base_BV = _log_p(read, read.base_BD)
    read, share_B, kl_B = trusted(read, trace, gate.tau, gate.most, base_BV=base_BV)
    signals_BF = signals(read, trace, share_B, kl_B, base_BV=base_BV)
    risk_B = gate.risk_B(signals_BF, trace.h_BH)
    left_B = (risk_B > gate.threshold) | (share_B == 0)
    verdict = Verdict(risk_B, torch.where(left_B, 0.0, share_B), kl_B, signals_BF)
    return (left_alone(read, trace, left_B) if bool(left_B.any()) else read), verdict


@torch.no_grad()
def trusted(
    read: Prefill, trace: Trace, tau: float, most: float = 1.0, *, base_BV: Tensor | None = None
) -> tuple[Prefill, Tensor, Tensor]:
    """Adapters at a share of `most`; rows whose first-token distribution is then further than `tau` from the base model's
    are shrunk until it is not. A share of 0 is left to the caller: the row is still read with a small one.

    Also the share of the adapter that is left [B], and KL(adapted || base) [B] at the end, in nats. `base_BV`: the base
    model's log-probabilities, if they are at hand.
    """
    base_BV = _log_p(read, read.base_BD) if base_BV is None else base_BV
    read = with_share(read, trace, base_BV.new_full(base_BV.shape[:1], most))
    kl_B = _kl(_log_p(read, read.hidden_BTD[:, -1]), base_BV)
    share_B, least = torch.full_like(kl_B, most), most * SHRINK ** (SHRINKS - 1)
    for _ in range(SHRINKS):
        out_B = ~(kl_B <= tau) & (share_B > 0)
        if not bool(out_B.any()):
            break
        # KL grows with the square of a small share: as many halvings at once as that asks for
        halvings_B = ((kl_B / tau).log() / -2 / math.log(SHRINK)).nan_to_num(SHRINKS, SHRINKS).ceil().clamp(min=1)
        smaller_B = share_B * SHRINK**halvings_B
        share_B = torch.where(out_B, torch.where(smaller_B < least, 0.0, smaller_B), share_B)
        read = with_share(read, trace, share_B)
        kl_B = torch.where(out_B, _kl(_log_p(read, read.hidden_BTD[:, -1]), base_BV), kl_B)
    return read, share_B, kl_B


def left_alone(read: Prefill, trace: Trace, left_B: Tensor) -> Prefill:
    """The same reading with some rows as the base model left them: their last token is not read again."""
    reading = trace.reading or trace.lower
    assert reading is not None
    assert read.lora is not None
    assert read.base_BD is not None
    keep_B111, cache = ~left_B[:, None, None, None], fork(read.cache)
    for layer, base in zip(cache.layers, reading.cache.layers, strict=True):
        for name in ("keys", "values"):
            mine_BGTC, base_BGTC = getattr(layer, name), getattr(base, name)
            last_BG1C = torch.where(keep_B111, mine_BGTC[:, :, -1:], base_BGTC[:, :, -1:])
            setattr(layer, name, torch.cat([mine_BGTC[:, :, :-1], last_BG1C], 2))
    hidden_B1D = torch.where(keep_B111[..., 0], read.hidden_BTD[:, -1:], read.base_BD[:, None])
    lora = read.lora.where(~left_B, trace.initial_lora)
    return replace(read, hidden_BTD=hidden_B1D, cache=cache, lora=lora, fallback_B=read.fallback_B & ~left_B)


def shrunk(trace: Trace, share: Tensor | float) -> LoraBatch:
    """The adapters with a share of what the steps did to B: one for all rows, or [B]. A share of 0 is the start."""
    start, end = FlatLora.of(trace.initial_lora), FlatLora.of(trace.lora)
    share_B1 = torch.as_tensor(share, dtype=end.B_BN.dtype, device=end.B_BN.device).expand(len(end.B_BN))[:, None]
    B_BN = start.B_BN + (end.B_BN - start.B_BN) * share_B1
    return replace(end, A_BN=torch.where(share_B1 == 0, start.A_BN, end.A_BN), B_BN=B_BN).lora


def with_share(read: Prefill, trace: Trace, share_B: Tensor) -> Prefill:
    """The same prompts with adapters of which only a share [B] of B is left; the last token is read anew."""
    lora, reading = shrunk(trace, share_B), trace.reading or trace.lower
    if _same(lora, read.lora):
        return read
    return prefill(read.backbone, read.batch, lora, trace.initial_lora, reach="answer", reading=reading)


def _same(a: LoraBatch, b: LoraBatch | None) -> bool:
    return b is not None and all(torch.equal(x, y) for x, y in zip(a.B, b.B, strict=True))


@torch.no_grad()
def signals(read: Prefill, trace: Trace, share_B: Tensor, kl_B: Tensor, *, base_BV: Tensor | None = None) -> Tensor:
    """`SIGNALS` [B,F], from the prompt only."""
    base_BV = _log_p(read, read.base_BD) if base_BV is None else base_BV
    start, end = FlatLora.of(trace.initial_lora), FlatLora.of(trace.lora)
    moved_B = (end.B_BN - start.B_BN).square().sum(1).sqrt()
    columns = [
        trace.prompt_nll_BK[:, 0],
        read.batch.lengths_B.log(),
        -(base_BV.exp() * base_BV).sum(1),
        kl_B.clamp(min=1e-6).log(),
        moved_B.clamp(min=1e-6).log(),
        trace.rates_BKM[:, 0].clamp(min=1e-6).log().mean(1),
        share_B.clamp(min=1e-3).log(),
    ]
    return torch.stack([column.float().nan_to_num(0.0, 0.0, 0.0) for column in columns], 1)


def _log_p(read: Prefill, h_BD: Tensor | None) -> Tensor:
    assert h_BD is not None, "the gate needs reach answer"
    return read.backbone.logits(h_BD).float().log_softmax(-1)


def _kl(p_BV: Tensor, q_BV: Tensor) -> Tensor:
    return (p_BV.exp() * (p_BV - q_BV)).sum(1)
