"""Batches of token ids: padded, by length, and the tokens of them that a loss counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor


class TokenBatch:
    """Token ids [B,T] of some prompts, padded; `mask_BT` is true on real tokens.

    What depends on how many tokens there are, and where, is computed from `on_host`: a device would have to be waited for.
    """

    def __init__(self, ids_BT: Tensor, mask_BT: Tensor, host: TokenBatch | None = None):
        """`host`: the same batch on the CPU, if it came from there."""
        self.ids_BT, self.mask_BT, self._host = ids_BT, mask_BT, host

    @property
    def device(self) -> torch.device:
        return self.ids_BT.device

    @cached_property
    def on_host(self) -> TokenBatch:
        if self.device.type == "cpu":
            return self
        return self._host or TokenBatch(self.ids_BT.cpu(), self.mask_BT.cpu())

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Real tokens of each row."""
        return tuple(self.mask_BT.sum(1).tolist()) if self.on_host is self else self.on_host.lengths

    @property
    def padded(self) -> bool:
        return min(self.lengths) < self.mask_BT.shape[1]

    @cached_property
    def lengths_B(self) -> Tensor:
        return self.mask_BT.sum(1)

    @cached_property
    def position_ids_BT(self) -> Tensor:
        """Counted from each prompt's first real token, on either padding side."""
        return (self.mask_BT.long().cumsum(1) - 1).clamp(min=0)

    @cached_property
    def scored(self) -> ScoredTokens:
        """Every real token of a row but its first."""
        return scored_tokens(self, self.mask_BT) if self.on_host is self else self.on_host.scored.to(self.device)

    def to(self, device: torch.device | str) -> TokenBatch:
        on_host = torch.device(device).type == "cpu"
        return TokenBatch(self.ids_BT.to(device), self.mask_BT.to(device), None if on_host else self.on_host)


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
    """Padded tokens that adapt together: a CPU's caches like small batches of long prompts (docs/performance.md)."""
    return 1024 if device.type == "cpu" else 8192


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


@dataclass(frozen=True, eq=False)
class ScoredTokens:
    """The tokens [N] that a loss counts: their rows, the positions they are predicted from, and what they are."""

    rows_N: Tensor
    positions_N: Tensor
    targets_N: Tensor
    counts_B: Tensor

    def to(self, device: torch.device) -> ScoredTokens:
        return ScoredTokens(*(t.to(device) for t in (self.rows_N, self.positions_N, self.targets_N, self.counts_B)))

    def states(self, hidden_BTD: Tensor) -> Tensor:
        return hidden_BTD[self.rows_N, self.positions_N]

    def means(self, nll_N: Tensor) -> Tensor:
        """Each row's mean [B] over its tokens; 0 if it has none."""
        sums_B = nll_N.new_zeros(self.counts_B.shape[0]).index_add(0, self.rows_N, nll_N)
        return sums_B / self.counts_B.clamp(min=1)


def scored_tokens(batch: TokenBatch, scored_BT: Tensor) -> ScoredTokens:
    """`scored_BT` marks the tokens to score. A row's first has nothing before it: never."""
    # A token is predicted from the position to its left, which must be real too.
    real_BT = scored_BT[:, 1:] & batch.mask_BT[:, :-1]
    rows_N, positions_N = real_BT.nonzero(as_tuple=True)
    return ScoredTokens(rows_N, positions_N, batch.ids_BT[rows_N, positions_N + 1], real_BT.sum(1))


def last_tokens(batch: TokenBatch, counts: Sequence[int]) -> ScoredTokens:
    """So many of each row's last tokens, of a batch that is padded on the left."""
    T = batch.ids_BT.shape[1]
    scored_BT = torch.arange(T)[None] >= T - torch.tensor(counts)[:, None]
    return scored_tokens(batch.on_host, scored_BT).to(batch.device)
