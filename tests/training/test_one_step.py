"""Training one step's rates from prompts prepared once: its gradient is autograd's through everything, its plan keeps its word."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_training import encoded, material, metrics, settings  # noqa: F401
from torch import Tensor

from counting import count_layers
from ephemera.batch import length_batches
from ephemera.inits import ZeroInit
from ephemera.llm.frozen_lm import FrozenLM
from ephemera.lora import LoraBatch
from ephemera.made_for import MadeFor
from ephemera.prepared import Prepared, bytes_of, prepare
from ephemera.prompt_loss import PROMPT, PromptLoss
from ephemera.rates import PerProjectionRate, ScaleNet, load_rate
from ephemera.scoring import Encoded
from ephemera.training import one_step, scalenet
from ephemera.training.meta_gradient import scalenet_backward
from ephemera.training.one_step import HARM, OneStepTrainee, Plan, one_step_backward, plan_of, scored
from ephemera.training.scalenet import train_scalenet
from reference import close, merged_weights, slow_nll
from test_prompt_loss import EXIT, random_lens, slow_loss
from test_reach import Slow, check_read, slow_rows
from tiny_models import left, random_scalenet, tiny_backbone

MADE = MadeFor(("squad",), reach="answer")
LENGTHS, ANSWERS = [6, 9, 1, 12, 7, 5], [3, 1, 2, 4, 2, 1]
INIT = ZeroInit(r=2, init_std=0.1)
Network = ScaleNet | PerProjectionRate


def by_length(lengths: Sequence[int], answers: Sequence[int]) -> list[Encoded]:
    """As the plan has them."""
    return sorted(encoded(list(lengths), list(answers)), key=lambda row: len(row.prompt))


def network_for(backbone: FrozenLM, kind: str, **settings: Any) -> Network:
    """Rates that help some prompts and harm others."""
    if kind == "scalenet":
        network = random_scalenet(backbone, made_for=MADE, **settings)
        network.base_rates = (1.5,)
        return network
    network = PerProjectionRate(projections=len(backbone.projections), base_rates=(1.5,), made_for=MADE, **settings)
    with torch.no_grad():
        network.log_rates_KM.add_(torch.randn_like(network.log_rates_KM))
    return network.double()


def slow_h(backbone: FrozenLM, ids: Sequence[int], exit_layer: int | None) -> Tensor:
    states = backbone.model(input_ids=torch.tensor([list(ids)]), output_hidden_states=True).hidden_states
    halves = (states[0], states[-1 if exit_layer is None else exit_layer])
    return torch.cat([state[0].mean(0) for state in halves]).detach()[None].float()


def slow_step(backbone: FrozenLM, network: Network, row: Encoded, start: LoraBatch) -> tuple[Tensor, LoraBatch]:
    """A prompt's rates [M], and its adapter as a function of them."""
    leaves, objective, M = start.leaves(), network.objective, len(backbone.projections)
    grads = [torch.zeros_like(t) for t in leaves.tensors]
    if len(row.prompt) > 1:
        weights = merged_weights(backbone, leaves, 0)
        if objective.exit_layer is None:
            nll = slow_nll(backbone.model, row.prompt, weights=weights)
        else:
            nll = slow_loss(backbone, objective, row.prompt, weights)
        grads = list(torch.autograd.grad(nll, leaves.tensors))
    h = slow_h(backbone, row.prompt, objective.exit_layer)
    rates_M = network.rates_BM(h, 1, 1, like=h, projections=M)[0]
    moved = [t - rates_M[i % M] * g for i, (t, g) in enumerate(zip(start.tensors, grads, strict=True))]
    return rates_M, start.with_tensors(moved)


