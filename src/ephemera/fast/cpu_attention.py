"""Causal attention within each prompt of a packed batch: what transformers calls in place of its own attention.

On a CPU it is written out as batched products; grouped queries are folded instead of repeating keys.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from ephemera.fast.packing import Packing
from ephemera.llm.architectures import architecture_of

Gather = Callable[[Tensor], Tensor]
KeysValues = dict[int, tuple[Tensor, Tensor]]  # by layer: keys and values [N,G,C] of all real tokens, rotated
ATTENTION = "ephemera_packed"
FUSED_FROM = 768  # positions; longer prompts go to the fused float32 kernel, which keeps no probabilities
BLOCK = {torch.bfloat16: 96}  # positions of a block of queries at least; bfloat16's products like to be larger
OTHER_BLOCK = 64
KEPT_BYTES = 12 << 20  # attention probabilities of a layer that are kept for the backward pass; more are made anew


def can_pack(config: Any, longest: int) -> bool:
    """Whether a decoder can run packed: a known one, and no prompt longer than what a layer attends to."""
    architecture, window = architecture_of(config), getattr(config, "sliding_window", None)
    return architecture is not None and architecture.packs and (window is None or longest <= window)


def attention(
    module: nn.Module,
    q_1HNC: Tensor,
    k_1GNC: Tensor,
    v_1GNC: Tensor,
    _mask: None,
    *,
    packing: Packing,
    cached: KeysValues | None = None,
    scaling: float | None = None,
    **_others: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each prompt: [1,H,N,C] queries, G heads of keys and values -> [1,N,H,C].

    `cached`: takes the layer's keys and values.
    """
    if cached is not None:
        cached[_layer_of(module)] = k_1GNC[0].detach().transpose(0, 1), v_1GNC[0].detach().transpose(0, 1)
    scaling = q_1HNC.shape[-1] ** -0.5 if scaling is None else scaling
    if writes_attention_out(packing, q_1HNC.dtype):
        block = block_of(q_1HNC.dtype)
        return _CausalAttention.apply(q_1HNC, k_1GNC, v_1GNC, packing, scaling, block), None  # pyright: ignore[reportReturnType]
    to_rows, to_tokens = packing.rows, packing.tokens
    if packing.padded:  # padded positions have no gradient of their own
        to_rows = partial(_Gathered.apply, packing.rows, packing.tokens)
        to_tokens = partial(_Gathered.apply, packing.tokens, packing.rows_or_zero)
    q_BHTC, k_BGTC, v_BGTC = (to_rows(x[0].transpose(0, 1)).transpose(1, 2) for x in (q_1HNC, k_1GNC, v_1GNC))
    y_BHTC = F.scaled_dot_product_attention(
        q_BHTC, k_BGTC, v_BGTC, is_causal=True, scale=scaling, enable_gqa=q_BHTC.shape[1] != k_BGTC.shape[1]
    )
    return to_tokens(y_BHTC.transpose(1, 2))[None], None


def _layer_of(module: nn.Module) -> int:
    layer = getattr(module, "layer_idx", None)
    assert isinstance(layer, int), "transformers numbers its attention modules"
    return layer


