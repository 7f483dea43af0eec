import pytest
import torch

from counting import count_head
from ephemera.adapt import adapt
from ephemera.adaptation import Adaptation
from ephemera.batch import TokenBatch, pad
from ephemera.inits import ZeroInit
from ephemera.llm.frozen_lm import FrozenLM
from ephemera.lora import LoraBatch
from ephemera.rates import FixedRate
from reference import close, merged_weights, slow_nll, slow_representation
from tiny_models import ARCHITECTURES, SomeRowsWild, left, random_ids, random_lora, random_scalenet, tiny_backbone

LENGTHS = [11, 4, 8]


def slow_adapt(backbone: FrozenLM, ids: list[int], lora: LoraBatch, row: int, rate, steps: int):
    """One prompt alone: weights W + (alpha / r) B A as plain tensors, autograd through transformers' own model."""
    lora = lora.rows([row])
    nlls, rates = [], []
    for k in range(1, steps + 1):
        leaves = lora.with_tensors([t.detach().clone().requires_grad_() for t in lora.tensors])
        weights = merged_weights(backbone, leaves, 0)
        nll = slow_nll(backbone.model, ids, weights=weights)
        grads = torch.autograd.grad(nll, leaves.tensors)
        h = slow_representation(backbone.model, ids, weights).detach()
        M = len(lora.projections)
        r = rate.rates_BM(h[None].float(), k, steps, like=nll.detach()[None], projections=M).detach()[0]
        moved = [t.detach() - r[i % M] * g for i, (t, g) in enumerate(zip(lora.tensors, grads, strict=True))]
        lora = lora.with_tensors(moved)
        nlls.append(nll.detach())
        rates.append(r)
    return lora, torch.stack(nlls), torch.stack(rates)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_steps_equal_a_slow_loop(architecture):
    backbone = tiny_backbone(architecture)
    prompts, start = random_ids([9, 5]), random_lora(backbone, 2)
    network = random_scalenet(backbone)
    trace = adapt(backbone, left(prompts), start, network, 3)
    for row, ids in enumerate(prompts):
        lora, nll, rates = slow_adapt(backbone, ids, start, row, network, 3)
        # h(x) is float32, summed in another order
        close(trace.prompt_nll_BK[row], nll, 1e-5)
        close(trace.rates_BKM[row], rates, 1e-5)
        close(trace.lora.rows([row]).tensors, lora.tensors, 1e-5)
    assert not trace.fallback_B.any()


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt_neox"])
def test_fixed_steps_equal_a_slow_loop_exactly(architecture):
    backbone = tiny_backbone(architecture)
    prompts = random_ids(LENGTHS)
    start = ZeroInit(r=2)(backbone, left(prompts), [0] * 3)
    trace = adapt(backbone, left(prompts), start, FixedRate(0.5), 4)
    for row, ids in enumerate(prompts):
        lora, nll, _ = slow_adapt(backbone, ids, start, row, FixedRate(0.5), 4)
        close(trace.prompt_nll_BK[row], nll)
        close(trace.lora.rows([row]).tensors, lora.tensors)


def same(trace: Adaptation, row: int, alone: Adaptation, tolerance: float = 1e-10) -> None:
    close(trace.prompt_nll_BK[row], alone.prompt_nll_BK[0], tolerance)
    close(trace.lora.rows([row]).tensors, alone.lora.tensors, tolerance)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_row_alone_is_the_row_in_any_batch(architecture, side):
    backbone = tiny_backbone(architecture)
    rate, init = FixedRate(0.5), ZeroInit(r=2)

    def run(prompts: list[list[int]]) -> Adaptation:
        batch = pad(prompts, side=side)
        return adapt(backbone, batch, init(backbone, batch, [7] * len(prompts)), rate, 3)

    prompts = random_ids(LENGTHS)
    together = run(prompts)
    other = run([prompts[1], *random_ids([13, 2], seed=9)])
    for row, ids in enumerate(prompts):
        same(together, row, run([ids]))
    same(other, 0, run([prompts[1]]))


@pytest.mark.parametrize("side", ["left", "right"])
def test_rates_of_a_row_do_not_depend_on_neighbours(llama, side):
    network, prompts = random_scalenet(llama), random_ids(LENGTHS)
    start = random_lora(llama, 3)
    together = adapt(llama, pad(prompts, side=side), start, network, 3)
    for row, ids in enumerate(prompts):
        alone = adapt(llama, left([ids]), start.rows([row]), network, 3)
        close(together.rates_BKM[row], alone.rates_BKM[0], 1e-6)  # h(x) is float32
        same(together, row, alone, 1e-6)


