"""The grid, the benchmark and lm-eval's adapter give a network with reach `answer` and a gate what AdaptiveLM gives it."""

import json
from pathlib import Path

import pytest
from lm_eval.api.instance import Instance

from ephemera import AdaptiveLM
from ephemera.config import Benchmark, Evaluate, check_config
from ephemera.evaluation.accuracy.run import benchmark
from ephemera.evaluation.lm_eval import EphemeraLM
from ephemera.evaluation.nll.grid import evaluate
from ephemera.evaluation.shared.records import RECORDS, AnswerRecord, Record, read_records
from ephemera.llm.frozen_lm import describe
from ephemera.llm.load import load_backbone
from ephemera.made_for import MadeFor
from ephemera.rates import PerProjectionRate, load_rate
from tiny_models import length_gate

ROWS = [{"prompt": f"The river {'runs ' * (i % 4)}past {i}", "answer": f"the mill {i % 3}"} for i in range(6)]
PROMPTS, ANSWERS = [row["prompt"] for row in ROWS], [row["answer"] for row in ROWS]


@pytest.fixture(scope="module")
def material(llama_folder, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("reach")
    backbone = load_backbone(str(llama_folder), dtype="float32", device="cpu")
    made_for = MadeFor(("own",), "plain", "answer", 1)
    rate = PerProjectionRate(
        projections=len(backbone.projections), base_rates=[3.0], trained_for=describe(backbone), made_for=made_for
    )
    rate.gate = length_gate(backbone, 0.5, by_length=50.0, tokens=9.5)  # some rows are left alone
    rate.save_pretrained(folder / "network")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return folder


@pytest.fixture(scope="module")
def wanted(material, llama_folder) -> list[float]:
    lm = AdaptiveLM.from_pretrained(
        str(llama_folder), dtype="float32", device="cpu", rate=load_rate(material / "network")
    )
    adaptation = lm.adapt(PROMPTS)
    assert 0 < sum(note is not None for note in adaptation.notes) < len(ROWS)
    return lm.answer_nll(PROMPTS, ANSWERS, adaptation).tolist()


def test_the_grid(material, llama_folder, wanted, tmp_path):
    config = check_config(
        Evaluate,
        {
            "output": str(tmp_path),
            "model": {"name": str(llama_folder), "dtype": "float32", "device": "cpu"},
            "data": {"task": "own", "source": str(material / "rows.jsonl"), "limit": None},
            "methods": ["none", "fixed", "layerwise"],
            "steps": [0, 1],
            "layerwise": str(material / "network"),
            "fixed_rate": 3.0,
            "reach": "answer",
            "generate": [],
        },
    )
    evaluate(config)
    records = {(r.method, r.id): r.nll for r in read_records(tmp_path / RECORDS, Record)}
    ids = sorted({i for _, i in records})
    assert len(ids) == len(ROWS)
    assert sorted(records["layerwise", i] for i in ids) == pytest.approx(sorted(wanted), abs=1e-5)
    lm = AdaptiveLM.from_pretrained(str(llama_folder), dtype="float32", device="cpu", rate=3.0, reach="answer")
    fixed = lm.answer_nll(PROMPTS, ANSWERS, lm.adapt(PROMPTS, steps=1)).tolist()
    assert sorted(records["fixed", i] for i in ids) == pytest.approx(sorted(fixed), abs=1e-5)
    assert sorted(fixed) != pytest.approx(sorted(wanted), abs=1e-3), "the gate leaves some rows alone"


def test_the_benchmark(material, llama_folder, wanted, tmp_path):
    config = check_config(
        Benchmark,
        {
            "output": str(tmp_path),
            "models": [{"name": str(llama_folder), "dtype": "float32", "device": "cpu"}],
            "variants": [{"name": "Adapted", "rate": str(material / "network"), "steps": 1}],
            "data": {"tasks": [{"task": "own", "source": str(material / "rows.jsonl")}], "limit": None},
            "max_new_tokens": 2,
        },
    )
    benchmark(config)
    found = [r.nll for r in read_records(tmp_path / RECORDS, AnswerRecord)]
    assert sorted(found) == pytest.approx(sorted(wanted), abs=1e-5)


def test_lm_eval(material, llama_folder):
    """Requests of one token are the first token's log-probability."""
    lm = EphemeraLM(str(llama_folder), rate=str(material / "network"), batch_size=2)
    plain = EphemeraLM(str(llama_folder), batch_size=2)
    pairs = [(prompt, f" {answer}") for prompt, answer in zip(PROMPTS, ANSWERS, strict=True)]
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    adapted, base = (which.loglikelihood(requests) for which in (lm, plain))
    own = AdaptiveLM.from_pretrained(
        str(llama_folder), dtype="float32", device="cpu", rate=load_rate(material / "network")
    )
    left = [note is not None for note in own.adapt(PROMPTS).notes]
    same = [a[0] == pytest.approx(b[0], abs=1e-5) for a, b in zip(adapted, base, strict=True)]
    assert same == left
