"""A batch without its padding: the real tokens of all rows in one line, padded only inside attention and LoRA.

A decoder is token by token but for attention, so its linear layers, norms and the rest need no padded places
at all; between prompts of 29 to 37 tokens those are a tenth of the work. `attention` is what transformers calls
in place of its own attention while `packed` holds; it also folds grouped queries instead of repeating keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

ATTENTION = "ephemera_packed"
# Causal decoders that hand keyword arguments down to attention and know no other bias than the causal mask
PACKABLE = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text", "olmo", "olmo2", "phi", "phi3", "gpt_neox")
FUSED_FROM = 128  # places; longer prompts go to the fused float32 kernel, which skips what lies above the diagonal
KEPT_BYTES = (
    8 << 20
)  # attention probabilities of a layer that are kept for the backward pass; larger ones are made anew


@dataclass(frozen=True, eq=False)
class Packing:
    """Where each of N real tokens stands in a batch of B rows that are padded on the right to T places."""

    lengths: tuple[int, ...]
    device: torch.device

    @cached_property
    def T(self) -> int:
        return max(self.lengths)

    @cached_property
    def padded(self) -> bool:
        return min(self.lengths) < self.T

    @cached_property
    def token_of_P(self) -> Tensor:
        """For each of P = B * T places the token that stands there; at padding, the row's last one."""
        lengths_B1 = torch.tensor(self.lengths, device=self.device)[:, None]
        places_BT = torch.arange(self.T, device=self.device)[None].minimum(lengths_B1 - 1)
        return (places_BT + lengths_B1.cumsum(0) - lengths_B1).flatten()

    @cached_property
    def place_of_N(self) -> Tensor:
        """For each token its place in B * T."""
        lengths_B1 = torch.tensor(self.lengths, device=self.device)[:, None]
        real_BT = torch.arange(self.T, device=self.device)[None] < lengths_B1
        return real_BT.flatten().nonzero()[:, 0]

    @cached_property
    def positions_1N(self) -> Tensor:
        return (self.place_of_N % self.T)[None]

    def rows(self, x_ND: Tensor) -> Tensor:
        """[N,...] as rows [B,T,...]; what stands at padded places is finite and must not be used."""
        x_PD = x_ND.index_select(0, self.token_of_P) if self.padded else x_ND
        return x_PD.unflatten(0, (len(self.lengths), self.T))

    def rows_or_zero(self, x_ND: Tensor) -> Tensor:
        """[N,...] as rows [B,T,...], zero at padded places."""
        if self.padded:
            x_ND = x_ND.new_zeros(len(self.token_of_P), *x_ND.shape[1:]).index_copy_(0, self.place_of_N, x_ND)
        return x_ND.unflatten(0, (len(self.lengths), self.T))

    def tokens(self, x_BTD: Tensor) -> Tensor:
        """Rows [B,T,...] as their real tokens [N,...]."""
        x_PD = x_BTD.flatten(0, 1)
        return x_PD.index_select(0, self.place_of_N) if self.padded else x_PD

    def heads(self, x_NHC: Tensor, groups: int) -> Tensor:
        """[N,H,C] as [B*G, H/G*T, C]: the heads of a group one after the other. Padded places as in `rows`."""
        N, H, C = x_NHC.shape
        from_Z, _ = self._head_places(H, groups)
        return x_NHC.reshape(N * H, C).index_select(0, from_Z).view(len(self.lengths) * groups, -1, C)

    def heads_or_zero(self, x_NHC: Tensor, groups: int) -> Tensor:
        """As `heads`, zero at padded places."""
        N, H, C = x_NHC.shape
        _, to_Z = self._head_places(H, groups)
        x_ZC = x_NHC.new_zeros(len(self.lengths) * H * self.T, C)
        return x_ZC.index_copy_(0, to_Z, x_NHC.reshape(N * H, C)).view(len(self.lengths) * groups, -1, C)

    def tokens_of_heads(self, x_XSC: Tensor, heads: int, groups: int) -> Tensor:
        """What `heads` made, back to [N,H,C]."""
        _, to_Z = self._head_places(heads, groups)
        return x_XSC.flatten(0, 1).index_select(0, to_Z).view(-1, heads, x_XSC.shape[-1])

    def _head_places(self, heads: int, groups: int) -> tuple[Tensor, Tensor]:
        """For each (row, group, head of it, place) its (token, head); and for each (token, head) that place."""
        key = (heads, groups)
        if key not in self._kept_places:
            size = heads // groups
            token_BT = self.token_of_P.view(len(self.lengths), self.T)
            head_GJ = torch.arange(heads, device=self.device).view(groups, size)
            from_BGJT = token_BT[:, None, None] * heads + head_GJ[None, :, :, None]
            place_BGJT = torch.arange(from_BGJT.numel(), device=self.device).view_as(from_BGJT)
            place_PH = place_BGJT.permute(0, 3, 1, 2).reshape(-1, heads)
            self._kept_places[key] = from_BGJT.flatten(), place_PH.index_select(0, self.place_of_N).flatten()
        return self._kept_places[key]

    @cached_property
    def _kept_places(self) -> dict[tuple[int, int], tuple[Tensor, Tensor]]:
        return {}

    @cached_property
    def later_TT(self) -> Tensor:
        """True where a place comes after the one that looks."""
        return torch.ones(self.T, self.T, dtype=torch.bool, device=self.device).triu(1)


