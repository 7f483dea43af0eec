"""The decoding benchmark: every contender decodes the same tokens, and the numbers come out."""

from __future__ import annotations

import json
from pathlib import Path

import benchmarks.decode
import pytest

from given_times import give


def test_adapted_and_attached_decode_alike(
    llama_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    give(monkeypatch, benchmarks.decode, {"adapted": 3.0, "plain": 1.5, "attached": 6.0, "transformers": 4.5})
    arguments = ["--model", str(llama_folder), "--dtypes", "float32", "--batches", "1,2", "--tokens", "6"]
    assert benchmarks.decode.main([*arguments, "--rounds", "2", "--json", "--output", str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    results = json.loads(out.splitlines()[-1])
    assert [cell["batch"] for cell in results["cells"]] == [1, 2]
    for cell in results["cells"]:
        assert cell["same_tokens_as_attached"] == 1.0
        assert cell["adapted_vs_plain"] == 0.5, "1.5 s against 3 s"
        assert cell["plain_vs_transformers"] == 3.0, "4.5 s against 1.5 s"
        assert cell["tokens_per_second"]["adapted"]["median"] == 6 * cell["batch"] / 3.0
        assert set(cell["tokens_per_second"]) == {"adapted", "plain", "attached", "transformers"}
    assert json.loads((tmp_path / "decode.json").read_text()) == results
    assert (tmp_path / "decode.md").read_text().strip() in err
