import json
import math
import os
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ephemera.adapt import adapt, meta_gradient
from ephemera.config import OptimizerSettings, TrainScaleNet, load_config
from ephemera.inits import ZeroInit
from ephemera.llm.frozen_lm import FrozenLM
from ephemera.lora import LoraBatch
from ephemera.prompt_loss import PROMPT
from ephemera.rates import load_rate
from ephemera.scoring import Encoded, answer_gradient
from ephemera.second_order import adapt_exactly
from ephemera.training import loop, run
from ephemera.training.loop import batches, learning_rate
from ephemera.training.many_steps import ScaleNetTrainee, averaged_rate
from ephemera.training.meta_gradient import scalenet_backward
from ephemera.training.scalenet import train_scalenet
from reference import close, merged_model, merged_weights, slow_nll, slow_representation
from tiny_models import left, random_ids, random_lora, random_scalenet, tiny_backbone
from training_runs import common, kill_and_resume, metrics, write_material

M = 4  # projections of a tiny model


class TableRate:
    """Rates [B,K,M] as given, so that they can be differentiated and nudged."""

    max_steps = None
    uses_representation = "no"
    reach = "all"
    gate = None
    trains = "both"
    made_for = None
    objective = PROMPT

    def __init__(self, table_BKM: Tensor):
        self.table_BKM = table_BKM

    def rates_BM(self, h_BH: Tensor | None, k: int, K: int, *, like: Tensor, projections: int) -> Tensor:
        return self.table_BKM[:, k - 1]

    def check(self, backbone: FrozenLM) -> None: ...


def encoded(prompts: list[int], answers: list[int]) -> list[Encoded]:
    pairs = zip(random_ids(prompts, seed=4), random_ids(answers, seed=5), strict=True)
    return [Encoded(str(i), prompt, answer) for i, (prompt, answer) in enumerate(pairs)]


def answer_loss(backbone: FrozenLM, row: Encoded, lora: LoraBatch, b: int) -> Tensor:
    weights = merged_weights(backbone, lora, b)
    return slow_nll(backbone.model, row.prompt + row.answer, first=len(row.prompt), weights=weights)


def unrolled(
    backbone: FrozenLM, rows: list[Encoded], lora: LoraBatch, table_BKM: Tensor, *, second_order: bool
) -> Tensor:
    """Summed answer NLL after the K-step loop, with a graph to the rates; written without adapt()."""
    total = table_BKM.new_zeros(())
    for b, row in enumerate(rows):
        current = lora.rows([b])
        for k in range(table_BKM.shape[1]):
            at = current.leaves() if k == 0 or not second_order else current
            nll = slow_nll(backbone.model, row.prompt, weights=merged_weights(backbone, at, 0))
            grads = torch.autograd.grad(nll, at.tensors, create_graph=second_order)
            moved = [
                t - table_BKM[b, k, i % M] * (g if second_order else g.detach())
                for i, (t, g) in enumerate(zip((at if second_order else current).tensors, grads, strict=True))
            ]
            current = current.with_tensors(moved)
        total = total + answer_loss(backbone, row, current, 0)
    return total


def finite_difference(f, table_BKM: Tensor, step: float = 3e-5) -> Tensor:
    """Fourth order: the loss is steep in the rates."""
    gradient = torch.zeros_like(table_BKM)
    for place in range(table_BKM.numel()):
        nudge = torch.zeros_like(table_BKM)
        nudge.view(-1)[place] = step
        near = f(table_BKM + nudge) - f(table_BKM - nudge)
        far = f(table_BKM + 2 * nudge) - f(table_BKM - 2 * nudge)
        gradient.view(-1)[place] = (8 * near - far) / (12 * step)
    return gradient


def meta(backbone: FrozenLM, rows: list[Encoded], lora: LoraBatch, table_BKM: Tensor) -> Tensor:
    batch = left([row.prompt for row in rows])
    trace = adapt(backbone, batch, lora, TableRate(table_BKM), table_BKM.shape[1], keep_grads=True)
    return meta_gradient(answer_gradient(backbone, rows, trace.lora)[1], trace.grads)


def example(K: int) -> tuple[FrozenLM, list[Encoded], LoraBatch, Tensor]:
    backbone = tiny_backbone("llama")
    rows = encoded([6, 9], [3, 1])
    torch.manual_seed(6)
    return backbone, rows, random_lora(backbone, 2), 0.02 + 0.1 * torch.rand(2, K, M, dtype=torch.float64)


