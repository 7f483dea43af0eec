"""The mean NLL over each prompt's hardest tokens: all are looked at, only those get a gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ephemera.objective import CHUNK_TOKENS, Predicted, TokenBatch, nll_and_dlogits, predicted, token_nll, wide_of


def mean_hardest_nll(
    hidden_BTD: Tensor,
    batch: TokenBatch,
    logits_of: Callable[[Tensor], Tensor],
    percent: int,
    *,
    scored_BT: Tensor | None = None,
    weight_VD: Tensor | None = None,
    twice_differentiable: bool = False,
) -> Tensor:
    """Mean NLL [B] over that share of each row's scored tokens whose NLL is highest.

    With `weight_VD`, the weight of a plain linear head, the head runs forward once for all tokens and backward for the
    chosen alone. Without it, or where a row is longer than a chunk, it runs forward for the chosen once more.
    """
    tokens = predicted(batch, scored_BT)
    h_ND, kept_B = tokens.states(hidden_BTD), share_of(tokens.counts_B, percent)
    if twice_differentiable:
        nll_N = token_nll(h_ND, logits_of, tokens.targets_N, twice_differentiable=True)
        return tokens.means(nll_N, hardest(nll_N.detach(), tokens, kept_B), kept_B)
    counts = tokens.counts_B.tolist()
    if weight_VD is not None and max(counts) <= CHUNK_TOKENS:
        nll_N, keep_N = _HardestNll.apply(h_ND, logits_of, weight_VD, tokens, counts, kept_B)  # pyright: ignore[reportGeneralTypeIssues]
        return tokens.means(nll_N, keep_N, kept_B)
    keep_N = hardest(token_nll(h_ND.detach(), logits_of, tokens.targets_N), tokens, kept_B)
    nll_N = token_nll(h_ND[keep_N], logits_of, tokens.targets_N[keep_N])
    return nll_N.new_zeros(len(counts)).index_add(0, tokens.rows_N[keep_N], nll_N) / kept_B.clamp(min=1)


def share_of(counts_B: Tensor, percent: int) -> Tensor:
    """So many percent of each row's tokens, rounded up."""
    return (counts_B * percent + 99) // 100


def hardest(nll_N: Tensor, tokens: Predicted, kept_B: Tensor) -> Tensor:
    """Which tokens [N] are among their row's `kept_B` highest; of equal ones the first."""
    order_N = nll_N.argsort(descending=True, stable=True)
    order_N = order_N[tokens.rows_N[order_N].argsort(stable=True)]  # row by row
    rows_N = tokens.rows_N[order_N]
    rank_N = torch.arange(len(order_N), device=nll_N.device) - (tokens.counts_B.cumsum(0) - tokens.counts_B)[rows_N]
    return torch.zeros_like(order_N, dtype=torch.bool).index_copy(0, order_N, rank_N < kept_B[rows_N])


class _HardestNll(torch.autograd.Function):
    """NLL of all targets [N], and which are their row's hardest; a gradient for those alone.

    Whole rows make a chunk, so that its logits, turned into their gradient in place, are there when the choice falls.
    """

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx,
        h_ND: Tensor,
        logits_of: Callable[[Tensor], Tensor],
        weight_VD: Tensor,
        tokens: Predicted,
        counts: Sequence[int],
        kept_B: Tensor,
    ) -> tuple[Tensor, Tensor]:
        nll_N = torch.empty(h_ND.shape[0], dtype=wide_of(h_ND.dtype), device=h_ND.device)
        keep_N = torch.zeros_like(nll_N, dtype=torch.bool)
        dh_ND = torch.zeros_like(h_ND)
        for first, last, chunk in _whole_rows(counts):
            targets_C = tokens.targets_N[chunk]
            dlogits_CV = nll_and_dlogits(logits_of(h_ND[chunk]), targets_C, nll_N[chunk])
            counts_B = tokens.counts_B[first:last]
            some = Predicted(tokens.rows_N[chunk] - first, tokens.places_N[chunk], targets_C, counts_B)
            keep_N[chunk] = hardest(nll_N[chunk], some, kept_B[first:last])
            (chosen_S,) = keep_N[chunk].nonzero(as_tuple=True)
            dh_ND[chunk].index_copy_(0, chosen_S, dlogits_CV.index_select(0, chosen_S) @ weight_VD)
        ctx.dh_ND = dh_ND
        ctx.mark_non_differentiable(keep_N)
        return nll_N, keep_N

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dnll_N: Tensor, _dkeep_N: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        """Only chosen tokens have a gradient to pass on: the mean is over them."""
        return ctx.dh_ND * dnll_N[:, None].to(ctx.dh_ND.dtype), None, None, None, None, None


def _whole_rows(counts: Sequence[int]) -> Iterator[tuple[int, int, slice]]:
    """(first row, row after the last, their tokens) of chunks that no row crosses."""
    first, start, size = 0, 0, 0
    for row, count in enumerate(counts):
        if size and size + count > CHUNK_TOKENS:
            yield first, row, slice(start, start + size)
            first, start, size = row, start + size, 0
        size += count
    if size:
        yield first, len(counts), slice(start, start + size)
