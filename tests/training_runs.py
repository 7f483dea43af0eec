"""Whole trainings on a tiny model and local rows, in a process that may be killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ephemera.config import Settings
from tiny_models import SENTENCES, save_tiny

SCRIPT = """
import sys, time
from ephemera.config import {kind}, load_config
from ephemera.training import loop
from {module} import {train}

original = loop.write_checkpoint
def slow_checkpoint(folder, step, *rest):  # time enough to be killed mid-way
    original(folder, step, *rest)
    print("saved", step, flush=True)
    time.sleep(0.5)
if sys.argv[3] == "slow":
    loop.write_checkpoint = slow_checkpoint
{train}(load_config({kind}, sys.argv[1]), resume=sys.argv[2] == "resume")
"""
Train = Callable[..., Path]


def write_material(folder: Path, *, train: int = 16, validation: int = 6) -> Path:
    """A model folder and JSONL rows of {"prompt", "answer"}."""
    save_tiny(folder / "model")
    words = " ".join(SENTENCES).split()
    count = train + validation
    rows = [{"prompt": " ".join(words[i : i + 3 + i % 5]), "answer": words[-i - 1]} for i in range(count)]
    for split, chosen in (("train", rows[:train]), ("validation", rows[train:])):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chosen))
    return folder


def common(material: Path, output: Path, task: str) -> list[str]:
    """Settings that all such runs share: 12 optimiser steps, a checkpoint every second one."""
    return [
        *[f"{split}.{key}" for split in ("train", "validation") for key in (f"source={material}", task)],
        f"output={output}",
        f"model.name={material / 'model'}",
        "model.device=cpu",
        "optimizer.samples=48",
        "optimizer.batch_size=4",
        "optimizer.warmup=2",
        "optimizer.learning_rate=0.01",
        "checkpoint_every=2",
        "validate_every=5",
    ]


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def launch(train: Train, settings: Settings, config: Path, *, resume: bool, slow: bool) -> subprocess.Popen[str]:
    """A process that trains; `slow`: it waits after each checkpoint, and says which."""
    config.write_text(settings.model_dump_json())  # JSON is YAML
    script = SCRIPT.format(kind=type(settings).__name__, module=train.__module__, train=train.__name__)
    command = [sys.executable, "-c", script, str(config), "resume" if resume else "new", "slow" if slow else "fast"]
    return subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, text=True)


def kill_and_resume(train: Train, settings: Settings, folder: Path, config: Path) -> None:
    """A run that is killed between its sixth step's checkpoint and its eighth's, while it writes a line; then goes on."""
    process = launch(train, settings, config, resume=False, slow=True)
    assert process.stdout is not None
    for line in process.stdout:
        if line.split() == ["saved", "6"]:
            break
    deadline = time.monotonic() + 60
    while max((m["step"] for m in metrics(folder)), default=0) < 7 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.stdout.close()
    assert process.wait() == -signal.SIGKILL
    assert not (folder / "network").exists()
    assert max(m["step"] for m in metrics(folder)) > 6
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "nll": 1.')  # as a kill in the midst of a write leaves it
    resumed = launch(train, settings, config, resume=True, slow=False)
    resumed.communicate()
    assert resumed.returncode == 0
