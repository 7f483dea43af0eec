"""The training benchmark: its passes are those of the loop's own plan, and the numbers come out."""

from __future__ import annotations

import json
from pathlib import Path

import benchmarks.fit
import benchmarks.training
import pytest

from ephemera.fast.fast_lm import FastLM
from ephemera.llm.load import load_backbone
from given_times import give


def test_training_and_its_passes_run_on_the_same_rows(
    llama_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    arguments = [
        "--model",
        str(llama_folder),
        "--batch",
        "3",
        "--steps",
        "3",
        "--rounds",
        "2",
        "--dtypes",
        "float32",
        "--hidden",
        "32",
    ]
    give(monkeypatch, benchmarks.training, {"training": 5.0, "passes": 4.0})
    assert benchmarks.training.main([*arguments, "--json", "--output", str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    results = json.loads(out.splitlines()[-1])
    assert [cell["network"] for cell in results["cells"]] == ["scalenet", "generator", "joint"]
    for cell in results["cells"]:
        assert cell["ratio"] == 1.25, "5 s against 4 s"
        assert 0 <= cell["waiting"] < 1
    assert 0 not in results["cells"][0]["K"]  # those steps are skipped
    assert json.loads((tmp_path / "training.json").read_text()) == results
    assert (tmp_path / "training.md").read_text().strip() in err


@pytest.mark.parametrize("network", ["scalenet", "generator", "joint"])
def test_passes_take_as_many_forwards_as_the_loop(llama_folder: Path, network: str, monkeypatch: pytest.MonkeyPatch):
    backbone = load_backbone(str(llama_folder), dtype="float32", device="cpu")
    seen: list[tuple[int, ...]] = []
    original = FastLM.forward

    def forward(self, batch, *args, **kwargs):
        seen.append(tuple(batch.ids_BT.shape))
        return original(self, batch, *args, **kwargs)

    monkeypatch.setattr(FastLM, "forward", forward)
    training = benchmarks.training.Training(backbone, network, "short", batch=3, steps=4, hidden_size=32)
    training.train()
    by_loop = list(seen)
    seen.clear()
    training.passes()
    assert seen == by_loop


def test_many_prompts_are_cut_and_adapted(llama_folder: Path, capsys: pytest.CaptureFixture[str]):
    assert benchmarks.fit.main(["--model", str(llama_folder), "--prompts", "3", "--tokens", "40"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (found["prompts"], found["tokens"], found["fallbacks"]) == (3, [40], 0)
    assert found["peak_gb"] >= found["peak_of_loading_gb"] > 0