def slow_gradient(
    backbone: FrozenLM, network: Network, rows: Sequence[Encoded], seed: int, clip: float | None, harm_weight: float
) -> tuple[list[Tensor], dict[str, float]]:
    """The mean gradient of the answers' NLL by the network's parameters, a row at a time; and what the report should say."""
    parameters = list(network.parameters())
    total, base, after = [torch.zeros_like(p) for p in parameters], [], []
    clipped = 0
    for row in rows:
        start = INIT(backbone, left([row.prompt]), [seed])
        rates_M, lora = slow_step(backbone, network, row, start)
        loss = Slow(backbone, row.prompt, merged_weights(backbone, lora, 0)).nll(row.answer) / len(row.answer)
        with torch.no_grad():
            unmoved = Slow(backbone, row.prompt, {}).nll(row.answer) / len(row.answer)
        (by_rate,) = torch.autograd.grad(loss, rates_M, retain_graph=True)
        factor = 1 + harm_weight * float(loss > unmoved)
        norm = (factor * by_rate * rates_M.detach()).norm().item()
        if clip is not None and norm > clip:
            factor, clipped = factor * clip / norm, clipped + 1
        by_weight = torch.autograd.grad(loss, parameters)
        total = [t + factor * g / len(rows) for t, g in zip(total, by_weight, strict=True)]
        base.append(unmoved.item())
        after.append(loss.item())
    changes = [a - b for a, b in zip(after, base, strict=True)]
    return total, {
        "nll": sum(after) / len(rows),
        "change": sum(changes) / len(rows),
        "harmed": sum(c > HARM for c in changes) / len(rows),
        "worse": sum(c > 0 for c in changes),
        "clipped": clipped,
    }


def taken(network: Network) -> list[Tensor]:
    """The gradients that lie in it, which are dropped."""
    grads = [p.grad.clone() for p in network.parameters() if p.grad is not None]
    network.zero_grad()
    return grads


@pytest.mark.parametrize(("clip", "harm_weight"), [(None, 0.0), (0.6, 0.0), (None, 1.5), (0.6, 1.5)])
@pytest.mark.parametrize("kind", ["scalenet", "per-projection"])
def test_the_gradient_is_autograd_through_everything(llama, kind, clip, harm_weight):
    network, rows = network_for(llama, kind), by_length(LENGTHS, ANSWERS)
    some = scored(llama, INIT, rows, network, 5)  # before output_hidden_states leaves hooks on the layers
    want, said = slow_gradient(llama, network, rows, 5, clip, harm_weight)
    for _ in range(2):  # the second pass over the same prepared prompts
        report = one_step_backward(network, some, clip=clip, harm_weight=harm_weight)
        assert max(g.abs().max() for g in want) > 1e-4
        close(taken(network), want, 1e-6)  # h(x) is float32
        assert report == pytest.approx({"K": 1, "non_finite": 0, **{k: said[k] for k in ("nll", "change", "harmed")}})
    assert 0 < said["worse"] < len(rows) - 1  # not the row of one token either
    assert (0 < said["clipped"] < len(rows)) == (clip is not None)


@pytest.mark.parametrize(
    ("architecture", "layers", "exit_layer"),
    [
        ("gemma3", "all", None),
        ("gpt_neox", "all", None),
        ("llama", "last-1", None),
        ("llama", "first-1", EXIT),
        ("mistral", [1], EXIT),
    ],
)
def test_in_other_models_on_some_layers_and_at_an_exit(architecture, layers, exit_layer):
    backbone = tiny_backbone(architecture, depth=3, layers=layers)
    objective = PROMPT
    if exit_layer is not None:
        objective = PromptLoss(exit_layer=exit_layer, lens=random_lens(backbone, layers=(exit_layer,)))
    rows = by_length(LENGTHS, ANSWERS)
    network = network_for(backbone, "scalenet", objective=objective)
    some = scored(backbone, INIT, rows, network, 5)
    want, said = slow_gradient(backbone, network, rows, 5, None, 0.0)
    report = one_step_backward(network, some, clip=None)
    close(taken(network), want, 1e-6)
    assert report["nll"] == pytest.approx(said["nll"])


@pytest.mark.parametrize("kind", ["scalenet", "per-projection"])
def test_it_is_the_plain_trainings_with_one_step(llama, kind):
    network, rows = network_for(llama, kind), by_length(LENGTHS, ANSWERS)
    plain = scalenet_backward(llama, INIT, network, rows, 1, seed=5, clip=0.6)
    want = taken(network)
    have = one_step_backward(network, scored(llama, INIT, rows, network, 5), clip=0.6)
    close(taken(network), want)
    assert have["nll"] == pytest.approx(plain["nll"], abs=1e-12)


