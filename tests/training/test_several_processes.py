"""Training on two processes gives what one gives; what the first resumes goes to the other, which needs no shared folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from ephemera.config import TrainScaleNet, load_config
from ephemera.training.scalenet import train_scalenet
from parallel_worker import ended, launch
from reference import close
from training_runs import common, metrics, write_material

CASES = {
    "steps": ["scalenet.max_steps=2", "validation_steps=[1, 2]", "scalenet.base_rates=[0.1, 0.01]"],
    "one step": [
        "scalenet.max_steps=1",
        "scalenet.reach=answer",
        "optimizer.passes=2",
    ],  # and a search of its base rate
}


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_material(tmp_path_factory.mktemp("material"))


def settings(material: Path, output: str, case: str) -> list[str]:
    """A batch of five, which two processes cannot halve; the last step's one row leaves the second process without any."""
    given = [*common(material, Path(output), "task=own"), *CASES[case], "scalenet.mlp_size=8"]
    return [*given, "optimizer.samples=21", "optimizer.batch_size=5", "checkpoint_every=2", "model.dtype=float32"]


def command(given: list[str], *more: str) -> list[str]:
    return ["train", "scalenet", *more, *[part for value in given for part in ("--set", value)]]


def alone(material: Path, folder: Path, case: str) -> Path:
    return train_scalenet(load_config(TrainScaleNet, None, settings(material, str(folder), case)))


def figures(folder: Path) -> list[dict[str, Any]]:
    return [{key: v for key, v in line.items() if key != "seconds"} for line in metrics(folder)]


def check_same(have: Path, want: Path) -> None:
    mine, theirs = load_file(have / "network" / "rate.safetensors"), load_file(want / "network" / "rate.safetensors")
    assert mine.keys() == theirs.keys()
    for key in mine:
        close(mine[key], theirs[key], 1e-6)
    assert len(figures(have)) == len(figures(want))
    for line, other in zip(figures(have), figures(want), strict=True):
        assert line == pytest.approx(other, abs=2e-5, nan_ok=True)


@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_what_one_trains(case: str, material: Path, tmp_path: Path):
    want = alone(material, tmp_path / "one", case).parent
    asked = command(settings(material, "run", case))
    homes = [tmp_path / "first", tmp_path / "second"]
    for home in homes:
        home.mkdir()
    first, second = ended(launch(asked, asked, script="ephemera", folders=homes))
    assert (first[0], second[0]) == (0, 0), first[2] + second[2]
    check_same(homes[0] / "run", want)
    assert not (homes[1] / "run" / "network").exists()


def test_a_resumed_run_needs_no_shared_folder(material: Path, tmp_path: Path):
    """And goes on with another number of processes than it began with."""
    homes = [tmp_path / "first", tmp_path / "second"]
    for home in homes:
        home.mkdir()
    want = alone(material, tmp_path / "one", "one step").parent
    shutil.copytree(want, homes[0] / "run")
    shutil.rmtree(homes[0] / "run" / "network")
    last = max((homes[0] / "run" / "checkpoints").iterdir())
    last.unlink()
    asked = command(settings(material, "run", "one step"), "--resume")
    kept = json.loads((want / "config.json").read_text())
    first, second = ended(launch(asked, asked, script="ephemera", folders=homes))
    assert (first[0], second[0]) == (0, 0), first[2] + second[2]
    check_same(homes[0] / "run", want)
    assert json.loads((homes[0] / "run" / "config.json").read_text())["scalenet"] == kept["scalenet"]


def test_processes_that_differ_are_refused(material: Path, tmp_path: Path):
    asked = command(settings(material, str(tmp_path / "run"), "steps"))
    first, second = ended(launch(asked, [*asked, "--set", "optimizer.seed=1"], script="ephemera"))
    for code, _, errors in (first, second):
        assert code == 2
        assert "the processes were given different settings or models" in errors.splitlines()[-1]
        assert "Traceback" not in errors


def test_training_holds_whole_models(material: Path, tmp_path: Path):
    given = [*settings(material, str(tmp_path / "run"), "steps"), "model.parallel=tensor"]
    with pytest.raises(ValueError, match="a training process holds the whole model"):
        train_scalenet(load_config(TrainScaleNet, None, given))
