"""`ephemera run` with a model that two processes share writes what one process writes, also where a run was stopped."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ephemera.config import Run, check_config
from ephemera.many.run import run
from parallel_worker import PROMPTS, ended, launch
from tiny_models import save_tiny


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_two_processes_write_what_one_writes(tmp_path: Path):
    save_tiny(tmp_path / "model")
    rows = [json.dumps({"prompt": prompt, "answer": " a mill"}) + "\n" for prompt in [*PROMPTS, *PROMPTS[:2]]]
    (tmp_path / "rows.jsonl").write_text("".join(rows))
    model = {"name": str(tmp_path / "model"), "device": "cpu", "dtype": "float32"}
    given = {"input": str(tmp_path / "rows.jsonl"), "task": "score", "rate": "0.1", "window": 4, "model": model}
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    run(check_config(Run, {**given, "output": str(one)}))
    run(check_config(Run, {**given, "output": str(two)}))
    two.write_text("".join(two.read_text().splitlines(keepends=True)[:4]))  # stopped after the first window
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps({**given, "output": str(two), "model": {**model, "parallel": "fsdp"}}))
    asked = ["run", "--config", str(config)]
    first, second = ended(launch(asked, asked, script="ephemera"))
    assert (first[0], second[0]) == (0, 0), first[2] + second[2]
    assert first[1].strip() == str(two)
    assert second[1:] == ("", "")
    assert [row["id"] for row in lines(two)] == [row["id"] for row in lines(one)]
    for have, want in zip(lines(two), lines(one), strict=True):
        assert have["nll"] == pytest.approx(want["nll"], abs=2e-5)
        assert have["prompt_nll_before"] == pytest.approx(want["prompt_nll_before"], abs=2e-5)
    assert sorted(path.name for path in tmp_path.glob("two*")) == ["two.jsonl", "two.jsonl.run.json"]