@contextmanager
def packed(decoder: nn.Module) -> Iterator[None]:
    """Let a decoder's attention be `attention`, which wants `packing=` in the decoder's keyword arguments."""
    config: Any = decoder.config
    before = config._attn_implementation
    try:
        config._attn_implementation = ATTENTION
        yield
    finally:
        config._attn_implementation = before


def can_pack(config: Any, longest: int) -> bool:
    """Whether a decoder can run packed: a known one, and no prompt longer than what a layer attends to."""
    window = getattr(config, "sliding_window", None)
    return config.model_type in PACKABLE and (window is None or longest <= window)


def attention(
    _module: nn.Module,
    q_1HNC: Tensor,
    k_1GNC: Tensor,
    v_1GNC: Tensor,
    _mask: None,
    *,
    packing: Packing,
    scaling: float | None = None,
    **_others: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each prompt: [1,H,N,C] queries, G heads of keys and values -> [1,N,H,C]."""
    scaling = q_1HNC.shape[-1] ** -0.5 if scaling is None else scaling
    fused = q_1HNC.device.type != "cpu" or (q_1HNC.dtype == torch.float32 and packing.T >= FUSED_FROM)
    if not fused:
        return _CausalAttention.apply(q_1HNC, k_1GNC, v_1GNC, packing, scaling), None  # pyright: ignore[reportReturnType]
    q_BHTC, k_BGTC, v_BGTC = (packing.rows(x[0].transpose(0, 1)).transpose(1, 2) for x in (q_1HNC, k_1GNC, v_1GNC))
    y_BHTC = F.scaled_dot_product_attention(
        q_BHTC, k_BGTC, v_BGTC, is_causal=True, scale=scaling, enable_gqa=q_BHTC.shape[1] != k_BGTC.shape[1]
    )
    return packing.tokens(y_BHTC.transpose(1, 2))[None], None


AttentionInterface.register(ATTENTION, attention)


class _CausalAttention(torch.autograd.Function):
    """Attention written out as batched products, for a CPU, whose fused kernel is slow on short prompts and in bfloat16.

    The H / G query heads that share keys stand as S = (H / G) * T query places of one of X = B * G heads, so keys
    and values are never repeated. Padding is on the right, after every real token: no real query sees it, and its
    own gradient is zero.
    """

    @staticmethod
    def forward(ctx, q_1HNC: Tensor, k_1GNC: Tensor, v_1GNC: Tensor, packing: Packing, scaling: float) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        H, G = q_1HNC.shape[1], k_1GNC.shape[1]
        q_XSC = packing.heads(q_1HNC[0].transpose(0, 1), G)
        k_XTC, v_XTC = (packing.heads(x[0].transpose(0, 1), G) for x in (k_1GNC, v_1GNC))
        p_XST = _probabilities(q_XSC, k_XTC, packing, scaling)
        ctx.kept = p_XST if p_XST.numel() * p_XST.element_size() <= KEPT_BYTES else None
        ctx.save_for_backward(q_XSC, k_XTC, v_XTC)
        ctx.packing, ctx.scaling, ctx.H, ctx.G = packing, scaling, H, G
        return packing.tokens_of_heads(torch.bmm(p_XST, v_XTC), H, G)[None]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy_1NHC: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        q_XSC, k_XTC, v_XTC = ctx.saved_tensors
        packing: Packing = ctx.packing
        dy_XSC = packing.heads_or_zero(dy_1NHC[0], ctx.G)
        p_XST = _probabilities(q_XSC, k_XTC, packing, ctx.scaling) if ctx.kept is None else ctx.kept
        dv_XTC = torch.bmm(p_XST.mT, dy_XSC)
        dp_XST = torch.bmm(dy_XSC, v_XTC.mT)
        ds_XST = torch.ops.aten._softmax_backward_data(dp_XST, p_XST, -1, p_XST.dtype).mul_(ctx.scaling)
        dq_XSC, dk_XTC = torch.bmm(ds_XST, k_XTC), torch.bmm(ds_XST.mT, q_XSC)
        back = ((dq_XSC, ctx.H), (dk_XTC, ctx.G), (dv_XTC, ctx.G))
        return *(packing.tokens_of_heads(d, heads, ctx.G).transpose(0, 1)[None] for d, heads in back), None, None


def _probabilities(q_XSC: Tensor, k_XTC: Tensor, packing: Packing, scaling: float) -> Tensor:
    """Causal softmax [X,S,T] of scaled products."""
    scores_XST = torch.bmm(q_XSC, k_XTC.mT).mul_(scaling)
    later_1ST = packing.later_TT.repeat(q_XSC.shape[1] // packing.T, 1)[None]
    return scores_XST.masked_fill_(later_1ST, float("-inf")).softmax(-1)
