"""The prompt's own next-token NLL, per prompt (LDTTA Eq. 7 and 9), and batches of prompts by length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from ephemera.fast.packing import Packing, worked_out_on_host
from ephemera.fast.shared_prefix import LEAST, Prefix, Shared, common, in_first_row, in_kept
from ephemera.fast.vocab_loss import Head, token_nll


@dataclass(frozen=True, eq=False)
class TokenBatch:
    """Token ids [B,T] of some prompts, padded; `mask_BT` is true on real tokens.

    What depends on how many tokens there are and where is worked out on the host, where batches come from.
    """

    ids_BT: Tensor
    mask_BT: Tensor
    host: TokenBatch | None = None  # the same there, where it came from

    @property
    def device(self) -> torch.device:
        return self.ids_BT.device

    @property
    def on_host(self) -> TokenBatch:
        return self if self.device.type == "cpu" else self.host or self._fetched

    @cached_property
    def _fetched(self) -> TokenBatch:
        return TokenBatch(self.ids_BT.cpu(), self.mask_BT.cpu())

    @cached_property
    def padded(self) -> bool:
        return not bool(self.mask_BT.all()) if self.on_host is self else self.on_host.padded

    @cached_property
    def lengths_B(self) -> Tensor:
        return self.mask_BT.sum(1)

    @cached_property
    def position_ids_BT(self) -> Tensor:
        """Counted from each prompt's first real token, on either padding side."""
        return (self.mask_BT.long().cumsum(1) - 1).clamp(min=0)

    @worked_out_on_host
    def packing(self) -> Packing:
        """The real tokens alone, in the order of `ids_BT[mask_BT]`."""
        return Packing(tuple(self.lengths_B.tolist()), self.device)

    @worked_out_on_host
    def predicted(self) -> ScoredTokens:
        """Every real token of a row but its first."""
        return predicted(self, self.mask_BT)

    @cached_property
    def beginning(self) -> int:
        """With how many tokens all rows begin; 0 of a single row, or of so few that nothing is gained by it."""
        rows = self.ids_BT.shape[0]
        tokens = common(self.real(self.ids_BT), self.packing) if rows > 1 else 0
        return tokens if tokens * (rows - 1) >= LEAST * sum(self.packing.lengths) else 0

    @cached_property
    def shared(self) -> Shared | None:
        if not self.beginning:
            return None
        return in_first_row(self.packing.place_of_N // self.packing.T, self.packing.positions_1N[0], self.beginning)

    @worked_out_on_host
    def places_N(self) -> Tensor:
        """Of each real token its place in B * T."""
        return self.mask_BT.flatten().nonzero()[:, 0]

    def real(self, x_BTD: Tensor) -> Tensor:
        """[B,T,...] -> [N,...]: what stands at real tokens."""
        x_PD = x_BTD.flatten(0, 1)
        return x_PD.index_select(0, self.places_N) if self.padded else x_PD

    def back(self, x_ND: Tensor) -> Tensor:
        """[N,...] -> [B,T,...], zero at padding."""
        if self.padded:
            x_ND = x_ND.new_zeros(self.mask_BT.numel(), *x_ND.shape[1:]).index_copy(0, self.places_N, x_ND)
        return x_ND.unflatten(0, self.mask_BT.shape)

    def to(self, device: torch.device | str) -> TokenBatch:
        on_host = torch.device(device).type == "cpu"
        return TokenBatch(self.ids_BT.to(device), self.mask_BT.to(device), None if on_host else self.on_host)

    def ready(self) -> None:
        """Move what steps need to know of the tokens' places, before the first: from then on nothing waits."""
        packing, _ = self.packing, self.padded
        places = [packing.place_of_N, packing.token_of_P, packing.padding_of_P, packing.positions_1N]
        assert all(x.device == self.device for x in (self.predicted.rows_N, self.places_N, *places))


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
    """The tokens [N] that a loss counts: their rows, the places they are predicted from, and what they are."""

    rows_N: Tensor
    places_N: Tensor
    targets_N: Tensor
    counts_B: Tensor

    def to(self, device: torch.device) -> ScoredTokens:
        return ScoredTokens(*(t.to(device) for t in (self.rows_N, self.places_N, self.targets_N, self.counts_B)))

    def states(self, hidden_BTD: Tensor) -> Tensor:
        return hidden_BTD[self.rows_N, self.places_N]

    def repeated(self, batch: TokenBatch, shared: Shared) -> Shared | None:
        """Of every token that a row predicts: those that the first row predicts from the same state are its, or they are
        known. The last shared token predicts words of the row's own."""
        kept, record = shared.kept, shared.record
        if kept is None and record is None and shared.tokens <= 1:
            return None
        place_N = batch.position_ids_BT[self.rows_N, self.places_N]
        if kept is not None:
            return in_kept(place_N, len(kept.ids) - 1, kept)
        repeated = in_first_row(self.rows_N, place_N, shared.tokens - 1) if shared.tokens > 1 else Shared()
        if record is not None:  # one token less, among the same values
            record = Prefix(record.ids[:-1], record.values)
        return replace(repeated, record=record)

    def means(self, nll_N: Tensor) -> Tensor:
        """Each row's mean [B] over its tokens; 0 if it has none."""
        sums_B = nll_N.new_zeros(self.counts_B.shape[0]).index_add(0, self.rows_N, nll_N)
        return sums_B / self.counts_B.clamp(min=1)


def predicted(batch: TokenBatch, scored_BT: Tensor) -> ScoredTokens:
    """`scored_BT` marks the tokens to score. A row's first has nothing before it: never."""
    # A token is predicted from the place to its left, which must be real too.
    real_BT = scored_BT[:, 1:] & batch.mask_BT[:, :-1]
    rows_N, places_N = real_BT.nonzero(as_tuple=True)
    return ScoredTokens(rows_N, places_N, batch.ids_BT[rows_N, places_N + 1], real_BT.sum(1))


def last_tokens(batch: TokenBatch, counts: Sequence[int]) -> ScoredTokens:
    """So many of each row's last tokens, of a batch that is padded on the left."""
    T = batch.ids_BT.shape[1]
    scored_BT = torch.arange(T)[None] >= T - torch.tensor(counts)[:, None]
    return predicted(batch.on_host, scored_BT).to(batch.device)


def mean_nll(
    hidden_BTD: Tensor,
    batch: TokenBatch,
    head: Head,
    *,
    tokens: ScoredTokens | None = None,
    shared: Shared | None = None,
    twice_differentiable: bool = False,
) -> Tensor:
    """Mean NLL [B] of each row's scored tokens (default: all) given the tokens before them; 0 where there is none.

    `shared`: as the pass that gave the states says; what it ran once goes through the head once. Rows do not touch each other: a batch's loss is the sum of these, so a prompt's step does not depend on its
    neighbours.
    """
    repeated = None
    if tokens is None:
        tokens = batch.predicted
        repeated = None if shared is None else tokens.repeated(batch, shared)
    nll_N = token_nll(
        tokens.states(hidden_BTD),
        head,
        tokens.targets_N,
        shared=repeated,
        twice_differentiable=twice_differentiable,
    )
    return tokens.means(nll_N)