@pytest.mark.parametrize("K", [1, 2, 3])
def test_meta_gradient_is_autograd_with_detached_gradients(K):
    backbone, rows, lora, table = example(K)
    table.requires_grad_()
    (want,) = torch.autograd.grad(unrolled(backbone, rows, lora, table, second_order=False), table)
    close(meta(backbone, rows, lora, table.detach()), want)


def test_meta_gradient_of_one_step_is_exact():
    backbone, rows, lora, table = example(1)
    want = finite_difference(lambda t: loss_after(backbone, rows, lora, t), table)
    close(meta(backbone, rows, lora, table), want, 1e-6)


def loss_after(backbone: FrozenLM, rows: list[Encoded], lora: LoraBatch, table: Tensor) -> Tensor:
    trace = adapt(backbone, left([row.prompt for row in rows]), lora, TableRate(table), table.shape[1])
    losses = []
    for b, row in enumerate(rows):
        model = merged_model(backbone, trace.lora, b)
        losses.append(slow_nll(model, row.prompt + row.answer, first=len(row.prompt)).detach())
    return torch.stack(losses).sum()


@pytest.mark.parametrize("K", [2, 3])
def test_second_order_is_exact_and_first_order_is_not(K):
    backbone, rows, lora, table = example(K)
    table.requires_grad_()
    batch = left([row.prompt for row in rows])
    trace = adapt_exactly(backbone, batch, lora, TableRate(table), K)
    with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no second derivative
        loss = sum(answer_loss(backbone, row, trace.lora, b) for b, row in enumerate(rows))
        (exact,) = torch.autograd.grad(loss, table)
        slow = unrolled(backbone, rows, lora, table, second_order=True)
        (by_hand,) = torch.autograd.grad(slow, table)
    want = finite_difference(lambda t: loss_after(backbone, rows, lora, t), table.detach())
    close(exact, by_hand)
    close(exact, want, 1e-6)
    first_order = meta(backbone, rows, lora, table.detach())
    close(first_order[:, -1], want[:, -1], 1e-6)  # no step follows the last one
    assert (first_order[:, 0] - want[:, 0]).abs().max() > 1e-3


def test_second_order_with_eager_attention():
    # The way the docstring names; float32 softmax inside, so only roughly exact
    backbone = tiny_backbone("llama", attention="eager")
    rows, lora = encoded([7, 7], [2, 3]), random_lora(backbone, 2)
    table = torch.full((2, 2, M), 0.1, dtype=torch.float64, requires_grad=True)
    trace = adapt_exactly(backbone, left([row.prompt for row in rows]), lora, TableRate(table), 2)
    loss = sum(answer_loss(backbone, row, trace.lora, b) for b, row in enumerate(rows))
    (have,) = torch.autograd.grad(loss, table)
    (want,) = torch.autograd.grad(unrolled(backbone, rows, lora, table, second_order=True), table)
    close(have, want, 1e-4)


def test_answer_gradient_scores_the_answer_alone(llama):
    rows = encoded([6, 3, 8], [4, 1, 2])
    lora = random_lora(llama, 3).leaves()
    nll_B, grads = answer_gradient(llama, rows, lora)
    want_B = torch.stack([answer_loss(llama, row, lora, b) for b, row in enumerate(rows)])
    close(nll_B, want_B)
    close(grads.tensors, torch.autograd.grad(want_B.sum(), lora.tensors))


@pytest.mark.parametrize("granularity", ["layer", "step"])
@pytest.mark.parametrize("clip", [None, 0.01])
def test_scalenet_gradient_is_autograd(llama, granularity, clip):
    network = random_scalenet(llama, granularity=granularity)
    rows, K = encoded([6, 9, 5], [3, 1, 2]), 3
    scalenet_backward(llama, ZeroInit(r=2), network, rows, K, seed=5, clip=clip)
    have = [p.grad.clone() for p in network.parameters()]

    start = ZeroInit(r=2)(llama, left([row.prompt for row in rows]), [5] * 3)
    wanted = [torch.zeros_like(p) for p in network.parameters()]
    for b, row in enumerate(rows):
        rates, lora = [], start.rows([b])
        for k in range(1, K + 1):
            at = lora.leaves()
            weights = merged_weights(llama, at, 0)
            h = slow_representation(llama.model, row.prompt, weights).detach()[None].float()
            grads = torch.autograd.grad(slow_nll(llama.model, row.prompt, weights=weights), at.tensors)
            r = network.rates_BM(h, k, K, like=h, projections=M)[0]
            rates.append(r)
            lora = lora.with_tensors(
                [t - r[i % M] * g.detach() for i, (t, g) in enumerate(zip(lora.tensors, grads, strict=True))]
            )
        loss, rates_KM = answer_loss(llama, row, lora, 0), torch.stack(rates)
        by_rate = torch.stack(torch.autograd.grad(loss, rates, retain_graph=True))
        norm = (by_rate * rates_KM.detach()).norm()
        factor = 1.0 if clip is None else min(1.0, clip / norm.item())
        assert clip is None or factor < 1
        by_weight = torch.autograd.grad(loss, list(network.parameters()))
        wanted = [total + factor * g / len(rows) for total, g in zip(wanted, by_weight, strict=True)]
    close(have, wanted, 1e-6)  # h(x) is float32