class _Gathered(torch.autograd.Function):
    """`there(x)`, whose gradient is `back` of its own. A gather both ways: autograd's way back from one adds up, in an order
    that a GPU chooses."""

    @staticmethod
    def forward(ctx, there: Gather, back: Gather, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.back = back
        return there(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        return None, None, ctx.back(dy)


def writes_attention_out(packing: Packing, dtype: torch.dtype) -> bool:
    """Whether attention is written out, and not left to torch's fused kernel."""
    return packing.device.type == "cpu" and (dtype != torch.float32 or packing.T < FUSED_FROM)


def block_of(dtype: torch.dtype) -> int:
    return BLOCK.get(dtype, OTHER_BLOCK)


AttentionInterface.register(ATTENTION, attention)


class _CausalAttention(torch.autograd.Function):
    """Attention written out as batched products, for a CPU, whose fused kernel is slow on short prompts and in bfloat16.

    The H / G query heads that share keys stand as S = (H / G) * T query positions of one of X = B * G heads, so keys
    and values are never repeated. Queries go in blocks, each multiplied with the keys up to its own end alone: what
    lies above the diagonal is computed within blocks only. Padding is on the right, after every real token: no real
    query sees it, and its own gradient is zero.
    """

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx, q_1HNC: Tensor, k_1GNC: Tensor, v_1GNC: Tensor, packing: Packing, scaling: float, block: int
    ) -> Tensor:
        H, G, X = q_1HNC.shape[1], k_1GNC.shape[1], len(packing.lengths) * k_1GNC.shape[1]
        q_ZC = packing.heads(q_1HNC[0].transpose(0, 1), G, block).mul_(scaling)
        k_XTC, v_XTC = (
            packing.heads(x[0].transpose(0, 1), G, packing.T).view(X, packing.T, -1) for x in (k_1GNC, v_1GNC)
        )
        y_ZC, kept = attend(q_ZC, k_XTC, v_XTC, packing, H, block)
        # Saved as autograd saves, not beside it: under checkpointing they are then dropped and made anew
        ctx.save_for_backward(q_ZC, k_XTC, v_XTC, *kept)
        ctx.packing, ctx.scaling, ctx.block, ctx.H, ctx.G = packing, scaling, block, H, G
        return packing.tokens_of_heads(y_ZC, H, G, block)[None]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy_1NHC: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        q_ZC, k_XTC, v_XTC, *kept = ctx.saved_tensors
        packing: Packing = ctx.packing
        H, G, block = ctx.H, ctx.G, ctx.block
        dq_ZC, dk_XTC, dv_XTC = torch.empty_like(q_ZC), torch.empty_like(k_XTC), torch.empty_like(v_XTC)
        dy_ZC = packing.heads_or_zero(dy_1NHC[0], G, block)
        attend_backward(dy_ZC, q_ZC, k_XTC, v_XTC, kept, packing, H, block, into=(dq_ZC, dk_XTC, dv_XTC))
        back = ((dq_ZC.mul_(ctx.scaling), H, block), (dk_XTC, G, packing.T), (dv_XTC, G, packing.T))
        dq, dk, dv = (
            packing.tokens_of_heads(d.view(-1, d.shape[-1]), heads, G, block).transpose(0, 1)[None]
            for d, heads, block in back
        )
        return dq, dk, dv, None, None, None


def attend(
    q_ZC: Tensor, k_XTC: Tensor, v_XTC: Tensor, packing: Packing, heads: int, block: int
) -> tuple[Tensor, list[Tensor]]:
    """Scaled queries, keys and values as `Packing.heads` lays them out: what is read [Z,C], as the queries stand, and each
    block's probabilities, or none where they are too large to keep."""
    groups = len(k_XTC) // len(packing.lengths)
    y_ZC = v_XTC.new_empty(len(q_ZC), v_XTC.shape[-1])
    kept: list[Tensor] = []
    for span, q_XSC, y_XSC in zip(
        packing.spans(block), *(packing.view_blocks(x, heads, groups, block) for x in (q_ZC, y_ZC)), strict=True
    ):
        p_XST = _probabilities(q_XSC, k_XTC, packing, span)
        torch.bmm(p_XST, v_XTC[:, : span[1]], out=y_XSC)
        kept.append(p_XST)
    return y_ZC, kept if sum(p.numel() * p.element_size() for p in kept) <= KEPT_BYTES else []


def attend_backward(
    dy_ZC: Tensor,
    q_ZC: Tensor,
    k_XTC: Tensor,
    v_XTC: Tensor,
    kept: Sequence[Tensor],
    packing: Packing,
    heads: int,
    block: int,
    *,
    into: tuple[Tensor, Tensor, Tensor],
) -> None:
    """Write the gradients by the scaled queries, the keys and the values. `dy_ZC` is zero at padded positions."""
    groups = len(k_XTC) // len(packing.lengths)
    dq_ZC, dk_XTC, dv_XTC = into
    blocks = zip(
        packing.spans(block),
        kept or [None] * len(packing.spans(block)),
        *(packing.view_blocks(x, heads, groups, block) for x in (q_ZC, dy_ZC, dq_ZC)),
        strict=True,
    )
    for span, kept_XST, q_XSC, dy_XSC, dq_XSC in reversed(list(blocks)):
        end = span[1]
        p_XST = _probabilities(q_XSC, k_XTC, packing, span) if kept_XST is None else kept_XST
        dp_XST = torch.bmm(dy_XSC, v_XTC[:, :end].mT)
        ds_XST = torch.ops.aten._softmax_backward_data(dp_XST, p_XST, -1, p_XST.dtype)
        torch.bmm(ds_XST, k_XTC[:, :end], out=dq_XSC)
        for d_XTC, left_XST, right_XSC in ((dv_XTC, p_XST, dy_XSC), (dk_XTC, ds_XST, q_XSC)):
            if end == packing.T:  # the last block comes first and sees every key
                torch.bmm(left_XST.mT, right_XSC, out=d_XTC)
            else:
                d_XTC[:, :end].baddbmm_(left_XST.mT, right_XSC)


def _probabilities(q_XSC: Tensor, k_XTC: Tensor, packing: Packing, span: tuple[int, int]) -> Tensor:
    """Causal softmax [X,S,T] of a block's scaled queries with the keys up to its end."""
    start, end = span
    scores_XST = torch.bmm(q_XSC, k_XTC[:, :end].mT)
    later_TT = packing.later_TT[: end - start, : end - start]
    scores_XST.unflatten(1, (-1, end - start))[..., start:].masked_fill_(later_TT, float("-inf"))
    return scores_XST.softmax(-1)
