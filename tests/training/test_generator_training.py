import json
import math
import random
import statistics
from collections import Counter
from pathlib import Path
from typing import Literal

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import nn

from ephemera.config import JointSettings, MixtureSettings, MixtureTask, OptimizerSettings, TrainGenerator, load_config
from ephemera.fast.vocab_loss import Head
from ephemera.inits import LoraGenerator, load_generator
from ephemera.llm.cached_layers import CACHE, cache_of
from ephemera.made_for import MadeFor
from ephemera.rates import ScaleNet, load_rate
from ephemera.scoring import Encoded, prompt_batch
from ephemera.training.generator import GeneratorTrainee, train_generator
from ephemera.training.loop import Schedule, train
from ephemera.training.meta_gradient import scalenet_backward
from ephemera.training.mixture import mix
from reference import close, merged_weights, slow_nll, slow_representation
from tiny_models import length_gate, random_ids, random_scalenet, tiny_backbone
from training_runs import common, kill_and_resume, metrics, write_material

M = 4  # projections of a tiny model


def encoded(prompts: list[int], answers: list[int]) -> list[Encoded]:
    pairs = zip(random_ids(prompts, seed=4), random_ids(answers, seed=5), strict=True)
    return [Encoded(str(i), prompt, answer) for i, (prompt, answer) in enumerate(pairs)]


# --- the mixture ---


def rows_of(**counts: int) -> dict[str, list[Encoded]]:
    return {name: [Encoded(f"{name}{i}", [1], [2]) for i in range(n)] for name, n in counts.items()}


def mixed_ids(
    rows: dict[str, list[Encoded]],
    samples: int = 1,
    *,
    stop: Literal["samples", "first_exhausted", "all_exhausted"] = "samples",
    seed: int = 0,
    weights: dict[str, float] | None = None,
) -> list[str]:
    tasks = [MixtureTask(task=name, weight=(weights or {}).get(name, 1.0)) for name in rows]
    return [row.id for row in mix(rows, MixtureSettings(tasks=tasks, stop=stop, seed=seed), samples)]


def of(name: str, ids: list[str]) -> list[str]:
    return [i for i in ids if i.startswith(name)]


def test_a_mixture_has_its_proportions():
    n, weights = 4000, {"a": 3.0, "b": 1.0, "c": 0.5}
    ids = mixed_ids(rows_of(a=7, b=500, c=5000), n, weights=weights)
    assert len(ids) == n
    for name, weight in weights.items():
        p = weight / sum(weights.values())
        assert abs(len(of(name, ids)) - n * p) < 4 * math.sqrt(n * p * (1 - p)), name
    # The order is mixed too: each tenth holds every task
    assert all(of(name, ids[i : i + 400]) for name in weights for i in range(0, n, 400))


def test_a_mixture_is_drawn_by_its_seed():
    rows = rows_of(a=7, b=9)
    assert mixed_ids(rows, 50, seed=1) == mixed_ids(rows, 50, seed=1)
    assert mixed_ids(rows, 50, seed=1) != mixed_ids(rows, 50, seed=2)
    assert mixed_ids(rows, 80, seed=1)[:50] == mixed_ids(rows, 50, seed=1)


def test_a_used_up_task_starts_over_in_another_order():
    counts = {"a": 5, "b": 11}
    ids = mixed_ids(rows_of(**counts), 200, weights={"a": 2.0})
    for name, size in counts.items():
        own = of(name, ids)
        passes = [own[i : i + size] for i in range(0, len(own), size)]
        assert len(passes) > 4
        assert all(sorted(whole) == sorted(f"{name}{i}" for i in range(size)) for whole in passes[:-1])
        assert len(set(passes[-1])) == len(passes[-1])
        assert passes[0] != passes[1]


