"""LoRA with one adapter per batch row (LDTTA Eq. 6, TaskWeaver 4.2): values and their attachment.

Shape suffixes used everywhere: B prompts in a batch, T tokens, D hidden size, V vocabulary,
L layers, M adapted projections, R LoRA rank, I/O in/out features, K steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from ephemera.llm.replaced import Place, child, replaced


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


Pair = tuple[Projection, Tensor, Tensor]  # a projection, its A [B,R,I] and its B [B,O,R]


@dataclass(frozen=True, eq=False)
class LoraBatch:
    """All A [B,R,I] and B [B,O,R] of a batch, one pair per projection; a value, never changed in place.

    The adapted projection is `y = W x + (lora_alpha / r) B A x` (LDTTA Eq. 6). Tensors are float32 (or float64) whatever the
    backbone's dtype. `A` and `B` are views of two buffers: row b of `A_BN` [B, sum of R*I] and of `B_BN` [B, sum of R*O]
    is prompt b's adapter, each B transposed, as its products read it fastest. A gradient by an adapter has the same form.
    """

    projections: tuple[Projection, ...]
    A_BN: Tensor
    B_BN: Tensor
    r: int
    lora_alpha: float
    A: tuple[Tensor, ...] = field(init=False, repr=False)
    B: tuple[Tensor, ...] = field(init=False, repr=False)

    def __post_init__(self):
        for_A, for_B = self._sizes
        A = tuple(a.unflatten(1, (self.r, -1)) for a in self.A_BN.split_with_sizes(for_A, 1))
        B = tuple(b.unflatten(1, (self.r, -1)).mT for b in self.B_BN.split_with_sizes(for_B, 1))
        object.__setattr__(self, "A", A)
        object.__setattr__(self, "B", B)

    @staticmethod
    def of(
        projections: tuple[Projection, ...], A: Sequence[Tensor], B: Sequence[Tensor], *, r: int, lora_alpha: float
    ) -> LoraBatch:
        """From one A and one B per projection."""
        A_BN, B_BN = torch.cat([a.flatten(1) for a in A], 1), torch.cat([b.mT.flatten(1) for b in B], 1)
        return LoraBatch(projections, A_BN, B_BN, r, lora_alpha)

    @property
    def scaling(self) -> float:
        return self.lora_alpha / self.r

    @property
    def batch_size(self) -> int:
        return self.A_BN.shape[0]

    @property
    def pairs(self) -> list[Pair]:
        return list(zip(self.projections, self.A, self.B, strict=True))

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Every A, then every B."""
        return self.A + self.B

    @property
    def buffers(self) -> tuple[Tensor, Tensor]:
        return self.A_BN, self.B_BN

    def with_tensors(self, tensors: Sequence[Tensor]) -> LoraBatch:
        """With other numbers, given as `tensors` has them."""
        M = len(self.projections)
        return LoraBatch.of(self.projections, tensors[:M], tensors[M:], r=self.r, lora_alpha=self.lora_alpha)

    def with_buffers(self, A_BN: Tensor, B_BN: Tensor) -> LoraBatch:
        return replace(self, A_BN=A_BN, B_BN=B_BN)

    @torch.enable_grad()
    def leaves(self) -> LoraBatch:
        """The same values; its buffers are fresh autograd leaves."""
        return self.with_buffers(self.A_BN.detach().requires_grad_(), self.B_BN.detach().requires_grad_())

    def rows(self, index: Tensor | Sequence[int]) -> LoraBatch:
        """The adapters of some rows, in the order given."""
        index_N = torch.as_tensor(index, device=self.A_BN.device)
        return self.with_buffers(*(t.index_select(0, index_N) for t in self.buffers))

    def where(self, keep_B: Tensor, other: LoraBatch | None) -> LoraBatch:
        """This batch's row where `keep_B` is true, the other's row elsewhere; None: zero."""
        others = (0.0, 0.0) if other is None else other.buffers
        return self.with_buffers(
            *(torch.where(keep_B[:, None], a, b) for a, b in zip(self.buffers, others, strict=True))
        )

    def to(self, device: torch.device | str) -> LoraBatch:
        return self.with_buffers(self.A_BN.to(device), self.B_BN.to(device))

    @staticmethod
    def cat(batches: Sequence[LoraBatch]) -> LoraBatch:
        return batches[0].with_buffers(torch.cat([b.A_BN for b in batches]), torch.cat([b.B_BN for b in batches]))

    def step(self, grads: LoraBatch, rates_BM: Tensor) -> LoraBatch:
        """LDTTA Eq. 14: phi_m <- phi_m - rate_m * grad_m, the same rate for A and B of a projection."""
        spread = self._spread(rates_BM.to(self.A_BN.dtype))
        pairs = zip(self.buffers, grads.buffers, spread, strict=True)
        return self.with_buffers(*(torch.addcmul(t, g, rates_BN, value=-1) for t, g, rates_BN in pairs))

    def scaled(self, factors_BM: Tensor) -> LoraBatch:
        """Each projection's A and B times a number."""
        return self.with_buffers(*(t * x_BN for t, x_BN in zip(self.buffers, self._spread(factors_BM), strict=True)))

    def without_A(self) -> LoraBatch:
        """Zero for A: a gradient that moves B only."""
        return self.with_buffers(torch.zeros_like(self.A_BN), self.B_BN)

    def dot_BM(self, other: LoraBatch) -> Tensor:
        """Inner product of each prompt's and projection's numbers, those of A and of B together."""
        A, B = (
            (mine * theirs).split_with_sizes(sizes, 1)
            for mine, theirs, sizes in zip(self.buffers, other.buffers, self._sizes, strict=True)
        )
        return torch.stack([a.sum(1) + b.sum(1) for a, b in zip(A, B, strict=True)], 1)

    def finite_B(self) -> Tensor:
        """Which rows hold only finite numbers: bool [B]."""
        return self.A_BN.isfinite().all(1) & self.B_BN.isfinite().all(1)

    @property
    def _sizes(self) -> tuple[list[int], list[int]]:
        return [self.r * p.in_features for p in self.projections], [self.r * p.out_features for p in self.projections]

    def _spread(self, x_BM: Tensor) -> tuple[Tensor, Tensor]:
        """[B,M] -> [B,N] of A and of B: a number for each entry of its projection's matrix."""
        columns = x_BM.split(1, 1)
        A_BN, B_BN = (
            torch.cat([x.expand(-1, size) for x, size in zip(columns, sizes, strict=True)], 1) for sizes in self._sizes
        )
        return A_BN, B_BN

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
        groups = by_module(self.pairs)
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


