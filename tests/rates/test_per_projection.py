"""Constants per projection: on disk, for their own model alone, where ScaleNet starts. And what a network was made for."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ephemera import artifact
from ephemera.adapt import adapt
from ephemera.inits import ZeroInit
from ephemera.llm.frozen_lm import describe
from ephemera.made_for import MadeFor, checked_reach, read_made_for
from ephemera.prompt_loss import PromptLoss
from ephemera.rates import AveragedRate, PerProjectionRate, Rate, ScaleNet, default_steps, load_rate
from reference import close
from test_prompt_loss import EXIT, random_lens
from tiny_models import left, random_ids, tiny_backbone

M, HIDDEN = 4, 3
MADE = MadeFor(("squad", "xsum"), "chat", "answer", 2, {"validation_nll_2": 1.25, "validation_harmed": 0.125})


def random_rate(**settings) -> PerProjectionRate:
    rate = PerProjectionRate(**{"projections": M, "base_rates": (0.5, 0.1, 0.02), **settings})
    with torch.no_grad():
        rate.log_rates_KM.add_(torch.randn_like(rate.log_rates_KM))
    return rate


def test_they_start_at_the_base_rates_whatever_the_prompt():
    rate = PerProjectionRate(projections=M, base_rates=(0.5, 0.1, 0.0))
    assert (rate.max_steps, rate.uses_representation, rate.reach) == (3, "no", "all")
    for K in (2, 3):
        for k, eta in ((1, 0.5), (2, 0.1)):
            close(rate.rates_BM(None, k, K, like=torch.zeros(5), projections=M), torch.full((5, M), eta), 1e-6)
    assert rate.rates_BM(None, 3, 3, like=torch.zeros(5), projections=M).max() <= 1e-7  # a zero can still grow
    close(torch.tensor(rate.base_rates), torch.tensor([0.5, 0.1, 1e-8]), 1e-6)


def test_each_step_and_projection_has_its_own():
    rate = random_rate()
    for k in (1, 2, 3):
        have = rate.rates_BM(None, k, 3, like=torch.zeros(2), projections=M)
        want = torch.tensor([math.exp(x) for x in rate.log_rates_KM[k - 1].tolist()])
        close(have, want.expand(2, M), 1e-6)
        mean = math.exp(sum(rate.log_rates_KM[k - 1].tolist()) / M)
        assert rate.base_rates[k - 1] == pytest.approx(mean)


def test_steps_go_by_them(llama):
    rate = random_rate(base_rates=(0.3,)).double()
    prompts = random_ids([6, 4])
    start = ZeroInit(r=2)(llama, left(prompts), [0, 0])
    trace = adapt(llama, left(prompts), start, rate, 1, keep_grads=True)
    rates_M = rate.log_rates_KM[0].exp().detach()
    moved = [(b - a) for a, b in zip(start.B, trace.lora.B, strict=True)]
    close(moved, [-rates_M[m] * g for m, g in enumerate(trace.grads[0].B)])
    close(trace.rates_BKM, rates_M.expand(2, 1, M))


@pytest.mark.parametrize("made_for", [None, MADE])
def test_they_are_saved_and_loaded(tmp_path, made_for):
    backbone = tiny_backbone(dtype=torch.float32)
    rate = random_rate(trained_for=describe(backbone), made_for=made_for, trains="B" if made_for else "both")
    rate.save_pretrained(tmp_path / "a")
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["rate.json", "rate.safetensors"]
    loaded = load_rate(tmp_path / "a")
    assert isinstance(loaded, PerProjectionRate)
    assert torch.equal(loaded.log_rates_KM, rate.log_rates_KM)
    assert not any(p.requires_grad for p in loaded.parameters())
    assert (loaded.max_steps, loaded.base_rates, loaded.trained_for) == (3, rate.base_rates, rate.trained_for)
    assert loaded.made_for == (made_for or MadeFor(("an unknown task",)))
    assert loaded.trains == rate.trains
    assert (loaded.reach, default_steps(loaded)) == (("all", 1) if made_for is None else ("answer", 2))
    loaded.check(backbone)
    loaded.save_pretrained(tmp_path / "b")
    assert (tmp_path / "a" / "rate.json").read_text() == (tmp_path / "b" / "rate.json").read_text() or made_for is None


def test_their_objective_and_lens_come_with_them(tmp_path):
    backbone = tiny_backbone(depth=3, layers="first-2")
    objective = PromptLoss(EXIT, random_lens(backbone).float(), vocabulary=50)
    random_rate(trained_for=describe(backbone), objective=objective).save_pretrained(tmp_path)
    loaded = load_rate(tmp_path)
    assert loaded.objective.describe() == objective.describe()
    assert loaded.objective.lens is not None
    assert objective.lens is not None
    close(loaded.objective.lens.weight_EDD, objective.lens.weight_EDD, 1e-2)  # bfloat16
    loaded.check(backbone)


def test_another_model_is_named_in_one_line():
    first = tiny_backbone("llama", dtype=torch.float32)
    rate = random_rate(trained_for=describe(first))
    rate.check(first)
    for other, words in (
        (
            tiny_backbone("gpt_neox", dtype=torch.float32),
            r"trained for tiny-llama .*; the model at hand is tiny-gpt_neox",
        ),
        (
            tiny_backbone("llama", dtype=torch.float32, seed=1),
            r"trained for tiny-llama .*the model at hand is tiny-llama",
        ),
        (tiny_backbone("llama", dtype=torch.float32, layers="last-1"), r"trained for .*4 projections.*2 projections"),
    ):
        with pytest.raises(ValueError, match=rf"this per-projection rate was {words}") as error:
            rate.check(other)
        assert "\n" not in str(error.value)
    untold = random_rate(projections=6)
    with pytest.raises(ValueError, match=r"these rates are for 6 projections; tiny-llama has 4\.") as error:
        untold.check(first)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="after 1 of 2 layers, but layer 1 is adapted"):
        random_rate(objective=PromptLoss(exit_layer=1)).check(first)


def test_wrong_files(tmp_path):
    def changed(folder: Path, **values) -> None:
        config = json.loads((folder / "rate.json").read_text())
        (folder / "rate.json").write_text(json.dumps({**config, **values}))

    for name, values in {
        "projections": {"projections": 5},
        "steps": {"base_rates": [0.5]},
        "no steps": {"base_rates": None},
        "words": {"base_rates": ["much"]},
        "unknown": {"mlp_size": 8},
        "format": {"made_for": {**MADE.describe(), "format": "html"}},
        "reach": {"made_for": {**MADE.describe(), "reach": "question"}},
        "negative": {"made_for": {**MADE.describe(), "steps": -1}},
        "no number": {"made_for": {**MADE.describe(), "steps": "two"}},
        "half": {"made_for": {**MADE.describe(), "steps": 1.5}},
        "no tasks": {"made_for": {"format": "chat"}},
        "a task": {"made_for": {**MADE.describe(), "tasks": "squad"}},
        "further": {"made_for": {**MADE.describe(), "language": "en"}},
        "no record": {"made_for": "squad"},
    }.items():
        folder = tmp_path / name
        random_rate(made_for=MADE).save_pretrained(folder)
        load_rate(folder)
        changed(folder, **values)
        with pytest.raises(ValueError, match=rf"the rate in .*{name} is corrupt or incomplete") as error:
            load_rate(folder)
        assert "\n" not in str(error.value)
    random_rate().save_pretrained(tmp_path / "cut")
    weights = tmp_path / "cut" / "rate.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(ValueError, match="is corrupt or incomplete"):
        load_rate(tmp_path / "cut")


# --- where ScaleNet starts ---


def small(**settings) -> ScaleNet:
    return ScaleNet(**{"hidden_size": HIDDEN, "projections": M, "mlp_size": 5, "base_rates": (1.0,), **settings})


def rates_of(network: ScaleNet, K: int) -> Tensor:
    """[K,M] of two prompts, which must have the same."""
    h, like = torch.randn(2, 2 * HIDDEN), torch.zeros(2)
    rates = torch.stack([network.rates_BM(h, k, K, like=like, projections=M) for k in range(1, K + 1)], 1)
    close(rates[0], rates[1], 1e-6)
    return rates[0].detach()


@pytest.mark.parametrize(
    "rates",
    [
        [0.5, 0.5, 0.5, 0.5],
        [0.1, 0.2, 0.3, 6.0],  # below and above their mean, where s is another function
        [1e-4, 1e-4, 1e-4, 1.0],
        [2.0, 3.0, 1.0, 40.0],
    ],
)
def test_a_scalenet_starts_with_the_same_rates(rates):
    network = small(max_log_scale=60.0)
    network.start_from(torch.tensor([rates]))
    close(rates_of(network, 1)[0], torch.tensor(rates), 1e-5)
    assert network.base_rates[0] == pytest.approx(math.prod(rates) ** (1 / M), rel=1e-5)
    s = network.scales(torch.randn(1, 2 * HIDDEN), 1, 1)[0]
    assert bool((s > 1.01).any()) == bool((s < 0.99).any()) == (len(set(rates)) > 1)
    assert network.out.weight.abs().max() == 0  # the prompt comes in by training


def test_as_far_as_the_clamp_lets_it():
    rates = [1e-3, 1e-3, 1e-3, 10.0]  # a thousand times the mean, above; s is at most 1 + 4 + 8
    network = small()
    network.start_from(torch.tensor([rates]))
    mean = math.prod(rates) ** (1 / M)
    close(rates_of(network, 1)[0], torch.tensor([1e-3, 1e-3, 1e-3, 13 * mean]), 1e-6)
    assert network.out.bias.max() == network.max_log_scale


def test_each_step_has_its_mean_and_all_the_average_pattern():
    pattern = torch.tensor([0.5, 1.0, 2.0, 1.0])
    table = torch.tensor([3.0, 0.2, 0.05])[:, None] * pattern
    network = small(base_rates=(1.0, 1.0, 1.0))
    network.start_from(table)
    close(rates_of(network, 3), table, 1e-5)
    assert network.config["base_rates"] == list(network.base_rates)
    close(torch.tensor(network.base_rates), torch.tensor([3.0, 0.2, 0.05]), 1e-5)
    turned = torch.stack([pattern, 1 / pattern, torch.ones(M)])
    network.start_from(turned)
    close(rates_of(network, 3), torch.ones(3, M), 1e-5)


def test_a_rate_of_zero_starts_tiny():
    network = small()
    network.start_from(torch.zeros(1, M))
    close(rates_of(network, 1), torch.full((1, M), 1e-8), 1e-12)


def test_a_started_network_is_saved_and_loaded(tmp_path):
    network = small(base_rates=(1.0, 1.0))
    rate = random_rate(base_rates=(0.5, 0.1))
    network.start_from(rate.log_rates_KM.detach().exp())
    network.save_pretrained(tmp_path)
    loaded = load_rate(tmp_path)
    assert isinstance(loaded, ScaleNet)
    close(rates_of(loaded, 2), rates_of(network, 2), 1e-6)


@pytest.mark.parametrize(
    ("shape", "settings"),
    [((2, M), {}), ((1, M + 1), {}), ((M,), {}), ((1, 1), {"granularity": "step"}), ((1, M), {"granularity": "step"})],
)
def test_constants_of_another_shape(shape, settings):
    network = small(**settings)
    before = [p.clone() for p in network.parameters()]
    with pytest.raises(
        ValueError, match=r"constants for \(.*\) steps and projections cannot start a ScaleNet"
    ) as error:
        network.start_from(torch.full(shape, 0.5))
    assert "\n" not in str(error.value)
    assert network.base_rates == (1.0,)
    close(list(network.parameters()), before, 0)


# --- what a network was made for ---


def test_a_record_goes_to_a_file_and_back(tmp_path):
    record = MADE.describe()
    assert json.loads(json.dumps(record)) == record
    assert read_made_for(record, tmp_path) == MADE
    assert read_made_for({"tasks": ["boolq"]}, tmp_path) == MadeFor(("boolq",), "plain", "all", 1, None)
    for kind in ("scalenet", "averaged"):
        rate: ScaleNet | AveragedRate = small(made_for=MADE)
        if kind == "averaged":
            rate = AveragedRate(torch.rand(1, 1, M), {"name": "tiny"}, made_for=MADE)
        rate.save_pretrained(tmp_path / kind)
        loaded: Rate = load_rate(tmp_path / kind)
        assert loaded.made_for == MADE
        assert (loaded.reach, default_steps(loaded)) == ("answer", 2)


def test_who_has_no_record_acts_on_every_token_and_takes_one_step():
    for rate in (small(), random_rate(), load_rate(0.1), AveragedRate(torch.rand(2, 2, M), {})):
        assert (rate.made_for, rate.reach, default_steps(rate)) == (None, "all", 1)
    assert default_steps(None) == 0


def test_wrong_values():
    for wrong in ({"format": "html"}, {"reach": "question"}, {"steps": -1}, {"steps": 1.5}, {"format": None}):
        with pytest.raises(ValueError, match="made_for holds format"):
            MadeFor(("squad",), **wrong)
    assert (checked_reach("all"), checked_reach("answer")) == ("all", "answer")
    with pytest.raises(ValueError, match=r"unknown reach 'anwser'. Did you mean 'answer'\?"):
        checked_reach("anwser")


def test_a_sentence_for_users():
    assert MADE.words == "this network was trained on chat prompts of squad, xsum, with 2 steps"
    many = MadeFor(tuple("abcdefgh"))
    assert many.words == "this network was trained on plain prompts of a, b, c, d, e, f and 2 more, with 1 step"


TASKS = {
    "scalenet-fast": ("nq-open", "squad"),
    "scalenet-nq-open": ("nq-open",),
    "scalenet-squad": ("squad",),
    "stepwise-nq-open": ("nq-open",),
    "stepwise-squad": ("squad",),
}


@pytest.mark.parametrize("name", [n for n in artifact.shipped("rate") if n in TASKS])
def test_shipped_files_from_before_there_was_a_record(name):
    folder = artifact.NETWORKS / name
    assert "made_for" not in json.loads((folder / "rate.json").read_text())
    places = [name] + [folder / "averaged"] * (folder / "averaged").exists()
    for place in places:
        made = load_rate(place).made_for
        assert made == MadeFor(TASKS[name], "plain", "all", 1, None)


def test_every_shipped_network_says_what_it_is_for():
    assert set(TASKS) <= set(artifact.shipped("rate"))
    for name in artifact.shipped("rate"):
        made = load_rate(name).made_for
        assert made is not None
        assert made.tasks
        assert "an unknown task" not in made.tasks
    made = read_made_for(None, artifact.NETWORKS / "taskweaver")
    eight = ("gsm8k", "snli", "arc-easy", "arc-challenge", "boolq", "openbookqa", "hellaswag", "winogrande")
    assert made == MadeFor(eight)


@pytest.mark.parametrize(
    ("card", "tasks"),
    [
        (None, ("an unknown task",)),
        ("", ("an unknown task",)),
        ("# My network\n\nFor fun.\n", ("an unknown task",)),
        ("# n: layer-wise ScaleNet for some-model on asked/dolly+nq-open\n", ("asked/dolly", "nq-open")),
        ("# n: for a model on squad, with an early exit\n", ("squad",)),
        ("# n\n\nTrained on 40 prompts drawn from snli (20 rows), arc-easy (20 rows).\n", ("snli", "arc-easy")),
    ],
)
def test_cards(tmp_path, card, tasks):
    (tmp_path / "averaged").mkdir()
    if card is not None:
        (tmp_path / "README.md").write_text(card)
    assert read_made_for(None, tmp_path) == read_made_for(None, tmp_path / "averaged") == MadeFor(tasks)


def test_the_card_of_a_folder_around_it_is_another_things(tmp_path):
    (tmp_path / "README.md").write_text("# Notes on networks\n")
    (tmp_path / "mine").mkdir()
    assert read_made_for(None, tmp_path / "mine") == MadeFor(("an unknown task",))