def test_stop_rules_of_one_task():
    stops: tuple[Literal["first_exhausted", "all_exhausted"], ...] = ("first_exhausted", "all_exhausted")
    for stop in stops:
        assert sorted(mixed_ids(rows_of(a=5), 99, stop=stop)) == [f"a{i}" for i in range(5)]
    assert Counter(mixed_ids(rows_of(a=5), 15)) == Counter({f"a{i}": 3 for i in range(5)})


@pytest.mark.parametrize("seed", range(8))
def test_stop_rules(seed):
    counts = {"a": 3, "b": 8, "c": 5}
    first = mixed_ids(rows_of(**counts), 1, stop="first_exhausted", seed=seed, weights={"b": 2.0})
    last = first[-1][0]
    assert len(set(first)) == len(first)  # nothing comes twice
    for name, size in counts.items():
        assert (len(of(name, first)) == size) == (name == last)

    every = mixed_ids(rows_of(**counts), 1, stop="all_exhausted", seed=seed, weights={"b": 2.0})
    assert every[: len(first)] == first
    last = every[-1][0]
    for name, size in counts.items():
        assert len(set(of(name, every))) == size
        assert len(of(name, every)) >= size
    assert len(of(last, every)) == counts[last]  # it stops as the last one is used up


# --- joint training ---


def generator_for(backbone, **settings) -> LoraGenerator:
    torch.manual_seed(7)
    values = {"hidden_size": 12, "r": 2, "lora_alpha": 5.0, **settings}
    return LoraGenerator(projections=backbone.projections, state_size=backbone.hidden_size, **values).to(backbone.dtype)


def randomised(generator: LoraGenerator) -> LoraGenerator:
    with torch.no_grad():
        for weight in generator.parameters():
            weight.normal_(0, 0.3)
    return generator


def step_of(K: int, seed: int, max_steps: int = 5) -> int:
    """An optimiser step at which K is drawn."""
    return next(s for s in range(1000) if random.Random(f"{seed}:{s}").randint(0, max_steps) == K)


@pytest.mark.parametrize("K", [0, 1, 3])
@pytest.mark.parametrize("clip", [1e9, 0.01])
def test_joint_gradients(llama, K, clip):
    """ScaleNet's is that of its own training; the generator's is autograd with prompt gradients as constants."""
    generator, network = randomised(generator_for(llama)), random_scalenet(llama)
    rows = encoded([6, 9, 4, 7], [3, 1, 2, 2])
    joint = JointSettings(clip_prompt=clip)
    trainee = GeneratorTrainee(llama, generator, validation={}, scalenet=network, joint=joint, seed=3)
    report = trainee.backward(rows, step_of(K, 3))
    assert (report["K"], report["non_finite"]) == (K, 0)
    rates_have = [p.grad for p in network.parameters()]
    have = [p.grad for p in generator.parameters() if p.grad is not None]
    if K == 0:
        assert all(g is None for g in rates_have)
    else:
        network.zero_grad()
        alone = scalenet_backward(llama, generator, network, rows, K, seed=0, clip=clip)
        assert alone["nll"] == pytest.approx(report["nll"], abs=1e-12)
        assert max(g.abs().max().item() for g in rates_have if g is not None) > 0
        close([g for g in rates_have if g is not None], [p.grad for p in network.parameters() if p.grad is not None])

    start = generator(llama, prompt_batch(llama, rows), [0] * len(rows))
    losses = []
    for b, row in enumerate(rows):
        lora = start.rows([b])
        for k in range(1, K + 1):
            at = lora.leaves()
            weights = merged_weights(llama, at, 0)
            with torch.no_grad():
                h = slow_representation(llama.model, row.prompt, weights)[None].float()
                r = network.rates_BM(h, k, K, like=h, projections=M)[0]
            grads = torch.autograd.grad(slow_nll(llama.model, row.prompt, weights=weights), at.tensors)
            lora = lora.with_tensors(
                [t - r[i % M] * g for i, (t, g) in enumerate(zip(lora.tensors, grads, strict=True))]
            )
        weights = merged_weights(llama, lora, 0)
        losses.append(slow_nll(llama.model, row.prompt + row.answer, first=len(row.prompt), weights=weights))
    loss = torch.stack(losses).mean()
    assert report["nll"] == pytest.approx(loss.item(), rel=1e-5)
    # h(x) is float32, which K steps carry on
    close(have, torch.autograd.grad(loss, list(generator.parameters())), 1e-9 if K == 0 else 1e-5)