def test_rates_in_another_dtype_than_the_model(llama):
    """A float32 network beside a float64 model."""
    rows = by_length(LENGTHS, ANSWERS)
    network = network_for(llama, "per-projection")
    some = scored(llama, INIT, rows, network, 5)
    one_step_backward(network, some, clip=None)
    want = taken(network)
    one_step_backward(network.float(), some, clip=None)
    close(taken(network), want, 1e-5)


def test_a_row_that_is_not_finite_gives_no_gradient(llama):
    rows = by_length([6, 9, 5], [3, 1, 2])

    class OneWild(ZeroInit):
        def __call__(self, backbone, batch, seeds):
            lora = super().__call__(backbone, batch, seeds)
            tensors = [t.clone() for t in lora.tensors]
            tensors[0][1] = float("nan")
            return lora.with_tensors(tensors)

    network = network_for(llama, "scalenet")
    report = one_step_backward(network, scored(llama, OneWild(r=2, init_std=0.1), rows, network, 5), clip=None)
    have = taken(network)
    assert report["non_finite"] == 1
    other = one_step_backward(network, scored(llama, INIT, [rows[0], rows[2]], network, 5), clip=None)
    close(have, [g * 2 / 3 for g in taken(network)], 1e-6)
    assert report["nll"] == pytest.approx(other["nll"])


# --- prompts, prepared ---


def prepared(backbone: FrozenLM, parts: Sequence[Sequence[Encoded]], objective: PromptLoss = PROMPT) -> Prepared:
    ids = [[row.prompt for row in part] for part in parts]
    seeds = [3 + n for n in range(sum(map(len, parts)))]
    return prepare(backbone, INIT, ids, seeds, objective=objective)


@pytest.mark.parametrize(
    ("architecture", "layers", "exit_layer"),
    [
        *[("llama", "all", None), ("gemma3", "all", None), ("mistral", "last-1", None), ("gpt_neox", "first-1", EXIT)],
        ("llama", [1], EXIT),
    ],
)
def test_parts_are_the_whole(architecture, layers, exit_layer):
    """Also where one part is packed, and the other is longer than a window."""
    backbone = tiny_backbone(architecture, depth=3, layers=layers)
    objective = PromptLoss(exit_layer=exit_layer)
    rows = by_length([1, 4, 6, 9, 11], [2, 3, 1, 4, 2])
    whole = prepared(backbone, [rows], objective)
    prompts, answers = [row.prompt for row in rows], [row.answer for row in rows]
    rates_BM = 0.1 + torch.rand(5, len(backbone.projections), dtype=torch.float64)
    lora = whole.step(rates_BM)
    with torch.no_grad():
        slow = [Slow(backbone, ids, {}) for ids in prompts]
        base_B = torch.stack([s.nll(answer) / len(answer) for s, answer in zip(slow, answers, strict=True)])
        after_B = torch.stack(
            [s.nll(answer) / len(answer) for s, answer in zip(slow_rows(backbone, prompts, lora), answers, strict=True)]
        )
    assert (after_B - base_B).abs().max() > 0.1
    for part in (whole, prepared(backbone, [rows[:3], rows[3:]], objective)):
        assert torch.equal(part.batch.ids_BT, whole.batch.ids_BT)
        assert torch.equal(part.batch.mask_BT, whole.batch.mask_BT)
        close(part.made.initial_lora.tensors, whole.made.initial_lora.tensors, 0)
        close(part.made.grads[0].tensors, whole.made.grads[0].tensors)
        close(part.h_BH, whole.h_BH, 1e-5)
        close(part.step(rates_BM).tensors, lora.tensors)
        close(part.answer_nll(answers, None), base_B)
        close(part.answer_nll(answers, lora), after_B)
        close(part.read(None).answer_nll(answers), base_B)
        assert part.read(None).generate(max_new_tokens=3, eos_token_id=-1) == [row.greedy(3) for row in slow]
    check_read(backbone, prompts, lora, part.read(lora))


