"""A command accepts no setting that it never reads: each is watched through small runs of the command."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from ephemera.config import (
    METHODS,
    Analyse,
    Benchmark,
    Evaluate,
    Run,
    Settings,
    Survey,
    TrainGate,
    TrainGenerator,
    TrainLens,
    TrainScaleNet,
    TrainTaskLora,
    check_config,
)
from ephemera.config.base import ModelSettings
from ephemera.evaluation.accuracy.run import benchmark
from ephemera.evaluation.adapters.analysis import analyse
from ephemera.evaluation.nll.grid import evaluate
from ephemera.evaluation.survey.run import survey
from ephemera.inits import LoraGenerator
from ephemera.llm.frozen_lm import describe
from ephemera.llm.load import load_backbone
from ephemera.llm.quantization import Quantization
from ephemera.llm.share import Parallel
from ephemera.made_for import MadeFor
from ephemera.many.run import run
from ephemera.rates import PerProjectionRate
from ephemera.training.gate import train_gate
from ephemera.training.generator import train_generator
from ephemera.training.lens import train_lens
from ephemera.training.scalenet import train_scalenet
from ephemera.training.task_lora import train_task_lora

ROWS = [{"prompt": f"The river {'runs ' * (i % 4)}past {i}", "answer": f"the mill {i % 3}"} for i in range(24)]
# The tables read the first in run.json, Ray's engine the others
OF_FILES = {Benchmark: {"against"}, Run: {"ray.workers", "ray.cpus", "ray.gpus"}}


def parts(settings: Settings, path: str = "") -> Iterator[tuple[Settings, str]]:
    """Settings and their parts, each with its path; parts of a list have the list's."""
    yield settings, path
    for name, value in dict(settings).items():
        for part in value if isinstance(value, list) else [value]:
            if isinstance(part, Settings):
                yield from parts(part, f"{path}{name}.")