def test_validation_is_of_each_task_and_of_a_neighbours_adapter(llama):
    generator, network = randomised(generator_for(llama)), random_scalenet(llama)
    validation = {"a": encoded([6, 9, 4], [3, 1, 2]), "b": encoded([5, 5], [2, 4])}
    report = GeneratorTrainee(llama, generator, validation=validation, scalenet=network).validate()
    keys = {"", "_a", "_b", "_swapped", "_1"}
    assert report.keys() == {f"validation_nll{key}" for key in keys}
    nlls = {}
    for task, rows in validation.items():
        lora = generator(llama, prompt_batch(llama, rows), [0] * len(rows))
        nlls[task] = [
            slow_nll(
                llama.model, r.prompt + r.answer, first=len(r.prompt), weights=merged_weights(llama, lora, b)
            ).item()
            for b, r in enumerate(rows)
        ]
        assert report[f"validation_nll_{task}"] == pytest.approx(statistics.mean(nlls[task]), abs=1e-4)
    assert report["validation_nll"] == pytest.approx(statistics.mean(nlls["a"] + nlls["b"]), abs=1e-4)
    assert abs(report["validation_nll_swapped"] - report["validation_nll"]) > 1e-4


def test_a_diverged_row_gives_no_gradient(llama):
    generator = randomised(generator_for(llama))
    trainee = GeneratorTrainee(llama, generator, validation={})
    rows = encoded([6, 9, 5, 4], [3, 1, 2, 2])
    logits = llama.logits
    # A row's loss is spoilt where its first answer token is to be predicted from
    bad = rows[1].answer[0]

    class Spoilt(nn.Module):
        def forward(self, h):
            return logits(h).index_fill(-1, torch.tensor([bad]), float("-inf"))

    assert all(bad not in row.answer for row in rows[:1] + rows[2:])
    llama.logits = Head(Spoilt())
    report = trainee.backward(rows, 0)
    have = [p.grad.clone() for p in generator.parameters() if p.grad is not None]
    assert report["non_finite"] == 1
    assert math.isfinite(report["nll"])
    generator.zero_grad()
    trainee.backward([rows[0], rows[2], rows[3]], 0)
    close(have, [p.grad * 3 / 4 for p in generator.parameters() if p.grad is not None], 1e-6)


# --- stability ---


def test_a_thousand_steps_are_stable(tmp_path):
    """Answers follow the prompt's last token: there is something to learn, also for validation prompts."""
    backbone = tiny_backbone(dtype=torch.float32)
    rng = random.Random(0)

    def row(i: int) -> Encoded:
        kind = rng.randrange(3)
        prompt = [1, *(rng.randrange(3, 300) for _ in range(rng.randrange(3, 7))), 300 + kind]
        return Encoded(str(i), prompt, [10 + kind, 20 + kind])

    rows = [row(i) for i in range(64)]
    generator = generator_for(backbone, hidden_size=16).train()
    trainee = GeneratorTrainee(backbone, generator, validation={"own": [row(i) for i in range(24)]})
    before = trainee.validate()
    settings = OptimizerSettings(samples=4000, batch_size=4, learning_rate=1e-3, warmup=50)
    train(trainee, rows, settings, Schedule(1000, 1000), tmp_path, Accelerator(cpu=True), resume=False)
    norms = [m["grad_norm"] for m in metrics(tmp_path) if "grad_norm" in m]
    assert len(norms) == 1000
    assert all(map(math.isfinite, norms))
    assert metrics(tmp_path)[-2]["skipped"] == 0
    assert statistics.median(norms[-100:]) < 10 * statistics.median(norms[:100])
    after = metrics(tmp_path)[-1]
    assert after["validation_nll"] < before["validation_nll"] - 1
    # It reads its prompt: a neighbour's adapter does worse
    assert after["validation_nll"] < after["validation_nll_swapped"] - 0.1
    assert before["validation_nll"] == pytest.approx(before["validation_nll_swapped"], abs=1e-5)


