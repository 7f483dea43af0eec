"""The benchmark of prepared training: the speed-up is the ratio of the times, and prepared prompts are read once."""

from __future__ import annotations

import json
from pathlib import Path

import benchmarks.prepared
import pytest

from ephemera.fast.fast_lm import FastLM
from ephemera.llm.load import load_backbone


def test_the_speed_up_is_the_ratio_of_the_times(llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    given = {"prepared": 2.0, "reading": 1.5, "plain": 3.0}
    monkeypatch.setattr(benchmarks.prepared, "timed", lambda call: given[call.__name__])
    arguments = [
        "--model",
        str(llama_folder),
        "--batch",
        "3",
        "--passes",
        "8",
        "--rounds",
        "2",
        "--output",
        str(tmp_path),
    ]
    assert benchmarks.prepared.main(arguments) == 0
    results = json.loads((tmp_path / "prepared.json").read_text())
    assert [cell["length"] for cell in results["cells"]] == ["nq-open", "squad"]
    assert all(cell["speedup_rounds"] == [12.0, 12.0] for cell in results["cells"]), "8 plain passes of 3 s against 2 s"
    assert "12.00 [12.00, 12.00] | 16.0 |" in (tmp_path / "prepared.md").read_text(), "and 16 if passes were free"
    short, long = (cell["tokens"] for cell in results["cells"])
    assert max(short) < min(long) <= benchmarks.prepared.SQUAD
    assert benchmarks.prepared.main(["--lengths", "xsum", "--model", str(llama_folder)]) == 2


def test_prepared_prompts_are_read_once(llama_folder: Path, monkeypatch: pytest.MonkeyPatch):
    backbone = load_backbone(str(llama_folder), dtype="float32", device="cpu")
    rows = benchmarks.prepared.rows_of(backbone, "squad", 3)
    longest, seen = max(len(row.prompt) for row in rows), []
    original = FastLM.forward

    def forward(self, batch, *args, **kwargs):
        seen.append(batch.ids_BT.shape[1])
        return original(self, batch, *args, **kwargs)

    monkeypatch.setattr(FastLM, "forward", forward)
    them = benchmarks.prepared.Contenders(backbone, rows, passes=4)
    them.prepared()
    assert seen.count(longest) == len(them.groups), "a prompt is read once, for four passes"
    seen.clear()
    them.plain()
    assert sum(width >= longest for width in seen) == 2 * len(them.groups), "prompts, then prompts and answers"
