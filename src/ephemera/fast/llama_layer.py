"""The decoder layer of Llama and its kin written out, forward and backward, for adaptation on a CPU.

What autograd would keep, copy and add for each small operation, this does once: sums go into the products, rotary positions
and both gathers of attention take queries, keys and values together, adapters on one input are one product. Prompts that
begin with the same words run those once while no adapter does anything yet (fast/shared_prefix.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import SiLUActivation

from ephemera.fast.cpu_attention import attend, attend_backward, block_of
from ephemera.fast.llama_parts import (
    LayerAdapters,
    PassPlan,
    Place,
    linear_plus,
    mlp_forward,
    norm_heads_,
    parts,
    qkv,
    rms,
    rms_backward,
    rotate_,
    side_by_side,
)
from ephemera.llm.architectures import ARCHITECTURES
from ephemera.llm.quantization import is_plain
from ephemera.llm.replaced import replaced
from ephemera.lora import LoraBatch

# transformers' classes with one and the same forward: norm, attention, sum, norm, gated MLP, sum
LAYERS = {known.layer for known in ARCHITECTURES.values()} - {None}
ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
LINEARS = tuple(f"self_attn.{name}" for name in ATTENTION) + tuple(f"mlp.{name}" for name in MLP)


def can_fuse(decoder: nn.Module, lora: LoraBatch | None = None) -> bool:
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
        and all(is_plain(m) and "forward" not in m.__dict__ for m in maps)
        and not any(m is not None and (m._forward_hooks or m._forward_pre_hooks) for m in every)
    )


def fused_layers(
    decoder: nn.Module, prefix: str, lora: LoraBatch | None, plan: PassPlan
) -> AbstractContextManager[None]:
    """Let every layer of `decoder` run so, with its share of the adapters; restored after.

    `prefix`: path of the decoder's layers in the model, where projections' paths begin ("model.layers").
    """
    layers = decoder.get_submodule("layers")
    assert isinstance(layers, nn.ModuleList)
    projections: dict[str, int] = {} if lora is None else {p.module: m for m, p in enumerate(lora.projections)}
    factors = () if lora is None else lora.tensors
    fused = []
    for i, layer in enumerate(layers):
        own = [(path, projections[name]) for path in LINEARS if (name := f"{prefix}.{i}.{path}") in projections]
        places = [Place(path, n, len(own) + n) for n, (path, _) in enumerate(own)]
        mine = [factors[m] for _, m in own] + [factors[len(projections) + m] for _, m in own]
        fused.append(FusedLayer(i, layer, places, mine, plan))
    return replaced([(decoder, "layers", nn.ModuleList(fused))])


# Linear maps that read the same input, in the order of a layer
_INPUTS = (LINEARS[:3], LINEARS[3:4], LINEARS[4:6], LINEARS[6:])


class FusedLayer(nn.Module):
    """Stands where a decoder layer stood."""

    def __init__(
        self, number: int, layer: nn.Module, places: Sequence[Place], factors: Sequence[Tensor], plan: PassPlan
    ):
        super().__init__()
        self.number, self.layer, self.places, self.factors, self.plan = number, layer, places, factors, plan

    def forward(
        self, hidden_states: Tensor, *_args: Any, position_embeddings: tuple[Tensor, Tensor], **_kwargs: Any
    ) -> Tensor:
        return _Layer.apply(  # pyright: ignore[reportReturnType]
            hidden_states, self.number, self.layer, self.places, self.plan, *position_embeddings, *self.factors
        )


class _Layer(torch.autograd.Function):
    """x_1ND -> x_1ND. Saved at all N tokens, also where a shared beginning was run once."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx,
        x_1ND: Tensor,
        number: int,
        layer: Any,
        places: Sequence[Place],
        plan: PassPlan,
        cos_1NC: Tensor,
        sin_1NC: Tensor,
        *factors: Tensor,
    ) -> Tensor:
        attention, packing = layer.self_attn, plan.packing
        unique, shared = plan.shared.unique, plan.shared
        assert shared.tokens_U is None or plan.flat, "rows with adapters of their own have nothing in common"

        def expand(x: Tensor, name: str) -> Tensor:
            return shared.expand(x, (number, name))

        adapters = LayerAdapters(places, factors, plan)
        x_ND = x_1ND[0]
        C = attention.head_dim
        H, G = attention.q_proj.out_features // C, attention.k_proj.out_features // C

        x1_ND = unique(x_ND)
        h1_ND, r1_N1 = rms(x1_ND, layer.input_layernorm)
        qkv_NE = expand(side_by_side(h1_ND, (attention.q_proj, attention.k_proj, attention.v_proj)), "qkv")
        h1_ND, r1_N1 = expand(h1_ND, "h1"), expand(r1_N1, "r1")
        q_NO, k_NO, v_NO = qkv_NE.split_with_sizes([H * C, G * C, G * C], 1)
        adapters.add(h1_ND, {"self_attn.q_proj": q_NO, "self_attn.k_proj": k_NO, "self_attn.v_proj": v_NO})
        heads_NWC = qkv_NE.view(-1, H + 2 * G, C)
        raw = norm_heads_(heads_NWC, attention, H, G)
        cos_N1C, sin_N1C = cos_1NC[0][:, None], plan.signed_sin(sin_1NC)
        rotate_(heads_NWC[:, : H + G], cos_N1C, sin_N1C)

        if plan.cached is not None:
            plan.cached[number] = heads_NWC[:, H : H + G], heads_NWC[:, H + G :]

        block, X = block_of(x_ND.dtype), len(packing.lengths) * G
        from_A, _ = packing.joint_positions(H, G, block)
        q_ZC, k_ZC, v_ZC = parts(heads_NWC.view(-1, C).index_select(0, from_A), H, G)
        q_ZC.mul_(attention.scaling)
        k_XTC, v_XTC = k_ZC.view(X, packing.T, C), v_ZC.view(X, packing.T, C)
        y_ZC, kept = attend(q_ZC, k_XTC, v_XTC, packing, H, block)
        y_NO = packing.tokens_of_heads(y_ZC, H, G, block).flatten(1)

        x2_ND = linear_plus(x1_ND, unique(y_NO), attention.o_proj)
        adapters.add(y_NO, {"self_attn.o_proj": x2_ND})
        out_ND, r2_N1, h2_ND, gate_NF, up_NF, silu_NF, a_NF = mlp_forward(x2_ND, layer, adapters)
        out_ND, x2_ND, r2_N1 = expand(out_ND, "out"), expand(x2_ND, "x2"), expand(r2_N1, "r2")
        gate_NF, up_NF, silu_NF = expand(gate_NF, "gate"), expand(up_NF, "up"), expand(silu_NF, "silu")
        needed = [any(place.path in paths for place in places) for paths in _INPUTS]
        rows = [  # inputs of adapted maps
            h1_ND if needed[0] else None,
            y_NO if needed[1] else None,
            expand(h2_ND, "h2") if needed[2] else None,
            expand(a_NF, "a") if needed[3] else None,
        ]
        ctx.save_for_backward(
            *(x_ND, r1_N1, q_ZC, k_XTC, v_XTC, x2_ND, r2_N1, gate_NF, up_NF, silu_NF, cos_N1C, sin_N1C),
            *(*rows, *raw, *kept, *factors),
        )
        ctx.counts = (len(raw), len(kept), len(factors))
        ctx.layer, ctx.places, ctx.plan, ctx.H, ctx.G, ctx.block = layer, places, plan, H, G, block
        return out_ND[None]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout_1ND: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        x_ND, r1_N1, q_ZC, k_XTC, v_XTC, x2_ND, r2_N1, gate_NF, up_NF, silu_NF, cos_N1C, sin_N1C, *others = (
            ctx.saved_tensors
        )
        rows, others = others[: len(_INPUTS)], others[len(_INPUTS) :]
        raw, kept = others[: ctx.counts[0]], others[ctx.counts[0] : sum(ctx.counts[:2])]
        layer, plan, H, G, block = ctx.layer, ctx.plan, ctx.H, ctx.G, ctx.block
        attention, mlp, packing = layer.self_attn, layer.mlp, plan.packing
        adapters = LayerAdapters(ctx.places, others[sum(ctx.counts[:2]) :], plan)
        dout_ND = dout_1ND[0]

        da_NF = dout_ND @ mlp.down_proj.weight
        adapters.backward(rows[3], {"mlp.down_proj": dout_ND}, da_NF)
        dup_NF = da_NF * silu_NF
        dgate_NF = torch.ops.aten.silu_backward(da_NF.mul_(up_NF), gate_NF)
        dh2_ND = (dgate_NF @ mlp.gate_proj.weight).addmm_(dup_NF, mlp.up_proj.weight)
        adapters.backward(rows[2], {"mlp.gate_proj": dgate_NF, "mlp.up_proj": dup_NF}, dh2_ND)
        dx2_ND = rms_backward(dh2_ND, x2_ND, r2_N1, layer.post_attention_layernorm, dout_ND)

        dy_NO = dx2_ND @ attention.o_proj.weight
        adapters.backward(rows[1], {"self_attn.o_proj": dx2_ND}, dy_NO)
        dy_ZC = packing.heads_or_zero(dy_NO.view(len(dy_NO), H, -1), G, block)
        dall_AC = dy_ZC.new_empty(len(q_ZC) + 2 * k_XTC.shape[0] * packing.T, dy_ZC.shape[1])
        dq_ZC, dk_ZC, dv_ZC = parts(dall_AC, H, G)
        into = (dq_ZC, dk_ZC.view_as(k_XTC), dv_ZC.view_as(v_XTC))
        attend_backward(dy_ZC, q_ZC, k_XTC, v_XTC, kept, packing, H, block, into=into)
        dq_ZC.mul_(attention.scaling)
        _, to_A = packing.joint_positions(H, G, block)
        dheads_NWC = dall_AC.index_select(0, to_A).view(-1, H + 2 * G, dall_AC.shape[1])
        rotate_(dheads_NWC[:, : H + G], cos_N1C, -sin_N1C)
        if raw:
            for d_NHC, x_NHC, r_NH1, norm in (
                (dheads_NWC[:, :H], raw[0], raw[1], attention.q_norm),
                (dheads_NWC[:, H : H + G], raw[2], raw[3], attention.k_norm),
            ):
                d_NHC.copy_(rms_backward(d_NHC, x_NHC, r_NH1, norm, None))
        dq_NO, dk_NO, dv_NO = dheads_NWC.flatten(1).split_with_sizes([m.out_features for m in qkv(attention)], 1)
        dx_1ND = dh1_ND = None
        if ctx.needs_input_grad[0]:
            dh1_ND = dq_NO @ attention.q_proj.weight
            dh1_ND.addmm_(dk_NO, attention.k_proj.weight).addmm_(dv_NO, attention.v_proj.weight)
        douts = {"self_attn.q_proj": dq_NO, "self_attn.k_proj": dk_NO, "self_attn.v_proj": dv_NO}
        adapters.backward(rows[0], douts, dh1_ND)
        if dh1_ND is not None:
            dx_1ND = rms_backward(dh1_ND, x_ND, r1_N1, layer.input_layernorm, dx2_ND)[None]
        return dx_1ND, None, None, None, None, None, None, *adapters.gradients
