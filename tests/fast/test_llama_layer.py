"""Decoder layers written out, and beginnings run once: equal to transformers' own layers, in values and gradients."""

from contextlib import contextmanager
from dataclasses import replace

import peft
import pytest
import torch

from counting import count_head
from ephemera.adapt import adapt
from ephemera.batch import pad
from ephemera.fast import vocab_loss as head
from ephemera.fast.fast_lm import FastForward
from ephemera.fast.llama_layer import LAYERS, can_fuse
from ephemera.fast.packing import Layout, Packing
from ephemera.fast.shared_prefix import common as common_beginning
from ephemera.fast.shared_prefix import in_first_row, within_batch
from ephemera.inits import ZeroInit
from ephemera.llm.load import load_backbone
from ephemera.prompt_loss import PromptLoss
from ephemera.rates import FixedRate
from reference import close
from tiny_models import ARCHITECTURES, VOCABULARY, random_ids, random_lora, random_scalenet, tiny_backbone

WRITTEN = ("llama", "mistral", "qwen2", "qwen3")
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SOME = ["k_proj", "o_proj", "down_proj"]


def passes(backbone, batch, lora, **kwargs):
    """Losses, h(x), the last hidden states and every gradient, written out and by transformers' own layers."""
    found = []
    for written in (True, False):
        backbone.fuses_layers = written
        leaves = lora.leaves()
        out = backbone.forward(batch, leaves, embedded=True, **kwargs)
        nll_B = backbone.mean_nll(out.hidden_BTD, batch, out=out)
        weights_B = torch.arange(1.0, len(nll_B) + 1, dtype=nll_B.dtype)
        grads = torch.autograd.grad(nll_B @ weights_B, leaves.tensors, allow_unused=True, materialize_grads=True)
        found.append((nll_B.detach(), out.representation_BH(batch), out.hidden_BTD.detach(), *grads))
        shared = out.shared.tokens if isinstance(out, FastForward) and out.shared is not None else 0
        if written:
            seen = shared
    return *found, seen


def starting(lengths, common: int) -> list[list[int]]:
    """Prompts that begin with the same tokens."""
    first = list(range(40, 40 + common))
    return [
        (first + [100 + (i * 7 + j) % 150 for j in range(n)])[:n] if n <= common else first + ids
        for i, (n, ids) in enumerate(
            zip(lengths, ([60 + i * 20 + j for j in range(n - common)] for i, n in enumerate(lengths)), strict=True)
        )
    ]


def test_which_models_are_written_out():
    for architecture in ARCHITECTURES:
        backbone = tiny_backbone(architecture)
        name = type(backbone.decoder.get_submodule("layers.0")).__name__
        assert can_fuse(backbone.decoder) == (architecture in WRITTEN) == (name in LAYERS)
    llama = tiny_backbone("llama")
    llama.decoder.get_submodule("layers.1.mlp").register_module("act_fn", torch.nn.GELU())
    assert not can_fuse(llama.decoder)
    llama = tiny_backbone("llama")
    llama.decoder.get_submodule("layers.1.mlp").register_module("up_proj", torch.nn.Identity())
    assert not can_fuse(llama.decoder)
    llama = tiny_backbone("llama")
    assert can_fuse(llama.decoder)
    with peft_on(llama.model):
        assert not can_fuse(llama.decoder)
    handle = llama.decoder.get_submodule("layers.0.self_attn.q_proj").register_forward_hook(lambda *_: None)
    assert not can_fuse(llama.decoder)
    handle.remove()
    assert can_fuse(llama.decoder)
    linear = llama.decoder.get_submodule("layers.0.mlp.up_proj")
    linear.forward = lambda x: x  # as accelerate does where weights lie elsewhere
    assert not can_fuse(llama.decoder)


def test_an_adapter_elsewhere_is_not_left_out():
    """On a module that is in no layer, by its name: the pass goes through transformers' layers, and moves it."""
    backbone = tiny_backbone("llama")
    stray = replace(backbone.projections[0], module="model.extra.q_proj")
    lora = random_lora(backbone, 2)
    assert can_fuse(backbone.decoder, lora)
    assert not can_fuse(backbone.decoder, replace(lora, projections=(stray, *lora.projections[1:])))


@contextmanager
def peft_on(model):
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    yield
    adapted.unload()


