"""`y + scaling * B A x` for every row as two batched products written out by hand, on padded or on packed tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ephemera.fast.packing import Packing
from ephemera.lora import LoraLinear, Pair


class _BatchedLora(torch.autograd.Function):
    """y_BTO + scaling * (x_BTI A_BRI^T) B_BOR^T, added to y in place (LDTTA Eq. 6).

    Autograd's own choice of operand layouts is several times slower on a CPU (docs/performance.md). With a `packing`, x and
    y are [1,N,...]: rows are made of them for the products only. Twice differentiable without one: under `create_graph`
    the intermediate is recomputed from the inputs.
    """

    @staticmethod
    def forward(
        ctx,
        y_BTO: Tensor,
        x_BTI: Tensor,
        A_BRI: Tensor,
        B_BOR: Tensor,
        scaling: float,
        packing: Packing | None,  # pyright: ignore[reportIncompatibleMethodOverride]
    ) -> Tensor:
        rows_BTI = x_BTI if packing is None else packing.rows(x_BTI[0])
        xa_BTR = torch.bmm(rows_BTI, A_BRI.to(x_BTI.dtype).mT)
        ctx.save_for_backward(rows_BTI, A_BRI, B_BOR, xa_BTR)
        ctx.scaling, ctx.packing = scaling, packing
        ctx.mark_dirty(y_BTO)
        B_BRO = B_BOR.mT.to(x_BTI.dtype)
        if packing is None:
            return y_BTO.baddbmm_(xa_BTR, B_BRO, alpha=scaling)
        return y_BTO.add_(packing.tokens(torch.bmm(xa_BTR, B_BRO)), alpha=scaling)

    @staticmethod
    def backward(ctx, dy_BTO: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        rows_BTI, A_BRI, B_BOR, xa_BTR = ctx.saved_tensors
        packing: Packing | None = ctx.packing
        A_low, B_BRO = A_BRI.to(rows_BTI.dtype), B_BOR.mT.to(rows_BTI.dtype)
        drows_BTO = dy_BTO if packing is None else packing.rows_or_zero(dy_BTO[0])
        if torch.is_grad_enabled():  # create_graph: the saved intermediate would count as a constant
            xa_BTR = torch.bmm(rows_BTI, A_low.mT)
        _, need_x, need_A, need_B, *_ = ctx.needs_input_grad
        dx_BTI = dA_BRI = dB_BOR = None
        if need_x or need_A:
            dxa_BTR = torch.bmm(drows_BTO, B_BRO.mT) * ctx.scaling
            if need_x:
                dx_BTI = torch.bmm(dxa_BTR, A_low)
                dx_BTI = dx_BTI if packing is None else packing.tokens(dx_BTI)[None]
            if need_A:
                dA_BRI = torch.bmm(dxa_BTR.mT, rows_BTI).to(A_BRI.dtype)
        if need_B:
            dB_BOR = (torch.bmm(xa_BTR.mT, drows_BTO).to(B_BOR.dtype) * ctx.scaling).mT
        return dy_BTO, dx_BTI, dA_BRI, dB_BOR, None, None


def lora_linear(
    y_BTO: Tensor, x_BTI: Tensor, A_BRI: Tensor, B_BOR: Tensor, scaling: float, packing: Packing | None = None
) -> Tensor:
    """`y + scaling * B A x` for every row of the batch; `y` may be overwritten. Packed: y and x are [1,N,...]."""
    if y_BTO._base is not None:  # autograd pays for writing into a view (linear with bias) by a clone anyway
        y_BTO = y_BTO.clone()
    if packing is None and not torch.is_grad_enabled():  # autograd's bookkeeping is a fifth of this at a few tokens
        xa_BTR = torch.bmm(x_BTI, A_BRI.to(x_BTI.dtype).mT)
        return y_BTO.baddbmm_(xa_BTR, B_BOR.mT.to(x_BTI.dtype), alpha=scaling)
    return _BatchedLora.apply(y_BTO, x_BTI, A_BRI, B_BOR, scaling, packing)  # pyright: ignore[reportReturnType]


class FastLoraLinear(LoraLinear):
    """Computes what `LoraLinear` does; with a `packing`, on packed tokens [1,N,I]."""

    def __init__(self, base: nn.Module, pairs: Sequence[Pair], scaling: float, packing: Packing | None = None):
        super().__init__(base, pairs, scaling)
        self.packing = packing

    def forward(self, x_BTI: Tensor) -> Tensor:
        y_BTO = self.base(x_BTI)
        for projection, A_BRI, B_BOR in self.pairs:
            if projection.rows is None:
                y_BTO = lora_linear(y_BTO, x_BTI, A_BRI, B_BOR, self.scaling, self.packing)
            else:
                zero_BTO = y_BTO.new_zeros(*y_BTO.shape[:2], B_BOR.shape[1])
                delta_BTO = lora_linear(zero_BTO, x_BTI, A_BRI, B_BOR, self.scaling, self.packing)
                y_BTO = y_BTO.index_add(2, projection.rows.to(y_BTO.device), delta_BTO)
        return y_BTO
