"""Rows that are equal count once, and a run says so."""

import json

import pytest

from ephemera.config import Evaluate
from ephemera.evaluation.nll.grid import evaluate
from ephemera.evaluation.nll.report import write_report
from ephemera.evaluation.nll.tables import signed_interval, with_interval
from ephemera.evaluation.shared.records import RECORDS, RUN, Record, read_json, read_records
from ephemera.evaluation.shared.statistics import bootstrap_mean
from ephemera.tasks import load_dataset

CAT, DOG = ({"prompt": f"the {animal} sat", "answer": "on the mat"} for animal in ("cat", "dog"))


@pytest.fixture
def write(tmp_path):
    def written(*rows):
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(tmp_path / "rows.jsonl")

    return written


def settings(llama_folder, source, output) -> Evaluate:
    return Evaluate.model_validate(
        {
            "output": str(output),
            "model": {"name": str(llama_folder), "dtype": "float32", "device": "cpu"},
            "data": {"task": "own", "source": source},
            "methods": ["none"],
            "steps": [0],
            "generate": [],
        }
    )


def test_equal_rows_count_once_in_the_order_of_the_file(write):
    data = load_dataset("own", source=write(CAT, DOG, CAT, CAT)).once()
    assert [(e.prompt, e.place.rpartition(":")[2]) for e in data.examples] == [
        ("the cat sat", "1"),
        ("the dog sat", "2"),
    ]
    assert data.repeated == 2


def test_an_evaluation_says_how_many_rows_were_equal(write, llama_folder, tmp_path):
    folder = evaluate(settings(llama_folder, write(CAT, DOG, CAT, CAT), tmp_path / "run"))
    assert len(read_records(folder / RECORDS, Record)) == 2
    assert read_json(folder / RUN)["left_out_as_equal"] == 2
    page = write_report(folder).read_text()
    for text in (page, (folder / "table.md").read_text()):
        assert "2 of 2 (" in text
        assert "2 equal to another row and counted once" in text


def test_rows_that_are_all_equal_are_refused(write, llama_folder, tmp_path):
    with pytest.raises(ValueError, match=r"at least 2 different rows; .* gave 1 \(and 1 equal to another\)"):
        evaluate(settings(llama_folder, write(CAT, CAT), tmp_path / "run"))


def test_one_prompt_has_no_interval():
    one, two = bootstrap_mean([-0.25]), bootstrap_mean([-0.25, 0.75])
    assert with_interval(one) == "-0.250 (one prompt: no interval)"
    assert signed_interval(one) == "\N{MINUS SIGN}0.250 (one prompt: no interval)"
    assert with_interval(two) == "0.250 [-0.25, 0.75]"
