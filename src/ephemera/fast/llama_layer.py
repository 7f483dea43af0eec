"""The decoder layer of Llama and its kin written out, forward and backward, for adaptation on a CPU.

What autograd would keep, copy and add for each small operation, this does once: sums go into the products, rotary positions
and both gathers of attention take queries, keys and values together, adapters on one input are one product. Prompts that
begin with the same words run those once while no adapter does anything yet (fast/shared_prefix.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import SiLUActivation

from ephemera.fast.packing import KeysValues, Packing, attend, attend_backward, block_of
from ephemera.fast.shared_prefix import Shared
from ephemera.llm.precision import wide_of
from ephemera.lora import LoraBatch

# transformers' classes with one and the same forward: norm, attention, sum, norm, gated MLP, sum
LAYERS = ("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer")
ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
LINEARS = tuple(f"self_attn.{name}" for name in ATTENTION) + tuple(f"mlp.{name}" for name in MLP)


def can_write_out(decoder: nn.Module, lora: LoraBatch | None = None) -> bool:
    """Whether each layer of `decoder` is one of those now: of plain linear maps, with SiLU, and with nobody's hooks; and all
    adapters sit on such maps.

    Asked before each pass, as others may have put their own modules in (PEFT does).
    """
    layers = dict(decoder.named_children()).get("layers")
    adapted = () if lora is None else lora.projections
    return (
        isinstance(layers, nn.ModuleList)
        and all(p.rows is None and ".layers." in p.module and p.module.endswith(LINEARS) for p in adapted)
        and all(_is_plain(layer) for layer in layers)
    )


def _is_plain(layer: nn.Module) -> bool:
    """By the modules' own tables: walking over `named_modules` would take 3 % of a short prompt's step."""
    if type(layer).__name__ not in LAYERS:
        return False
    attention, mlp = layer._modules["self_attn"], layer._modules["mlp"]
    assert attention is not None
    assert mlp is not None
    maps = [attention._modules[name] for name in ATTENTION] + [mlp._modules[name] for name in MLP]
    every = (layer, attention, mlp, *layer._modules.values(), *attention._modules.values(), *mlp._modules.values())
    return (
        isinstance(mlp._modules["act_fn"], nn.SiLU | SiLUActivation)
        and all(type(m) is nn.Linear and "forward" not in m.__dict__ for m in maps)
        and not any(m is not None and (m._forward_hooks or m._forward_pre_hooks) for m in every)
    )


class Pair(NamedTuple):
    """An adapter's place in its layer: the linear map's path there, and its A and B among the pass's factors."""

    path: str
    A: int
    B: int


@dataclass(frozen=True, eq=False)
class Pass:
    """What all layers of one pass share."""

    packing: Packing
    scaling: float
    shared: Shared
    flat: bool  # every B is zero: adapters change nothing yet, and only B has a gradient
    kept: KeysValues | None = None  # where each layer leaves its keys and values

    @cached_property
    def positions(self) -> dict[int, Tensor]:
        return {}

    def signed_sin(self, sin_1NC: Tensor) -> Tensor:
        """sin with the sign that rotating halves gives it: [N,1,C]. The same tensor comes to every layer."""
        if id(sin_1NC) not in self.positions:
            half = sin_1NC.shape[-1] // 2
            self.positions[id(sin_1NC)] = torch.cat([-sin_1NC[0, :, :half], sin_1NC[0, :, half:]], 1)[:, None]
        return self.positions[id(sin_1NC)]


