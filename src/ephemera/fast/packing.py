"""A batch without its padding: the real tokens of all rows in one line, padded only inside attention and LoRA.

A decoder is token by token but for attention, so its linear layers, norms and the rest need no padded places
at all; between prompts of 29 to 37 tokens those are a tenth of the work. `attention` is what transformers calls
in place of its own attention while `packed` holds; it also folds grouped queries instead of repeating keys.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

Made = TypeVar("Made")
Gather = Callable[[Tensor], Tensor]
KeysValues = dict[int, tuple[Tensor, Tensor]]  # by layer: keys and values [N,G,C] of all real tokens, rotated
ATTENTION = "ephemera_packed"
# Causal decoders that hand keyword arguments down to attention and know no other bias than the causal mask
PACKABLE = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text", "olmo", "olmo2", "phi", "phi3", "gpt_neox")
FUSED_FROM = 768  # places; longer prompts go to the fused float32 kernel, which keeps no probabilities
BLOCK = {torch.bfloat16: 96}  # places of a block of queries at least; bfloat16's products like to be larger
OTHER_BLOCK = 64
KEPT_BYTES = 12 << 20  # attention probabilities of a layer that are kept for the backward pass; more are made anew


def worked_out_on_host(compute: Callable[[Any], Made]) -> cached_property[Made]:
    """A property that an object's twin on the host (`on_host`; itself where it is there) works out, moved to its `device`.

    For what depends on how many tokens there are and where: a device would have to be waited for.
    """

    def ready(it: Any) -> Made:
        if it.on_host is it:
            return compute(it)
        made: Any = getattr(it.on_host, compute.__name__)
        return made.to(it.device)

    ready.__doc__ = compute.__doc__
    return cached_property(ready)


@dataclass(frozen=True, eq=False)
class Packing:
    """Where each of N real tokens stands in a batch of B rows that are padded on the right to T places."""

    lengths: tuple[int, ...]
    device: torch.device

    host: Packing | None = None  # the same there, where it came from

    @property
    def on_host(self) -> Packing:
        if self.device.type == "cpu":
            return self
        return Packing(self.lengths, torch.device("cpu")) if self.host is None else self.host

    def to(self, device: torch.device) -> Packing:
        return Packing(self.lengths, device, self.on_host if device.type != "cpu" else None)

    @cached_property
    def T(self) -> int:
        return max(self.lengths)

    @cached_property
    def padded(self) -> bool:
        return min(self.lengths) < self.T

    @worked_out_on_host
    def token_of_P(self) -> Tensor:
        """For each of P = B * T places the token that stands there; at padding, the row's last one."""
        lengths_B1 = torch.tensor(self.lengths)[:, None]
        places_BT = torch.arange(self.T)[None].minimum(lengths_B1 - 1)
        return (places_BT + lengths_B1.cumsum(0) - lengths_B1).flatten()

    @worked_out_on_host
    def place_of_N(self) -> Tensor:
        """For each token its place in B * T."""
        real_BT = torch.arange(self.T)[None] < torch.tensor(self.lengths)[:, None]
        return real_BT.flatten().nonzero()[:, 0]

    @worked_out_on_host
    def padding_of_P(self) -> Tensor:
        """The places among B * T that hold no token."""
        return (torch.ones_like(self.token_of_P).index_fill_(0, self.place_of_N, 0)).nonzero()[:, 0]

    @worked_out_on_host
    def positions_1N(self) -> Tensor:
        return (self.place_of_N % self.T)[None]

    def rows(self, x_ND: Tensor) -> Tensor:
        """[N,...] as rows [B,T,...]; what stands at padded places is finite and must not be used."""
        x_PD = x_ND.index_select(0, self.token_of_P) if self.padded else x_ND
        return x_PD.unflatten(0, (len(self.lengths), self.T))

    def rows_or_zero(self, x_ND: Tensor) -> Tensor:
        """[N,...] as rows [B,T,...], zero at padded places."""
        x_BTD = self.rows(x_ND)
        if self.padded:  # filling what was copied too much takes half the time of copying into zeros
            x_BTD.flatten(0, 1).index_fill_(0, self.padding_of_P, 0)
        return x_BTD

    def tokens(self, x_BTD: Tensor) -> Tensor:
        """Rows [B,T,...] as their real tokens [N,...]."""
        x_PD = x_BTD.flatten(0, 1)
        return x_PD.index_select(0, self.place_of_N) if self.padded else x_PD

    def heads(self, x_NHC: Tensor, groups: int, block: int) -> Tensor:
        """[N,H,C] as [Z,C], Z = B * H * T: the queries of block after block, each as `view_blocks` shows it.

        The heads of a group stand one after the other. Padded places as in `rows`.
        """
        from_Z, _, _ = self._head_places(x_NHC.shape[1], groups, block)
        return x_NHC.reshape(-1, x_NHC.shape[-1]).index_select(0, from_Z)

    def heads_or_zero(self, x_NHC: Tensor, groups: int, block: int) -> Tensor:
        """As `heads`, zero at padded places."""
        x_ZC = self.heads(x_NHC, groups, block)
        _, _, padding = self._head_places(x_NHC.shape[1], groups, block)
        return x_ZC.index_fill_(0, padding, 0) if self.padded else x_ZC

    def tokens_of_heads(self, x_ZC: Tensor, heads: int, groups: int, block: int) -> Tensor:
        """What `heads` made, back to [N,H,C]."""
        _, to_Z, _ = self._head_places(heads, groups, block)
        return x_ZC.index_select(0, to_Z).view(-1, heads, x_ZC.shape[-1])

    def spans(self, block: int) -> list[tuple[int, int]]:
        """The first place of each block, and that after its last: blocks of at least `block` places, about alike."""
        count = max(1, self.T // block)
        return [(self.T * i // count, self.T * (i + 1) // count) for i in range(count)]

    def view_blocks(self, x_ZC: Tensor, heads: int, groups: int, block: int) -> list[Tensor]:
        """What `heads` made as [B*G, (H/G)*places, C] of each block."""
        X = len(self.lengths) * groups
        sizes = [len(self.lengths) * heads * (end - start) for start, end in self.spans(block)]
        return [x.view(X, -1, x.shape[-1]) for x in x_ZC.split(sizes)]

    def _head_places(self, heads: int, groups: int, block: int) -> tuple[Tensor, Tensor, Tensor]:
        """For each (block, row, group, head of it, place) its (token, head); for each of those that place; padding."""
        key = (heads, groups, block)
        if key not in self._kept_places:
            B, T = len(self.lengths), self.T

            def in_blocks(x_BTGJ: Tensor) -> Tensor:
                x_BGJT = x_BTGJ.permute(0, 2, 3, 1)
                return torch.cat([x_BGJT[..., start:end].flatten() for start, end in self.spans(block)])

            token_BT11 = self.token_of_P.view(B, T, 1, 1)
            head_GJ = torch.arange(heads, device=self.device).view(groups, -1)
            from_Z = in_blocks(token_BT11 * heads + head_GJ)
            place_Z = in_blocks(torch.arange(len(from_Z), device=self.device).view(B, T, groups, -1))
            z_PH = torch.empty_like(place_Z).scatter_(0, place_Z, torch.arange(len(place_Z), device=self.device))
            z_PH = z_PH.view(B * T, heads)
            real_P = torch.zeros(B * T, dtype=torch.bool, device=self.device).index_fill_(0, self.place_of_N, True)
            self._kept_places[key] = from_Z, z_PH[real_P].flatten(), z_PH[~real_P].flatten()
        return self._kept_places[key]

    def joint_places(self, heads: int, groups: int, block: int) -> tuple[Tensor, Tensor]:
        """For queries, keys and values that stand side by side, [N, heads + 2 groups, C], to be gathered by one index: from
        which (token, head) each place of `heads` comes, queries first, then keys, then values; and the way back."""
        key = (heads, groups, block)
        if key not in self._kept_joints:
            width = heads + 2 * groups
            froms, tos, first, offset = [], [], 0, 0
            for count, size in ((heads, block), (groups, self.T), (groups, self.T)):
                from_Z, to_Z, _ = self._head_places(count, groups, size)
                froms.append(from_Z // count * width + first + from_Z % count)
                tos.append(to_Z.view(-1, count) + offset)
                first, offset = first + count, offset + len(from_Z)
            self._kept_joints[key] = torch.cat(froms), torch.cat(tos, 1).flatten()
        return self._kept_joints[key]

    @cached_property
    def _kept_joints(self) -> dict[tuple[int, int, int], tuple[Tensor, Tensor]]:
        return {}

    @cached_property
    def _kept_places(self) -> dict[tuple[int, int, int], tuple[Tensor, Tensor, Tensor]]:
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
    module: nn.Module,
    q_1HNC: Tensor,
    k_1GNC: Tensor,
    v_1GNC: Tensor,
    _mask: None,
    *,
    packing: Packing,
    kept: KeysValues | None = None,
    scaling: float | None = None,
    **_others: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each prompt: [1,H,N,C] queries, G heads of keys and values -> [1,N,H,C].

    `kept`: takes the layer's keys and values.
    """
    if kept is not None:
        kept[_layer_of(module)] = k_1GNC[0].detach().transpose(0, 1), v_1GNC[0].detach().transpose(0, 1)
    scaling = q_1HNC.shape[-1] ** -0.5 if scaling is None else scaling
    if writes_out(packing, q_1HNC.dtype):
        block = block_of(q_1HNC.dtype)
        return _CausalAttention.apply(q_1HNC, k_1GNC, v_1GNC, packing, scaling, block), None  # pyright: ignore[reportReturnType]
    to_rows, to_tokens = packing.rows, packing.tokens
    if packing.padded:  # padded places have no gradient of their own
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


def writes_out(packing: Packing, dtype: torch.dtype) -> bool:
    """Whether attention is written out, and not left to torch's fused kernel."""
    return packing.device.type == "cpu" and (dtype != torch.float32 or packing.T < FUSED_FROM)


def block_of(dtype: torch.dtype) -> int:
    return BLOCK.get(dtype, OTHER_BLOCK)


AttentionInterface.register(ATTENTION, attention)


class _CausalAttention(torch.autograd.Function):
    """Attention written out as batched products, for a CPU, whose fused kernel is slow on short prompts and in bfloat16.

    The H / G query heads that share keys stand as S = (H / G) * T query places of one of X = B * G heads, so keys
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
    """Write the gradients by the scaled queries, the keys and the values. `dy_ZC` is zero at padded places."""
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