def watched(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> tuple[set[str], set[str]]:
    """The paths of all settings that hold no others, and of those that are read from now on, in copies too."""
    leaves: set[str] = set()
    for part, path in parts(settings):
        object.__setattr__(part, "__pydantic_private__", {"path": path})  # goes with a copy
        holders = {p.removeprefix(path).partition(".")[0] for _, p in parts(part, path)}
        leaves |= {path + name for name in type(part).model_fields if name not in holders}
    read: set[str] = set()

    def noted(self: Settings, name: str) -> Any:
        if name in type(self).model_fields:
            with suppress(AttributeError, TypeError):  # made since, by the command itself
                read.add(object.__getattribute__(self, "__pydantic_private__")["path"] + name)
        return object.__getattribute__(self, name)

    monkeypatch.setattr(Settings, "__getattribute__", noted)
    return leaves, read


@pytest.fixture(scope="module")
def material(llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("settings")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    questions = [{"question": row["prompt"], "answer": row["answer"]} for row in ROWS]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    backbone = load_backbone(str(llama_folder), dtype="float32", device="cpu")
    of_all = {"projections": len(backbone.projections), "trained_for": describe(backbone)}
    made_for = MadeFor(("own",), "plain", "answer", 1)
    PerProjectionRate(base_rates=[0.1], made_for=made_for, **of_all).save_pretrained(folder / "network")
    generator = LoraGenerator(
        projections=backbone.projections,
        state_size=backbone.hidden_size,
        hidden_size=8,
        trained_for=describe(backbone),
    )
    for parameter in generator.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    generator.save_pretrained(folder / "generator")
    return folder


def runs(
    llama_folder: Path, material: Path, output: Path
) -> dict[type[Settings], tuple[Callable[..., Any], list[Any]]]:
    """Each command's function, and the settings of one run or two that go through all of it."""
    model = {"name": str(llama_folder), "dtype": "float32", "device": "cpu"}
    data = {"task": "own", "source": str(material / "rows.jsonl"), "limit": None}
    few = {**data, "limit": 4}
    tasks = {"tasks": [{"task": "own"}], "source": str(material / "rows.jsonl"), "limit": 4}
    optimizer = {"samples": 4, "batch_size": 2, "warmup": 1}
    training = {"output": str(output), "model": model, "optimizer": optimizer}
    network, generator = str(material / "network"), str(material / "generator")
    methods = [method for method in METHODS if method != "template"]  # rows of one's own have none
    rates = {"base_rates": [0.1], "max_steps": 1}
    of_rows = {"input": data["source"], "max_new_tokens": 1}
    joint = {**rates, "mlp_size": 4}
    mixed = {**training, "train": tasks, "validation": tasks}
    one_task = {**training, "train": few, "validation": few}
    return {
        TrainScaleNet: (
            train_scalenet,
            [
                {**one_task, "scalenet": joint, "validation_steps": [1]},
                {**one_task, "scalenet": {**joint, "reach": "answer"}, "validation_steps": [1]},
            ],
        ),
        TrainLens: (train_lens, [{**one_task, "exit_layers": [1]}]),
        TrainGenerator: (
            train_generator,
            [{**mixed, "optimizer": {**optimizer, "samples": 12}, "generator": {"hidden_size": 8}, "scalenet": joint}],
        ),
        TrainTaskLora: (train_task_lora, [mixed]),
        TrainGate: (
            train_gate,
            [
                {
                    "output": str(output),
                    "model": model,
                    "network": network,
                    "data": data,
                    "unseen": few,
                    "batch_size": 24,
                }
            ],
        ),
        Evaluate: (
            evaluate,
            [
                {
                    **{"output": str(output), "model": model, "data": few, "validation": few},
                    **{"stepwise": network, "layerwise": network, "averaged": network, "uniform_grid": [0.1]},
                    "constants": network,
                    **{"steps": [0, 1], "methods": methods, "cross_gradient": True},
                    "other": {**few, "task": "nq-open", "source": str(material / "questions.jsonl")},
                }
            ],
        ),
        Benchmark: (
            benchmark,
            [
                {
                    **{"output": str(output), "models": [model], "data": tasks, "max_new_tokens": 1},
                    "variants": [{"name": "stepped", "init": generator, "rate": "0.1", "steps": 1, "tasks": ["own"]}],
                }
            ],
        ),
        Analyse: (analyse, [{"output": str(output), "model": model, "generator": generator, "data": tasks}]),
        Survey: (
            survey,
            [
                {
                    **{"output": str(output), "model": model, "network": network, "data": few, "max_new_tokens": 1},
                    **{"constants": network, "methods": ["none", "uniform", "constants", "network"]},
                }
            ],
        ),
        Run: (
            run,
            [
                {**of_rows, "output": f"{output}-{task}", "task": task, "model": model, "rate": 0.1}
                for task in ("answer", "score", "adapt")
            ],
        ),
    }


COMMANDS = (
    TrainScaleNet,
    TrainLens,
    TrainGenerator,
    TrainTaskLora,
    TrainGate,
    Evaluate,
    Benchmark,
    Analyse,
    Survey,
    Run,
)


@pytest.mark.parametrize("kind", COMMANDS)
def test_every_setting_of_a_command_is_read(kind, llama_folder, material, tmp_path, monkeypatch):
    command, given = runs(llama_folder, material, tmp_path / "run")[kind]
    leaves, read = set(), set()
    for values in given:
        config = check_config(kind, values)
        with monkeypatch.context() as patch:
            mine, seen = watched(config, patch)
            command(config)
        leaves |= mine
        read |= seen
    assert leaves - read == OF_FILES.get(kind, set())


def test_a_setting_that_nothing_reads_would_be_found(monkeypatch):
    config = check_config(TrainLens, {})
    leaves, read = watched(config, monkeypatch)
    copy = config.model_copy(deep=True)
    assert copy.train.task == "nq-open"
    assert copy.optimizer.seed == 0
    assert read == {"train", "train.task", "optimizer", "optimizer.seed"}
    assert {"train.split", "validation.task", "optimizer.samples", "output"} <= leaves - read
    assert not {"train", "optimizer"} & leaves


def test_closed_sets_are_those_of_the_modules_that_read_them():
    """They are written twice, as settings load without torch."""
    fields = ModelSettings.model_fields
    assert fields["quantization"].annotation == Quantization
    assert fields["parallel"].annotation == Parallel
