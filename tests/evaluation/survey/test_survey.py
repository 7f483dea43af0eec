"""A survey on a tiny model: every method against AdaptiveLM or by hand, resuming, tables, the page."""

import json
from pathlib import Path

import pytest

from ephemera import AdaptiveLM
from ephemera.config import Survey, check_config
from ephemera.evaluation.shared.records import RECORDS, SurveyRecord, read_json, read_records
from ephemera.evaluation.survey.report import changed
from ephemera.evaluation.survey.run import survey
from ephemera.evaluation.survey.tables import cells_of, verdict
from ephemera.inits import load_generator
from ephemera.llm.frozen_lm import describe
from ephemera.llm.load import load_backbone
from ephemera.made_for import MadeFor, Reach
from ephemera.rates import FixedRate, PerProjectionRate, load_rate
from tiny_models import generator_of, length_gate

ROWS = [{"prompt": f"The river {'runs ' * (i % 4)}past {i}", "answer": f"the mill {i % 3}"} for i in range(7)]


@pytest.fixture(scope="module")
def material(llama_folder, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("survey")
    backbone = load_backbone(str(llama_folder), dtype="float32", device="cpu")
    rate = PerProjectionRate(
        projections=len(backbone.projections),
        base_rates=[3.0],
        trained_for=describe(backbone),
        made_for=MadeFor(("own",), "plain", "answer", 1),
    )
    rate.gate = length_gate(backbone, 0.5, by_length=50.0, tokens=9.5)
    rate.save_pretrained(folder / "network")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return folder


def settings(material: Path, llama_folder: Path, output: Path, **more) -> Survey:
    values = {
        "output": str(output),
        "network": str(material / "network"),
        "model": {"name": str(llama_folder), "dtype": "float32", "device": "cpu"},
        "data": {"task": "own", "source": str(material / "rows.jsonl"), "format": "plain"},
        "methods": ["none", "uniform", "network", "ungated", "swapped"],
        "uniform_rate": 2.0,
        "max_new_tokens": 4,
        "batch_size": 4,
        **more,
    }
    return check_config(Survey, values)


def test_a_survey(material, llama_folder, tmp_path):
    folder = survey(settings(material, llama_folder, tmp_path / "run"))
    records = read_records(folder / RECORDS, SurveyRecord)
    prompts, answers = [r["prompt"] for r in ROWS], [r["answer"] for r in ROWS]
    network = load_rate(material / "network")
    lm = AdaptiveLM.from_pretrained(str(llama_folder), rate="none", dtype="float32", device="cpu")
    by = {m: sorted(r.nll for r in records if r.method == m) for m in ("none", "uniform", "network", "ungated")}
    gated = lm.adapt(prompts, rate=network)
    wanted = {"none": lm.answer_nll(prompts, answers), "network": lm.answer_nll(prompts, answers, gated)}
    uniform = lm.adapt(prompts, rate=FixedRate(2.0, reach="answer"))
    wanted["uniform"] = lm.answer_nll(prompts, answers, uniform)
    network.gate = None
    wanted["ungated"] = lm.answer_nll(prompts, answers, lm.adapt(prompts, rate=network))
    for method, nll in wanted.items():
        assert by[method] == pytest.approx(sorted(nll.tolist()), abs=1e-4), method
    alone = sum((note or "").startswith("abstained") for note in gated.notes)
    assert 0 < alone < len(ROWS)
    assert sum(r.share == 0 for r in records if r.method == "network") == alone
    assert by["network"] != by["ungated"]
    cells = {c.method: c for c in cells_of(records)}
    assert cells["network"].abstained == pytest.approx(alone / len(ROWS))
    assert "own" in (folder / "table.md").read_text()
    assert "<mark>" in (folder / "report.html").read_text() or "abstained" in (folder / "report.html").read_text()
    before = (folder / RECORDS).read_text()
    survey(settings(material, llama_folder, tmp_path / "run"))
    assert (folder / RECORDS).read_text() == before, "a finished survey has nothing to do"
    price = read_json(folder / "run.json")["price"]
    assert f"Over {len(ROWS)} prompts of 1 kinds" in verdict(list(cells.values()), price, "network")


def test_generated_adapters(material, llama_folder, tmp_path):
    """Own and neighbour's, from the kept reading: as AdaptiveLM generates and scores them; reach all is refused."""
    lm = AdaptiveLM.from_pretrained(str(llama_folder), rate="none", dtype="float32", device="cpu")
    reaches: tuple[Reach, ...] = ("answer", "all")
    for reach in reaches:
        generator_of(tmp_path / reach, lm.backbone, reach)
    more = {"methods": ["none", "network", "generated", "generated-swapped"], "generate": ["generated"]}
    folder = survey(settings(material, llama_folder, tmp_path / "run", generator=str(tmp_path / "answer"), **more))
    records = read_records(folder / RECORDS, SurveyRecord)
    by = {m: {r.id: r.nll for r in records if r.method == m} for m in ("none", "generated", "generated-swapped")}
    made = AdaptiveLM.from_pretrained(str(llama_folder), init=tmp_path / "answer", dtype="float32", device="cpu")
    prompts, answers = [r["prompt"] for r in ROWS], [r["answer"] for r in ROWS]
    wanted = made.answer_nll(prompts, answers, made.adapt(prompts))
    assert sorted(by["generated"].values()) == pytest.approx(sorted(wanted.tolist()), abs=1e-4)
    assert all(abs(by["generated"][i] - by["none"][i]) > 1e-3 for i in by["none"])
    assert any(abs(by["generated"][i] - by["generated-swapped"][i]) > 1e-4 for i in by["none"])
    assert all((r.text is not None) == (r.method == "generated") for r in records)
    with pytest.raises(ValueError, match=r"reach all; a survey compares reach answer"):
        survey(settings(material, llama_folder, tmp_path / "x", generator=str(tmp_path / "all"), **more))


def test_a_gated_generator(material, llama_folder, tmp_path):
    """Under its gate as AdaptiveLM applies it, some rows left alone; whole as without the gate's file."""
    lm = AdaptiveLM.from_pretrained(str(llama_folder), rate="none", dtype="float32", device="cpu")
    generator = load_generator(generator_of(tmp_path / "gated", lm.backbone, "answer"))
    generator.gate = length_gate(lm.backbone, 0.5, by_length=50.0, tokens=9.5, state_size=lm.backbone.hidden_size)
    generator.save_pretrained(tmp_path / "gated")
    more = {"methods": ["none", "network", "generated", "generated-ungated"], "generate": ["generated"]}
    gated = str(tmp_path / "gated")
    folder = survey(settings(material, llama_folder, tmp_path / "run", generator=gated, **more))
    records = read_records(folder / RECORDS, SurveyRecord)
    by = {m: {r.id: r for r in records if r.method == m} for m in ("none", "generated", "generated-ungated")}
    made = AdaptiveLM.from_pretrained(str(llama_folder), init=tmp_path / "gated", dtype="float32", device="cpu")
    prompts, answers = [r["prompt"] for r in ROWS], [r["answer"] for r in ROWS]
    adapted = made.adapt(prompts)
    assert adapted.share_B is not None
    assert sorted(r.share for r in by["generated"].values()) == sorted(adapted.share_B.tolist())
    wanted = made.answer_nll(prompts, answers, adapted).tolist()
    assert sorted(r.nll for r in by["generated"].values()) == pytest.approx(sorted(wanted), abs=1e-4)
    alone = [i for i, r in by["generated"].items() if r.share == 0]
    assert 0 < len(alone) < len(ROWS)
    assert all(by["generated"][i].nll == pytest.approx(by["none"][i].nll, abs=1e-5) for i in alone)
    assert all(r.share == 1 and abs(r.nll - by["none"][i].nll) > 1e-3 for i, r in by["generated-ungated"].items())
    assert sum(c.abstained * c.n for c in cells_of(records) if c.method == "generated") == pytest.approx(len(alone))
    shown = {"methods": ["none", "generated"], "generate": ["none", "generated"], "shown": "generated"}
    folder = survey(settings(material, llama_folder, tmp_path / "shown", generator=gated, **shown))
    again = {r.id: r for r in read_records(folder / RECORDS, SurveyRecord) if r.method == "generated"}
    assert {i: (r.share, r.text) for i, r in again.items()} == {
        i: (r.share, r.text) for i, r in by["generated"].items()
    }
    assert all(again[i].nll == pytest.approx(r.nll, abs=1e-5) for i, r in by["generated"].items())
    page = (folder / "report.html").read_text()
    first = [r for r in read_records(folder / RECORDS, SurveyRecord) if r.method == "generated"][
        :6
    ]  # that the page shows
    assert page.count("abstained: the base model") == sum(r.share == 0 for r in first) > 0
    assert "first token with generated" in (folder / "table.md").read_text()


def test_what_changed():
    assert changed("the mill runs", "the old mill") == [("the", False), ("old", True), ("mill", False)]


def test_wrong_settings(material, llama_folder, tmp_path):
    for wrong, words in (
        ({"methods": ["network"]}, r"methods needs none, the base model, and network"),
        ({"methods": ["none", "uniform"]}, r"methods needs none, the base model, and network"),
        ({"methods": ["none", "lora"]}, r"give the adapter's folder \(lora=FOLDER\)"),
        ({"methods": ["none", "constants"]}, r"constants=FOLDER"),
        ({"methods": ["none", "network", "generated"]}, r"give a generator \(generator=FOLDER\)"),
    ):
        with pytest.raises(ValueError, match=words):
            settings(material, llama_folder, tmp_path, **wrong)
    with pytest.raises(ValueError, match=r"a survey is of one trained network with reach answer"):
        survey(settings(material, llama_folder, tmp_path / "x", network="0.05"))
