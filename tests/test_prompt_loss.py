"""The loss at an exit layer, over some words, against a slow one; its own errors; its files."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ephemera.adapt import adapt
from ephemera.batch import pad
from ephemera.early_exit.lens import Lens
from ephemera.fast.vocab_loss import Head
from ephemera.llm.frozen_lm import FrozenLM
from ephemera.prompt_loss import PROMPT, PromptLoss, load_objective
from ephemera.rates import FixedRate, load_rate
from reference import close, merged_weights
from tiny_models import ARCHITECTURES, VOCABULARY, left, random_ids, random_lora, random_scalenet, tiny_backbone

EXIT = 2
LENGTHS = [11, 4, 8]


def random_lens(backbone: FrozenLM, layers=(EXIT,)) -> Lens:
    torch.manual_seed(8)
    lens = Lens(hidden_size=backbone.hidden_size, exit_layers=layers).double().requires_grad_(False)
    lens.weight_EDD.normal_(0, 0.2)
    lens.bias_ED.normal_(0, 0.2)
    lens.scale_ED.uniform_(0.5, 2)
    return lens


def early(architecture: str) -> FrozenLM:
    return tiny_backbone(architecture, depth=4, layers="first-2")


def slow_loss(backbone: FrozenLM, objective: PromptLoss, ids: list[int], weights: dict[str, Tensor]) -> Tensor:
    """Token by token, from transformers' own hidden states."""
    inputs = {"input_ids": torch.tensor([ids]), "output_hidden_states": True}
    states = torch.func.functional_call(backbone.model, weights, (), inputs).hidden_states
    lens, norm = objective.lens, backbone.decoder.get_submodule(backbone.final_norm)
    losses = []
    for t in range(1, len(ids)):
        h = states[EXIT][0, t - 1]
        if lens is not None:
            h = h + lens.weight_EDD[0] @ (h / lens.scale_ED[0]) + lens.bias_ED[0]
        logits = backbone.head(norm(h))
        if backbone.logits.softcap:
            logits = torch.tanh(logits / backbone.logits.softcap) * backbone.logits.softcap
        if objective.vocabulary is not None:
            outside = [i for i in range(objective.vocabulary, VOCABULARY) if i != ids[t]]
            logits = logits.index_fill(0, torch.tensor(outside), -torch.inf)
        losses.append(F.cross_entropy(logits, torch.tensor(ids[t])))
    return torch.stack(losses).mean()


@pytest.mark.parametrize(
    "settings",
    [{}, {"vocabulary": 100}, {"vocabulary": 30}],
    ids=str,
)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("architecture", ["llama", "gemma3", "phi"])  # softcap nowhere, bias in phi's head
def test_exit_steps_equal_autograd_through_a_slow_loss(architecture, side, settings):
    backbone = early(architecture)
    objective = PromptLoss(exit_layer=EXIT, lens=random_lens(backbone), **settings)
    check_against_slow(backbone, objective, side)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_untrained_lens_in_every_architecture(architecture):
    check_against_slow(early(architecture), PromptLoss(exit_layer=EXIT), "left")


def check_against_slow(backbone: FrozenLM, objective: PromptLoss, side) -> None:
    objective.check(backbone)
    prompts, start = random_ids(LENGTHS), random_lora(backbone, 3)
    trace = adapt(backbone, pad(prompts, side=side), start, FixedRate(0.3, objective), 2)
    for row, ids in enumerate(prompts):
        lora = start.rows([row])
        for k in range(2):
            leaves = lora.leaves()
            loss = slow_loss(backbone, objective, ids, merged_weights(backbone, leaves, 0))
            grads = torch.autograd.grad(loss, leaves.tensors)
            lora = lora.with_tensors([t - 0.3 * g for t, g in zip(lora.tensors, grads, strict=True)])
            close(trace.prompt_nll_BK[row, k], loss.detach())
        close(trace.lora.rows([row]).tensors, lora.tensors)


