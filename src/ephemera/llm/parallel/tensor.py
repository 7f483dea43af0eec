"""Tensor parallelism: every layer's matrices are cut over the processes by transformers' own plan, and so are the adapters.

Adapters, their gradients and updates are whole on every process. A product takes this process's part of A or B, and what
the processes exchange for it has rank width, [B,T,R].
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ephemera.llm import processes
from ephemera.llm.collectives import summed, summed_gradient, taken
from ephemera.llm.frozen_lm import FrozenLM
from ephemera.lora import LoraLinear, Pair, Projection

# transformers' styles of a linear module, by what a process sees of it
CUT_OUTPUT = {"colwise"}
CUT_INPUT = {"rowwise"}
WHOLE = {"colwise_gather_output", "colwise_rep", "rowwise_split_input", "rowwise_rep", "replicate"}


class TensorLoraLinear(LoraLinear):
    """A module that is cut over processes, with adapters that are not."""

    def __init__(self, base: nn.Module, pairs: Sequence[Pair], scaling: float, cut: str):
        super().__init__(base, pairs, scaling)
        self.cut = cut

    def forward(self, x_BTI: Tensor) -> Tensor:
        """This process's part of y = W x + scaling * B A x (LDTTA Eq. 6).

        Output cut: x is whole, and B's rows are this process's. Input cut: x and A's columns are this process's, and A x
        is summed. Either way the processes exchange [B,T,R]: A x, or the gradient by it.
        """
        y_BTO = self.base(x_BTI)
        for projection, A, B in self.pairs:
            A_BRI, B_BOR, rows = A.to(x_BTI), B.to(x_BTI), projection.rows
            if self.cut == "output":
                first, last = own_part(projection.module_out_features)
                own_N, rows = _own_rows(projection, first, last)
                u_BTR = summed_gradient(torch.bmm(x_BTI, A_BRI.mT))
                delta_BTO = torch.bmm(u_BTR, taken(B_BOR, 1, own_N.to(x_BTI.device)).mT)
            else:
                own_N = torch.arange(*own_part(projection.in_features), device=x_BTI.device)
                u_BTR = summed(torch.bmm(x_BTI, taken(A_BRI, 2, own_N).mT))
                delta_BTO = torch.bmm(u_BTR, B_BOR.mT)
            delta_BTO = self.scaling * delta_BTO
            y_BTO = y_BTO + delta_BTO if rows is None else y_BTO.index_add(2, rows.to(y_BTO.device), delta_BTO)
        return y_BTO


def own_part(length: int) -> tuple[int, int]:
    """This process's first entry of `length`, and the one after its last; the last process's part may be shorter."""
    size = -(-length // processes.size())
    return min(length, processes.rank() * size), min(length, (processes.rank() + 1) * size)


def _own_rows(projection: Projection, first: int, last: int) -> tuple[Tensor, Tensor | None]:
    """Which of B's rows are this process's, and where they lie in its part of the output (None: they fill it)."""
    if projection.rows is None:
        return torch.arange(first, last), None
    (own_N,) = ((projection.rows >= first) & (projection.rows < last)).nonzero(as_tuple=True)
    return own_N, projection.rows[own_N] - first


class TensorLM(FrozenLM):
    """A model whose layers are cut over the processes. All of them compute the same rows, and have the same results."""

    parallel = "tensor"

    def __init__(self, model: PreTrainedModel, *args: Any, **kwargs: Any):
        super().__init__(model, *args, **kwargs)
        self.styles = styles_of(model)
        self._check_styles()
        self.adapted = self._adapted

    def _adapted(self, base: nn.Module, pairs: Sequence[Pair], scaling: float) -> nn.Module:
        style = self.styles.get(pairs[0][0].module, "replicate")
        if style in WHOLE:
            return LoraLinear(base, pairs, scaling)
        return TensorLoraLinear(base, pairs, scaling, "output" if style in CUT_OUTPUT else "input")

    def with_adapters_on(self, *args: Any, **kwargs: Any) -> TensorLM:
        other = super().with_adapters_on(*args, **kwargs)
        other.adapted = other._adapted
        other._check_styles()
        return other

    def _check_styles(self) -> None:
        for projection in self.projections:
            style = self.styles.get(projection.module, "replicate")
            if style not in CUT_OUTPUT | CUT_INPUT | WHOLE:
                raise ValueError(
                    f"parallel='tensor': {projection.module} is cut in a way that adapters cannot follow ({style}). Adapt "
                    'other modules (target_modules="qv"), or use parallel="fsdp".'
                )

    def anywhere(self, flag: bool) -> bool:
        return processes.anywhere(flag, self.device)

    def generation(self, *, sampled: bool) -> dict[str, Any]:
        if sampled:  # every process draws the same tokens
            torch.manual_seed(processes.from_first(int(torch.randint(1 << 31, ()))))
        return {}

    def check_same(self, what: str, value: object) -> None:
        processes.check_same(what, value, self.device)


def styles_of(model: PreTrainedModel) -> dict[str, str]:
    """How transformers has cut each module, by its path."""
    plan: dict[str, str] = model.tp_plan or {}
    numbered = {path: re.sub(r"\.\d+(?=\.|$)", ".*", path) for path, _ in model.named_modules()}
    return {path: plan[general] for path, general in numbered.items() if general in plan}


def check_divides(name: str, config: Any, count: int) -> None:
    """ValueError if the attention heads cannot be dealt to so many processes evenly."""
    text = config.get_text_config()
    heads: int = text.num_attention_heads
    kv_heads: int = getattr(text, "num_key_value_heads", None) or heads
    if heads % count or kv_heads % count:
        fits = [str(n) for n in range(2, kv_heads + 1) if heads % n == 0 and kv_heads % n == 0]
        allowed = f"--nproc-per-node {' or '.join(fits)}" if fits else "one process"
        raise ValueError(
            f"parallel='tensor': {name} has {heads} attention heads and {kv_heads} of keys and values, which {count} "
            f"processes cannot share evenly. Start {allowed}, or use parallel='fsdp'."
        )
