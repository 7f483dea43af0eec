"""What adapters depend on: controls, the command, and how it resumes."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from ephemera import cli
from ephemera.config import Analyse, load_config
from ephemera.evaluation.adapters import analysis
from ephemera.evaluation.adapters.analysis import CONTROLS, analyse, compare, control_nll, control_states
from ephemera.evaluation.shared.records import ControlRecord, RecordFile
from ephemera.inits import LoraGenerator
from ephemera.llm.frozen_lm import FrozenLM, describe
from ephemera.llm.load import load_backbone
from ephemera.scoring import Encoded
from tiny_models import random_ids, save_tiny

SNLI = [
    {"premise": f"A man {verb} by the river.", "hypothesis": f"He {other}.", "label": n % 3}
    for n, (verb, other) in enumerate(
        [("sat", "sat"), ("ran", "slept"), ("sang", "sang"), ("slept", "is 6"), ("ate", "ate")]
    )
]
BOOLQ = [
    {"passage": f"The {thing} is old.", "question": f"is the {thing} new", "answer": n % 2 == 0}
    for n, thing in enumerate(["mill", "river", "book", "sea", "winter"])
]


def make_generator(backbone: FrozenLM, *, reads_h: bool) -> LoraGenerator:
    """As after training; with heads' weights at zero, adapters that are not zero but the same for every h."""
    torch.manual_seed(4)
    generator = LoraGenerator(
        projections=backbone.projections,
        state_size=backbone.hidden_size,
        hidden_size=16,
        trained_for=describe(backbone),
    )
    with torch.no_grad():
        for head in (*generator.A_heads, *generator.B_heads):
            head[-1].bias.normal_(0, 0.2)
            if reads_h:
                head[-1].weight.normal_(0, 0.1)
    return generator.to(backbone.dtype).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def long_folder(tmp_path_factory):
    """The tiny model with room for these tasks' prompts."""
    return with_room(save_tiny(tmp_path_factory.mktemp("long")))


def with_room(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 512}))
    return folder