@contextmanager
def written_out(decoder: nn.Module, prefix: str, lora: LoraBatch | None, about: Pass) -> Iterator[None]:
    """Let every layer of `decoder` run so, with its share of the adapters; restored after.

    `prefix`: path of the decoder's layers in the model, where projections' paths begin ("model.layers").
    """
    layers = decoder.get_submodule("layers")
    assert isinstance(layers, nn.ModuleList)
    places: dict[str, int] = {} if lora is None else {p.module: m for m, p in enumerate(lora.projections)}
    factors = () if lora is None else lora.tensors
    written = []
    for i, layer in enumerate(layers):
        own = [(path, places[name]) for path in LINEARS if (name := f"{prefix}.{i}.{path}") in places]
        pairs = [Pair(path, n, len(own) + n) for n, (path, _) in enumerate(own)]
        mine = [factors[m] for _, m in own] + [factors[len(places) + m] for _, m in own]
        written.append(_Written(i, layer, pairs, mine, about))
    try:
        decoder.register_module("layers", nn.ModuleList(written))
        yield
    finally:
        decoder.register_module("layers", layers)


class _Written(nn.Module):
    """Stands where a decoder layer stood."""

    def __init__(self, place: int, layer: nn.Module, pairs: Sequence[Pair], factors: Sequence[Tensor], about: Pass):
        super().__init__()
        self.place, self.layer, self.pairs, self.factors, self.about = place, layer, pairs, factors, about

    def forward(
        self, hidden_states: Tensor, *_args: Any, position_embeddings: tuple[Tensor, Tensor], **_kwargs: Any
    ) -> Tensor:
        return _Layer.apply(  # pyright: ignore[reportReturnType]
            hidden_states, self.place, self.layer, self.pairs, self.about, *position_embeddings, *self.factors
        )


