"""A batch without its padding: the real tokens of all rows in one line, padded only inside attention and LoRA.

A decoder is token by token but for attention, so its linear layers, norms and the rest need no padded positions at all.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from ephemera.batch import TokenBatch

HeadPositions = tuple[Tensor, Tensor, Tensor]


class Packing:
    """Where each of N real tokens stands in a batch of B rows that are padded on the right to T positions.

    For each of P = B * T positions `token_of_P` is the token there (at padding the row's last one); `position_of_N` is each
    token's position in B * T, `positions_1N` that in its row; `padding_of_P` are the positions without a token. All are
    computed on the host.
    """

    def __init__(self, lengths: Sequence[int]):
        self.lengths, self.device = tuple(lengths), torch.device("cpu")
        self.T = max(self.lengths)
        self.padded = min(self.lengths) < self.T
        lengths_B1 = torch.tensor(self.lengths)[:, None]
        positions_1T = torch.arange(self.T)[None]
        token_of_P = (positions_1T.minimum(lengths_B1 - 1) + lengths_B1.cumsum(0) - lengths_B1).flatten()
        real_P = (positions_1T < lengths_B1).flatten()
        position_of_N = real_P.nonzero()[:, 0]
        self.token_of_P, self.position_of_N = token_of_P, position_of_N
        self.padding_of_P = (~real_P).nonzero()[:, 0]
        self.positions_1N = (position_of_N % self.T)[None]
        self._heads: dict[tuple[int, int, int], HeadPositions] = {}
        self._joints: dict[tuple[int, int, int], tuple[Tensor, Tensor]] = {}

    def to(self, device: torch.device) -> Packing:
        moved = copy.copy(self)
        moved.device, moved._heads, moved._joints = device, {}, {}
        moved.token_of_P, moved.position_of_N = self.token_of_P.to(device), self.position_of_N.to(device)
        moved.padding_of_P, moved.positions_1N = self.padding_of_P.to(device), self.positions_1N.to(device)
        moved.__dict__.pop("later_TT", None)
        return moved

    def rows(self, x_ND: Tensor) -> Tensor:
        """[N,...] as rows [B,T,...]; what stands at padded positions is finite and must not be used."""
        x_PD = x_ND.index_select(0, self.token_of_P) if self.padded else x_ND
        return x_PD.unflatten(0, (len(self.lengths), self.T))

    def rows_or_zero(self, x_ND: Tensor) -> Tensor:
        """[N,...] as rows [B,T,...], zero at padded positions."""
        x_BTD = self.rows(x_ND)
        if self.padded:  # filling what was copied too much takes half the time of copying into zeros
            x_BTD.flatten(0, 1).index_fill_(0, self.padding_of_P, 0)
        return x_BTD

    def tokens(self, x_BTD: Tensor) -> Tensor:
        """Rows [B,T,...] as their real tokens [N,...]."""
        x_PD = x_BTD.flatten(0, 1)
        return x_PD.index_select(0, self.position_of_N) if self.padded else x_PD

    def heads(self, x_NHC: Tensor, groups: int, block: int) -> Tensor:
        """[N,H,C] as [Z,C], Z = B * H * T: the queries of block after block, each as `view_blocks` shows it.

        The heads of a group stand one after the other. Padded positions as in `rows`.
        """
        from_Z, _, _ = self._head_positions(x_NHC.shape[1], groups, block)
        return x_NHC.reshape(-1, x_NHC.shape[-1]).index_select(0, from_Z)

    def heads_or_zero(self, x_NHC: Tensor, groups: int, block: int) -> Tensor:
        """As `heads`, zero at padded positions."""
        x_ZC = self.heads(x_NHC, groups, block)
        _, _, padding = self._head_positions(x_NHC.shape[1], groups, block)
        return x_ZC.index_fill_(0, padding, 0) if self.padded else x_ZC

    def tokens_of_heads(self, x_ZC: Tensor, heads: int, groups: int, block: int) -> Tensor:
        """What `heads` made, back to [N,H,C]."""
        _, to_Z, _ = self._head_positions(heads, groups, block)
        return x_ZC.index_select(0, to_Z).view(-1, heads, x_ZC.shape[-1])

    def spans(self, block: int) -> list[tuple[int, int]]:
        """The first position of each block, and that after its last: blocks of at least `block` positions, about alike."""
        count = max(1, self.T // block)
        return [(self.T * i // count, self.T * (i + 1) // count) for i in range(count)]

    def view_blocks(self, x_ZC: Tensor, heads: int, groups: int, block: int) -> list[Tensor]:
        """What `heads` made as [B*G, (H/G)*positions, C] of each block."""
        X = len(self.lengths) * groups
        sizes = [len(self.lengths) * heads * (end - start) for start, end in self.spans(block)]
        return [x.view(X, -1, x.shape[-1]) for x in x_ZC.split(sizes)]

    def _head_positions(self, heads: int, groups: int, block: int) -> HeadPositions:
        """For each (block, row, group, head of it, position) its (token, head); for each of those that position; padding."""
        key = (heads, groups, block)
        if key not in self._heads:
            B, T = len(self.lengths), self.T

            def in_blocks(x_BTGJ: Tensor) -> Tensor:
                x_BGJT = x_BTGJ.permute(0, 2, 3, 1)
                return torch.cat([x_BGJT[..., start:end].flatten() for start, end in self.spans(block)])

            token_BT11 = self.token_of_P.view(B, T, 1, 1)
            head_GJ = torch.arange(heads, device=self.device).view(groups, -1)
            from_Z = in_blocks(token_BT11 * heads + head_GJ)
            position_Z = in_blocks(torch.arange(len(from_Z), device=self.device).view(B, T, groups, -1))
            z_PH = torch.empty_like(position_Z).scatter_(
                0, position_Z, torch.arange(len(position_Z), device=self.device)
            )
            z_PH = z_PH.view(B * T, heads)
            real_P = torch.zeros(B * T, dtype=torch.bool, device=self.device).index_fill_(0, self.position_of_N, True)
            self._heads[key] = from_Z, z_PH[real_P].flatten(), z_PH[~real_P].flatten()
        return self._heads[key]

    def joint_positions(self, heads: int, groups: int, block: int) -> tuple[Tensor, Tensor]:
        """For queries, keys and values that stand side by side, [N, heads + 2 groups, C], to be gathered by one index: from
        which (token, head) each position of `heads` comes, queries first, then keys, then values; and the way back."""
        key = (heads, groups, block)
        if key not in self._joints:
            width = heads + 2 * groups
            froms, tos, first, offset = [], [], 0, 0
            for count, size in ((heads, block), (groups, self.T), (groups, self.T)):
                from_Z, to_Z, _ = self._head_positions(count, groups, size)
                froms.append(from_Z // count * width + first + from_Z % count)
                tos.append(to_Z.view(-1, count) + offset)
                first, offset = first + count, offset + len(from_Z)
            self._joints[key] = torch.cat(froms), torch.cat(tos, 1).flatten()
        return self._joints[key]

    @cached_property
    def later_TT(self) -> Tensor:
        """True where a position comes after the one that looks."""
        return torch.ones(self.T, self.T, dtype=torch.bool, device=self.device).triu(1)


class Layout:
    """A batch's real tokens [N] in the order of `ids_BT[mask_BT]`, and the way there and back."""

    def __init__(self, batch: TokenBatch):
        """Of a batch on the host."""
        self.shape, self.padded = batch.mask_BT.shape, batch.padded
        self.packing = Packing(batch.lengths)
        self.positions_N = batch.mask_BT.flatten().nonzero()[:, 0]  # in B * T

    def to(self, device: torch.device) -> Layout:
        moved = copy.copy(self)
        moved.packing, moved.positions_N = self.packing.to(device), self.positions_N.to(device)
        return moved

    def real(self, x_BTD: Tensor) -> Tensor:
        """[B,T,...] -> [N,...]: what stands at real tokens."""
        x_PD = x_BTD.flatten(0, 1)
        return x_PD.index_select(0, self.positions_N) if self.padded else x_PD

    def back(self, x_ND: Tensor) -> Tensor:
        """[N,...] -> [B,T,...], zero at padding."""
        if self.padded:
            x_ND = x_ND.new_zeros(self.shape.numel(), *x_ND.shape[1:]).index_copy(0, self.positions_N, x_ND)
        return x_ND.unflatten(0, self.shape)