def test_a_prepared_prompt_keeps_no_more_than_is_counted():
    """Prompts of one length, in parts or whole; float32, as bytes_of counts adapters. States and ids are small beside it."""
    backbone = tiny_backbone("llama", dtype=torch.float32, target_modules="attention")
    rows = by_length([40, 40], [1, 1])
    for parts in ([rows], [rows[:1], rows[1:]]):
        some = prepared(backbone, parts)
        small = sum(t.nbytes for t in (some.h_BH, some.batch.ids_BT, some.batch.mask_BT)) + 2 * 4 * backbone.hidden_size
        counted = 2 * bytes_of(backbone, 40, INIT.r)
        assert counted <= held_bytes(some) <= counted + small + 4 * (2 * len(backbone.projections) + 1)


def held_bytes(some: Prepared) -> int:
    trace = some.made
    assert trace.reading is not None
    tensors = [some.h_BH, some.batch.ids_BT, some.batch.mask_BT, trace.reading.hidden_BTD]
    tensors += [*trace.lora.tensors, *trace.initial_lora.tensors, *trace.grads[0].tensors]
    for layer in trace.reading.cache.layers:
        assert layer.keys is not None
        assert layer.values is not None
        tensors += [layer.keys, layer.values]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


# --- the plan ---


def plan(rows: Sequence[Encoded], sizes: Sequence[int], **settings: int) -> Plan:
    return plan_of(rows, sizes, **{"batch_size": 4, "samples": 90, "passes": 3, "memory": 60, "seed": 0, **settings})


def test_every_row_of_a_chunk_is_seen_in_each_pass():
    rows = encoded([3 + i * 7 % 30 for i in range(23)], [1] * 23)
    sizes = [5 + i * 3 % 11 for i in range(23)]
    made = plan(rows, sizes)
    assert made == plan(rows, sizes)  # a pure function
    assert made != plan(rows, sizes, seed=1)
    assert len(made.batches) == len(made.chunks)
    assert made.chunks == sorted(made.chunks)
    epoch: list[int] = []
    for chunk in range(made.chunks[-1] + 1):
        batches = [batch for batch, c in zip(made.batches, made.chunks, strict=True) if c == chunk]
        held = sorted({i for batch in batches for i in batch})
        assert sum(sizes[i] for i in held) <= 60
        per_pass = len(batches) // 3
        orders = [batches[n * per_pass : (n + 1) * per_pass] for n in range(3)]
        for order in orders:
            assert sorted(i for batch in order for i in batch) == held
            assert Counter(map(tuple, order)) == Counter(map(tuple, orders[0]))  # the same batches: prepared once
        assert all(1 <= len(batch) <= 4 for batch in batches)
        for batch in batches:
            assert [len(rows[i].prompt) for i in batch] == sorted(len(rows[i].prompt) for i in batch)
        epoch += held
    assert sorted(epoch[:23]) == list(range(23))  # a shuffle an epoch
    assert len(set(epoch[23:])) == len(epoch) - 23
    assert sum(map(len, made.batches)) == 90


def test_a_chunk_is_as_large_as_fits_and_its_batches_are_alike():
    rows = encoded([3 + i * 7 % 41 for i in range(41)], [1] * 41)
    made = plan(rows, [1] * 41, samples=41 * 3, memory=41)
    assert set(made.chunks) == {0}
    lengths = sorted(len(row.prompt) for row in rows)
    for n in range(3):
        order = made.batches[n * 11 : (n + 1) * 11]
        assert sorted(sorted(len(rows[i].prompt) for i in batch) for batch in order) == [
            lengths[i : i + 4] for i in range(0, 41, 4)
        ]
    assert made.batches[:11] != made.batches[11:22] != made.batches[22:]
    assert [len(rows[i].prompt) for i in made.batches[0]] != lengths[:4]  # not from short to long
    full = plan(rows, [1] * 41, samples=41 * 3, memory=20)
    sizes = [len({i for b, c in zip(full.batches, full.chunks, strict=True) if c == n for i in b}) for n in range(3)]
    assert sizes == [20, 20, 1]


