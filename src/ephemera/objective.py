"""The prompt's own next-token NLL, per prompt (LDTTA Eq. 7 and 9), and batches of prompts by length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ephemera.packed import Packing

CHUNK_TOKENS = 512  # logits held at once: 512 x 49,152 float32 are 100 MB
CPU_SOFTMAX_TOKENS = 16  # rows turned into probabilities at once on a CPU: few enough to stay in its cache


@dataclass(frozen=True, eq=False)
class TokenBatch:
    """Token ids [B,T] of some prompts, padded; `mask_BT` is true on real tokens."""

    ids_BT: Tensor
    mask_BT: Tensor

    @cached_property
    def padded(self) -> bool:
        return not bool(self.mask_BT.all())

    @cached_property
    def lengths_B(self) -> Tensor:
        return self.mask_BT.sum(1)

    @cached_property
    def position_ids_BT(self) -> Tensor:
        """Counted from each prompt's first real token, on either padding side."""
        return (self.mask_BT.long().cumsum(1) - 1).clamp(min=0)

    @cached_property
    def packing(self) -> Packing:
        """The real tokens alone, in the order of `ids_BT[mask_BT]`."""
        return Packing(tuple(self.lengths_B.tolist()), self.ids_BT.device)

    @cached_property
    def _places_N(self) -> Tensor:
        return self.mask_BT.flatten().nonzero()[:, 0]

    def real(self, x_BTD: Tensor) -> Tensor:
        """[B,T,...] -> [N,...]: what stands at real tokens."""
        x_PD = x_BTD.flatten(0, 1)
        return x_PD.index_select(0, self._places_N) if self.padded else x_PD

    def back(self, x_ND: Tensor) -> Tensor:
        """[N,...] -> [B,T,...], zero at padding."""
        if self.padded:
            x_ND = x_ND.new_zeros(self.mask_BT.numel(), *x_ND.shape[1:]).index_copy(0, self._places_N, x_ND)
        return x_ND.unflatten(0, self.mask_BT.shape)

    def to(self, device: torch.device | str) -> TokenBatch:
        return TokenBatch(self.ids_BT.to(device), self.mask_BT.to(device))


def pad(sequences: Sequence[Sequence[int]], *, side: Literal["left", "right"] = "left", pad_id: int = 0) -> TokenBatch:
    """Token id lists to one padded batch. Left is the side that decoding needs."""
    T = max(len(s) for s in sequences)
    ids_BT = torch.full((len(sequences), T), pad_id, dtype=torch.long)
    mask_BT = torch.zeros(len(sequences), T, dtype=torch.bool)
    for b, sequence in enumerate(sequences):
        span = slice(T - len(sequence), T) if side == "left" else slice(0, len(sequence))
        ids_BT[b, span] = torch.tensor(sequence, dtype=torch.long)
        mask_BT[b, span] = True
    return TokenBatch(ids_BT, mask_BT)


def batch_tokens(device: torch.device) -> int:
    """Padded tokens that adapt together: a CPU's caches like small batches of long prompts.

    At 4,096 tokens eight XSum prompts took 1.8 times as long there as at 1,024 (docs/findings.md).
    """
    return 1024 if device.type == "cpu" else 16_384


def length_batches(lengths: Sequence[int], *, batch_size: int, max_tokens: int | None = None) -> list[list[int]]:
    """Row indices in batches of similar length: at most `batch_size` rows and `max_tokens` padded tokens."""
    batches: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        full = not batches or len(batches[-1]) == batch_size
        if not full and max_tokens is not None:  # sorted: row i is the longest so far
            full = (len(batches[-1]) + 1) * lengths[i] > max_tokens
        if full:
            batches.append([])
        batches[-1].append(i)
    return batches