def test_a_diverged_row_gives_no_gradient(llama):
    """Its h(x) is not finite, and zero times that would be no zero."""
    rows = encoded([6, 9, 5], [3, 1, 2])

    class OneWild(ZeroInit):
        def __call__(self, backbone, batch, seeds):
            lora = super().__call__(backbone, batch, seeds)
            tensors = [t.clone() for t in lora.tensors]
            tensors[-1][1] = float("nan")
            return lora.with_tensors(tensors)

    network = random_scalenet(llama)
    report = scalenet_backward(llama, OneWild(r=2), network, rows, 2, seed=5)
    have = [p.grad.clone() for p in network.parameters()]
    assert report["non_finite"] == 1
    network.zero_grad()
    scalenet_backward(llama, ZeroInit(r=2), network, [rows[0], rows[2]], 2, seed=5)
    close(have, [p.grad * 2 / 3 for p in network.parameters()], 1e-6)


def test_training_keeps_gradients_not_graphs(llama):
    """First order stores K prompt gradients; what ScaleNet's graph holds does not lead to the model."""
    seen: set[int] = set()

    def walk(node):
        if node is None or id(node) in seen:
            return
        seen.add(id(node))
        names.append(type(node).__name__)
        for parent, _ in node.next_functions:
            walk(parent)

    sizes = []
    network = random_scalenet(llama)
    for K in (1, 3):
        names: list[str] = []
        prompts = random_ids([9, 5])
        trace = adapt(llama, left(prompts), random_lora(llama, 2), network, K, keep_grads=True)
        assert len(trace.grads) == K
        assert not any(g.requires_grad for grads in trace.grads for g in grads.tensors)
        assert not any(t.requires_grad for t in trace.lora.tensors)
        walk(trace.rates_BKM.grad_fn)
        assert not any("Lora" in name or "Attention" in name or "Embedding" in name for name in names)
        sizes.append(len(names))
    assert sizes[1] < 3 * sizes[0]


def test_the_backbone_gets_no_gradient(llama):
    network = random_scalenet(llama)
    scalenet_backward(llama, ZeroInit(r=2), network, encoded([6, 9], [3, 1]), 2, seed=0)
    assert all(p.grad is None and not p.requires_grad for p in llama.model.parameters())
    assert not llama.model.training


def test_averaged_rate_is_the_mean_over_prompts(llama):
    network = random_scalenet(llama)
    rows = encoded([6, 9, 5, 7, 4], [1] * 5)
    average = averaged_rate(llama, ZeroInit(r=2), network, rows, batch_size=2)
    assert average.table_KKM.shape == (5, 5, M)
    for K in (1, 2, 5):
        rates = []
        for row in rows:
            batch = left([row.prompt])
            rates.append(adapt(llama, batch, ZeroInit(r=2)(llama, batch, [0]), network, K).rates_BKM[0])
        close(average.table_KKM[K - 1, :K], torch.stack(rates).mean(0), 1e-5)
        assert not average.table_KKM[K - 1, K:].any()
    like = torch.zeros(3, dtype=torch.float64)
    close(average.rates_BM(None, 2, 5, like=like, projections=M), average.table_KKM[4, 1].expand(3, M), 1e-6)


def test_batches_cover_every_row_each_epoch():
    lengths = [3 + i * 7 % 40 for i in range(37)]
    plan = list(batches(lengths, batch_size=5, total=37 * 3, seed=1))
    assert plan == list(batches(lengths, batch_size=5, total=37 * 3, seed=1))
    assert plan != list(batches(lengths, batch_size=5, total=37 * 3, seed=2))
    flat = [i for batch in plan for i in batch]
    for epoch in range(3):
        assert sorted(flat[epoch * 37 : (epoch + 1) * 37]) == list(range(37))
    assert flat[:37] != flat[37:74]
    assert max(map(len, plan)) == 5


