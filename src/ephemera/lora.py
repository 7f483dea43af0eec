"""LoRA with one adapter per batch row (LDTTA Eq. 6, TaskWeaver 4.2): values and their attachment.

Shape suffixes used everywhere: B prompts in a batch, T tokens, D hidden size, V vocabulary,
L layers, M adapted projections, R LoRA rank, I/O in/out features, K steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ephemera.fast.packing import Packing


@dataclass(frozen=True, eq=False)
class Projection:
    """One adapted projection: a linear module, or some output rows of a fused one.

    `rows` holds the output rows [O] that belong to it (GPT-NeoX keeps query, key and value of
    every head in one module); None means all `module_out_features` of them.
    """

    module: str
    kind: str
    layer: int
    in_features: int
    module_out_features: int
    rows: Tensor | None = None

    @property
    def out_features(self) -> int:
        return self.module_out_features if self.rows is None else len(self.rows)

    @property
    def name(self) -> str:
        """Unique within a model: the module's path, and the kind where a module is shared."""
        return self.module if self.rows is None else f"{self.module}[{self.kind}]"


@dataclass(frozen=True, eq=False)
class LoraBatch:
    """All A [B,R,I] and B [B,O,R] of a batch, one pair per projection; a value, never changed in place.

    The adapted projection is `y = W x + (lora_alpha / r) B A x` (LDTTA Eq. 6). Tensors are float32
    (or float64) whatever the backbone's dtype.
    """

    projections: tuple[Projection, ...]
    A: tuple[Tensor, ...]
    B: tuple[Tensor, ...]
    r: int
    lora_alpha: float

    @property
    def scaling(self) -> float:
        return self.lora_alpha / self.r

    @property
    def batch_size(self) -> int:
        return self.A[0].shape[0]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Every A, then every B."""
        return self.A + self.B

    def with_tensors(self, tensors: Sequence[Tensor]) -> LoraBatch:
        M = len(self.projections)
        return replace(self, A=tuple(tensors[:M]), B=tuple(tensors[M:]))

    def leaves(self) -> LoraBatch:
        """The same values as fresh autograd leaves."""
        return self.with_tensors([t.detach().requires_grad_() for t in self.tensors])

    def rows(self, index: Tensor | Sequence[int]) -> LoraBatch:
        """The adapters of some rows, in the order given."""
        index_N = torch.as_tensor(index, device=self.A[0].device)
        return self.with_tensors([t.index_select(0, index_N) for t in self.tensors])

    def where(self, keep_B: Tensor, other: LoraBatch) -> LoraBatch:
        """This batch's row where `keep_B` is true, the other's row elsewhere."""
        keep_B11 = keep_B[:, None, None]
        return self.with_tensors(
            [torch.where(keep_B11, a, b) for a, b in zip(self.tensors, other.tensors, strict=True)]
        )

    def to(self, device: torch.device | str) -> LoraBatch:
        return self.with_tensors([t.to(device) for t in self.tensors])

    @staticmethod
    def cat(batches: Sequence[LoraBatch]) -> LoraBatch:
        columns = zip(*(b.tensors for b in batches), strict=True)
        return batches[0].with_tensors([torch.cat(column) for column in columns])

    def peft_factors(self, row: int) -> tuple[dict[str, tuple[Tensor, Tensor]], int, float]:
        """One row as PEFT sees it: {module: (A [r,I], B [O,r])}, r, lora_alpha.

        PEFT knows one pair per module. Where several projections share a fused module their pairs
        are stacked along the rank, each B scattered to its own output rows; r and lora_alpha grow
        together, so that the scaling stays.
        """
        if not 0 <= row < self.batch_size:
            raise ValueError(
                f"row {row} is not in this adaptation: it holds {self.batch_size} prompts, so 0 to {self.batch_size - 1}."
            )
        groups = _by_module(self)
        widest = max(len(pairs) for pairs in groups.values())
        factors = {}
        for module, pairs in groups.items():
            As, Bs = [], []
            for projection, A_BRI, B_BOR in pairs:
                A_RI, B_OR = A_BRI[row].detach(), B_BOR[row].detach()
                if projection.rows is not None:
                    rows = projection.rows.to(B_OR.device)
                    full_OR = B_OR.new_zeros(projection.module_out_features, self.r)
                    B_OR = full_OR.index_copy(0, rows, B_OR)
                As.append(A_RI)
                Bs.append(B_OR)
            for _ in range(widest - len(pairs)):
                As.append(torch.zeros_like(As[0]))
                Bs.append(torch.zeros_like(Bs[0]))
            factors[module] = (torch.cat(As, 0), torch.cat(Bs, 1))
        return factors, self.r * widest, self.lora_alpha * widest

    def peft_state_dict(self, row: int) -> dict[str, Tensor]:
        """One row's tensors under the key names that PEFT writes to adapter_model.safetensors."""
        state = {}
        for module, (A_RI, B_OR) in self.peft_factors(row)[0].items():
            state[f"base_model.model.{module}.lora_A.weight"] = A_RI.contiguous().cpu()
            state[f"base_model.model.{module}.lora_B.weight"] = B_OR.contiguous().cpu()
        return state


class _BatchedLora(torch.autograd.Function):
    """y_BTO + scaling * (x_BTI A_BRI^T) B_BOR^T as two batched products, added to y in place.

    Written by hand because autograd's own choice of operand layouts is several times slower on CPU
    (docs/findings.md); B that lies transposed in memory (flat.py) is the fast one. With a `packing`, x and y are [1,N,...]: rows are made of them for the products alone.
    Twice differentiable without one: under `create_graph` the intermediate is recomputed from the inputs, so
    that exact second order sees it.
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


class LoraLinear(nn.Module):
    """A frozen linear module with per-row adapters on it, all of its output or some of its rows."""

    def __init__(
        self,
        base: nn.Module,
        pairs: Sequence[tuple[Projection, Tensor, Tensor]],
        scaling: float,
        packing: Packing | None = None,
    ):
        super().__init__()
        self.base = base
        self.pairs = tuple(pairs)
        self.scaling = scaling
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


def _by_module(lora: LoraBatch) -> dict[str, list[tuple[Projection, Tensor, Tensor]]]:
    groups: dict[str, list[tuple[Projection, Tensor, Tensor]]] = {}
    for projection, A_BRI, B_BOR in zip(lora.projections, lora.A, lora.B, strict=True):
        groups.setdefault(projection.module, []).append((projection, A_BRI, B_BOR))
    return groups


@contextmanager
def attach(model: nn.Module, lora: LoraBatch | None, packing: Packing | None = None) -> Iterator[None]:
    """Run `model` with these adapters on it; whatever happens inside, the model is restored after.

    With a `packing` the model runs on real tokens alone, [1,N,...].
    """
    if lora is None:
        yield
        return
    replaced: list[tuple[nn.Module, str, nn.Module]] = []
    try:
        for path, pairs in _by_module(lora).items():
            parent_path, _, child = path.rpartition(".")
            parent = model.get_submodule(parent_path)
            base = parent.get_submodule(child)
            assert not isinstance(base, LoraLinear), f"{path} already carries an adapter"
            setattr(parent, child, LoraLinear(base, pairs, lora.scaling, packing))
            replaced.append((parent, child, base))
        yield
    finally:
        for parent, child, base in replaced:
            setattr(parent, child, base)
