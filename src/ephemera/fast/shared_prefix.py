"""Prompts that begin alike: what their first tokens give is computed once, for a batch, or for all that come.

A decoder is causal: while no adapter does anything yet, the first P tokens of a prompt have the same states whatever
follows. Rows of a batch find them in its first row; a server's prompts, which all begin with the words of the chat template,
find them where an earlier prompt left them (`PrefixCache`).
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ephemera.batch import ScoredTokens, TokenBatch
from ephemera.fast.packing import Packing

LEAST = 0.1  # of all tokens need not be computed again; fewer are not worth the gathering


@dataclass(frozen=True, eq=False)
class Prefix:
    """The first tokens of some prompts, and what each point of a pass gave for them: [P,...]."""

    ids: tuple[int, ...]
    values: dict[Hashable, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Shared:
    """Which of all N tokens to compute [U], and where each finds itself [N]: among those, or after what `kept` has of P.

    `record`: a beginning whose values this pass leaves for later ones. `tokens`: of so many all rows look in the first row.
    """

    tokens_U: Tensor | None = None  # None: all
    from_N: Tensor | None = None
    kept: Prefix | None = None
    record: Prefix | None = None
    tokens: int = 0

    def unique(self, x_ND: Tensor) -> Tensor:
        return x_ND if self.tokens_U is None else x_ND.index_select(0, self.tokens_U)

    def expand(self, x_UD: Tensor, name: Hashable) -> Tensor:
        """`name`: where in the pass this is, the same in every pass."""
        x_ND = x_UD if self.kept is None else torch.cat([self.kept.values[name], x_UD])
        x_ND = x_ND if self.from_N is None else x_ND.index_select(0, self.from_N)
        if self.record is not None:
            self.record.values[name] = x_ND[: len(self.record.ids)].clone()
        return x_ND


def common(ids_N: Tensor, packing: Packing) -> int:
    """With how many tokens all rows begin."""
    ids_BP = packing.rows(ids_N)[:, : min(packing.lengths)]
    return int((ids_BP == ids_BP[:1]).all(0).long().cumprod(0).sum())


def within_batch(ids_N: Tensor, packing: Packing) -> Shared | None:
    """How the rows of a batch share their beginning; None for a single row, or so few tokens that nothing is gained."""
    rows = len(packing.lengths)
    tokens = common(ids_N, packing) if rows > 1 else 0
    if not tokens or tokens * (rows - 1) < LEAST * sum(packing.lengths):
        return None
    return in_first_row(packing.position_of_N // packing.T, packing.positions_1N[0], tokens)


def of_scored(shared: Shared, scored: ScoredTokens, batch: TokenBatch) -> Shared | None:
    """The same of every token that a row predicts: those that the first row predicts from the same state are its, or they
    are known. The last shared token predicts words of the row's own."""
    kept, record = shared.kept, shared.record
    if kept is None and record is None and shared.tokens <= 1:
        return None
    position_N = batch.position_ids_BT[scored.rows_N, scored.positions_N]
    if kept is not None:
        return in_kept(position_N, len(kept.ids) - 1, kept)
    repeated = in_first_row(scored.rows_N, position_N, shared.tokens - 1) if shared.tokens > 1 else Shared()
    if record is not None:  # one token less, among the same values
        record = Prefix(record.ids[:-1], record.values)
    return replace(repeated, record=record)


def in_first_row(row_N: Tensor, position_N: Tensor, tokens: int) -> Shared:
    """Rows find what stands at their first `tokens` positions in row 0, which has all of those."""
    repeated_N = (row_N > 0) & (position_N < tokens)
    own_N = (~repeated_N).long().cumsum(0) - 1
    return Shared((~repeated_N).nonzero()[:, 0], torch.where(repeated_N, position_N, own_N), tokens=tokens)


def in_kept(position_N: Tensor, tokens: int, kept: Prefix) -> Shared:
    """All rows find what stands at their first `tokens` positions in `kept`."""
    repeated_N = position_N < tokens
    own_N = (~repeated_N).long().cumsum(0) - 1 + tokens
    from_N = torch.where(repeated_N, position_N, own_N)
    in_order = bool((from_N == torch.arange(len(from_N), device=from_N.device)).all())  # a single prompt
    return Shared((~repeated_N).nonzero()[:, 0], None if in_order else from_N, kept)


class PrefixCache:
    """Token sequences that many prompts begin with, as a chat template's own, and what passes gave for them."""

    def __init__(self, known: Sequence[Sequence[int]]):
        self.known = sorted((tuple(ids) for ids in known if ids), key=len, reverse=True)
        self._kept: dict[Hashable, Prefix] = {}

    def meet(
        self, key: Hashable, ids_N: Tensor, packing: Packing, last: Hashable, within: Shared | None
    ) -> Shared | None:
        """How a pass over these prompts is shared: with what was kept of their beginning; or as `within` says, and leaving
        its own for later passes.

        `key`: passes that give the same. `last`: what such a pass records last; what an error cut short is made anew.
        """
        rows = len(packing.lengths)
        alike = common(ids_N, packing) if rows > 1 else packing.lengths[0]
        for ids in self.known:
            if len(ids) > alike or tuple(ids_N[: len(ids)].tolist()) != ids or rows * len(ids) < LEAST * len(ids_N):
                continue
            kept = self._kept.get((key, ids))
            if kept is not None and last in kept.values:
                return in_kept(packing.positions_1N[0], len(ids), kept)
            self._kept[key, ids] = Prefix(ids)
            return replace(within or Shared(), record=self._kept[key, ids])
        return within