class _Layer(torch.autograd.Function):
    """x_1ND -> x_1ND. Saved at all N tokens, also where a shared beginning was run once."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx,
        x_1ND: Tensor,
        place: int,
        layer: Any,
        pairs: Sequence[Pair],
        about: Pass,
        cos_1NC: Tensor,
        sin_1NC: Tensor,
        *factors: Tensor,
    ) -> Tensor:
        attention, mlp, packing = layer.self_attn, layer.mlp, about.packing
        once, shared = about.shared.once, about.shared
        assert shared.tokens_U is None or about.flat, "rows with adapters of their own have nothing in common"

        def again(x: Tensor, name: str) -> Tensor:
            return shared.again(x, (place, name))

        adapters = _Adapters(pairs, factors, about)
        x_ND = x_1ND[0]
        C = attention.head_dim
        H, G = attention.q_proj.out_features // C, attention.k_proj.out_features // C

        x1_ND = once(x_ND)
        h1_ND, r1_N1 = _norm(x1_ND, layer.input_layernorm)
        qkv_NE = again(_side_by_side(h1_ND, (attention.q_proj, attention.k_proj, attention.v_proj)), "qkv")
        h1_ND, r1_N1 = again(h1_ND, "h1"), again(r1_N1, "r1")
        q_NO, k_NO, v_NO = qkv_NE.split_with_sizes([H * C, G * C, G * C], 1)
        adapters.add(h1_ND, {"self_attn.q_proj": q_NO, "self_attn.k_proj": k_NO, "self_attn.v_proj": v_NO})
        heads_NWC = qkv_NE.view(-1, H + 2 * G, C)
        raw: list[Tensor] = []
        if "q_norm" in dict(attention.named_children()):
            for x_NHC, norm in (
                (heads_NWC[:, :H], attention.q_norm),
                (heads_NWC[:, H : H + G], attention.k_norm),
            ):
                raw.append(x_NHC.clone())
                normed_NHC, r_NH1 = _norm(raw[-1], norm)
                raw.append(r_NH1)
                x_NHC.copy_(normed_NHC)
        cos_N1C, sin_N1C = cos_1NC[0][:, None], about.signed_sin(sin_1NC)
        _rotate_(heads_NWC[:, : H + G], cos_N1C, sin_N1C)

        if about.kept is not None:
            about.kept[place] = heads_NWC[:, H : H + G], heads_NWC[:, H + G :]

        block, X = block_of(x_ND.dtype), len(packing.lengths) * G
        from_A, _ = packing.joint_places(H, G, block)
        q_ZC, k_ZC, v_ZC = _parts(heads_NWC.view(-1, C).index_select(0, from_A), H, G)
        q_ZC.mul_(attention.scaling)
        k_XTC, v_XTC = k_ZC.view(X, packing.T, C), v_ZC.view(X, packing.T, C)
        y_ZC, kept = attend(q_ZC, k_XTC, v_XTC, packing, H, block)
        y_NO = packing.tokens_of_heads(y_ZC, H, G, block).flatten(1)

        x2_ND = _linear_plus(x1_ND, once(y_NO), attention.o_proj)
        adapters.add(y_NO, {"self_attn.o_proj": x2_ND})
        h2_ND, r2_N1 = _norm(x2_ND, layer.post_attention_layernorm)
        gate_NF, up_NF = (F.linear(h2_ND, m.weight, m.bias) for m in (mlp.gate_proj, mlp.up_proj))
        adapters.add(h2_ND, {"mlp.gate_proj": gate_NF, "mlp.up_proj": up_NF})
        silu_NF = F.silu(gate_NF)
        a_NF = silu_NF * up_NF
        out_ND = _linear_plus(x2_ND, a_NF, mlp.down_proj)
        adapters.add(a_NF, {"mlp.down_proj": out_ND})
        out_ND, x2_ND, r2_N1 = again(out_ND, "out"), again(x2_ND, "x2"), again(r2_N1, "r2")
        gate_NF, up_NF, silu_NF = again(gate_NF, "gate"), again(up_NF, "up"), again(silu_NF, "silu")
        needed = [any(pair.path in paths for pair in pairs) for paths in _INPUTS]
        rows = [  # inputs of adapted maps
            h1_ND if needed[0] else None,
            y_NO if needed[1] else None,
            again(h2_ND, "h2") if needed[2] else None,
            again(a_NF, "a") if needed[3] else None,
        ]
        ctx.save_for_backward(
            *(x_ND, r1_N1, q_ZC, k_XTC, v_XTC, x2_ND, r2_N1, gate_NF, up_NF, silu_NF, cos_N1C, sin_N1C),
            *(*rows, *raw, *kept, *factors),
        )
        ctx.counts = (len(raw), len(kept), len(factors))
        ctx.layer, ctx.pairs, ctx.about, ctx.H, ctx.G, ctx.block = layer, pairs, about, H, G, block
        return out_ND[None]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout_1ND: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        x_ND, r1_N1, q_ZC, k_XTC, v_XTC, x2_ND, r2_N1, gate_NF, up_NF, silu_NF, cos_N1C, sin_N1C, *others = (
            ctx.saved_tensors
        )
        rows, others = others[: len(_INPUTS)], others[len(_INPUTS) :]
        raw, kept = others[: ctx.counts[0]], others[ctx.counts[0] : sum(ctx.counts[:2])]
        layer, about, H, G, block = ctx.layer, ctx.about, ctx.H, ctx.G, ctx.block
        attention, mlp, packing = layer.self_attn, layer.mlp, about.packing
        adapters = _Adapters(ctx.pairs, others[sum(ctx.counts[:2]) :], about)
        dout_ND = dout_1ND[0]

        da_NF = dout_ND @ mlp.down_proj.weight
        adapters.backward(rows[3], {"mlp.down_proj": dout_ND}, da_NF)
        dup_NF = da_NF * silu_NF
        dgate_NF = torch.ops.aten.silu_backward(da_NF.mul_(up_NF), gate_NF)
        dh2_ND = (dgate_NF @ mlp.gate_proj.weight).addmm_(dup_NF, mlp.up_proj.weight)
        adapters.backward(rows[2], {"mlp.gate_proj": dgate_NF, "mlp.up_proj": dup_NF}, dh2_ND)
        dx2_ND = _norm_backward(dh2_ND, x2_ND, r2_N1, layer.post_attention_layernorm, dout_ND)

        dy_NO = dx2_ND @ attention.o_proj.weight
        adapters.backward(rows[1], {"self_attn.o_proj": dx2_ND}, dy_NO)
        dy_ZC = packing.heads_or_zero(dy_NO.view(len(dy_NO), H, -1), G, block)
        dall_AC = dy_ZC.new_empty(len(q_ZC) + 2 * k_XTC.shape[0] * packing.T, dy_ZC.shape[1])
        dq_ZC, dk_ZC, dv_ZC = _parts(dall_AC, H, G)
        into = (dq_ZC, dk_ZC.view_as(k_XTC), dv_ZC.view_as(v_XTC))
        attend_backward(dy_ZC, q_ZC, k_XTC, v_XTC, kept, packing, H, block, into=into)
        dq_ZC.mul_(attention.scaling)
        _, to_A = packing.joint_places(H, G, block)
        dheads_NWC = dall_AC.index_select(0, to_A).view(-1, H + 2 * G, dall_AC.shape[1])
        _rotate_(dheads_NWC[:, : H + G], cos_N1C, -sin_N1C)
        if raw:
            for d_NHC, x_NHC, r_NH1, norm in (
                (dheads_NWC[:, :H], raw[0], raw[1], attention.q_norm),
                (dheads_NWC[:, H : H + G], raw[2], raw[3], attention.k_norm),
            ):
                d_NHC.copy_(_norm_backward(d_NHC, x_NHC, r_NH1, norm, None))
        dq_NO, dk_NO, dv_NO = dheads_NWC.flatten(1).split_with_sizes([m.out_features for m in _qkv(attention)], 1)
        dx_1ND = dh1_ND = None
        if ctx.needs_input_grad[0]:
            dh1_ND = dq_NO @ attention.q_proj.weight
            dh1_ND.addmm_(dk_NO, attention.k_proj.weight).addmm_(dv_NO, attention.v_proj.weight)
        douts = {"self_attn.q_proj": dq_NO, "self_attn.k_proj": dk_NO, "self_attn.v_proj": dv_NO}
        adapters.backward(rows[0], douts, dh1_ND)
        if dh1_ND is not None:
            dx_1ND = _norm_backward(dh1_ND, x_ND, r1_N1, layer.input_layernorm, dx2_ND)[None]
        return dx_1ND, None, None, None, None, None, None, *adapters.gradients


# Linear maps that read the same input, in the order of a layer
_INPUTS = (LINEARS[:3], LINEARS[3:4], LINEARS[4:6], LINEARS[6:])


class _Adapters:
    """A layer's adapters: what they add, and their gradients (LDTTA Eq. 6)."""

    def __init__(self, pairs: Sequence[Pair], factors: Sequence[Tensor], about: Pass):
        self.pairs, self.factors, self.about = pairs, factors, about
        self.gradients: list[Tensor | None] = [None] * len(factors)

    def add(self, x_NI: Tensor, outputs: dict[str, Tensor]) -> None:
        """Add `scaling * B A x` to the output of each adapted map that reads `x`."""
        pairs = [pair for pair in self.pairs if pair.path in outputs]
        if not pairs or self.about.flat:
            return
        packing, scaling = self.about.packing, self.about.scaling
        rows_BTI = packing.rows(x_NI)
        xa_BTS = torch.bmm(rows_BTI, self._joint_A(pairs, x_NI.dtype).mT)
        for pair, xa_BTR in zip(
            pairs, xa_BTS.split_with_sizes([self.factors[p.A].shape[1] for p in pairs], 2), strict=True
        ):
            delta_BTO = torch.bmm(xa_BTR, self.factors[pair.B].mT.to(x_NI.dtype))
            outputs[pair.path].add_(packing.tokens(delta_BTO), alpha=scaling)

    def backward(self, x_NI: Tensor | None, doutputs: dict[str, Tensor], dx_NI: Tensor | None) -> None:
        """Note the gradients by A and B of each adapted map that reads `x`, and add that by `x` to `dx_NI`."""
        pairs = [pair for pair in self.pairs if pair.path in doutputs]
        if not pairs:
            return
        assert x_NI is not None
        packing, scaling, dtype = self.about.packing, self.about.scaling, x_NI.dtype
        rows_BTI, A_BSI = packing.rows(x_NI), self._joint_A(pairs, dtype)
        ranks = [self.factors[p.A].shape[1] for p in pairs]
        xa_BTS = torch.bmm(rows_BTI, A_BSI.mT)
        dxa: list[Tensor] = []
        for pair, xa_BTR in zip(pairs, xa_BTS.split_with_sizes(ranks, 2), strict=True):
            dy_BTO, B_BOR = packing.rows_or_zero(doutputs[pair.path]), self.factors[pair.B]
            self.gradients[pair.B] = (torch.bmm(xa_BTR.mT, dy_BTO).to(B_BOR.dtype) * scaling).mT
            if not self.about.flat:
                dxa.append(torch.bmm(dy_BTO, B_BOR.mT.to(dtype).mT))
        if self.about.flat:  # B is zero: so are the gradients by A, and by x through here
            return
        dxa_BTS = torch.cat(dxa, 2).mul_(scaling)
        for pair, dA_BRI in zip(pairs, torch.bmm(dxa_BTS.mT, rows_BTI).split_with_sizes(ranks, 1), strict=True):
            self.gradients[pair.A] = dA_BRI.to(self.factors[pair.A].dtype)
        if dx_NI is not None:
            dx_NI.add_(packing.tokens(torch.bmm(dxa_BTS, A_BSI)))

    def _joint_A(self, pairs: Sequence[Pair], dtype: torch.dtype) -> Tensor:
        As = [self.factors[pair.A] for pair in pairs]
        return (As[0] if len(As) == 1 else torch.cat(As, 1)).to(dtype)