@pytest.mark.parametrize(("samples", "seen"), [(1, 3), (3, 3), (4, 6), (90, 90), (91, 93)])
def test_a_plan_ends_with_whole_passes(samples, seen):
    rows = encoded([5] * 10, [1] * 10)
    made = plan(rows, [10] * 10, samples=samples)
    assert sum(map(len, made.batches)) == seen
    long = plan(rows, [10] * 10, samples=200)
    whole = made.chunks.index(made.chunks[-1])  # the last chunk may be a part
    assert made.batches[:whole] == long.batches[:whole]


def test_a_row_that_does_not_fit():
    rows = encoded([5, 80, 7], [1] * 3)
    sizes = [10_000_000, 90_000_000, 20_000_000]
    with pytest.raises(ValueError, match=r"a prompt of 80 tokens needs 0\.09 GB to be kept") as error:
        plan(rows, sizes, memory=50_000_000)
    assert str(error.value).endswith(
        "optimizer.memory_gb allows 0.05. Raise it, or leave such rows out with train.max_tokens."
    )
    assert "\n" not in str(error.value)
    assert plan(rows, sizes, memory=90_000_000).batches


# --- under the loop ---


def trainee_for(
    backbone: FrozenLM, rows: Sequence[Encoded], made: Plan, network: Network | None = None, **settings: Any
) -> OneStepTrainee:
    given: dict[str, Any] = {"validation": rows, "batch_size": 2, "clip_prompt": 1.0, "harm_weight": 0.0, "seed": 4}
    return OneStepTrainee(
        backbone, INIT, network or network_for(backbone, "scalenet"), plan=made, **{**given, **settings}
    )