# --- gradients that are not finite ---


class Spoilt:
    """A trainee whose gradient is not finite at some steps; it keeps the weights that each step began with."""

    def __init__(self, bad: set[int], value: float = float("nan")):
        self.learning_rates = {"": 1.0}
        torch.manual_seed(1)
        self.network = nn.Linear(3, 2)
        self.bad = bad
        self.value = value
        self.weights: list[torch.Tensor] = []

    def backward(self, rows, step):
        self.weights.append(self.network.weight.detach().clone())
        self.network(torch.ones(1, 3)).square().sum().backward()
        if step in self.bad:
            assert self.network.weight.grad is not None
            self.network.weight.grad[0, 1] = self.value
        return {"nll": 1.0}

    def validate(self):
        return {"validation_nll": 1.0}


def spoilt_run(folder: Path, trainee: Spoilt, *, steps: int, checkpoint_every: int = 100) -> None:
    settings = OptimizerSettings(samples=steps, batch_size=1, learning_rate=0.1, warmup=0)
    schedule = Schedule(checkpoint_every, 100)
    train(trainee, encoded([3] * 4, [1] * 4), settings, schedule, folder, Accelerator(cpu=True), resume=False)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_steps_that_are_not_finite_are_skipped_and_counted(tmp_path, value):
    trainee = Spoilt({2, 3, 6}, value)
    spoilt_run(tmp_path, trainee, steps=10)
    trainee.weights.append(trainee.network.weight.detach())
    moved = [not torch.equal(a, b) for a, b in zip(trainee.weights, trainee.weights[1:], strict=False)]
    assert moved == [step not in {2, 3, 6} for step in range(10)]
    assert [m["skipped"] for m in metrics(tmp_path) if "skipped" in m] == [0, 0, 1, 2, 2, 2, 3, 3, 3, 3]
    assert all(w.isfinite().all() for w in trainee.weights)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    norms = [json.loads(line, parse_constant=pytest.fail).get("grad_norm", 0.0) for line in lines[:10]]
    assert [norm is None for norm in norms] == [step in {2, 3, 6} for step in range(10)]  # JSON has no NaN


def test_nine_in_a_row_go_on_however_often(tmp_path):
    bad = set(range(40)) - {0, 10, 20, 30}  # nine, one that is good, nine, ...
    trainee = Spoilt(bad)
    spoilt_run(tmp_path, trainee, steps=40)
    assert len(trainee.weights) == 40
    assert [m["skipped"] for m in metrics(tmp_path) if "skipped" in m][-1] == 36


@pytest.mark.parametrize("checkpoint_every", [100, 3])
def test_ten_in_a_row_stop_and_keep_the_last_good_weights(tmp_path, checkpoint_every):
    trainee = Spoilt(set(range(5, 40)))
    with pytest.raises(
        ValueError, match=r"not finite 10 steps in a row \(up to step 15\).* lower optimizer.learning_rate"
    ):
        spoilt_run(tmp_path, trainee, steps=40, checkpoint_every=checkpoint_every)
    assert len(trainee.weights) == 15
    good = trainee.weights[5]  # after the step before the first bad one
    assert not torch.equal(good, trainee.weights[4])
    newest = sorted((tmp_path / "checkpoints").glob("step-*.safetensors"))[-1]
    state = load_file(newest)
    assert all(t.isfinite().all() for t in state.values())
    assert torch.equal(state["network.weight"], good)
    assert state["optimizer.weight.step"] == 5
    assert [m["skipped"] for m in metrics(tmp_path)][-1] == 10


