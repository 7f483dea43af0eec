"""A batch's adapters as the loop holds them: one buffer for every A and one for every B, so that a step is one multiply-add each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from ephemera.lora import LoraBatch


@dataclass(frozen=True, eq=False)
class FlatLora:
    """Row b of `A_BN` [B, sum of R*I] and of `B_BN` [B, sum of R*O] is prompt b's adapter, or the gradient by it.

    Each B lies transposed, which is how its products read it fastest (docs/findings.md). A value, as `LoraBatch` is.
    `like`: an adapter with the same projections and shapes.
    """

    A_BN: Tensor
    B_BN: Tensor
    like: LoraBatch

    @staticmethod
    def of(lora: LoraBatch) -> FlatLora:
        return FlatLora(
            torch.cat([A_BRI.flatten(1) for A_BRI in lora.A], 1),
            torch.cat([B_BOR.mT.flatten(1) for B_BOR in lora.B], 1),
            lora,
        )

    @cached_property
    def lora(self) -> LoraBatch:
        """The same numbers as views, one per matrix."""
        A = [a.unflatten(1, like.shape[1:]) for a, like in zip(self._split(self.A_BN, 0), self.like.A, strict=True)]
        B = [
            b.unflatten(1, like.mT.shape[1:]).mT for b, like in zip(self._split(self.B_BN, 1), self.like.B, strict=True)
        ]
        return self.like.with_tensors([*A, *B])

    @property
    def tensors(self) -> tuple[Tensor, Tensor]:
        return self.A_BN, self.B_BN

    def with_tensors(self, tensors: Sequence[Tensor]) -> FlatLora:
        A_BN, B_BN = tensors
        return replace(self, A_BN=A_BN, B_BN=B_BN)

    def detach(self) -> FlatLora:
        return self.with_tensors([t.detach() for t in self.tensors])

    def leaves(self) -> FlatLora:
        """The same values as fresh autograd leaves."""
        return self.with_tensors([t.detach().requires_grad_() for t in self.tensors])

    def step(self, grads: FlatLora, rates_BM: Tensor) -> FlatLora:
        """LDTTA Eq. 14: phi_m <- phi_m - rate_m * grad_m, the same rate for A and B of a projection."""
        return self.with_tensors(
            [
                torch.addcmul(t, g, self._spread(rates_BM.to(t.dtype), kind), value=-1)
                for kind, (t, g) in enumerate(zip(self.tensors, grads.tensors, strict=True))
            ]
        )

    def scaled(self, factors_BM: Tensor) -> FlatLora:
        """Each projection's A and B times a number."""
        return self.with_tensors([t * self._spread(factors_BM, kind) for kind, t in enumerate(self.tensors)])

    def without_A(self) -> FlatLora:
        """Zero for A: a gradient that moves B only."""
        return replace(self, A_BN=torch.zeros_like(self.A_BN))

    def dot_BM(self, other: FlatLora) -> Tensor:
        """Inner product of each prompt's and projection's numbers, those of A and of B together."""
        A, B = (
            self._split(mine * theirs, kind)
            for kind, (mine, theirs) in enumerate(zip(self.tensors, other.tensors, strict=True))
        )
        return torch.stack([a.sum(1) + b.sum(1) for a, b in zip(A, B, strict=True)], 1)

    def where(self, keep_B: Tensor, other: FlatLora | None) -> FlatLora:
        """This batch's row where `keep_B` is true, the other's row elsewhere; None: zero."""
        others = (0.0, 0.0) if other is None else other.tensors
        return self.with_tensors(
            [torch.where(keep_B[:, None], a, b) for a, b in zip(self.tensors, others, strict=True)]
        )

    def finite_B(self) -> Tensor:
        """Which rows hold only finite numbers: bool [B]."""
        return self.A_BN.isfinite().all(1) & self.B_BN.isfinite().all(1)

    @cached_property
    def _sizes(self) -> tuple[list[int], list[int]]:
        return [t.shape[1:].numel() for t in self.like.A], [t.shape[1:].numel() for t in self.like.B]

    def _split(self, flat_BN: Tensor, kind: int) -> tuple[Tensor, ...]:
        return flat_BN.split_with_sizes(self._sizes[kind], 1)

    def _spread(self, x_BM: Tensor, kind: int) -> Tensor:
        """[B,M] -> [B,N]: a number for each entry of its projection's matrix."""
        columns = x_BM.split(1, 1)
        return torch.cat([x.expand(-1, size) for x, size in zip(columns, self._sizes[kind], strict=True)], 1)