class _ChunkedNll(torch.autograd.Function):
    """NLL of targets [N] from hidden states [N,D], with logits and their gradient made chunk by chunk.

    No [N,V] float32 tensor exists beyond one chunk, and the head gets no gradient. The gradient of a
    token's NLL by its hidden state is computed with the forward, while the chunk's logits are there.
    """

    @staticmethod
    def forward(ctx, h_ND: Tensor, logits_of: Callable[[Tensor], Tensor], targets_N: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        nll_N = torch.empty(h_ND.shape[0], dtype=wide_of(h_ND.dtype), device=h_ND.device)
        dh_ND = torch.empty_like(h_ND) if ctx.needs_input_grad[0] else None
        for start in range(0, h_ND.shape[0], CHUNK_TOKENS):
            chunk = slice(start, start + CHUNK_TOKENS)
            if dh_ND is None:
                nll_N[chunk] = _nll(logits_of(h_ND[chunk]), targets_N[chunk])
                continue
            h_CD = h_ND[chunk].detach().requires_grad_()
            with torch.enable_grad():
                logits_CV = logits_of(h_CD)
            dlogits_CV = nll_and_dlogits(logits_CV.detach(), targets_N[chunk], nll_N[chunk])
            (dh_ND[chunk],) = torch.autograd.grad(logits_CV, h_CD, dlogits_CV)
        ctx.dh_ND = dh_ND
        return nll_N

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dnll_N: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        return ctx.dh_ND * dnll_N[:, None].to(ctx.dh_ND.dtype), None, None


def nll_and_dlogits(logits_CV: Tensor, targets_C: Tensor, nll_C: Tensor) -> Tensor:
    """Write the NLL to `nll_C`, and over the logits its gradient by them: softmax minus one-hot.

    In place, and on a CPU a few rows at a time: passes over a whole chunk go through memory and take three
    times as long. An accelerator would lose more to the extra kernel launches.
    """
    size = CPU_SOFTMAX_TOKENS if logits_CV.device.type == "cpu" else CHUNK_TOKENS
    for start in range(0, len(targets_C), size):
        rows = slice(start, start + size)
        target_S1 = targets_C[rows, None]
        p_SV = logits_CV[rows].log_softmax(-1, dtype=nll_C.dtype)
        nll_C[rows] = -p_SV.gather(1, target_S1)[:, 0]
        p_SV.exp_().scatter_add_(1, target_S1, p_SV.new_full((1, 1), -1.0).expand_as(target_S1))
        logits_CV[rows] = p_SV
    return logits_CV


def wide_of(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _nll(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    return F.cross_entropy(logits_NV.to(wide_of(logits_NV.dtype)), targets_N, reduction="none")


def token_nll(
    h_ND: Tensor, logits_of: Callable[[Tensor], Tensor], targets_N: Tensor, *, twice_differentiable: bool = False
) -> Tensor:
    """NLL [N] in nats of each target given its hidden state, in float32 (float64 for a float64 model)."""
    if twice_differentiable:
        return _nll(logits_of(h_ND), targets_N)
    return _ChunkedNll.apply(h_ND, logits_of, targets_N)  # pyright: ignore[reportReturnType]


@dataclass(frozen=True, eq=False)
class Predicted:
    """The tokens [N] that a loss counts: their rows, the places they are predicted from, and what they are."""

    rows_N: Tensor
    places_N: Tensor
    targets_N: Tensor
    counts_B: Tensor

    def states(self, hidden_BTD: Tensor) -> Tensor:
        return hidden_BTD[self.rows_N, self.places_N]

    def means(self, nll_N: Tensor, keep_N: Tensor | None = None, counts_B: Tensor | None = None) -> Tensor:
        """Each row's mean [B] over its tokens, or over those that are kept (`counts_B` of each row); 0 where none is."""
        rows_N = self.rows_N
        if keep_N is not None:
            nll_N, rows_N = nll_N[keep_N], rows_N[keep_N]
        counts_B = self.counts_B if counts_B is None else counts_B
        sums_B = nll_N.new_zeros(counts_B.shape[0]).index_add(0, rows_N, nll_N)
        return sums_B / counts_B.clamp(min=1)


def predicted(batch: TokenBatch, scored_BT: Tensor | None = None) -> Predicted:
    """`scored_BT` marks the tokens to score (default: every real one). A row's first has nothing before it: never."""
    scored_BT = batch.mask_BT if scored_BT is None else scored_BT
    # A token is predicted from the place to its left, which must be real too.
    real_BT = scored_BT[:, 1:] & batch.mask_BT[:, :-1]
    rows_N, places_N = real_BT.nonzero(as_tuple=True)
    return Predicted(rows_N, places_N, batch.ids_BT[rows_N, places_N + 1], real_BT.sum(1))


def mean_nll(
    hidden_BTD: Tensor,
    batch: TokenBatch,
    logits_of: Callable[[Tensor], Tensor],
    *,
    scored_BT: Tensor | None = None,
    twice_differentiable: bool = False,
) -> Tensor:
    """Mean NLL [B] of each row's scored tokens given the tokens before them; 0 where there is none.

    Rows do not touch each other: a batch's loss is the sum of these, so a prompt's step does not depend on its
    neighbours.
    """
    tokens = predicted(batch, scored_BT)
    nll_N = token_nll(tokens.states(hidden_BTD), logits_of, tokens.targets_N, twice_differentiable=twice_differentiable)
    return tokens.means(nll_N)
