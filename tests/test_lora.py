import pytest
import torch
from torch import nn

from ephemera.fast.lora_matmul import lora_linear
from ephemera.fast.packing import Packing
from ephemera.lora import LoraBatch, LoraLinear, Projection, attach
from reference import close, merged_model
from tiny_models import ARCHITECTURES, left, random_ids, random_lora, tiny_backbone

B, T, IN, OUT, R = 3, 4, 5, 6, 2
SCALING = 2.5


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def small_pair() -> LoraBatch:
    """Two projections of one batch, without a model."""
    projections = (Projection("a", "q", 0, IN, OUT), Projection("b", "v", 0, IN, 3))
    return LoraBatch.of(
        projections, A=(draw(B, R, IN), draw(B, R, IN)), B=(draw(B, OUT, R), draw(B, 3, R)), r=R, lora_alpha=5.0
    )


@pytest.mark.parametrize("bias", [False, True])
def test_lora_linear_is_a_merged_weight_for_each_row(bias):
    # With bias, torch returns a view here, which may not be written into.
    linear = nn.Linear(IN, OUT, bias=bias, dtype=torch.float64).requires_grad_(False)
    x, A, B_ = draw(B, T, IN), draw(B, R, IN), draw(B, OUT, R)
    want = []
    for b in range(B):
        y = x[b] @ (linear.weight + SCALING * B_[b] @ A[b]).T
        want.append(y if linear.bias is None else y + linear.bias)
    close(lora_linear(linear(x), x, A, B_, SCALING), torch.stack(want))