def test_an_a_lasts_for_a_chunk_and_its_prompts_are_read_once(llama, monkeypatch):
    rows = by_length([9, 12, 10, 14], [2, 3, 1, 2])
    made = plan_of(rows, [10] * 4, batch_size=2, samples=4 * 3 * 2, passes=3, memory=40, seed=0)
    assert made.chunks == [0] * 6 + [1] * 6
    trainee = trainee_for(llama, rows, made)
    seen: list[dict[str, Tensor]] = [{}, {}]
    backward = one_step.one_step_backward

    def watched(network, some, **settings):
        for b, row in enumerate(some.rows):
            assert some.prepared.batch.ids_BT[b, -len(row.prompt) :].tolist() == row.prompt
            A_RI = some.prepared.made.initial_lora.A[0][b]
            assert torch.equal(seen[trainee.chunk].setdefault(row.id, A_RI), A_RI)
        return backward(network, some, **settings)

    monkeypatch.setattr(one_step, "one_step_backward", watched)
    widths: list[int] = []
    llama.decoder.register_forward_pre_hook(
        lambda _m, _args, kwargs: widths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    layers = count_layers(llama, monkeypatch)
    for step, batch in enumerate(made.batches):
        trainee.backward([rows[i] for i in batch], step)
    assert [len(s) for s in seen] == [4, 4]
    for i, row in enumerate(rows):
        assert (seen[0][row.id] - seen[1][row.id]).abs().max() > 1e-3
        others = [seen[0][other.id] for other in rows[:i]]
        assert all((seen[0][row.id] - A_RI).abs().max() > 1e-3 for A_RI in others)
    prompts = sorted(w for w in widths if w > 3)  # packed: two prompts in a row; answers feed at most 3
    assert prompts == sorted(2 * [len(rows[0].prompt) + len(rows[1].prompt), len(rows[2].prompt) + len(rows[3].prompt)])
    passes = 2 * 2 * (1 + 1 + 3)  # chunks, batches; the prompts, the base model's answers, three passes
    assert layers == {0: passes, 1: passes}


def test_rows_of_two_tasks_with_the_same_id_are_two_rows(llama):
    first, second = encoded([6, 9], [3, 2])
    rows = [first, Encoded(first.id, second.prompt, second.answer, "other task")]
    made = plan_of(rows, [1] * 2, batch_size=1, samples=2, passes=1, memory=2, seed=0)
    network = network_for(llama, "scalenet")
    trainee = trainee_for(llama, rows, made, network)
    have = [trainee.backward([rows[i]], step) for step, (i,) in enumerate(made.batches)]
    for (i,), report in zip(made.batches, have, strict=True):
        some = scored(llama, INIT, [rows[i]], network, trainee.seed * 1_000_003)
        assert report["nll"] == pytest.approx(one_step_backward(network, some, clip=1.0)["nll"])


def test_validation_says_who_was_helped_and_who_harmed(llama, monkeypatch):
    monkeypatch.setattr(one_step, "HARM", 0.7)  # between the changes of two rows
    rows = [
        Encoded(row.id, row.prompt, row.answer, "one" if n % 2 else "two")
        for n, row in enumerate(by_length(LENGTHS, ANSWERS))
    ]
    network = network_for(llama, "scalenet")
    trainee = trainee_for(llama, rows, Plan([], []), network)
    layers = count_layers(llama, monkeypatch)
    report = trainee.validate()
    batches = len(length_batches([len(row.prompt) for row in rows], batch_size=2))
    assert layers == {0: 3 * batches, 1: 3 * batches}
    assert trainee.validate() == report
    assert layers == {0: 4 * batches, 1: 4 * batches}  # prompts and the base model's answers are kept
    base, after, rates = [], [], []
    for row in rows:
        rates_M, lora = slow_step(llama, network, row, INIT(llama, left([row.prompt]), [0]))
        rates.append(rates_M)
        for into, weights in ((base, {}), (after, merged_weights(llama, lora, 0))):
            into.append((Slow(llama, row.prompt, weights).nll(row.answer) / len(row.answer)).item())
    change = {row.id: a - b for row, a, b in zip(rows, after, base, strict=True)}
    logs_BM = torch.stack(rates).log()
    want = {
        "validation_nll_0": sum(base) / 6,
        "validation_nll_1": sum(after) / 6,
        "validation_harmed": sum(c > one_step.HARM for c in change.values()) / 6,
        "validation_spread_prompts_1": logs_BM.std(0).mean().item(),
        "validation_spread_projections_1": logs_BM.mean(0).std(correction=0).item(),
    }
    for task in ("one", "two"):
        mine = [change[row.id] for row in rows if row.task == task]
        want |= {f"gain {task}": sum(mine) / 3, f"harmed {task}": sum(c > one_step.HARM for c in mine) / 3}
    assert report == pytest.approx(want, abs=1e-5)
    assert 0 < report["validation_harmed"] < sum(c > 0 for c in change.values()) / 6


def answer_settings(material: Path, output: Path, **scalenet_settings: Any):  # noqa: F811
    config = settings(material, output)
    config.scalenet = config.scalenet.model_copy(
        update={"reach": "answer", "max_steps": 1, "base_rates": [0.5], "harm_weight": 0.5, **scalenet_settings}
    )
    config.optimizer = config.optimizer.model_copy(update={"passes": 2, "memory_gb": 3e-5, "samples": 40})
    config.validation_steps, config.checkpoint_every = [1], 1
    return config


def stopped_and_resumed(config: Any, monkeypatch: pytest.MonkeyPatch, stops: Any) -> Path:
    """Stopped before the first step that `stops` names, just after a checkpoint."""
    backward, done = OneStepTrainee.backward, []

    def stopping(self, rows, step):
        if stops(self, step):
            done.append(step)
            raise KeyboardInterrupt
        return backward(self, rows, step)

    with monkeypatch.context() as patch:
        patch.setattr(OneStepTrainee, "backward", stopping)
        with pytest.raises(KeyboardInterrupt):
            train_scalenet(config)
    assert done
    assert not (Path(config.output) / "network").exists()
    return train_scalenet(config, resume=True)


def check_same(whole: Path, resumed: Path) -> None:
    first, second = (load_file(folder / "rate.safetensors") for folder in (whole, resumed))
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
    first, second = (metrics(folder.parent) for folder in (whole, resumed))
    assert [(line["step"], line.get("nll")) for line in first] == [(line["step"], line.get("nll")) for line in second]


def amid_a_later_chunk(trainee: OneStepTrainee, step: int) -> bool:
    chunks = trainee.plan.chunks
    return 0 < chunks[step - 1] == chunks[step] < chunks[-1]


@pytest.mark.parametrize("granularity", ["layer", "constant"])
def test_a_run_that_stopped_amid_a_chunk_resumes_to_the_same_weights(
    material,  # noqa: F811
    tmp_path,
    monkeypatch,
    granularity,
):
    torch.set_num_threads(1)
    whole = train_scalenet(answer_settings(material, tmp_path / "whole", granularity=granularity))
    config = answer_settings(material, tmp_path / "run", granularity=granularity)
    resumed = stopped_and_resumed(config, monkeypatch, amid_a_later_chunk)
    check_same(whole, resumed)
    network = load_rate(resumed)
    assert isinstance(network, PerProjectionRate if granularity == "constant" else ScaleNet)
    made = network.made_for
    assert made is not None
    assert (made.tasks, made.format, made.reach, made.steps) == (("own",), "plain", "answer", 1)
    last = next(line for line in reversed(metrics(resumed.parent)) if "validation_nll_1" in line)
    assert made.validation == {k: last[k] for k in ("validation_nll_0", "validation_nll_1", "validation_harmed")}


@pytest.mark.parametrize("phase", ["constants", "network"])
def test_so_does_one_that_trains_constants_first(material, tmp_path, monkeypatch, phase):  # noqa: F811
    torch.set_num_threads(1)
    one, config = (answer_settings(material, tmp_path / name, constants=0.05) for name in ("whole", "run"))
    for settings_of in (one, config):  # one chunk, of several batches
        settings_of.optimizer.memory_gb, settings_of.optimizer.samples = 1.0, 32
    whole = train_scalenet(one)

    def stops(trainee: OneStepTrainee, step: int) -> bool:
        mine = isinstance(trainee.network, PerProjectionRate) == (phase == "constants")
        return mine and (step == len(trainee.plan.chunks) - 1 if phase == "constants" else step == 2)

    resumed = stopped_and_resumed(config, monkeypatch, stops)
    check_same(whole.parent / "constants" / "network", resumed.parent / "constants" / "network")
    check_same(whole, resumed)


def test_a_network_starts_from_constants(material, tmp_path, monkeypatch):  # noqa: F811
    constants = train_scalenet(answer_settings(material, tmp_path / "constants", granularity="constant"))
    want = load_rate(constants)
    assert isinstance(want, PerProjectionRate)
    assert want.log_rates_KM.std() > 1e-3
    begun: list[Tensor] = []

    def kept(trainee, *_args, **_kwargs):
        begun.append(trainee.network.rates_BM(torch.randn(2, 64), 1, 1, like=torch.zeros(2), projections=4))
        raise KeyboardInterrupt

    monkeypatch.setattr(scalenet, "train", kept)
    with pytest.raises(KeyboardInterrupt):
        train_scalenet(answer_settings(material, tmp_path / "run", start=str(constants)))
    close(begun[0], want.log_rates_KM.exp().expand(2, -1), 1e-5)


@pytest.mark.parametrize(
    ("section", "update", "words"),
    [
        ("scalenet", {"reach": "all"}, r"optimizer\.passes is for one step from the zero start with reach answer"),
        ("optimizer", {"memory_gb": 1e-6}, r"a prompt of \d+ tokens needs .* optimizer\.memory_gb allows"),
        ("objective", {"exit_layer": 2, "tune_lens": 0.1, "lens": "lens"}, r"tune_lens is not for one step with reach"),
    ],
)
def test_settings_that_do_not_go_together(material, tmp_path, section, update, words):  # noqa: F811
    config = answer_settings(material, tmp_path / "run")
    if section == "objective":
        random_lens(tiny_backbone()).save_pretrained(tmp_path / "lens")
        update = {**update, "lens": str(tmp_path / "lens")}
    setattr(config, section, getattr(config, section).model_copy(update=update))
    with pytest.raises(ValueError, match=words):
        train_scalenet(config)