# --- whole runs: a tiny model, local data, killed and resumed ---


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_material(tmp_path_factory.mktemp("material"))


def settings(material: Path, output: Path, *more: str) -> TrainGenerator:
    return load_config(
        TrainGenerator,
        None,
        [
            *common(material, output, "tasks=[{task: own}]"),
            "generator.hidden_size=8",
            "generator.save_dtype=float32",
            "scalenet={max_steps: 3, base_rates: [0.5, 0.05, 0.05], mlp_size: 8, learning_rate_factor: 2.0}",
            *more,
        ],
    )


@pytest.fixture(scope="module")
def finished(material: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of 12 optimiser steps."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    torch.set_num_threads(1)
    train_generator(settings(material, folder))
    return folder


def equal_runs(a: Path, b: Path) -> None:
    for name in ("network/generator", "scalenet/rate", "checkpoints/step-000012"):
        first, second = (load_file(folder / f"{name}.safetensors") for folder in (a, b))
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first), name
    for key in ("nll", "K", "grad_norm", "validation_nll", "validation_nll_1"):
        first, second = ([(m["step"], m[key]) for m in metrics(folder) if key in m] for folder in (a, b))
        assert first == second
        assert len(first) == (3 if key.startswith("validation") else 12)


def test_a_run_trains_both_networks(material, finished):
    generator, network = load_generator(finished / "network"), load_rate(finished / "scalenet")
    assert all(weight.abs().max() > 0 for weight in generator.B_heads.parameters())
    assert generator.mean_H.abs().max() > 0
    assert isinstance(network, ScaleNet)
    assert network.max_steps == 3
    assert network.out.weight.abs().max() > 0
    assert {m["K"] for m in metrics(finished) if "K" in m} > {0}
    assert "own (16 rows)" in (finished / "network" / "README.md").read_text()


def test_a_killed_run_resumes_to_the_same_weights(material, finished, tmp_path):
    folder = tmp_path / "run"
    kill_and_resume(train_generator, settings(material, folder), folder, tmp_path / "config.json")
    equal_runs(folder, finished)


def test_other_settings_are_not_resumed(material, finished):
    with pytest.raises(ValueError, match=r"--resume: .* has other settings \(optimizer differ\)"):
        train_generator(settings(material, finished, "optimizer.batch_size=2"), resume=True)


def test_settings_that_cannot_be_read_again(material, finished, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"--resume: .*config.json holds no settings of such a run"):
        train_generator(settings(material, tmp_path / "run"), resume=True)


def test_a_run_goes_on_from_a_trained_generator(material, finished, tmp_path):
    more = [
        f"start={finished / 'network'}",
        "scalenet=null",
        "optimizer.learning_rate=1e-12",
    ]
    with pytest.raises(ValueError, match=r"hidden_size=99 has no effect: start=.* was made with hidden_size=8"):
        train_generator(settings(material, tmp_path / "run", *more, "generator.hidden_size=99"))
    start = load_generator(finished / "network")
    assert start.made_for == MadeFor(("own",), steps=0)
    start.made_for, start.gate = MadeFor(("snli",), "chat", steps=0), length_gate(tiny_backbone(), 0.5)
    start.save_pretrained(tmp_path / "start")
    more[0] = f"start={tmp_path / 'start'}"
    folder = train_generator(settings(material, tmp_path / "run", *more))
    again = load_generator(folder)
    assert again.made_for == MadeFor(("own",), steps=0), "what it was trained on last"
    assert again.gate is None, "which was calibrated for the start"
    have, want = load_generator(folder).state_dict(), load_generator(finished / "network").state_dict()
    assert have.keys() == want.keys()
    close([have[key] for key in want], list(want.values()), 1e-6)


