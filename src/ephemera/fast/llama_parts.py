"""What a written-out decoder layer is made of: the plan of a pass, a layer's adapters, and its small operations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ephemera.fast.cpu_attention import KeysValues
from ephemera.fast.packing import Packing
from ephemera.fast.shared_prefix import Shared
from ephemera.llm.precision import wide_of


class Place(NamedTuple):
    """An adapter's place in its layer: the linear map's path there, and its A and B among the pass's factors."""

    path: str
    A: int
    B: int


class PassPlan:
    """What all layers of one pass have in common."""

    def __init__(
        self,
        packing: Packing,
        scaling: float,
        shared: Shared,
        adapters_are_zero: bool,
        cached: KeysValues | None = None,
    ):
        """`adapters_are_zero`: every B is zero, so adapters change nothing yet, and only B has a gradient. `cached`: where
        each layer leaves its keys and values."""
        self.packing, self.scaling, self.shared, self.cached = packing, scaling, shared, cached
        self.flat = adapters_are_zero
        self._sin: tuple[Tensor, Tensor] | None = None

    def signed_sin(self, sin_1NC: Tensor) -> Tensor:
        """sin with the sign that rotating halves gives it: [N,1,C]. The same tensor comes to every layer of one kind."""
        if self._sin is None or self._sin[0] is not sin_1NC:
            half = sin_1NC.shape[-1] // 2
            self._sin = sin_1NC, torch.cat([-sin_1NC[0, :, :half], sin_1NC[0, :, half:]], 1)[:, None]
        return self._sin[1]


class LayerAdapters:
    """A layer's adapters: what they add, and their gradients (LDTTA Eq. 6)."""

    def __init__(self, places: Sequence[Place], factors: Sequence[Tensor], plan: PassPlan):
        self.places, self.factors, self.plan = places, factors, plan
        self.gradients: list[Tensor | None] = [None] * len(factors)

    def add(self, x_NI: Tensor, outputs: dict[str, Tensor]) -> None:
        """Add `scaling * B A x` to the output of each adapted map that reads `x`."""
        pairs = [pair for pair in self.places if pair.path in outputs]
        if not pairs or self.plan.flat:
            return
        packing, scaling = self.plan.packing, self.plan.scaling
        rows_BTI = packing.rows(x_NI)
        xa_BTS = torch.bmm(rows_BTI, self._joint_A(pairs, x_NI.dtype).mT)
        for pair, xa_BTR in zip(
            pairs, xa_BTS.split_with_sizes([self.factors[p.A].shape[1] for p in pairs], 2), strict=True
        ):
            delta_BTO = torch.bmm(xa_BTR, self.factors[pair.B].mT.to(x_NI.dtype))
            outputs[pair.path].add_(packing.tokens(delta_BTO), alpha=scaling)

    def backward(self, x_NI: Tensor | None, doutputs: dict[str, Tensor], dx_NI: Tensor | None) -> None:
        """Note the gradients by A and B of each adapted map that reads `x`, and add that by `x` to `dx_NI`."""
        pairs = [pair for pair in self.places if pair.path in doutputs]
        if not pairs:
            return
        assert x_NI is not None
        packing, scaling, dtype = self.plan.packing, self.plan.scaling, x_NI.dtype
        rows_BTI, A_BSI = packing.rows(x_NI), self._joint_A(pairs, dtype)
        ranks = [self.factors[p.A].shape[1] for p in pairs]
        xa_BTS = torch.bmm(rows_BTI, A_BSI.mT)
        dxa: list[Tensor] = []
        for pair, xa_BTR in zip(pairs, xa_BTS.split_with_sizes(ranks, 2), strict=True):
            dy_BTO, B_BOR = packing.rows_or_zero(doutputs[pair.path]), self.factors[pair.B]
            self.gradients[pair.B] = (torch.bmm(xa_BTR.mT, dy_BTO).to(B_BOR.dtype) * scaling).mT
            if not self.plan.flat:
                dxa.append(torch.bmm(dy_BTO, B_BOR.mT.to(dtype).mT))
        if self.plan.flat:  # B is zero: so are the gradients by A, and by x through here
            return
        dxa_BTS = torch.cat(dxa, 2).mul_(scaling)
        for pair, dA_BRI in zip(pairs, torch.bmm(dxa_BTS.mT, rows_BTI).split_with_sizes(ranks, 1), strict=True):
            self.gradients[pair.A] = dA_BRI.to(self.factors[pair.A].dtype)
        if dx_NI is not None:
            dx_NI.add_(packing.tokens(torch.bmm(dxa_BTS, A_BSI)))

    def _joint_A(self, places: Sequence[Place], dtype: torch.dtype) -> Tensor:
        As = [self.factors[place.A] for place in places]
        return (As[0] if len(As) == 1 else torch.cat(As, 1)).to(dtype)


