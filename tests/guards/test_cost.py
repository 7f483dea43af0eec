"""What adaptation may cost, counted in passes, operations and bytes, which no busy machine changes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from counting import count_head
from ephemera.adapt import adapt
from ephemera.inits import ZeroInit
from ephemera.model import AdaptiveLM
from ephemera.rates import FixedRate
from tiny_models import left, random_ids, random_lora, tiny_backbone

# The most that a step may take, on a tiny Llama (2 layers, 4 adapted projections) with prompts of 9 and 6 tokens.
# Attention is written out (fast/packing.py), so that its own six products a layer count here.
LIMITS: dict[str, dict[str, int]] = {
    "float32": {
        "mm": 18,
        "addmm": 4,
        "addmm_": 5,
        "bmm": 31,
        "baddbmm": 0,
        "baddbmm_": 0,
        "_to_copy": 2,
        "clone": 0,
        "copy_": 0,
        "cat": 14,
        "all operations": 274,
        "bytes": 311_000,
    },
    "bfloat16": {
        "mm": 19,
        "addmm": 4,
        "addmm_": 4,
        "bmm": 31,
        "baddbmm": 0,
        "baddbmm_": 0,
        "_to_copy": 52,
        "clone": 0,
        "copy_": 0,
        "cat": 16,
        "all operations": 328,
        "bytes": 270_000,
    },
}
ATTENTION = {"float32": "sdpa", "bfloat16": "eager"}
PRODUCTS = ("mm", "addmm", "addmm_", "bmm", "baddbmm", "baddbmm_")
COPIES = ("_to_copy", "clone", "copy_", "cat")
WHAT_TO_DO = (
    "If the cost is meant to rise, raise LIMITS in tests/guards/test_cost.py and say in docs/performance.md what it buys; "
    "if not, find what computes or copies more. `python tests/guards/test_cost.py` prints what a step takes now."
)


class Operations(TorchDispatchMode):
    """Counts every aten operation that computes or copies, those of backward passes too, and the bytes of tensors that
    are new. Views are free."""

    def __init__(self):
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns):
            self.counts[func.overloadpacket.__name__] += 1
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for t in tree_leaves(out):
            if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in given:
                self.bytes += t.nbytes
        return out

    def found(self) -> dict[str, int]:
        return {
            **{name: self.counts[name] for name in (*PRODUCTS, *COPIES)},
            "all operations": sum(self.counts.values()),
            "bytes": self.bytes,
        }


@contextmanager
def inputs_of(module: nn.Module) -> Iterator[list[tuple[int, ...]]]:
    """Shapes of what a module is called with."""
    seen: list[tuple[int, ...]] = []

    def note(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(tuple((args[0] if args else kwargs["input_ids"]).shape))

    handle = module.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


def per_step(dtype: str) -> dict[str, int]:
    """Counts of three steps less those of two: what happens once does not show."""
    backbone = tiny_backbone("llama", dtype=getattr(torch, dtype), attention=ATTENTION[dtype])
    batch = left(random_ids([9, 6]))
    totals = []
    for steps in (2, 3):
        lora = ZeroInit()(backbone, batch, [0, 0])
        adapt(backbone, batch, lora, FixedRate(0.1), steps)  # lazy things first
        with Operations() as operations:
            adapt(backbone, batch, lora, FixedRate(0.1), steps)
        totals.append(operations.found())
    return {name: totals[1][name] - totals[0][name] for name in totals[0]}


@pytest.mark.parametrize("dtype", list(ATTENTION))
def test_a_step_takes_no_more_operations_than_it_did(dtype: str):
    found = per_step(dtype)
    risen = [f"{name} {found[name]:,} (at most {most:,})" for name, most in LIMITS[dtype].items() if found[name] > most]
    assert not risen, f"a step in {dtype} takes more than before: {', '.join(risen)}. {WHAT_TO_DO}"
    assert set(found) == set(LIMITS[dtype])


@pytest.mark.parametrize("K", [0, 1, 3])
def test_passes_are_k_steps_one_prefill_and_the_tokens(K: int, monkeypatch: pytest.MonkeyPatch):
    backbone = tiny_backbone("llama", dtype=torch.float32)
    scored = count_head(backbone, monkeypatch)
    lm = AdaptiveLM(backbone, rate=0.1)
    prompts, new = ["The river runs past the old mill.", "Give a short answer."], 4
    lengths = [len(lm.encode(p)) for p in prompts]
    B, T = len(prompts), max(lengths)
    with inputs_of(backbone.decoder) as passes, Operations() as operations:
        adaptation = lm.adapt(prompts, steps=K)
    assert passes == [(1, sum(lengths))] * K  # real tokens alone
    assert scored == [sum(lengths) - B] * K  # each token's logits once
    assert operations.counts["_softmax"] == K * backbone.layers  # of attention, kept for the backward pass
    assert operations.counts["_softmax_backward_data"] == K * backbone.layers
    with inputs_of(backbone.decoder) as passes, inputs_of(backbone.head) as headed:
        lm.generate(prompts, adaptation=adaptation, max_new_tokens=new, min_new_tokens=new)
    assert passes == [(B, T)] + [(B, 1)] * new
    assert headed == [(B, 1, backbone.hidden_size)] * new  # generate asks for the last logits alone
    with inputs_of(backbone.decoder) as passes:
        lm.answer_nll(prompts, ["the sea", "yes"], adaptation=adaptation)
    longest = max(len(lm.encode_answer(p, a)) for p, a in zip(prompts, ["the sea", "yes"], strict=True))
    assert passes == [(B, T), (B, longest - 1)]


@pytest.mark.parametrize(("dtype", "casts"), [(torch.float32, 0), (torch.bfloat16, 1)])
@torch.no_grad()
def test_a_token_takes_two_small_products_a_projection(dtype: torch.dtype, casts: int):
    backbone = tiny_backbone("llama", dtype=dtype, attention="eager")
    lora = random_lora(backbone, 2).with_tensors([t.float() for t in random_lora(backbone, 2).tensors])
    token_B1 = torch.tensor([[5], [9]])
    found = []
    for adapters in (None, lora):
        with backbone.decoding(adapters)(), Operations() as operations:
            backbone.model(token_B1)
        found.append(operations.counts)
    M = len(backbone.projections)
    more = {name: found[1][name] - found[0][name] for name in ("bmm", "baddbmm_", "_to_copy", "cat", "clone")}
    assert more["bmm"] + more["baddbmm_"] == 2 * M
    assert more["_to_copy"] == casts * M
    assert more["cat"] == more["clone"] == 0


if __name__ == "__main__":
    for dtype in ATTENTION:
        print(f'    "{dtype}": {per_step(dtype)},')