@pytest.mark.parametrize("target_modules", ["qv", ALL, SOME], ids=["qv", "all", "some"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("architecture", WRITTEN)
def test_a_pass_equals_transformers_layers(architecture, side, target_modules):
    backbone = tiny_backbone(architecture, target_modules=target_modules)
    assert can_fuse(backbone.decoder)
    written, own, shared = passes(backbone, pad(random_ids([9, 1, 6]), side=side), random_lora(backbone, 3))
    assert shared == 0
    for got, want in zip(written, own, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_biases_everywhere(architecture):
    backbone = tiny_backbone(architecture)
    for path in ("q_proj", "k_proj", "v_proj", "o_proj"):
        linear = backbone.decoder.get_submodule(f"layers.0.self_attn.{path}")
        linear.bias = torch.nn.Parameter(torch.randn(linear.out_features, dtype=torch.float64), requires_grad=False)
    for path in ("gate_proj", "up_proj", "down_proj"):
        linear = backbone.decoder.get_submodule(f"layers.0.mlp.{path}")
        linear.bias = torch.nn.Parameter(torch.randn(linear.out_features, dtype=torch.float64), requires_grad=False)
    written, own, _ = passes(backbone, pad(random_ids([9, 4]), side="left"), random_lora(backbone, 2))
    for got, want in zip(written, own, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("stop", [None, 2])
def test_some_layers_a_kept_bottom_and_an_exit(stop):
    backbone = tiny_backbone("llama", depth=4, layers=[1])
    batch, lora = pad(random_ids([11, 4, 8]), side="left"), random_lora(backbone, 3)
    for kwargs in ({"stop": stop}, {"stop": stop, "lower": backbone.lower(batch)}):
        written, own, _ = passes(backbone, batch, lora, **kwargs)
        for got, want in zip(written, own, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("target_modules", ["qv", ALL], ids=["qv", "all"])
@pytest.mark.parametrize("lengths", [(15, 12, 20), (12, 15, 20), (12, 12, 12)])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("architecture", WRITTEN)
def test_a_shared_beginning_is_run_once_and_changes_nothing(architecture, side, lengths, target_modules, monkeypatch):
    backbone = tiny_backbone(architecture, target_modules=target_modules)
    if architecture == "mistral":
        backbone.decoder.config.sliding_window = 32  # longer prompts are not packed
    batch = pad(starting(lengths, 12), side=side)
    lora = ZeroInit(r=2)(backbone, batch, [0] * 3)  # B = 0: adapters do nothing yet
    scored = count_head(backbone, monkeypatch)
    written, own, shared = passes(backbone, batch, lora)
    assert shared == 12
    assert scored == [sum(lengths) - 3 - 2 * 11, sum(lengths) - 3]
    for got, want in zip(written, own, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)


def test_rows_with_adapters_of_their_own_share_nothing():
    backbone = tiny_backbone("llama")
    batch = pad(starting((15, 12, 20), 12), side="left")
    assert backbone.forward(batch, random_lora(backbone, 3)).shared.tokens == 0
    assert backbone.forward(batch, None).shared.tokens == 12


@pytest.mark.parametrize("objective", [PromptLoss(), PromptLoss(vocabulary=50)])
def test_steps_from_a_shared_beginning_equal_each_prompt_alone(objective):
    backbone, prompts = tiny_backbone("llama"), starting((15, 12, 20), 12)
    start = ZeroInit(r=2)(backbone, pad(prompts), [0] * 3)
    network = random_scalenet(backbone)
    network.objective = objective
    together = adapt(backbone, pad(prompts), start, network, 3)
    for row, ids in enumerate(prompts):
        alone = adapt(backbone, pad([ids]), start.rows([row]), network, 3)
        close(together.lora.rows([row]).tensors, alone.lora.tensors)
        close(together.prompt_nll_BK[row], alone.prompt_nll_BK[0])


@pytest.mark.parametrize(
    ("prompts", "common"),
    [
        ([[1, 2, 3, 4], [1, 2, 5]], 2),
        ([[1, 2, 3], [1, 2, 3, 4]], 3),  # a whole prompt
        ([[1, 2], [1, 2]], 2),
        ([[1, 2, 3], [2, 2, 3]], 0),  # the same words later do not count
        ([[1, 2, 9, 4], [1, 2, 3, 4], [1, 2, 9, 4]], 2),
    ],
)
def test_beginnings(prompts, common):
    packing = Packing(tuple(map(len, prompts)))
    ids_N = torch.tensor([i for ids in prompts for i in ids])
    assert common_beginning(ids_N, packing) == common
    shared = in_first_row(packing.position_of_N // packing.T, packing.positions_1N[0], common)
    assert len(shared.tokens_U) == len(ids_N) - common * (len(prompts) - 1)
    assert torch.equal(shared.expand(shared.unique(ids_N[:, None]), "ids")[:, 0], ids_N)
    first = shared.expand(shared.unique(torch.arange(len(ids_N))[:, None]), "ids")[:, 0].split(packing.lengths)
    assert all(x[:common].tolist() == list(range(common)) for x in first)


@pytest.mark.parametrize("target_modules", ["qv", ALL], ids=["qv", "all"])
@pytest.mark.parametrize("architecture", WRITTEN)
def test_a_known_beginning_is_run_once_for_all_that_come(architecture, target_modules, monkeypatch):
    backbone = tiny_backbone(architecture, target_modules=target_modules)
    backbone.decoder.config.sliding_window = 32
    first = starting((12,), 12)[0]
    batches = [starting(lengths, 12) for lengths in ((15,), (16,), (20, 14, 13), (17, 17))]
    others = [[5, *first], first[:11]]  # begin otherwise, or end too soon
    network, scored = random_scalenet(backbone), count_head(backbone, monkeypatch)

    def steps(prompts):
        start = ZeroInit(r=2)(backbone, pad(prompts), [0] * len(prompts))
        scored.clear()
        trace = adapt(backbone, pad(prompts), start, network, 2)
        return trace, list(scored)

    want = [steps(prompts)[0] for prompts in (*batches, others)]
    backbone = backbone.with_prefixes([first, [7, 8]])
    found = [steps(prompts) for prompts in (*batches, others)]
    for (have, _), plain in zip(found, want, strict=True):
        close(have.lora.tensors, plain.lora.tensors)
        close(have.prompt_nll_BK, plain.prompt_nll_BK)
        close(have.rates_BKM, plain.rates_BKM)
    # Of each row the first step scores what stands after the beginning; the second step every token
    assert [counts for _, counts in found] == [[14, 14], [4, 15], [47 - 36, 44], [10, 32], [22, 22]]


def test_a_beginning_recorded_beside_rows_that_share_it():
    backbone = tiny_backbone("llama")
    batches = [starting(lengths, 12) for lengths in ((15, 20), (16,), (13, 14, 17))]
    start = [ZeroInit(r=2)(backbone, pad(prompts), [0] * len(prompts)) for prompts in batches]
    want = [adapt(backbone, pad(p), s, FixedRate(0.5), 2) for p, s in zip(batches, start, strict=True)]
    backbone = backbone.with_prefixes([batches[0][0][:12]])
    for prompts, s, plain in zip(batches, start, want, strict=True):
        close(adapt(backbone, pad(prompts), s, FixedRate(0.5), 2).lora.tensors, plain.lora.tensors)


def test_an_exit_keeps_a_beginning_of_its_own():
    backbone = tiny_backbone("llama", depth=4, layers="first-2")
    prompts = starting((15, 12, 20), 12)
    rates = [FixedRate(0.5, PromptLoss(exit_layer=2)), FixedRate(0.5), FixedRate(0.5, PromptLoss(exit_layer=3))] * 2
    start = ZeroInit(r=2)(backbone, pad(prompts[:1]), [0])
    want = [adapt(backbone, pad(prompts[:1]), start, rate, 2).lora for rate in rates]
    backbone = backbone.with_prefixes([prompts[0][:12]])
    for rate, plain in zip(rates, want, strict=True):
        close(adapt(backbone, pad(prompts[:1]), start, rate, 2).lora.tensors, plain.tensors)


def test_a_pass_that_fails_leaves_no_beginning(monkeypatch):
    backbone, prompts = tiny_backbone("llama"), starting((15,), 12)
    start = ZeroInit(r=2)(backbone, pad(prompts), [0])
    want = adapt(backbone, pad(prompts), start, FixedRate(0.5), 2).lora
    backbone = backbone.with_prefixes([prompts[0][:12]])
    with monkeypatch.context() as broken:
        broken.setattr(head, "_walk", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            adapt(backbone, pad(prompts), start, FixedRate(0.5), 2)
    for _ in range(3):
        close(adapt(backbone, pad(prompts), start, FixedRate(0.5), 2).lora.tensors, want.tensors)


def test_short_beginnings_and_single_prompts_are_left_alone():
    assert shared_tokens([[5] * 9]) == 0
    assert shared_tokens([[5, *range(20, 30)], [5, *range(40, 50)]]) == 0  # one of 22 tokens saved
    assert shared_tokens([[5, 6, 7, *range(20, 30)], [5, 6, 7, *range(40, 50)]]) == 3


def shared_tokens(prompts) -> int:
    layout = Layout(batch := pad(prompts))
    shared = within_batch(layout.real(batch.ids_BT), layout.packing)
    return 0 if shared is None else shared.tokens


def test_bfloat16_rounds_as_well_as_transformers_layers(llama_folder):
    """Other sums are rounded, so no bit need be the same; distances from float32 are of one size."""
    exact, low = load_backbone(str(llama_folder)), load_backbone(str(llama_folder), dtype="bfloat16")
    errors, moved = {True: 0.0, False: 0.0}, 0.0
    for seed in range(4):
        batch = pad([[1 + (7 * seed + 5 * i) % 90 for i in range(n)] for n in (12, 9)], side="left")
        lora = ZeroInit(r=2)(exact, batch, [seed, seed])
        want = adapt(exact, batch, lora, FixedRate(0.5), 2).lora
        moved += squares(want, lora)
        for written in errors:
            low.fuses_layers = written
            errors[written] += squares(adapt(low, batch, lora, FixedRate(0.5), 2).lora, want)
    assert errors[True] < 2 * errors[False] < 0.1 * moved


def squares(one, other) -> float:
    return sum(float((a - b).square().sum()) for a, b in zip(one.tensors, other.tensors, strict=True))


def test_vocabulary_is_large_enough():
    assert max(max(ids) for ids in starting((15, 12, 20), 12)) < VOCABULARY