@pytest.mark.parametrize("bias", [False, True])
def test_lora_linear_gradients(bias):
    linear = nn.Linear(IN, OUT, bias=bias, dtype=torch.float64).requires_grad_(False)
    inputs = tuple(t.requires_grad_() for t in (draw(2, 3, IN), draw(2, R, IN), draw(2, OUT, R)))

    def through(x, A, B_):
        return lora_linear(linear(x), x, A, B_, SCALING)

    assert torch.autograd.gradcheck(through, inputs)
    assert torch.autograd.gradgradcheck(through, inputs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_without_gradients_the_numbers_are_the_same(bias, dtype):
    linear = torch.nn.Linear(6, 5, bias=bias, dtype=dtype).requires_grad_(False)
    x, A, B_ = torch.randn(3, 4, 6, dtype=dtype), torch.randn(3, 2, 6), torch.randn(3, 5, 2)
    if dtype == torch.float64:
        A, B_ = A.double(), B_.double()
    want = lora_linear(linear(x), x, A, B_.clone().requires_grad_(), SCALING)
    with torch.no_grad():
        have = lora_linear(linear(x), x, A, B_, SCALING)
    assert want.requires_grad
    assert torch.equal(have, want)
    assert (have - linear(x)).abs().max() > 0.1


def test_packed_rows_take_any_gradient():
    """Merged weights row by row. A row's last token has a gradient here, which no prompt loss gives it."""
    lengths, N = (2, 4, 1), 7
    y, x = draw(1, N, OUT), draw(1, N, IN).requires_grad_()
    A, B_factor = draw(B, R, IN).requires_grad_(), draw(B, OUT, R).requires_grad_()
    packing = Packing(lengths)
    got = lora_linear(y.clone(), x, A, B_factor, SCALING, packing)
    want = y + torch.cat([x_TI @ (SCALING * B_factor[b] @ A[b]).T for b, x_TI in enumerate(x[0].split(lengths))])[None]
    close(got, want)
    dy = draw(1, N, OUT)
    inputs = (x, A, B_factor)
    close(torch.autograd.grad(got, inputs, dy), torch.autograd.grad(want, inputs, dy))


def test_lora_linear_gradient_by_the_base_output():
    y = draw(2, 3, OUT).requires_grad_()
    x, A, B_ = draw(2, 3, IN), draw(2, R, IN), draw(2, OUT, R)
    # y is overwritten: gradcheck must see a copy
    assert torch.autograd.gradcheck(lambda y: lora_linear(y.clone(), x, A, B_, SCALING), y)


def test_gradients_are_float32_beside_a_bfloat16_model():
    x, y = draw(B, T, IN).bfloat16(), draw(B, T, OUT).bfloat16()
    A, B_ = draw(B, R, IN).float().requires_grad_(), draw(B, OUT, R).float().requires_grad_()
    out = lora_linear(y.clone(), x, A, B_, SCALING)
    assert out.dtype == torch.bfloat16
    want = y.float() + SCALING * x.float() @ A.mT @ B_.mT
    torch.testing.assert_close(out.float(), want, atol=0.3, rtol=0.05)
    dA, dB = torch.autograd.grad(out.float().sum(), (A, B_))
    assert dA.dtype == dB.dtype == torch.float32
    slow = torch.autograd.grad(want.sum(), (A, B_))
    close((dA, dB), slow, tolerance=0.1 * float(max(g.abs().max() for g in slow)))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("targets", ["qv", "attention"])
def test_a_model_with_adapters_is_the_merged_model_for_each_row(architecture, targets):
    backbone = tiny_backbone(architecture, target_modules=targets)
    lora = random_lora(backbone, 3)
    prompts = random_ids([9, 9, 9])
    batch = left(prompts)
    plain = backbone.forward(batch).hidden_BTD
    hidden = backbone.forward(batch, lora).hidden_BTD
    assert (hidden - plain).abs().amax(dim=(1, 2)).min() > 1e-2
    for row in range(3):
        merged = merged_model(backbone, lora, row)
        close(backbone.logits(hidden[row]), merged(input_ids=batch.ids_BT[row : row + 1]).logits[0])


def test_a_fused_module_named_whole_is_adapted_whole():
    backbone = tiny_backbone("gpt_neox", target_modules=["query_key_value"])
    lora = random_lora(backbone, 2)
    assert [p.out_features for p in backbone.projections] == [96, 96]
    batch = left(random_ids([8, 8]))
    hidden = backbone.forward(batch, lora).hidden_BTD
    for row in range(2):
        merged = merged_model(backbone, lora, row)
        close(backbone.logits(hidden[row]), merged(input_ids=batch.ids_BT[row : row + 1]).logits[0])


def test_fused_rows_move_alone():
    rows = torch.tensor([4, 1, 7])
    projection = Projection("a", "v", 0, IN, 9, rows)
    linear = nn.Linear(IN, 9, dtype=torch.float64)
    x, A, B_ = draw(B, T, IN), draw(B, R, IN), draw(B, 3, R)
    y = LoraLinear(linear, [(projection, A, B_)], SCALING)(x)
    change = y - linear(x)
    for b in range(B):
        close(change[b][:, rows], SCALING * x[b] @ A[b].T @ B_[b].T)
    others = [i for i in range(9) if i not in rows]
    assert not change[..., others].any()


def test_an_adapter_is_a_value():
    lora = small_pair()
    before = [t.clone() for t in lora.tensors]
    lora.leaves().with_tensors([torch.zeros_like(t) for t in lora.tensors])
    assert all(torch.equal(a, b) for a, b in zip(lora.tensors, before, strict=True))


def test_rows_cat_and_where():
    lora, other = small_pair(), small_pair()
    chosen = lora.rows([2, 0])
    assert torch.equal(chosen.A[1], lora.A[1][[2, 0]])
    assert torch.equal(chosen.B[0], lora.B[0][[2, 0]])
    joined = LoraBatch.cat([chosen, other])
    assert joined.batch_size == 5
    assert torch.equal(joined.B[1][2:], other.B[1])
    mixed = lora.where(torch.tensor([True, False, True]), other)
    assert torch.equal(mixed.A[0][1], other.A[0][1])
    assert torch.equal(mixed.B[1][[0, 2]], lora.B[1][[0, 2]])


def test_the_model_is_restored_after_an_error_and_after_two_runs(llama):
    batch = left(random_ids([6, 6]))
    modules = dict(llama.model.named_modules())
    before = llama.forward(batch).hidden_BTD
    first = llama.forward(batch, random_lora(llama, 2, seed=1)).hidden_BTD

    def fail_inside():
        with attach(llama.model, random_lora(llama, 2)):
            assert any(isinstance(m, LoraLinear) for m in llama.model.modules())
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail_inside()
    assert dict(llama.model.named_modules()) == modules
    assert torch.equal(llama.forward(batch, random_lora(llama, 2, seed=1)).hidden_BTD, first)
    assert torch.equal(llama.forward(batch).hidden_BTD, before)


def test_a_failed_attach_leaves_nothing_attached(llama):
    lora = random_lora(llama, 1)
    wrong = LoraBatch.of(
        (*lora.projections[:-1], Projection("model.nowhere", "v", 1, 32, 16)), lora.A, lora.B, r=3, lora_alpha=5.0
    )
    with pytest.raises(AttributeError), attach(llama.model, wrong):
        pass
    assert not any(isinstance(m, LoraLinear) for m in llama.model.modules())


def test_adapters_do_not_stack(llama):
    lora = random_lora(llama, 1)
    with attach(llama.model, lora):
        with pytest.raises(AssertionError, match="already carries"), attach(llama.model, lora):
            pass
        assert sum(isinstance(m, LoraLinear) for m in llama.model.modules()) == 4


def test_a_row_that_is_not_there(llama):
    with pytest.raises(ValueError, match=r"row 2 .* holds 2 prompts, so 0 to 1"):
        random_lora(llama, 2).peft_factors(2)