def test_rows_do_not_touch_each_other(llama):
    objective = PromptLoss(exit_layer=2, lens=random_lens(llama), vocabulary=90)
    prompts, start = random_ids(LENGTHS), random_lora(llama, 3)
    together = adapt(llama, left(prompts), start, FixedRate(0.3, objective), 2)
    for row, ids in enumerate(prompts):
        alone = adapt(llama, left([ids]), start.rows([row]), FixedRate(0.3, objective), 2)
        close(together.lora.rows([row]).tensors, alone.lora.tensors)


def test_an_exit_after_the_last_layer_is_the_prompt_loss(llama):
    batch, start = left(random_ids(LENGTHS)), random_lora(llama, 3)
    have = adapt(llama, batch, start, FixedRate(0.3, PromptLoss(exit_layer=llama.layers)), 2)
    want = adapt(llama, batch, start, FixedRate(0.3), 2)
    close(have.lora.tensors, want.lora.tensors)
    whole = adapt(llama, batch, start, FixedRate(0.3, PromptLoss(vocabulary=VOCABULARY)), 2)
    close(whole.lora.tensors, want.lora.tensors)


def test_softcapped_heads(llama):
    llama.logits = Head(llama.head, 3.0)
    objective = PromptLoss(vocabulary=VOCABULARY)
    batch, start = left(random_ids(LENGTHS)), random_lora(llama, 3)
    have = adapt(llama, batch, start, FixedRate(0.3, objective), 1)
    close(have.lora.tensors, adapt(llama, batch, start, FixedRate(0.3), 1).lora.tensors)


def test_what_does_not_fit_is_refused():
    backbone = tiny_backbone("llama", depth=4, layers="first-3")
    with pytest.raises(ValueError, match=r'after 2 of 4 layers, but layer 2 is adapted.*"first-2"'):
        PromptLoss(exit_layer=2).check(backbone)
    with pytest.raises(ValueError, match="after 5 of 4 layers"):
        PromptLoss(exit_layer=5).check(backbone)
    PromptLoss(exit_layer=3).check(backbone)
    with pytest.raises(ValueError, match=r"lens reads after layers \(2,\), the objective after 3"):
        PromptLoss(exit_layer=3, lens=random_lens(backbone))
    with pytest.raises(ValueError, match="vocabulary=0"):
        PromptLoss(vocabulary=0)
    backbone.hidden_size, objective = 8, PromptLoss(exit_layer=3, lens=random_lens(tiny_backbone(), (3,)))
    with pytest.raises(ValueError, match=r"lens is for hidden size 32; .* has 8"):
        objective.check(backbone)


def test_as_it_stands_in_a_file(tmp_path, llama):
    assert PROMPT.describe() is None
    assert load_objective(None, tmp_path) is PROMPT
    objective = PromptLoss(exit_layer=2, lens=random_lens(llama), vocabulary=50)
    objective.save_lens(tmp_path)
    (tmp_path / "inner").mkdir()
    for kept, folder in ((objective.describe(), tmp_path), (objective.describe(".."), tmp_path / "inner")):
        loaded = load_objective(kept, folder)
        assert replace(loaded, lens=None).describe() == replace(objective, lens=None).describe()
        close(loaded.lens.weight_EDD, objective.lens.weight_EDD, 1e-2)


@pytest.mark.parametrize(("key", "neutral", "gone"), [("tokens", "all", "last-8"), ("template", None, "Question: {}")])
def test_settings_that_are_gone_load_at_their_neutral_value_only(key, neutral, gone, tmp_path, llama):
    network = random_scalenet(llama).float()
    network.objective = PromptLoss(vocabulary=50)
    network.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "rate.json").read_text())
    config["objective"][key] = neutral
    (tmp_path / "rate.json").write_text(json.dumps(config))
    assert load_rate(tmp_path).objective.describe() == network.objective.describe()
    config["objective"][key] = gone
    (tmp_path / "rate.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=rf"^the rate in .* sets {key} to .*, which this version no longer supports"):
        load_rate(tmp_path)
