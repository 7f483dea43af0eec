"""Adapters in one buffer per kind against the same arithmetic matrix by matrix."""

import torch
from torch import Tensor

from ephemera.flat import FlatLora
from ephemera.lora import LoraBatch, Projection
from reference import close

B, R = 3, 2
SHAPES = ((7, 5), (7, 3), (4, 6))  # in and out features: no two matrices of one kind have to be alike


def draw(seed: int, *, rows: int = B) -> LoraBatch:
    generator = torch.Generator().manual_seed(seed)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return LoraBatch(
        tuple(Projection(f"{m}", "q", m, i, o) for m, (i, o) in enumerate(SHAPES)),
        A=tuple(numbers(rows, R, i) for i, _ in SHAPES),
        B=tuple(numbers(rows, o, R) for _, o in SHAPES),
        r=R,
        lora_alpha=4.0,
    )


def equal(one: LoraBatch, other: LoraBatch) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.tensors, other.tensors, strict=True))


def test_there_and_back_is_the_same_and_needs_no_copy():
    lora = draw(0)
    flat = FlatLora.of(lora)
    assert equal(flat.lora, lora)
    assert {t.untyped_storage().data_ptr() for t in flat.lora.A} == {flat.A_BN.untyped_storage().data_ptr()}
    assert {t.untyped_storage().data_ptr() for t in flat.lora.B} == {flat.B_BN.untyped_storage().data_ptr()}


def test_a_gradient_comes_back_in_the_same_order():
    lora, weights = draw(0), draw(1)
    leaves = FlatLora.of(lora).leaves()
    loss = sum((t.sin() * w).sum() for t, w in zip(leaves.lora.tensors, weights.tensors, strict=True))
    grads = leaves.with_tensors(torch.autograd.grad(loss, leaves.tensors))
    want = [t.cos() * w for t, w in zip(lora.tensors, weights.tensors, strict=True)]
    close(grads.lora.tensors, want)


def test_step_is_equation_14():
    lora, grads, rates = draw(0), draw(1), torch.rand(B, len(SHAPES))
    before = [t.clone() for t in lora.tensors]
    after = FlatLora.of(lora).step(FlatLora.of(grads), rates).lora
    for m in range(len(SHAPES)):
        for b in range(B):
            rate = rates[b, m].double()
            close(after.A[m][b], lora.A[m][b] - rate * grads.A[m][b])
            close(after.B[m][b], lora.B[m][b] - rate * grads.B[m][b])
    assert all(torch.equal(a, b) for a, b in zip(lora.tensors, before, strict=True))  # a value


def test_products_and_scales_are_per_prompt_and_projection():
    one, other, factors = draw(0), draw(1), torch.rand(B, len(SHAPES), dtype=torch.float64)
    dots = FlatLora.of(one).dot_BM(FlatLora.of(other))
    scaled = FlatLora.of(one).scaled(factors).lora
    for m in range(len(SHAPES)):
        for b in range(B):
            want = (one.A[m][b] * other.A[m][b]).sum() + (one.B[m][b] * other.B[m][b]).sum()
            close(dots[b, m], want)
            close(scaled.A[m][b], factors[b, m] * one.A[m][b])
            close(scaled.B[m][b], factors[b, m] * one.B[m][b])


def test_where_and_finite():
    lora, other = draw(0), draw(1)
    spoilt = [t.clone() for t in lora.tensors]
    spoilt[0][1, 0, 0], spoilt[4][2, 0, 0] = float("nan"), float("inf")
    flat = FlatLora.of(lora.with_tensors(spoilt))
    finite = flat.finite_B()
    assert finite.tolist() == [True, False, False]
    mixed = flat.where(finite, FlatLora.of(other)).lora
    assert equal(mixed.rows([0]), lora.rows([0]))
    assert equal(mixed.rows([1, 2]), other.rows([1, 2]))
    emptied = flat.where(finite, None).lora
    assert equal(emptied.rows([0]), lora.rows([0]))
    assert not any(t[1:].any() for t in emptied.tensors)