def _qkv(attention: Any) -> tuple[nn.Linear, nn.Linear, nn.Linear]:
    return attention.q_proj, attention.k_proj, attention.v_proj


def _parts(all_AC: Tensor, heads: int, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of `Packing.joint_places`."""
    unit = len(all_AC) // (heads + 2 * groups)
    q_ZC, k_ZC, v_ZC = all_AC.split_with_sizes([unit * heads, unit * groups, unit * groups])
    return q_ZC, k_ZC, v_ZC


def _side_by_side(x_NI: Tensor, maps: Sequence[nn.Linear]) -> Tensor:
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


def _linear_plus(residual_NO: Tensor, x_NI: Tensor, m: nn.Linear) -> Tensor:
    y_NO = torch.addmm(residual_NO, x_NI, m.weight.T)
    return y_NO if m.bias is None else y_NO.add_(m.bias)


def _rotate_(x_NWC: Tensor, cos_N1C: Tensor, sin_N1C: Tensor) -> None:
    """Rotary positions, in place; with `-sin` the way back."""
    turned_NWC = x_NWC.roll(x_NWC.shape[-1] // 2, -1)
    x_NWC.mul_(cos_N1C).addcmul_(turned_NWC, sin_N1C)


def _norm(x: Tensor, norm: Any) -> tuple[Tensor, Tensor]:
    """RMS norm over the last dimension, as transformers rounds it; and 1 / rms, in float32 (float64 of a float64 model)."""
    wide = x.to(wide_of(x.dtype))
    r = torch.rsqrt(wide.square().mean(-1, keepdim=True) + norm.variance_epsilon)
    return norm.weight * (wide * r).to(x.dtype), r


def _norm_backward(dy: Tensor, x: Tensor, r: Tensor, norm: Any, residual: Tensor | None) -> Tensor:
    """The gradient by x, with n = x r and u = dy weight: (u - n mean(u n)) r; plus `residual`."""
    u = (dy * norm.weight).to(r.dtype)
    wide = x.to(r.dtype)
    inner = torch.linalg.vecdot(u, wide)[..., None].mul_(r).mul_(r).div_(x.shape[-1])
    u.addcmul_(wide, inner, value=-1)
    if residual is not None and residual.dtype == u.dtype:
        return torch.addcmul(residual, u, r)
    dx = u.mul_(r).to(x.dtype)
    return dx if residual is None else dx.add_(residual)
