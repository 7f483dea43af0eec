"""The benchmark of quantised weights: a wrong form is one line, and the table tells what was measured."""

import benchmarks.quantised
import torch


def test_a_form_that_there_is_not(capsys):
    assert benchmarks.quantised.main(["--forms", "none,int3"]) == 2
    assert "give some of none, int8, nf4, torchao-int8" in capsys.readouterr().err


def test_the_table():
    row = {"form": "int8", "weights": 2_000_000, "prompt_nll": 4.714, "cosine": [0.99, 0.5], "seconds": [1.0, 9.0, 2.0]}
    text = benchmarks.quantised.table(
        {"machine": benchmarks.quantised.machine(), "forms": [{**row, "peak": 3_000_000}]}
    )
    assert "| int8 | 2 | 4.71 | 0.50 to 0.99 | 2.00 | 3 |" in text, "the median of the seconds"


def test_bytes():
    assert benchmarks.quantised.bytes_of(torch.zeros(3, 2, dtype=torch.int8)) == 6
