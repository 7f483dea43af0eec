"""The figure of costs: what it measures, and that it is drawn."""

from __future__ import annotations

import json
from pathlib import Path

import benchmarks.figure
import pytest
from benchmarks.figure import measure, points

from given_times import give
from tiny_models import tiny_backbone


def test_points_cover_all_four_axes():
    backbone = tiny_backbone("llama")
    found = list(points(backbone))
    assert {p.axis for p in found} == {"steps", "batch", "length", "first", "last"}
    assert [p.steps for p in found if p.axis == "steps"] == [1, 2, 3, 5]
    layers = {(p.axis, p.x): {q.layer for q in p.projections} for p in found if p.axis in ("first", "last")}
    assert layers == {("first", 0.5): {0}, ("last", 0.5): {1}, ("first", 1.0): {0, 1}, ("last", 1.0): {0, 1}}
    assert all(p.projections == backbone.projections for p in found if p.axis in ("steps", "batch", "length"))


def test_the_model_keeps_its_projections(monkeypatch: pytest.MonkeyPatch):
    give(monkeypatch, benchmarks.figure, {"adapt": 5.0, "prefill": 2.0})
    backbone = tiny_backbone("llama")
    every = backbone.projections
    point = next(p for p in points(backbone) if p.axis == "last")
    assert measure(backbone, point, 2)["cost"] == 2.5, "5 s against 2 s"
    assert backbone.projections is every


def test_it_is_drawn(llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("STEPS", "BATCHES", "LENGTHS", "SHARES"):
        monkeypatch.setattr(benchmarks.figure, name, getattr(benchmarks.figure, name)[:2])
    arguments = ["--model", str(llama_folder), "--dtypes", "float32", "--rounds", "2", "--output", str(tmp_path)]
    assert benchmarks.figure.main(arguments) == 0
    assert (tmp_path / "cost.png").stat().st_size > 10_000
    cells = json.loads((tmp_path / "cost.json").read_text())["cells"]
    assert len(cells) == 10
    assert (tmp_path / "cost.md").read_text().count("float32") == 10
