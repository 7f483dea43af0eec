"""RMS norms with their backward pass written out: the same values (in float64 more exact ones), in half the operations."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ephemera.llm.architectures import ARCHITECTURES
from ephemera.llm.precision import wide_of
from ephemera.llm.replaced import child

# transformers' classes with one and the same forward: weight * (x / rms(x)) in float32, cast before the weight
NORMS = {known.rms_norm for known in ARCHITECTURES.values()} - {None}


class _RmsNorm(torch.autograd.Function):
    """Forward as in transformers, operation by operation; autograd would keep and revisit each of them.

    In float64 throughout for a float64 model, where theirs goes through float32.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        wide = x.to(wide_of(x.dtype))
        r = _rms(wide, eps)
        ctx.save_for_backward(x, weight, r)
        ctx.eps = eps
        return weight * (wide * r).to(x.dtype)

    @staticmethod
    def backward(ctx, dy: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight, r = ctx.saved_tensors
        wide = x.to(wide_of(x.dtype))
        if torch.is_grad_enabled():  # create_graph: what was kept would count as a constant
            r = _rms(wide, ctx.eps)
        normed = wide * r
        dweight = (dy * normed.to(x.dtype)).flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        dnormed = (dy * weight).to(wide.dtype)
        inner = torch.linalg.vecdot(dnormed, normed)[..., None] / x.shape[-1]
        return torch.addcmul(dnormed, normed, inner, value=-1).mul(r).to(x.dtype), dweight, None


def _rms(wide: Tensor, eps: float) -> Tensor:
    return torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)


class FastNorm(nn.Module):
    """Stands where a norm of a known class stood; it reads that norm's weight when it runs."""

    def __init__(self, norm: nn.Module):
        super().__init__()
        self.norm: Any = norm

    @property
    def weight(self) -> Tensor:
        return self.norm.weight

    @property
    def variance_epsilon(self) -> float:
        return self.norm.variance_epsilon

    def forward(self, x: Tensor) -> Tensor:
        weight, eps = self.weight, self.variance_epsilon
        if not torch.is_grad_enabled() and x.dtype == torch.float32 and x.device.type == "cpu":
            # torch's own, the same bits there: half the time of the above at one token, 2 % of decoding
            return F.rms_norm(x, weight.shape, weight, eps)
        return _RmsNorm.apply(x, weight, eps)  # pyright: ignore[reportReturnType]


NormPlace = tuple[nn.Module, str, FastNorm]


def fast_norms(model: nn.Module) -> list[NormPlace]:
    """A stand-in for every norm of a known class; values change in float64 only."""
    known = [(path, module) for path, module in model.named_modules() if type(module).__name__ in NORMS]
    return [(*child(model, path), FastNorm(norm)) for path, norm in known]