class LoraLinear(nn.Module):
    """A frozen linear module with per-row adapters on it, all of its output or some of its rows."""

    def __init__(self, base: nn.Module, pairs: Sequence[Pair], scaling: float):
        super().__init__()
        self.base, self.pairs, self.scaling = base, tuple(pairs), scaling

    def forward(self, x_BTI: Tensor) -> Tensor:
        """y = W x + scaling * B A x (LDTTA Eq. 6), as two products of rank R: B A is never built."""
        y_BTO = self.base(x_BTI)
        for projection, A_BRI, B_BOR in self.pairs:
            delta_BTO = self.scaling * torch.bmm(torch.bmm(x_BTI, A_BRI.to(x_BTI).mT), B_BOR.to(x_BTI).mT)
            rows = projection.rows
            y_BTO = y_BTO + delta_BTO if rows is None else y_BTO.index_add(2, rows.to(y_BTO.device), delta_BTO)
        return y_BTO


def by_module(pairs: Sequence[Pair]) -> dict[str, list[Pair]]:
    """Pairs by the module that they sit on: a fused one has several."""
    groups: dict[str, list[Pair]] = {}
    for pair in pairs:
        groups.setdefault(pair[0].module, []).append(pair)
    return groups


Adapted = Callable[[nn.Module, Sequence[Pair], float], nn.Module]


def attach(model: nn.Module, lora: LoraBatch | None, adapted: Adapted = LoraLinear) -> AbstractContextManager[None]:
    """Run `model` with these adapters on it; whatever happens inside, the model is restored after.

    `adapted`: makes the module that stands in for an adapted one.
    """
    return nullcontext() if lora is None else attach_pairs(model, lora.pairs, lora.scaling, adapted)


def attach_pairs(
    model: nn.Module, pairs: Sequence[Pair], scaling: float, adapted: Adapted = LoraLinear
) -> AbstractContextManager[None]:
    """As `attach`, with some projections' adapters."""
    places: list[Place] = []
    for path, own in by_module(pairs).items():
        parent, name = child(model, path)
        base = parent.get_submodule(name)
        assert not isinstance(base, LoraLinear), f"{path} already carries an adapter"
        places.append((parent, name, adapted(base, own, scaling)))
    return replaced(places)