def test_batches_stop_at_the_total_and_a_longer_run_starts_the_same():
    lengths = [5] * 10
    short = list(batches(lengths, batch_size=4, total=13, seed=0))
    assert sum(map(len, short)) == 13
    long = list(batches(lengths, batch_size=4, total=30, seed=0))
    assert long[: len(short) - 1] == short[:-1]


def test_batches_put_similar_lengths_together():
    lengths = list(range(100))
    plan = list(batches(lengths, batch_size=10, total=100, seed=0))
    assert max(max(b) - min(b) for b in plan) == 9
    assert [min(b) for b in plan] != sorted(min(b) for b in plan)  # but not from short to long


def test_learning_rate_warms_up_and_decays():
    settings = OptimizerSettings(learning_rate=1.0, warmup=10)
    rates = [learning_rate(step, 100, settings) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[10] == 1
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == pytest.approx(0.1, abs=1e-2)


def test_steps_are_drawn_from_one_to_kmax(llama):
    network = random_scalenet(llama)
    trainee = ScaleNetTrainee(
        llama,
        ZeroInit(r=1),
        network,
        validation=encoded([5, 4], [1, 2]),
        validation_steps=[1, 2],
        batch_size=2,
        clip_prompt=1.0,
        seed=0,
    )
    drawn = Counter()
    for step in range(60):
        report = trainee.backward(encoded([2], [1]), step)
        drawn[0 if report is None else report["K"]] += 1
    assert set(drawn) == {1, 2, 3, 4, 5}, "K = 0 has no gradient: it is no sample"
    report = trainee.validate()
    assert {"validation_nll_1", "validation_nll_2", "validation_spread_prompts_1"} <= set(report)
    assert report["validation_spread_projections_2"] > 0


# --- whole runs: a tiny model, local data, killed and resumed ---


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_material(tmp_path_factory.mktemp("material"))


def settings(material: Path, output: Path) -> TrainScaleNet:
    more = ["model.lora.r=2", "scalenet.base_rates=[0.5, 0.05, 0.05]", "scalenet.max_steps=3", "scalenet.mlp_size=8"]
    return load_config(TrainScaleNet, None, [*common(material, output, "task=own"), *more, "validation_steps=[1, 2]"])


@pytest.fixture(scope="module")
def finished(material: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of 12 optimiser steps."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    torch.set_num_threads(1)
    train_scalenet(settings(material, folder))
    return folder


def equal_networks(a: Path, b: Path) -> None:
    for part in ("network", "network/averaged"):
        first, second = (load_file(folder / part / "rate.safetensors") for folder in (a, b))
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first), part


def check_metrics(folder: Path, finished: Path) -> None:
    def trained(run):
        return [(m["step"], m["nll"]) for m in metrics(run) if "nll" in m]

    def validated(run):
        return [(m["step"], m["validation_nll_1"]) for m in metrics(run) if "validation_nll_1" in m]

    assert trained(folder) == trained(finished)
    assert validated(folder) == validated(finished)
    assert [step for step, _ in validated(folder)] == [5, 10, 12]


def test_a_killed_run_resumes_to_the_same_weights(material, finished, tmp_path):
    folder = tmp_path / "run"
    kill_and_resume(train_scalenet, settings(material, folder), folder, tmp_path / "config.json")
    equal_networks(folder, finished)
    check_metrics(folder, finished)


def test_a_truncated_checkpoint_falls_back_to_the_one_before(material, finished, tmp_path, capfd):
    folder = tmp_path / "run"
    config = settings(material, folder)
    train_scalenet(config)
    newest = sorted((folder / "checkpoints").glob("step-*.safetensors"))
    assert [p.stem for p in newest] == ["step-000010", "step-000012"]
    newest[-1].write_bytes(newest[-1].read_bytes()[:-40])
    (folder / "network" / "rate.safetensors").unlink()
    train_scalenet(config, resume=True)
    assert "step-000012.safetensors is corrupt" in capfd.readouterr().err
    equal_networks(folder, finished)
    check_metrics(folder, finished)


def test_a_new_run_does_not_continue_an_old_one(material, finished, tmp_path):
    folder = tmp_path / "run"
    for _ in range(2):
        train_scalenet(settings(material, folder))
    equal_networks(folder, finished)
    check_metrics(folder, finished)


def test_a_trained_network_moves_and_loads(material, finished):
    network = load_rate(finished / "network")
    assert network.max_steps == 3
    assert network.out.weight.abs().max() > 0
    assert load_rate(finished / "network" / "averaged").table_KKM.shape == (3, 3, M)
    assert json.loads((finished / "config.json").read_text())["scalenet"]["mlp_size"] == 8


def test_two_processes_train_to_the_same_weights(material, finished, tmp_path):
    """Each takes half of every batch; only the order of float32 sums may differ."""
    folder = tmp_path / "run"
    config = tmp_path / "config.json"
    config.write_text(settings(material, folder).model_dump_json())
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--master_port",
        str(free_port()),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = [*command, "-m", "ephemera", "train", "scalenet", "--config", str(config)]
    result = subprocess.run(run, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    one, two = (load_file(f / "network" / "rate.safetensors") for f in (finished, folder))
    assert one.keys() == two.keys()
    for key in one:
        close(two[key], one[key], 1e-4)
    check_steps = [[m["step"] for m in metrics(f) if "grad_norm" in m] for f in (finished, folder)]
    assert check_steps[0] == check_steps[1]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_trackers_take_the_settings_or_are_named_as_missing(material, tmp_path, monkeypatch):
    config = settings(material, tmp_path / "run")
    config.trackers = ["tensorboard"]
    monkeypatch.setattr(run, "is_tensorboard_available", lambda: False)
    with pytest.raises(ValueError, match=r"tensorboard, which is not installed: pip install 'ephemera\[tensorboard\]'"):
        train_scalenet(config)
    flat = run._flat(config.model_dump(mode="json"))
    assert flat["optimizer.samples"] == 48
    assert flat["scalenet.base_rates"] == "[0.5, 0.05, 0.05]"
    assert flat["train.limit"] == "null"
    assert all(isinstance(value, bool | int | float | str) for value in flat.values())


def test_base_rates_of_the_wrong_number(material, tmp_path):
    config = settings(material, tmp_path / "run")
    config.scalenet.base_rates = [0.5, 0.1]
    with pytest.raises(ValueError, match=r"base_rates has 2 rates for scalenet.max_steps=3"):
        train_scalenet(config)


def test_mean_nll_of_the_slow_loop_agrees(llama):
    # The oracle of this file against batch.py, so that neither drifts alone
    ids = random_ids([8])
    batch = left(ids)
    close(llama.mean_nll(llama.forward(batch).hidden_BTD, batch), slow_nll(llama.model, ids[0])[None])


class CountedTrainee(ScaleNetTrainee):
    """Keeps the number of rows of each call."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.calls: list[int] = []

    def backward(self, rows, step):
        self.calls.append(len(rows))
        return super().backward(rows, step)


def test_long_batches_are_learned_from_in_parts(llama: FrozenLM, monkeypatch: pytest.MonkeyPatch):
    """The gradient and the report of a batch are the same whether it passes through the model whole or in parts."""
    rows = encoded([9, 4, 6, 12, 5], [3, 1, 2, 4, 2])
    steps = {loop.random.Random(f"7:{s}").randint(1, 5): s for s in range(40)}
    found = []
    for tokens in (10_000, 16):  # whole; then at most one or two rows at once
        network = random_scalenet(llama)
        trainee = CountedTrainee(
            llama,
            ZeroInit(r=2),
            network,
            validation=[],
            validation_steps=[],
            batch_size=5,
            clip_prompt=1.0,
            seed=7,
        )
        monkeypatch.setattr(loop, "batch_tokens", lambda _device, most=tokens: most)
        report = loop._backward(trainee, rows, steps[2], accelerator=Accelerator(cpu=True))
        found.append((report, [p.grad for p in network.parameters()], trainee.calls))
    (whole, whole_grads, whole_calls), (parts, part_grads, part_calls) = found
    assert (whole_calls, sum(part_calls), len(part_calls)) == ([5], 5, 4)
    assert parts == pytest.approx(whole)
    for have, want in zip(part_grads, whole_grads, strict=True):
        assert want.abs().max() > 0
        close(have, want)


def test_parts_pool_their_reports():
    nan = float("nan")
    reports = [(3, {"K": 2, "nll": 1.0, "non_finite": 1}), (1, {"K": 2, "nll": 4.0, "non_finite": 0})]
    assert loop._pooled(reports) == {"K": 2, "nll": 2.0, "non_finite": 1}
    lost = [(2, {"K": 1, "nll": nan, "non_finite": 2}), (1, {"K": 1, "nll": 3.0, "non_finite": 0})]
    assert loop._pooled(lost) == {"K": 1, "nll": 3.0, "non_finite": 2}
    assert math.isnan(loop._pooled(lost[:1])["nll"])