def test_a_pass_until_every_row_was_seen(material, tmp_path):
    more = ["train.stop=all_exhausted", "scalenet=null", "optimizer.samples=999"]
    train_generator(settings(material, tmp_path / "run", *more))
    assert max(m["step"] for m in metrics(tmp_path / "run")) == 4  # 16 rows by 4


def test_base_rates_of_the_wrong_number(material, tmp_path):
    config = settings(material, tmp_path / "run", "scalenet={max_steps: 3, base_rates: [0.5, 0.1]}")
    with pytest.raises(ValueError, match=r"base_rates should hold 3 rates .* got \[0.5, 0.1\]"):
        train_generator(config)


# --- reach answer ---


def slow_reach_nll(backbone, lora, row: int, rows: list[Encoded]) -> torch.Tensor:
    """By transformers' own forward: the base model's cache, then the last prompt token and the answer with merged weights."""
    prompt, answer = rows[row].prompt, rows[row].answer
    with torch.no_grad():
        cache = cache_of(backbone.model(torch.tensor([prompt[:-1]]), use_cache=True))
    fed = torch.tensor([[prompt[-1], *answer[:-1]]])
    output = torch.func.functional_call(backbone.model, merged_weights(backbone, lora, row), (fed,), {CACHE: cache})
    return nn.functional.cross_entropy(output.logits[0], torch.tensor(answer))


def test_a_generator_with_reach_answer_learns_from_its_answers_alone():
    backbone, rows = tiny_backbone("llama"), encoded([5, 9, 7], [3, 2, 4])
    generator = LoraGenerator(
        projections=backbone.projections, state_size=backbone.hidden_size, hidden_size=16, reach="answer"
    ).double()
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in generator.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    trainee = GeneratorTrainee(backbone, generator.train(), validation={"own": rows})
    report = trainee.backward(rows, 0)
    have = {name: p.grad.clone() for name, p in generator.named_parameters() if p.grad is not None}
    generator.zero_grad()
    batch = prompt_batch(backbone, rows)
    lora = generator.lora(backbone.projections, generator.state_BH(backbone, batch))
    nlls = [slow_reach_nll(backbone, lora, row, rows) for row in range(3)]
    torch.stack(nlls).mean().backward()
    for name, parameter in generator.named_parameters():
        assert parameter.grad is not None
        close(have[name], parameter.grad, 1e-6)  # h is float32
    assert report["nll"] == pytest.approx(torch.stack(nlls).mean().item(), abs=1e-6)
    assert trainee.validate()["validation_nll"] == pytest.approx(report["nll"], abs=1e-6)


def test_a_generators_reach_is_kept_and_its_prompts_are_read_once(tmp_path, monkeypatch):
    from ephemera import AdaptiveLM
    from ephemera.llm.frozen_lm import FrozenLM

    backbone = tiny_backbone("llama")
    made = LoraGenerator(
        projections=backbone.projections, state_size=backbone.hidden_size, hidden_size=16, reach="answer"
    )
    made.save_pretrained(tmp_path)
    lm = AdaptiveLM(backbone, init=load_generator(tmp_path))
    seen, original = [], FrozenLM.forward

    def forward(self, batch, *args, **kwargs):
        seen.append(batch.ids_BT.shape[1])
        return original(self, batch, *args, **kwargs)

    monkeypatch.setattr(FrozenLM, "forward", forward)
    adaptation = lm.adapt("The mill on the river runs at night")
    assert adaptation.reach == "answer"
    lm.answer_nll("The mill on the river runs at night", "and by day", adaptation)
    length = len(lm.encode("The mill on the river runs at night"))
    assert seen.count(length) == 1, "one reading of the prompt for h and for the answer"
    with pytest.raises(ValueError, match="unknown reach"):
        LoraGenerator(projections=backbone.projections, state_size=8, reach="half")  # pyright: ignore[reportArgumentType]
