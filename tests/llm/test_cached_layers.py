"""Passes through some layers alone are equal to passes through all of them, and run only what is needed."""

import pytest
import torch

from counting import count_layers
from ephemera.adapt import adapt
from ephemera.batch import pad
from ephemera.llm.frozen_lm import FrozenLM
from ephemera.llm.prefill import prefill
from ephemera.prompt_loss import PromptLoss
from ephemera.rates import FixedRate
from reference import close, merged_model, merged_weights, slow_nll
from tiny_models import ARCHITECTURES, left, random_ids, random_lora, random_scalenet, tiny_backbone

DEPTH = 4
LENGTHS = [11, 4, 8]  # sliding windows of 6 see the difference


def upper_half(architecture: str) -> FrozenLM:
    return tiny_backbone(architecture, depth=DEPTH, layers="last-2")


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_steps_above_kept_layers_equal_a_slow_loop(architecture, side):
    backbone = upper_half(architecture)
    assert {p.layer for p in backbone.projections} == {2, 3}
    prompts, start = random_ids(LENGTHS), random_lora(backbone, 3)
    trace = adapt(backbone, pad(prompts, side=side), start, FixedRate(0.3), 2)
    assert trace.reading is not None
    for row, ids in enumerate(prompts):
        lora = start.rows([row])
        for _ in range(2):
            leaves = lora.leaves()
            nll = slow_nll(backbone.model, ids, weights=merged_weights(backbone, leaves, 0))
            grads = torch.autograd.grad(nll, leaves.tensors)
            lora = lora.with_tensors([t - 0.3 * g for t, g in zip(lora.tensors, grads, strict=True)])
        close(trace.lora.rows([row]).tensors, lora.tensors)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_prefill_on_kept_layers_equals_a_fresh_one(architecture):
    backbone = upper_half(architecture)
    prompts, answers = random_ids(LENGTHS), random_ids([3, 1, 4], seed=5)
    batch, lora = left(prompts), random_lora(backbone, 3)
    lower = backbone.lower(batch)
    assert lower is not None
    have, want = prefill(backbone, batch, lora, cached=lower), prefill(backbone, batch, lora)
    close(have.hidden_BTD, want.hidden_BTD)
    for a, b in zip(have.cache.layers, want.cache.layers, strict=True):
        close([a.keys, a.values], [b.keys, b.values])
    close(have.answer_nll(answers), want.answer_nll(answers))
    first = have.generate(max_new_tokens=5)
    assert first == want.generate(max_new_tokens=5)
    # Decoding has not grown what the next prefill takes
    again = prefill(backbone, batch, lora, cached=lower)
    close(again.answer_nll(answers), prefill(backbone, batch, lora).answer_nll(answers))
    for row, (ids, answer) in enumerate(zip(prompts, answers, strict=True)):
        slow = slow_nll(merged_model(backbone, lora, row), ids + answer, first=len(ids))
        close(again.answer_nll(answers)[row], slow)


@pytest.mark.parametrize("K", [1, 3])
def test_layers_below_the_adapted_ones_run_once(K, monkeypatch):
    backbone = upper_half("llama")
    counts = count_layers(backbone, monkeypatch)
    batch = left(random_ids(LENGTHS))
    trace = adapt(backbone, batch, random_lora(backbone, 3), FixedRate(0.1), K)
    prefill(backbone, batch, trace.lora, cached=trace.reading)
    assert counts == {0: 1, 1: 1, 2: K + 1, 3: K + 1}


def test_no_layer_above_the_exit_runs(monkeypatch):
    backbone = tiny_backbone("llama", depth=DEPTH, layers="1-2")
    counts = count_layers(backbone, monkeypatch)
    batch = left(random_ids(LENGTHS))
    adapt(backbone, batch, random_lora(backbone, 3), FixedRate(0.1, PromptLoss(exit_layer=3)), 2)
    assert counts == {0: 1, 1: 2, 2: 2}


def test_h_of_x_stays(monkeypatch):
    backbone = upper_half("qwen3")
    batch, lora, network = left(random_ids(LENGTHS)), random_lora(backbone, 3), random_scalenet(backbone)
    have = adapt(backbone, batch, lora, network, 2)
    monkeypatch.setattr(FrozenLM, "lower", lambda self, batch: None)
    want = adapt(backbone, batch, lora, network, 2)
    close(have.rates_BKM, want.rates_BKM)
    close(have.lora.tensors, want.lora.tensors)


def test_a_model_that_cannot_be_cut_takes_the_full_pass(monkeypatch):
    backbone = upper_half("llama")
    batch, lora = left(random_ids(LENGTHS)), random_lora(backbone, 3)
    want = adapt(backbone, batch, lora, FixedRate(0.3), 2)
    backbone.architecture = None
    counts = count_layers(backbone, monkeypatch)
    have = adapt(backbone, batch, lora, FixedRate(0.3), 2)
    assert have.reading is None
    close(have.lora.tensors, want.lora.tensors)
    assert counts == dict.fromkeys(range(DEPTH), 2)
    with pytest.raises(ValueError, match="does not know how to stop a llama early"):
        PromptLoss(exit_layer=4).check(backbone)


def test_the_decoder_is_restored_after_an_error():
    backbone = upper_half("gemma3")
    layers, norm = backbone.decoder.layers, backbone.decoder.norm
    batch, lora = left(random_ids(LENGTHS)), random_lora(backbone, 3)
    want = backbone.forward(batch, lora).hidden_BTD

    def fail(*_):
        raise RuntimeError("in the middle")

    for layer, rate in ((0, FixedRate(0.1)), (3, FixedRate(0.1)), (3, FixedRate(0.1, PromptLoss(exit_layer=4)))):
        handle = layers[layer].register_forward_hook(fail)
        with pytest.raises(RuntimeError, match="in the middle"):
            adapt(backbone, batch, lora, rate, 1)
        handle.remove()
        assert backbone.decoder.layers is layers
        assert backbone.decoder.norm is norm
        close(backbone.forward(batch, lora).hidden_BTD, want, 0)