def qkv(attention: Any) -> tuple[nn.Linear, nn.Linear, nn.Linear]:
    return attention.q_proj, attention.k_proj, attention.v_proj


def parts(all_AC: Tensor, heads: int, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of `Packing.joint_positions`."""
    unit = len(all_AC) // (heads + 2 * groups)
    q_ZC, k_ZC, v_ZC = all_AC.split_with_sizes([unit * heads, unit * groups, unit * groups])
    return q_ZC, k_ZC, v_ZC


def side_by_side(x_NI: Tensor, maps: Sequence[nn.Linear]) -> Tensor:
    """Several linear maps of one input, in one tensor [N, sum of O]."""
    if x_NI.dtype not in (torch.float32, torch.float64):  # whose fast products write only to whole tensors
        return torch.cat([F.linear(x_NI, m.weight, m.bias) for m in maps], 1)
    y_NE = x_NI.new_empty(len(x_NI), sum(m.out_features for m in maps))
    for m, y_NO in zip(maps, y_NE.split_with_sizes([m.out_features for m in maps], 1), strict=True):
        if m.bias is None:
            torch.mm(x_NI, m.weight.T, out=y_NO)
        else:
            torch.addmm(m.bias, x_NI, m.weight.T, out=y_NO)
    return y_NE


def linear_plus(residual_NO: Tensor, x_NI: Tensor, m: nn.Linear) -> Tensor:
    y_NO = torch.addmm(residual_NO, x_NI, m.weight.T)
    return y_NO if m.bias is None else y_NO.add_(m.bias)


def rotate_(x_NWC: Tensor, cos_N1C: Tensor, sin_N1C: Tensor) -> None:
    """Rotary positions, in place; with `-sin` the way back."""
    turned_NWC = x_NWC.roll(x_NWC.shape[-1] // 2, -1)
    x_NWC.mul_(cos_N1C).addcmul_(turned_NWC, sin_N1C)


def rms(x: Tensor, norm: Any) -> tuple[Tensor, Tensor]:
    """RMS norm over the last dimension, as transformers rounds it; and 1 / rms, in float32 (float64 of a float64 model)."""
    wide = x.to(wide_of(x.dtype))
    r = torch.rsqrt(wide.square().mean(-1, keepdim=True) + norm.variance_epsilon)
    return norm.weight * (wide * r).to(x.dtype), r


def rms_backward(dy: Tensor, x: Tensor, r: Tensor, norm: Any, residual: Tensor | None) -> Tensor:
    """The gradient by x, with n = x r and u = dy weight: (u - n mean(u n)) r; plus `residual`."""
    u = (dy * norm.weight).to(r.dtype)
    wide = x.to(r.dtype)
    inner = torch.linalg.vecdot(u, wide)[..., None].mul_(r).mul_(r).div_(x.shape[-1])
    u.addcmul_(wide, inner, value=-1)
    if residual is not None and residual.dtype == u.dtype:
        return torch.addcmul(residual, u, r)
    dx = u.mul_(r).to(x.dtype)
    return dx if residual is None else dx.add_(residual)


def norm_heads_(heads_NWC: Tensor, attention: Any, H: int, G: int) -> list[Tensor]:
    """Norm queries and keys in place, where a model does; what each was before, and its 1 / rms, for the backward pass."""
    raw: list[Tensor] = []
    if "q_norm" in dict(attention.named_children()):
        for x_NHC, norm in ((heads_NWC[:, :H], attention.q_norm), (heads_NWC[:, H : H + G], attention.k_norm)):
            before_NHC = x_NHC.clone()
            normed_NHC, r_NH1 = rms(before_NHC, norm)
            x_NHC.copy_(normed_NHC)
            raw += [before_NHC, r_NH1]
    return raw


def mlp_forward(x2_ND: Tensor, layer: Any, adapters: LayerAdapters) -> tuple[Tensor, ...]:
    """The layer's output, and what its backward pass needs: 1 / rms, normed input, gate, up, silu(gate), their product."""
    mlp = layer.mlp
    h2_ND, r2_N1 = rms(x2_ND, layer.post_attention_layernorm)
    gate_NF, up_NF = (F.linear(h2_ND, m.weight, m.bias) for m in (mlp.gate_proj, mlp.up_proj))
    adapters.add(h2_ND, {"mlp.gate_proj": gate_NF, "mlp.up_proj": up_NF})
    silu_NF = F.silu(gate_NF)
    a_NF = silu_NF * up_NF
    out_ND = linear_plus(x2_ND, a_NF, mlp.down_proj)
    adapters.add(a_NF, {"mlp.down_proj": out_ND})
    return out_ND, r2_N1, h2_ND, gate_NF, up_NF, silu_NF, a_NF
