"""An evaluation on two processes gives the records of one: rows are dealt out, or the model is and all see every row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ephemera.config import Evaluate, check_config
from ephemera.evaluation.nll.grid import evaluate
from ephemera.evaluation.shared.records import RECORDS, Record, RecordFile, read_records
from parallel_worker import ended, launch
from tiny_models import SENTENCES, save_tiny


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("material")
    save_tiny(folder / "model")
    words = " ".join(SENTENCES).split()
    rows = [{"prompt": " ".join(words[i : i + 2 + i % 4]), "answer": words[-i - 1]} for i in range(9)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"task": "own", "source": str(folder / "rows.jsonl"), "limit": None}
    model = {"name": str(folder / "model"), "device": "cpu", "dtype": "float32"}
    grid = {"methods": ["none", "fixed"], "steps": [0, 1], "generate": [1], "generate_methods": ["fixed"]}
    return {"model": model, "data": data, "batch_size": 2, **grid}


def found(folder: Path) -> dict[Any, dict[str, Any]]:
    records = read_records(folder / RECORDS, Record)
    assert len({record.key for record in records}) == len(records)
    return {record.key: record.model_dump(exclude={"seconds"}) for record in records}


@pytest.mark.parametrize("parallel", ["none", "tensor"])
def test_two_processes_find_what_one_finds(parallel: str, settings: dict[str, Any], tmp_path: Path):
    want = found(evaluate(check_config(Evaluate, {**settings, "output": str(tmp_path / "one")})))
    model = {**settings["model"], "parallel": parallel}
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps({**settings, "model": model, "output": str(tmp_path / "two")}))
    asked = ["evaluate", "--config", str(config)]
    first, second = ended(launch(asked, asked, script="ephemera"))
    assert (first[0], second[0]) == (0, 0), first[2] + second[2]
    assert "| fixed" in first[1]
    assert second[1:] == ("", "")
    have = found(tmp_path / "two")
    assert have.keys() == want.keys()
    for key, record in want.items():
        assert have[key]["text"] == record["text"]
        assert have[key]["nll"] == pytest.approx(record["nll"], abs=1e-5)
        assert have[key]["prompt_nll"] == pytest.approx(record["prompt_nll"], abs=1e-5)
    assert not list((tmp_path / "two").glob("*.part"))


def test_what_a_stopped_process_found_is_kept(tmp_path: Path):
    """The next run, on however many processes, begins with it."""
    record = Record(method="none", K=0, id="a", nll=1.0, tokens=1, prompt_nll=[], seconds=0.0)
    other = record.model_copy(update={"id": "b"})
    RecordFile(tmp_path, Record).add([record])
    (tmp_path / f"{RECORDS}.1.part").write_text(other.model_dump_json() + "\n" + '{"method": "no')
    again = RecordFile(tmp_path, Record)
    assert [r.id for r in again.records] == ["a", "b"]
    assert [r.id for r in read_records(tmp_path / RECORDS, Record)] == ["a", "b"]
    assert not list(tmp_path.glob("*.part"))
