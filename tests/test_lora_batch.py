"""Adapters in one buffer per kind against the same arithmetic matrix by matrix."""

import torch
from torch import Tensor

from ephemera.lora import LoraBatch, Projection
from reference import close

B, R = 3, 2
SHAPES = ((7, 5), (7, 3), (4, 6))  # in and out features: no two matrices of one kind have to be alike


def draw(seed: int, *, rows: int = B) -> LoraBatch:
    generator = torch.Generator().manual_seed(seed)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return LoraBatch.of(
        tuple(Projection(f"{m}", "q", m, i, o) for m, (i, o) in enumerate(SHAPES)),
        A=tuple(numbers(rows, R, i) for i, _ in SHAPES),
        B=tuple(numbers(rows, o, R) for _, o in SHAPES),
        r=R,
        lora_alpha=4.0,
    )


def equal(one: LoraBatch, other: LoraBatch) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.tensors, other.tensors, strict=True))


def test_matrices_are_views_of_two_buffers():
    lora = draw(0)
    assert {t.untyped_storage().data_ptr() for t in lora.A} == {lora.A_BN.untyped_storage().data_ptr()}
    assert {t.untyped_storage().data_ptr() for t in lora.B} == {lora.B_BN.untyped_storage().data_ptr()}
    assert equal(lora.with_tensors(lora.tensors), lora)
    assert equal(lora.with_buffers(*lora.buffers), lora)


def test_a_gradient_comes_back_in_the_same_order():
    lora, weights = draw(0), draw(1)
    leaves = lora.leaves()
    loss = sum((t.sin() * w).sum() for t, w in zip(leaves.tensors, weights.tensors, strict=True))
    grads = leaves.with_buffers(*torch.autograd.grad(loss, leaves.buffers))
    want = [t.cos() * w for t, w in zip(lora.tensors, weights.tensors, strict=True)]
    close(grads.tensors, want)


def test_step_is_equation_14():
    lora, grads, rates = draw(0), draw(1), torch.rand(B, len(SHAPES))
    before = [t.clone() for t in lora.tensors]
    after = lora.step(grads, rates)
    for m in range(len(SHAPES)):
        for b in range(B):
            rate = rates[b, m].double()
            close(after.A[m][b], lora.A[m][b] - rate * grads.A[m][b])
            close(after.B[m][b], lora.B[m][b] - rate * grads.B[m][b])
    assert all(torch.equal(a, b) for a, b in zip(lora.tensors, before, strict=True))  # a value


def test_products_and_scales_are_per_prompt_and_projection():
    one, other, factors = draw(0), draw(1), torch.rand(B, len(SHAPES), dtype=torch.float64)
    dots = one.dot_BM(other)
    scaled = one.scaled(factors)
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
    flat = lora.with_tensors(spoilt)
    finite = flat.finite_B()
    assert finite.tolist() == [True, False, False]
    mixed = flat.where(finite, other)
    assert equal(mixed.rows([0]), lora.rows([0]))
    assert equal(mixed.rows([1, 2]), other.rows([1, 2]))
    emptied = flat.where(finite, None)
    assert equal(emptied.rows([0]), lora.rows([0]))
    assert not any(t[1:].any() for t in emptied.tensors)
