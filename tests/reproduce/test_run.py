"""Results from training to the table on a tiny model: against the commands run apart; stopped, resumed and run again."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from ephemera import cli
from ephemera.cost import device_of, shape_of
from ephemera.evaluation.nll.grid import evaluate
from ephemera.evaluation.shared.records import RECORDS, Record, read_records
from ephemera.reproduce import run as running
from ephemera.reproduce.recipe import load_recipe
from ephemera.reproduce.result import reproduce, stages_of
from ephemera.reproduce.run import DONE
from ephemera.reproduce.stages import Planner
from tiny_models import SENTENCES, save_tiny

WORDS = " ".join(SENTENCES).split()


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with a configuration that a plan can read, and rows of an open and of a choice task."""
    folder = tmp_path_factory.mktemp("material")
    config = save_tiny(folder / "model") / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "max_position_embeddings": 1024}))
    for task in ("nq_open", "snli"):
        (folder / task).mkdir()
    for place, split in enumerate(("train", "validation", "test")):
        asked = [{"question": " ".join(WORDS[i + place : i + place + 4]), "answer": [WORDS[-i - 1]]} for i in range(6)]
        snli = [{"premise": WORDS[i], "hypothesis": WORDS[i + place + 1], "label": i % 3} for i in range(6)]
        for task, rows in (("nq_open", asked), ("snli", snli)):
            (folder / task / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


COMMON = ["dtype=float32", "rows=4", "validation_rows=3", "max_tokens=512", "batch_size=4"]
LDTTA = ["datasets={nq-open: [nq-open]}", "samples=8", "max_steps=2", "steps=[0, 1, 2]", "mlp_size=4", "seeds=[0, 1]"]
TASKWEAVER = ["tasks=[snli]", "samples=8", "lora_steps=2", "hidden_size=8"]


def prepared(name: str, material: Path, root: Path, *overrides: str):
    source = f"source={material}/{{task}}"
    recipe = load_recipe(name, [*COMMON, source, *(LDTTA if name in ("fig3", "fig5") else TASKWEAVER), *overrides])
    return recipe, Planner(recipe, root, str(material / "model"), shape_of(str(material / "model")), "cpu")


def made(name: str, material: Path, root: Path, *overrides: str) -> Path:
    recipe, planner = prepared(name, material, root, *overrides)
    return reproduce(recipe, planner, root / name, device_of("cpu-2-cores"))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("reproduced")


@pytest.fixture(scope="module")
def figure3(material: Path, root: Path) -> Path:
    return made("fig3", material, root)


def test_its_figures_are_those_of_the_records(material, root, figure3):
    """Means over prompts by hand: of a learned method over both seeds, of the others from the first seed's grid."""
    recipe, planner = prepared("fig3", material, root)
    grids = [read_records(s.folder / RECORDS, Record) for s in stages_of(recipe, planner) if s.kind == "evaluate"]
    cells = json.loads((figure3.parent / "results.json").read_text())["results"]["nq-open plain"]
    assert {(c["method"], c["K"]) for c in cells} >= {("none", 0), ("fixed", 2), ("stepwise", 1), ("layerwise", 2)}
    for cell in cells:
        learned = cell["method"] in ("stepwise", "layerwise", "averaged")
        own = [[r.nll for r in grid if (r.method, r.K) == (cell["method"], cell["K"])] for grid in grids]
        assert [len(nlls) for nlls in own] == [4, 4 if learned else 0]
        assert cell["nll"]["mean"] == pytest.approx(np.mean(own if learned else own[0]), rel=1e-6)
        assert cell["n"] == 4
    assert (figure3.parent / "figures" / "fig3-nq-open-plain.png").stat().st_size > 10_000
    assert "| layer-wise | 2 | 4 |" in figure3.read_text()


def test_a_stage_is_the_command_with_its_settings(material, root, figure3, tmp_path):
    recipe, planner = prepared("fig3", material, root)
    (stage,) = [s for s in stages_of(recipe, planner) if s.name == "evaluate nq-open plain seed 1"]
    apart = evaluate(stage.settings.model_copy(update={"output": str(tmp_path / "apart")}))
    want = {r.key: r.nll for r in read_records(apart / RECORDS, Record)}
    assert {r.key: r.nll for r in read_records(stage.folder / RECORDS, Record)} == want


def test_what_is_done_is_not_run_again(material, root, figure3, monkeypatch):
    monkeypatch.setattr(running, "execute", lambda stage: pytest.fail(f"ran {stage.name} again"))
    first = json.loads((figure3.parent / "results.json").read_text())["results"]
    made("fig3", material, root)
    assert json.loads((figure3.parent / "results.json").read_text())["results"] == first


def test_another_result_trains_only_what_is_new(material, root, figure3, monkeypatch):
    ran, execute = [], running.execute
    monkeypatch.setattr(running, "execute", lambda stage: (ran.append(stage.name), execute(stage))[1])
    page = made("fig5", material, root)
    assert ran == ["evaluate nq-open plain seed 0", "evaluate nq-open plain seed 1"]
    assert (page.parent / "figures" / "fig5.png").exists()
    assert "schedule_consistency" in json.loads((page.parent / "results.json").read_text())["results"]


def test_schedules_and_constants_stand_beside_the_papers_methods(material, tmp_path):
    page = made("fig3", material, tmp_path, "seeds=[0]", "methods=[none, first, constants]")
    by_place = {(c["method"], c["K"]): c["nll"]["mean"] for c in figures(page)}
    assert set(by_place) == {("none", 0)} | {(method, K) for method in ("first", "constants") for K in (1, 2)}
    assert by_place["first", 1] == pytest.approx(by_place["first", 2], abs=1e-5)  # the second step stands still
    assert "best first step, then none" in page.read_text()


def figures(page: Path) -> list[dict]:
    """Of each cell, all but the time it took."""
    cells = json.loads((page.parent / "results.json").read_text())["results"]["nq-open plain"]
    return [{key: value for key, value in cell.items() if key != "seconds"} for cell in cells]


def test_a_stopped_stage_goes_on(material, tmp_path, monkeypatch):
    """Ctrl-C in the grid: networks are kept, its records too, and the next run ends with the same figures."""
    from ephemera.evaluation.nll import grid

    one = ["seeds=[0]", "methods=[none, layerwise]"]
    whole = figures(made("fig3", material, tmp_path / "whole", *one))
    add, calls = grid.RecordFile.add, []

    def stopping(self, records):
        add(self, records)
        calls.append(len(records))
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(grid.RecordFile, "add", stopping)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        made("fig3", material, tmp_path / "stopped", *one)
    monkeypatch.undo()
    recipe, planner = prepared("fig3", material, tmp_path / "stopped", *one)
    network, stopped = stages_of(recipe, planner)
    assert (network.folder / DONE).exists()
    assert not (stopped.folder / DONE).exists()
    kept = len(read_records(stopped.folder / RECORDS, Record))
    assert kept == sum(calls)
    page = made("fig3", material, tmp_path / "stopped", *one)
    assert figures(page) == whole


def test_taskweavers_table(material, tmp_path):
    page = made("taskweaver-table2", material, tmp_path)
    text = page.read_text()
    assert all(f"| {name} |" in text for name in ("Base", "Task LoRA", "Mixed LoRA", "TaskWeaver"))
    assert "## As published" in text
    assert "Pythia-70M" in text
    # Two LoRAs would be one: a mixture of one task is that task's own
    assert len(list((tmp_path / "stages").glob("*/done.json"))) == 3


def test_taskweavers_analysis(material, tmp_path):
    text = made("taskweaver-analysis", material, tmp_path).read_text()
    assert "analyse plain seed 0" in text
    assert len(list((tmp_path / "stages").glob("*/done.json"))) == 2


@pytest.fixture
def told(capsys, monkeypatch):
    """What a user sees of `ephemera reproduce ...`."""

    def run(*arguments: str) -> tuple[str, str]:
        monkeypatch.setattr("sys.argv", ["ephemera", "reproduce", *arguments])
        with pytest.raises(SystemExit):
            cli.main()
        return capsys.readouterr()

    return run


def test_the_command_plans(told):
    out, err = told("table1", "--dry-run", "--model", "Qwen3-32B", "--on", "h200", "--seeds", "0,1")
    assert "LDTTA Table 1, NLL on AdaptEval: Qwen3-32B" in out
    assert "hours on h200" in out
    assert "train layer-wise adapteval plain seed 1" in out
    assert err == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fig9"], "unknown result 'fig9'"),
        (["fig3", "--model", "Qwen3-33B", "--dry-run"], "unknown model 'Qwen3-33B'. Did you mean 'Qwen3-32B'"),
        (["fig3", "--on", "h300", "--dry-run"], "unknown device 'h300'"),
        (["fig3", "--seeds", "a", "--dry-run"], "seeds"),
    ],
)
def test_mistakes_are_one_line(told, arguments, message):
    out, err = told(*arguments)
    assert out == ""
    assert message in err
    assert len(err.strip().splitlines()) == 1
