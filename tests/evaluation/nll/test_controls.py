"""Each control's answers against plain transformers with merged weights, one prompt and one token at a time."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ephemera.adaptation import Adaptation
from ephemera.config import CONTROLS as NAMES
from ephemera.config import Evaluate, check_config
from ephemera.evaluation.nll.controls import CONTROLS, Material, controlled
from ephemera.evaluation.nll.grid import evaluate
from ephemera.evaluation.nll.report import write_report
from ephemera.evaluation.shared.records import RECORDS, Record, read_records
from ephemera.inits import ZeroInit
from ephemera.llm.frozen_lm import FrozenLM
from ephemera.llm.load import load_backbone
from ephemera.llm.prefill import prefill
from ephemera.lora import LoraBatch
from ephemera.made_for import MadeFor
from ephemera.rates import ScaleNet
from ephemera.scoring import Encoded, prompt_batch
from ephemera.tasks import TASKS, bare_prompt
from reference import close, merged_weights, slow_nll, slow_representation
from tiny_models import length_gate, random_ids, random_scalenet, tiny_backbone

K = 2
START = ZeroInit(r=3, lora_alpha=5.0, init_std=0.3)


def some_rows(n: int, seed: int, *, task: str = "here") -> list[Encoded]:
    """Prompts of 4 tokens and more, shortest first, with an answer each."""
    prompts, answers = random_ids([4 + i // 2 for i in range(n)], seed=seed), random_ids([1 + i % 3 for i in range(n)])
    return [Encoded(f"{task}-{i}", p, a) for i, (p, a) in enumerate(zip(prompts, answers, strict=True))]


@pytest.fixture(scope="module")
def backbone() -> FrozenLM:
    return tiny_backbone()


@pytest.fixture(scope="module")
def network(backbone) -> ScaleNet:
    network = random_scalenet(backbone)
    network.base_rates = (1.0,) * 5
    return network


@pytest.fixture(scope="module")
def material(backbone, network) -> Material:
    template = Encoded("template", random_ids([5], seed=8)[0], [])
    other = some_rows(2, 9, task="there")
    return Material(backbone, START, network, some_rows(20, 5), template, other, seed=0, batch_size=3)


def made_by(material: Material, method: str, rows: Sequence[Encoded]) -> Adaptation:
    return controlled(material, method, rows, material.adapted(rows, K), K)


def answers_nll(material: Material, rows: Sequence[Encoded], made: Adaptation) -> Tensor:
    read = prefill(material.backbone, prompt_batch(material.backbone, rows), made.lora, made.initial_lora)
    assert not read.fallback_B.any()
    return read.answer_nll([row.answer for row in rows])


def slow_adapter(
    material: Material, row: Encoded, rates_KM: Tensor | None = None, *, seed: int = 0
) -> tuple[LoraBatch, Tensor]:
    """K steps on one prompt by autograd through merged weights, at these rates or those that the network predicts."""
    backbone, used = material.backbone, []
    lora = START(backbone, prompt_batch(backbone, [row]), [seed])
    for k in range(1, K + 1):
        leaves = [t.detach().requires_grad_() for t in lora.tensors]
        weights = merged_weights(backbone, lora.with_tensors(leaves), 0)
        grads = torch.autograd.grad(slow_nll(backbone.model, row.prompt, weights=weights), leaves, allow_unused=True)
        if rates_KM is None:
            h_H = slow_representation(backbone.model, row.prompt, weights).detach()
            assert isinstance(material.rule, ScaleNet)
            rates_M = material.rule.base_rates[k - 1] * material.rule.scales(h_H[None], k, K)[0].detach()
        else:
            rates_M = rates_KM[k - 1]
        both = torch.cat([rates_M, rates_M])  # every A, then every B
        lora = lora.with_tensors([t - r * g for t, r, g in zip(lora.tensors, both, grads, strict=True)])
        used.append(rates_M)
    return lora, torch.stack(used)


def slow_answer(material: Material, row: Encoded, loras: Sequence[LoraBatch]) -> Tensor:
    """The row's answer NLL under the mean of these adapters' merged weights."""
    every = [merged_weights(material.backbone, lora, 0) for lora in loras]
    weights = {name: torch.stack([each[name] for each in every]).mean(0).detach() for name in every[0]}
    with torch.no_grad():
        return slow_nll(material.backbone.model, row.prompt + row.answer, first=len(row.prompt), weights=weights)


def check(material: Material, method: str, rows: Sequence[Encoded], want: Sequence[Tensor], tolerance=1e-6) -> None:
    """As wanted, and not what the layer-wise network gives."""
    have_B = answers_nll(material, rows, made_by(material, method, rows))
    close(have_B, torch.stack(list(want)), tolerance)
    own_B = answers_nll(material, rows, material.adapted(rows, K))
    assert ((have_B - own_B).abs() > 1e-4).all()


def test_every_control_has_a_name():
    assert tuple(CONTROLS) == NAMES


def test_the_mean_is_that_of_sixteen_other_prompts_weight_changes(material):
    rows = list(material.rows)[6:9]
    donors = material.donors()
    assert len({row.id for row in donors}) == 17
    assert {row.id for row in material.rows} > {row.id for row in donors}
    inside = [row.id in {donor.id for donor in donors} for row in material.rows]
    rows = [list(material.rows)[i] for i in (inside.index(False), inside.index(True))]
    rows.sort(key=lambda row: len(row.prompt))
    adapters = {row.id: slow_adapter(material, row)[0] for row in donors}
    want = [slow_answer(material, r, [adapters[d.id] for d in donors if d.id != r.id][:16]) for r in rows]
    check(material, "mean", rows, want)


def test_the_mean_of_few_rows_is_of_the_others(material):
    few = replace(material, rows=material.rows[:3], _donors={})
    others = [[few.adapters_of([other], K) for other in few.rows if other is not row] for row in few.rows]
    check(few, "mean", few.rows, [slow_answer(few, row, two) for row, two in zip(few.rows, others, strict=True)])


def test_a_mean_that_is_not_finite_falls_back_to_the_start(material):
    few = replace(material, rows=material.rows[:3], _donors={})
    made = made_by(few, "mean", few.rows)
    broken = made.lora.with_buffers(made.lora.A_BN, torch.full_like(made.lora.B_BN, torch.nan))
    read = prefill(few.backbone, prompt_batch(few.backbone, few.rows), broken, made.initial_lora)
    assert read.fallback_B.all()
    want = [slow_nll(few.backbone.model, r.prompt + r.answer, first=len(r.prompt)) for r in few.rows]
    close(read.answer_nll([r.answer for r in few.rows]), torch.stack(want).detach())


def test_template_and_other_task(material):
    rows = list(material.rows)[3:6]
    of_template = slow_adapter(material, material.template)[0]
    check(material, "template", rows, [slow_answer(material, row, [of_template]) for row in rows])
    others = [slow_adapter(material, row)[0] for row in material.other]
    want = [slow_answer(material, row, [others[i % 2]]) for i, row in enumerate(rows, 3)]
    check(material, "other-task", rows, want)


def test_h_swapped_takes_the_neighbours_rates_along_its_own_gradient(material):
    rows = list(material.rows)[3:6]
    rates = [slow_adapter(material, row)[1] for row in rows]
    want = [slow_answer(material, row, [slow_adapter(material, row, rates[b - 1])[0]]) for b, row in enumerate(rows)]
    check(material, "h-swapped", rows, want, 1e-5)  # h(x) is float32


def test_shuffled_rates_are_a_prompts_own_in_other_places(material):
    rows = list(material.rows)[3:6]
    own, made = material.adapted(rows, K).rates_BKM, made_by(material, "shuffled", rows).rates_BKM
    close(made.sort(2).values, own.sort(2).values)
    orders = [[own[b, 0].tolist().index(x) for x in made[b, 0].tolist()] for b in range(3)]
    assert len(set(map(tuple, orders))) > 1, "one draw for each prompt"
    for b, order in enumerate(orders):
        close(made[b, 1], own[b, 1, order])  # the same places at the second step
    want = [slow_answer(material, row, [slow_adapter(material, row, made[b])[0]]) for b, row in enumerate(rows)]
    close(answers_nll(material, rows, made_by(material, "shuffled", rows)), torch.stack(want), 1e-6)
    assert (made_by(replace(material, seed=4), "shuffled", rows).rates_BKM != made).any()


def test_redrawn_starts_from_another_A(material):
    rows = list(material.rows)[3:6]
    want = [slow_answer(material, row, [slow_adapter(material, row, seed=1)[0]]) for row in rows]
    check(material, "redrawn", rows, want, 1e-5)


def test_a_bare_template_has_empty_fields():
    assert bare_prompt(TASKS["nq-open"]) == (
        "Give a short answer of the following question. Output only the answer.\n\nQuestion: \n\nAnswer:"
    )
    for name in ("own", "arc-easy", "asked/dolly"):
        with pytest.raises(ValueError, match=f"task '{name}' has no template"):
            bare_prompt(TASKS[name])


@pytest.fixture
def setting(llama_folder: Path, tmp_path: Path) -> dict:
    """A run of all controls on a tiny model."""
    questions = [
        {"question": f"who {'ran ' * (i % 3)}past the mill {i}", "answer": [f"the river {i}"]} for i in range(6)
    ]
    others = [{"prompt": f"The river runs {'on ' * i}", "answer": "to the sea"} for i in range(3)]
    for name, rows in (("nq", questions), ("other", others)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    backbone = load_backbone(str(llama_folder), dtype="float32", device="cpu")
    network = random_scalenet(backbone).float()
    network.base_rates = (2.0,) * 5
    network.made_for = MadeFor(("nq-open",), "plain", "answer", 1)
    network.gate = length_gate(backbone, 0.5, by_length=50.0, tokens=40.0)  # longer prompts are left alone
    network.save_pretrained(tmp_path / "network")
    return {
        "model": {"name": str(llama_folder), "dtype": "float32", "device": "cpu"},
        "data": {"task": "nq-open", "source": str(tmp_path / "nq.jsonl"), "limit": None},
        "other": {"task": "own", "source": str(tmp_path / "other.jsonl")},
        "layerwise": str(tmp_path / "network"),
        "methods": ["none", "layerwise", *NAMES],
        "steps": [0, 1],
        "generate": [],
        "batch_size": 4,
    }


def nlls(folder: Path) -> dict[tuple[str, str], float]:
    return {(r.method, r.id): r.nll for r in read_records(folder / RECORDS, Record)}


def test_a_run_with_all_controls_goes_on_and_is_reported(setting, tmp_path):
    whole = evaluate(check_config(Evaluate, {**setting, "output": str(tmp_path / "whole")}))
    first = {"methods": ["none", "swapped"], "other": None, "output": str(tmp_path / "parts")}
    evaluate(check_config(Evaluate, {**setting, **first}))
    parts = evaluate(check_config(Evaluate, {**setting, "output": str(tmp_path / "parts")}))
    assert nlls(parts) == nlls(whole)
    assert len(nlls(whole)) == 6 * (2 + len(NAMES))
    found = nlls(whole)
    ids = {i for _, i in found}
    left_alone = {m: {i for i in ids if found[m, i] == found["none", i]} for m in ("layerwise", "h-swapped")}
    assert 0 < len(left_alone["layerwise"]) < 6
    assert left_alone["h-swapped"] == left_alone["layerwise"], "the gate looks at the prompt that is answered"
    write_report(whole)
    table = (whole / "table.md").read_text()
    shares = table.partition("## Controls")[2].partition("\n## ")[0]
    for name in NAMES:
        assert f"| {name} (control) | 1 |" in shares
    assert "another draw of A moves" in shares
    cells = {c["method"]: c for c in json.loads((whole / "results.json").read_text())["cells"]}
    own, mean = (cells[name]["against_none"]["mean"] for name in ("layerwise", "mean"))
    assert cells["mean"]["against_layerwise"]["mean"] == pytest.approx(mean - own)
    spread = json.loads((whole / "results.json").read_text())["spread_of_A"]
    differences = [nlls(whole)["layerwise", i] - nlls(whole)["redrawn", i] for i in {i for _, i in nlls(whole)}]
    assert spread[0]["of_A"] == pytest.approx((sum(d * d for d in differences) / 12) ** 0.5)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"other": None}, "needs rows of another task: give other.task"),
        ({"methods": ["none"]}, "other.task=own has no effect"),
        ({"other": {"task": "nq-open"}}, "other.task=nq-open is data.task too"),
        ({"init": "taskweaver"}, "redrawn draws A anew, and init=taskweaver draws none"),
        ({"cross_gradient": True, "steps": [1]}, "Add none and layerwise to methods, and 0 and 1 to steps"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(setting, wrong, words):
    with pytest.raises(ValueError, match=words):
        check_config(Evaluate, {**setting, **wrong})


def test_a_task_without_a_template_is_refused(setting, tmp_path):
    own = {"data": setting["other"], "other": None, "methods": ["none", "layerwise", "template"]}
    with pytest.raises(ValueError, match="task 'own' has no template"):
        evaluate(check_config(Evaluate, {**setting, **own, "output": str(tmp_path / "run")}))