@pytest.fixture
def two_tasks(tmp_path):
    for name, rows in (("snli", SNLI), ("boolq", BOOLQ)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_shuffled_states_are_never_a_prompts_own():
    h_NH = torch.arange(9.0)[:, None]
    task_N = torch.tensor([0, 0, 1, 1, 1, 1, 2, 2, 2])
    states = control_states(h_NH, task_N, seed=3)
    assert list(states) == list(CONTROLS)
    same_N, other_N = (states[name][:, 0].long() for name in ("same_task", "other_task"))
    assert sorted(same_N.tolist()) == list(range(9))
    assert (same_N != torch.arange(9)).all()
    assert (task_N[same_N] == task_N).all()
    assert (task_N[other_N] != task_N).all()
    assert states["mean"].unique().tolist() == [4.0]
    assert "other_task" not in control_states(h_NH, torch.zeros(9, dtype=torch.long), seed=3)


def test_random_states_have_the_prompts_mean_and_deviation_by_feature():
    h_NH = torch.randn(4000, 3) * torch.tensor([1.0, 5.0, 0.1]) + torch.tensor([0.0, 2.0, -3.0])
    random_NH = control_states(h_NH, torch.arange(4000) % 2, seed=0)["random"]
    torch.testing.assert_close(random_NH.std(0), h_NH.std(0), rtol=0.05, atol=0)
    assert ((random_NH.mean(0) - h_NH.mean(0)).abs() < 0.05 * h_NH.std(0)).all()


@pytest.mark.parametrize("reads_h", [False, True])
def test_controls_tell_whether_a_generator_reads_its_input(reads_h, llama, tmp_path):
    generator = make_generator(llama, reads_h=reads_h)
    rows = [Encoded(str(n), ids[:-3], ids[-3:]) for n, ids in enumerate(random_ids([9, 7, 12, 8, 10, 7]))]
    h_NH, task_N = torch.randn(6, llama.hidden_size), torch.tensor([0, 0, 0, 1, 1, 1])
    states = control_states(h_NH, task_N, seed=0)
    names = ["a"] * 3 + ["b"] * 3
    nll = control_nll(llama, generator, rows, states, names, RecordFile(tmp_path, ControlRecord), batch_size=4)
    assert nll["base"] != nll["own"]
    for name in ("same_task", "other_task", "mean", "random"):
        assert (nll[name] == nll["own"]) is not reads_h
    by_name = {c.name: c for c in compare(nll, range(6))}
    assert by_name["own"].against_own.mean == 0
    want = sum(nll["random"]) / 6 - sum(nll["own"]) / 6
    assert by_name["random"].against_own.mean == pytest.approx(want, abs=1e-12)
    assert by_name["random"].against_own.low <= want + 1e-12


def test_the_command_from_a_folder_to_figures(long_folder, two_tasks, monkeypatch, capsys):
    generator = make_generator(load_backbone(str(long_folder), device="cpu"), reads_h=True)
    generator.save_pretrained(two_tasks / "network")
    settings = [
        f"output={two_tasks / 'run'}",
        f"model.name={long_folder}",
        "model.device=cpu",
        f"generator={two_tasks / 'network'}",
        "data.tasks=[{task: snli}, {task: boolq}]",
        f"data.source={two_tasks}/{{task}}",
        "data.limit=4",
        "batch_size=3",
    ]
    words = ["analyse", *(word for setting in settings for word in ("--set", setting))]
    monkeypatch.setattr(sys, "argv", ["ephemera", *words])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    out, _ = capsys.readouterr()
    assert stop.value.code == 0
    folder = two_tasks / "run"
    figures = {path.name for path in (folder / "figures").iterdir()}
    assert figures == {"norms.png", "cosines.png", "embedding.png", "controls.png"}
    page = (folder / "table.md").read_text()
    assert page.strip() == out.strip()
    for said in (*CONTROLS.values(), "- Commit: ", "- Command: `ephemera analyse", "8 (snli 4, boolq 4)"):
        assert said in page
    results = json.loads((folder / "results.json").read_text())
    assert results["tasks"] == {"snli": 4, "boolq": 4}
    assert results["config"]["data"]["limit"] == 4
    assert len(results["norms"]["mean_by_task"]["snli"]) == len(results["norms"]["projections"]) == 4
    assert [c["name"] for c in results["controls"]["all"]] == list(CONTROLS)
    records = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
    assert len(records) == 8
    own = [r["nll"]["own"] for r in records]
    assert results["controls"]["all"][1]["nll"]["mean"] == pytest.approx(sum(own) / 8)
    again = analyse(load_config(Analyse, None, settings))
    assert [r.nll for r in again.records] == [r["nll"] for r in records]


def test_a_stopped_analysis_goes_on_where_it_was(long_folder, two_tasks, monkeypatch, capsys):
    make_generator(load_backbone(str(long_folder), device="cpu"), reads_h=True).save_pretrained(two_tasks / "network")
    whole = analyse(config_for(long_folder, two_tasks, "batch_size=3", f"output={two_tasks / 'whole'}"))
    scored: list[str] = []
    score = analysis.answer_nll

    def counted(backbone, rows, lora):
        if len(scored) == 2 * len(CONTROLS):
            raise KeyboardInterrupt
        scored.append(rows[0].id)
        return score(backbone, rows, lora)

    monkeypatch.setattr(analysis, "answer_nll", counted)
    config = config_for(long_folder, two_tasks, "batch_size=3")
    with pytest.raises(SystemExit) as stop:
        analyse(config)
    assert stop.value.code == 130
    folder = two_tasks / "run"
    assert f"stopped: 6 records are kept in {folder}; the same command goes on" in capsys.readouterr().err
    first = (folder / "records.jsonl").read_text()
    assert len(first.splitlines()) == 6
    scored.clear()
    monkeypatch.setattr(analysis, "answer_nll", lambda *given: scored.append(given[1][0].id) or score(*given))
    with pytest.raises(ValueError, match=r"holds an analysis with other settings \(seed differ\)"):
        analyse(config_for(long_folder, two_tasks, "batch_size=3", "seed=1"))
    assert scored == []
    resumed = analyse(config)
    assert len(scored) == 2 * len(CONTROLS)  # four batches, two of them done before
    assert [r.nll for r in resumed.records] == [r.nll for r in whole.records]
    assert resumed.controls == whole.controls
    scored.clear()
    assert analyse(config).controls == whole.controls
    assert scored == []
    assert (two_tasks / "whole" / "records.jsonl").read_text() == (folder / "records.jsonl").read_text()


def test_adapters_that_are_all_the_same_leave_no_embedding(long_folder, two_tasks):
    from ephemera.evaluation.adapters.figures import write_figures
    from ephemera.evaluation.adapters.tables import write_tables

    generator = make_generator(load_backbone(str(long_folder), device="cpu"), reads_h=False)
    generator.save_pretrained(two_tasks / "network")
    found = analyse(config_for(long_folder, two_tasks))
    assert len(write_figures(found)) == 3
    assert "–" in write_tables(found).read_text()
    assert json.loads((two_tasks / "run" / "results.json").read_text())["updates"]["silhouette"]["value"] is None


def config_for(model, folder, *more: str) -> Analyse:
    settings = [
        f"output={folder / 'run'}",
        f"model.name={model}",
        "model.device=cpu",
        f"generator={folder / 'network'}",
    ]
    settings += ["data.tasks=[{task: snli}, {task: boolq}]", f"data.source={folder}/{{task}}", *more]
    return load_config(Analyse, None, settings)


def test_a_generator_for_another_model_is_one_clear_error(long_folder, two_tasks, tmp_path_factory):
    other = with_room(save_tiny(tmp_path_factory.mktemp("other"), seed=5))
    make_generator(load_backbone(str(other), device="cpu"), reads_h=True).save_pretrained(two_tasks / "network")
    with pytest.raises(ValueError, match=r"this generator was trained for .*the model at hand is") as error:
        analyse(config_for(long_folder, two_tasks))
    assert "\n" not in str(error.value)
    assert str(long_folder) in str(error.value)


def test_mistakes_are_one_clear_error(long_folder, two_tasks):
    with pytest.raises(ValueError, match="unknown generator"):
        analyse(config_for(long_folder, two_tasks))
    make_generator(load_backbone(str(long_folder), device="cpu"), reads_h=True).save_pretrained(two_tasks / "network")
    with pytest.raises(ValueError, match=r"data\.limit should be at least 2"):
        analyse(config_for(long_folder, two_tasks, "data.limit=1"))
    (two_tasks / "snli" / "test.jsonl").write_text(json.dumps(SNLI[0]) + "\n" + json.dumps(SNLI[0]) + "\n")
    with pytest.raises(ValueError, match=r"at least 2 rows of each task; snli has 1"):
        analyse(config_for(long_folder, two_tasks))
    (two_tasks / "run").mkdir(exist_ok=True)
    (two_tasks / "run" / "run.json").write_text("{}")
    with pytest.raises(ValueError, match="holds a run of another command"):
        analyse(config_for(long_folder, two_tasks))


def test_the_generators_own_lora_is_used_and_said(long_folder, two_tasks):
    make_generator(load_backbone(str(long_folder), device="cpu"), reads_h=True).save_pretrained(two_tasks / "network")
    found = analyse(config_for(long_folder, two_tasks))
    assert found.conditions["LoRA"] == "r 2, alpha 8, on qv"