def test_a_depends_on_seed_and_prompt_not_on_place(llama):
    prompts = random_ids(LENGTHS)
    init = ZeroInit()
    together = init(llama, left(prompts), [0, 0, 0])
    turned = init(llama, pad([prompts[2], prompts[0]], side="right"), [0, 0])
    assert all(torch.equal(a[2], b[0]) for a, b in zip(together.A, turned.A, strict=True))
    assert all(torch.equal(a[0], b[1]) for a, b in zip(together.A, turned.A, strict=True))
    assert not torch.equal(together.A[0][0], together.A[0][1])
    seeded = init(llama, left(prompts), [1, 0, 0])
    assert not torch.equal(seeded.A[0][0], together.A[0][0])
    assert torch.equal(seeded.A[0][1], together.A[0][1])
    assert not any(b.any() for b in together.B)
    deviation = torch.cat([a.flatten() for a in together.A]).std().item()
    assert deviation == pytest.approx(1e-2, rel=0.1)
    # Each projection has its own draw
    assert not torch.equal(together.A[0], together.A[1])


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_cost_is_one_forward_a_step(llama, steps, monkeypatch):
    passes, scored = [], count_head(llama, monkeypatch)
    llama.decoder.register_forward_hook(lambda *_: passes.append(1))
    prompts = random_ids(LENGTHS)
    adapt(llama, left(prompts), random_lora(llama, 3), random_scalenet(llama), steps)
    # One pass and one walk over the vocabulary a step, for predicted tokens only; h(x) costs none
    assert len(passes) == steps
    assert scored == [sum(LENGTHS) - 3] * steps


# 1e200 leaves finite adapters, whose next forward pass is not finite
@pytest.mark.parametrize(("wild", "steps"), [(float("inf"), 1), (float("nan"), 1), (float("nan"), 3), (1e200, 3)])
def test_a_diverged_row_starts_over_and_touches_no_other(llama, wild, steps):
    prompts, start = random_ids([*LENGTHS, 9]), random_lora(llama, 4)
    trace = adapt(llama, left(prompts), start, SomeRowsWild({1: wild}), steps)
    assert trace.fallback_B.tolist() == [False, True, False, False]
    assert all(t.isfinite().all() for t in trace.lora.tensors)
    close(trace.lora.rows([1]).tensors, start.rows([1]).tensors, 0)
    calm = adapt(llama, left(prompts), start, FixedRate(0.1), steps)
    for row in (0, 2, 3):
        close(trace.lora.rows([row]).tensors, calm.lora.rows([row]).tensors)
        close(trace.prompt_nll_BK[row], calm.prompt_nll_BK[row])


def test_a_one_token_prompt_stays_as_it_was(llama):
    start = random_lora(llama, 2)
    trace = adapt(llama, left(random_ids([1, 6])), start, FixedRate(0.5), 2)
    close(trace.lora.rows([0]).tensors, start.rows([0]).tensors, 0)
    assert trace.prompt_nll_BK[0].tolist() == [0, 0]
    assert not trace.fallback_B.any()
    alone = adapt(llama, left(random_ids([1])), start.rows([0]), FixedRate(0.5), 2)
    close(alone.lora.tensors, start.rows([0]).tensors, 0)


def test_no_steps(llama):
    start = random_lora(llama, 2)
    trace = adapt(llama, left(random_ids([3, 6])), start, None, 0)
    close(trace.lora.tensors, start.tensors, 0)
    assert trace.prompt_nll_BK.shape == (2, 0)
    assert trace.rates_BKM.shape == (2, 0, 4)
    assert not trace.fallback_B.any()


def test_adapters_hold_no_graph(llama):
    batch = TokenBatch(torch.tensor(random_ids([6])), torch.ones(1, 6).bool())
    trace = adapt(llama, batch, random_lora(llama, 1), random_scalenet(llama), 2)
    assert not any(t.requires_grad for t in (*trace.lora.tensors, trace.prompt_nll_BK, trace.rates_BKM))


def test_bfloat16_models_adapt_in_float32():
    backbone = tiny_backbone("llama", dtype=torch.bfloat16)
    prompts = random_ids(LENGTHS)
    start = ZeroInit()(backbone, left(prompts), [0] * 3)
    trace = adapt(backbone, left(prompts), start, FixedRate(1e-5), 2)
    assert {t.dtype for t in trace.lora.tensors} == {torch.float32}
    assert trace.prompt_nll_BK.dtype == torch.float32
    # Far below bfloat16's resolution, and not lost
    assert all((a != b).any() for a, b in zip(trace.lora.B, start.B, strict=True))
