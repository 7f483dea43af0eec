"""The generator's benchmark and the table of starts and steps."""

import json

import pytest

from benchmarks import both, generator
from ephemera.evaluation.shared.records import RECORDS, RUN, Record, RecordFile


def test_parameters_by_hand():
    """proj, embeddings, two layers, norm, and a head for each module and matrix."""
    rows = {(r["model"], r["modules"]): r for r in generator.sizes()}
    D, H, r, layers = 576, 1024, 2, 30
    fixed = D * H + H + (layers + 2 + 2) * H + 2 * (H * H + H) + 2 * H
    outs = [r * 576, r * 576, r * 576, r * 192]  # q: A, B; v: A, B
    count = fixed + sum((H + 1) * out for out in outs)
    assert rows["SmolLM2-135M", "q/v"]["parameters"] == count
    assert rows["SmolLM2-135M", "q/v"]["megabytes"] == pytest.approx(2 * count / 1e6)
    assert len(rows) == 15
    text = generator.sizes_table(list(rows.values()))
    assert text.count("| Llama-3.2-3B |") == 3


def test_ratios_are_of_the_same_turn():
    calls = []
    found = generator._ratio(lambda: calls.append("mine"), lambda: calls.append("other"), 3)
    assert calls == ["mine", "other"] * 4  # one turn to warm up
    assert len(found["ratios"]) == 3
    first, second = found["seconds"]["all"], found["reference_seconds"]["all"]
    assert found["ratios"] == pytest.approx([a / b for a, b in zip(first, second, strict=True)])


def test_the_joined_table(tmp_path, capsys):
    values = {"zero": {"none": 3.0, "layerwise": 2.0}, "taskweaver": {"none": 2.5, "layerwise": 1.5}}
    for start, methods in values.items():
        folder = tmp_path / f"evaluate-{start}-snli"
        folder.mkdir()
        run = {"rows": 2, "uniform_rates": None, "commit": "abc", "config": {"seed": 0}, "model": {"fingerprint": "f"}}
        (folder / RUN).write_text(json.dumps(run))
        RecordFile(folder, Record).add(
            [
                Record(method=m, K=int(m != "none"), id=str(i), nll=x + i, tokens=1, prompt_nll=[], seconds=0.1)
                for m, x in methods.items()
                for i in range(2)
            ]
        )
        assert (folder / RECORDS).exists()
    both.main([str(tmp_path), "--output", str(tmp_path)])
    text = (tmp_path / "table.md").read_text()
    assert "| zero | 3.500 [3.00, 4.00] | – |" in text
    assert "| generated + layer-wise | −1.000 [−1.000, −1.000] | −0.500 [−0.500, −0.500] |" in text
    cells = json.loads((tmp_path / "results.json").read_text())["cells"]
    assert {(c["start"], c["method"]): c["mean"] for c in cells}["taskweaver", "layerwise"] == 2.0
    assert capsys.readouterr().out.startswith("# Starts")
    with pytest.raises(SystemExit, match="holds no evaluate-START-TASK folders"):
        both.main([str(tmp_path / "nowhere"), "--output", str(tmp_path)])
