"""The mean NLL over each prompt's hardest tokens: all are looked at, only those get a gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from ephemera.head import Head, token_nll
from ephemera.objective import Predicted


def mean_hardest_nll(
    hidden_BTD: Tensor,
    tokens: Predicted,
    head: Head,
    percent: int,
    *,
    twice_differentiable: bool = False,
) -> Tensor:
    """Mean NLL [B] over that share of each row's tokens whose NLL is highest.

    The head runs forward for all tokens, and for the chosen once more, with its gradient.
    """
    h_ND, kept_B = tokens.states(hidden_BTD), share_of(tokens.counts_B, percent)
    if twice_differentiable:
        nll_N = token_nll(h_ND, head, tokens.targets_N, twice_differentiable=True)
        return tokens.means(nll_N, hardest(nll_N.detach(), tokens, kept_B), kept_B)
    keep_N = hardest(token_nll(h_ND.detach(), head, tokens.targets_N), tokens, kept_B)
    nll_N = token_nll(h_ND[keep_N], head, tokens.targets_N[keep_N])
    return nll_N.new_zeros(len(kept_B)).index_add(0, tokens.rows_N[keep_N], nll_N) / kept_B.clamp(min=1)


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
