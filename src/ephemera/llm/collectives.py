"""Sums over processes that gradients pass through: what one process does to a shard, seen from all."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


class _Summed(torch.autograd.Function):
    """Sum over processes; each process's gradient is the whole one already."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grads[0]


class _SummedGradient(torch.autograd.Function):
    """Nothing on the way up; each process's gradient is a part of the whole, so they are summed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        total = grads[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total


class _Taken(torch.autograd.Function):
    """Some entries along a dimension; their gradients of all processes make up the whole."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, index_N: Tensor) -> Tensor:
        ctx.dim, ctx.index_N, ctx.shape = dim, index_N, x.shape
        return x.index_select(dim, index_N)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        whole = grads[0].new_zeros(ctx.shape).index_copy(ctx.dim, ctx.index_N, grads[0])
        dist.all_reduce(whole)
        return whole, None, None


def summed(x: Tensor) -> Tensor:
    """The sum of all processes' `x`. Its gradient is taken as it is: every process has the whole one."""
    out: Any = _Summed.apply(x)
    return out


def summed_gradient(x: Tensor) -> Tensor:
    """`x`, which every process has whole; the processes' gradients by it are summed."""
    out: Any = _SummedGradient.apply(x)
    return out


def taken(x: Tensor, dim: int, index_N: Tensor) -> Tensor:
    """The entries `index_N` of `x` along `dim`; each process takes others, and the gradient by `x` is whole on each."""
    out: Any = _Taken.apply(x, dim, index_N)
    return out
