"""The frontier's searches, shares and prices, on a tiny model."""

import json

import numpy as np
import pytest
import torch
from benchmarks.frontier import answer_nlls, climb, main, vertex
from benchmarks.frontier_points import Point, points

from benchmarks import frontier, frontier_report
from ephemera.early_exit.lens import Lens
from ephemera.llm.load import load_backbone
from ephemera.rates import FixedRate
from ephemera.scoring import Encoded
from reference import merged_model, slow_nll
from tiny_models import random_ids

POINTS = [
    Point(),
    Point("first-1", 1, vocabulary=50),
    Point("first-1", 1, K=2),
    Point("last-1"),
]


def test_every_point_has_a_name_of_its_own():
    assert len({point.key for point in points()}) == len(points())
    assert frontier_report.REFERENCES["uniform"] in points()


def test_a_climb_finds_the_lowest_rate_and_its_neighbours():
    for best in (1.0, 40.0):
        seen = climb(lambda rate, best=best: (np.log2(rate) - np.log2(best)) ** 2, 8.0)
        assert vertex(seen) == pytest.approx(best, rel=1e-6)
    assert vertex({4.0: 1.0, 8.0: 0.5, 16.0: float("inf")}) == 8.0


def test_the_figure_is_drawn(tmp_path):
    """Values as a run leaves them; only that it is a picture of some size."""
    entry = {"nlls": [5.0, 5.5], "time": {"prefills": 2.0}, "rates": [4.0]}
    results = {"none": {"nlls": [6.0, 6.5]}, "points": {point.key: entry for point in points()}}
    frontier_report.write_report(tmp_path, results)
    assert (tmp_path / "frontier.png").stat().st_size > 10_000
    assert (tmp_path / "table.md").read_text().count("| 5.250 | 100% [100%, 100%]") == len(points())


def test_shares_and_their_intervals():
    base, full = np.full(50, 6.0), np.full(50, 4.0)
    assert frontier_report.share(base, np.full(50, 5.0), full) == (0.5, 0.5, 0.5)
    generator = np.random.default_rng(0)
    value, low, high = frontier_report.share(base, 5 + 0.3 * generator.standard_normal(50), full)
    assert low < value < high


def test_answers_after_steps_are_those_of_merged_models(llama_folder):
    backbone = load_backbone(str(llama_folder), dtype="float32", device="cpu")
    rows = [Encoded(str(i), p, a) for i, (p, a) in enumerate(zip(random_ids([9, 4]), random_ids([2, 3]), strict=True))]
    for have, row in zip(answer_nlls(backbone, rows, None, 0), rows, strict=True):
        want = slow_nll(merged_model(backbone, None), row.prompt + row.answer, first=len(row.prompt)).item()
        assert have == pytest.approx(want, abs=1e-4)
    assert answer_nlls(backbone, rows, FixedRate(3.0), 1) != answer_nlls(backbone, rows, None, 0)


@pytest.fixture
def inputs(tmp_path, monkeypatch):
    rows = [{"question": f"who wrote book {i}", "answer": ["Ann", "Bo", "Cy"][i % 3 :]} for i in range(9)]
    (tmp_path / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Lens(hidden_size=32, exit_layers=[1]).save_pretrained(tmp_path / "lens")
    monkeypatch.setattr(frontier, "points", lambda: POINTS)
    monkeypatch.setattr(frontier_report, "points", lambda: POINTS)
    return tmp_path


def test_a_whole_run(inputs, llama_folder):
    folder = inputs / "out"
    common = ["--output", str(folder), "--model", str(llama_folder)]
    quality = [
        "quality",
        *common,
        "--source",
        str(inputs),
        "--lens",
        str(inputs / "lens"),
        "--search",
        "3",
        "--rows",
        "6",
    ]
    main(quality)
    main(["time", *common, "--rounds", "2", "--batch", "2", "--threads", str(torch.get_num_threads())])
    results = json.loads((folder / "results.json").read_text())
    assert set(results["points"]) == {point.key for point in POINTS}
    for entry in results["points"].values():
        assert len(entry["nlls"]) == len(results["none"]["nlls"]) == 6
        assert len(entry["time"]["rounds"]) == 2
    table = (folder / "table.md").read_text()
    assert "| layers first-1, qv, exit 1, words 50, K=1 |" in table
    main(quality)  # nothing is left to do
    assert json.loads((folder / "results.json").read_text()) == results
    with pytest.raises(SystemExit, match="holds points of other settings"):
        main([*quality[:-1], "5"])
