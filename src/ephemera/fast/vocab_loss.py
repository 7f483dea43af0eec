"""The vocabulary head and the loss behind it, some words at a time: no logits of the whole vocabulary exist."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ephemera.fast.shared_prefix import Shared
from ephemera.llm.head import Head, token_nll
from ephemera.llm.precision import wide_of

# Tokens and words whose logits are held at once. A CPU's cache likes few: 1,024 x 2,048 float32 are 8 MB
CPU_BLOCK = (1024, 2048)
DEVICE_BLOCK = (2048, 16_384)
LOSS, HEAD_GRADIENT = "loss", "gradient at the head"  # points of a pass (fast/shared_prefix.py), the last ones


class _BlockNll(torch.autograd.Function):
    """NLL of targets [N] from hidden states [N,D]; its gradient by those is made in the same walk over the words.

    The head gets no gradient.
    """

    @staticmethod
    def forward(ctx, h_ND: Tensor, head: Head, targets_N: Tensor, shared: Shared | None) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        if shared is not None:
            h_ND, targets_N = shared.unique(h_ND), shared.unique(targets_N)
        size, words = CPU_BLOCK if h_ND.device.type == "cpu" else DEVICE_BLOCK
        walk = _walk if head.plain else _differentiated
        parts = [
            walk(h_CD, head, targets_C, words, ctx.needs_input_grad[0])
            for h_CD, targets_C in zip(h_ND.split(size), targets_N.split(size), strict=True)
        ]
        nll_N = torch.cat([nll_C for nll_C, _ in parts])
        nll_N = nll_N if shared is None else shared.expand(nll_N, LOSS)
        if ctx.needs_input_grad[0]:
            dh_ND = torch.cat([dh_CD for _, dh_CD in parts if dh_CD is not None])
            ctx.dh_ND = dh_ND if shared is None else shared.expand(dh_ND, HEAD_GRADIENT)
        return nll_N

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dnll_N: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        return ctx.dh_ND * dnll_N[:, None].to(ctx.dh_ND.dtype), None, None, None


def _walk(h_ND: Tensor, head: Head, targets_N: Tensor, words: int, want_dh: bool) -> tuple[Tensor, Tensor | None]:
    """One walk over the vocabulary: log-sum-exp and softmax-weighted mean of the words' rows, both kept relative to the
    highest logit so far, as in flash attention.

    With p = softmax(h W^T): nll = logsumexp - own logit, dnll/dh = sum_v p_v W_v - W_target; under a soft cap each W_v
    counts by 1 - (logit / cap)^2.
    """
    weight_VD, bias_V, cap = head.module.get_parameter("weight"), getattr(head.module, "bias", None), head.softcap
    wide, targets_N1 = wide_of(h_ND.dtype), targets_N[:, None]
    top_N1 = h_ND.new_full((len(h_ND), 1), -torch.inf, dtype=wide)
    sum_N1, own_N1 = torch.zeros_like(top_N1), torch.zeros_like(top_N1)
    mean_ND = torch.zeros_like(h_ND, dtype=wide) if want_dh else None
    for start in range(0, len(weight_VD), words):
        weight_CD = weight_VD[start : start + words]
        low_NC = F.linear(h_ND, weight_CD, None if bias_V is None else bias_V[start : start + words])
        logits_NC = low_NC.to(wide)
        if cap is not None:
            logits_NC = logits_NC.div_(cap).tanh_().mul_(cap)
        place_N1 = targets_N1 - start
        here_N1 = (place_N1 >= 0) & (place_N1 < len(weight_CD))
        own_N1 = torch.where(here_N1, logits_NC.gather(1, place_N1.clamp(0, len(weight_CD) - 1)), own_N1)
        slope_NC = None if cap is None or not want_dh else 1 - (logits_NC / cap).square_()
        higher_N1 = torch.maximum(top_N1, logits_NC.amax(1, keepdim=True))
        shrink_N1 = (top_N1 - higher_N1).exp_()
        top_N1, p_NC = higher_N1, logits_NC.sub_(higher_N1).exp_()
        sum_N1 = sum_N1.mul_(shrink_N1).add_(p_NC.sum(1, keepdim=True))
        if mean_ND is not None:
            p_NC = p_NC if slope_NC is None else p_NC.mul_(slope_NC)
            mean_ND.mul_(shrink_N1)
            if wide == h_ND.dtype:
                mean_ND.addmm_(p_NC, weight_CD)
            else:
                mean_ND.add_(p_NC.to(h_ND.dtype) @ weight_CD)
    nll_N = (top_N1 + sum_N1.log() - own_N1)[:, 0]
    if mean_ND is None:
        return nll_N, None
    own_ND = weight_VD[targets_N].to(wide)
    own_ND = own_ND if cap is None else own_ND * (1 - (own_N1 / cap).square())
    return nll_N, mean_ND.div_(sum_N1).sub_(own_ND).to(h_ND.dtype)


def _differentiated(
    h_ND: Tensor, head: Head, targets_N: Tensor, _words: int, want_dh: bool
) -> tuple[Tensor, Tensor | None]:
    """The same through autograd and all words at once, for a head that is not a plain linear map."""
    h_ND = h_ND.detach().requires_grad_(want_dh)
    with torch.set_grad_enabled(want_dh):
        nll_N = token_nll(h_ND, head, targets_N)
        dh_ND = torch.autograd.grad(nll_N.sum(), h_ND)[0] if want_dh else None
    return nll_N.detach(), dh_ND


def block_nll(h_ND: Tensor, head: Head, targets_N: Tensor, shared: Shared | None = None) -> Tensor:
    """As `token_nll`, once differentiable. `shared`: tokens whose states and targets are another's; the head runs for the
    others only."""
    return _BlockNll.apply(h_ND, head, targets_N, shared)  # pyright: ignore[reportReturnType]
