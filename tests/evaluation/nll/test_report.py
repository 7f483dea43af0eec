"""Tables, figures and the page of a run, from records made up."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from ephemera.config import Evaluate
from ephemera.evaluation.nll.report import samples, write_report
from ephemera.evaluation.nll.tables import details_table, method_names, nll_table, scientific
from ephemera.evaluation.shared.records import RECORDS, RUN, Record, RecordFile, write_json
from ephemera.evaluation.shared.statistics import summarize


def record(method: str, K: int, id: str, nll: float, **more) -> Record:
    return Record(
        **{"method": method, "K": K, "id": id, "nll": nll, "tokens": 1, "prompt_nll": [], "seconds": 1.0, **more}
    )


def synthetic(folder: Path, *, text: str = "an <i>answer</i> & http://example.org/") -> Path:
    """A run folder as `evaluate` leaves it, with every method, K up to 2 and one diverged cell."""
    folder.mkdir()
    config = Evaluate(output=str(folder), uniform_rates={1: 6.0, 2: 0.8}, steps=[0, 1, 2])
    write_json(
        folder / RUN,
        {
            "config": config.model_dump(mode="json"),
            "source": "rows & more.jsonl",
            "rows": 9,
            "dropped_without_answer": 1,
            "left_out_as_too_long": 0,
            "uniform_rates": {"1": 6.0, "2": 0.8},
            "uniform_search": None,
            "model": {"name": "tiny", "fingerprint": "00ff", "dtype": "torch.float32"},
            "projections": [[layer, kind] for layer in range(3) for kind in "qv"],
            "versions": {"ephemera": "0"},
            "commit": "abc1234",
            "command": "ephemera evaluate",
        },
    )
    random = np.random.default_rng(0)
    records = []
    for i in map(str, range(9)):
        base = random.uniform(2, 4)
        words = {"prompt": "p" + text, "answer": "a" + text, "text": text, "rouge_lsum": 0.5}
        records.append(record("none", 0, i, base, **words))
        for method in config.methods[1:]:
            for K in (1, 2):
                more = {}
                if method == "layerwise":
                    more = {**words, "rates": random.lognormal(0, 2, (K, 6)).tolist()}
                nll = float("inf") if (method, K, i) == ("uniform", 2, "0") else base * random.uniform(0.6, 1.1)
                records.append(record(method, K, i, nll, **more))
    RecordFile(folder, Record).add(records)
    return folder


class Tags(HTMLParser):
    """Every element with its attributes; void elements aside, all must close in order."""

    def __init__(self):
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_a_report_holds_everything_and_asks_for_nothing(tmp_path):
    folder = synthetic(tmp_path / "run")
    page = write_report(folder)
    assert page == folder / "report.html"
    kept = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    figures = {f"figures/fig{i}.png" for i in (3, 4, 5)}
    assert kept == {RUN, RECORDS, "results.json", "table.csv", "table.md", "report.html"} | figures
    assert all((folder / name).read_bytes().startswith(b"\x89PNG") for name in figures)
    html = page.read_text()
    tags = Tags()
    tags.feed(html)
    assert tags.open == []
    sources = [value for _, attrs in tags.found for key, value in attrs.items() if key in ("src", "href", "srcset")]
    assert len(sources) == 3
    assert all(value and value.startswith("data:image/png;base64,") for value in sources)
    assert not {"script", "link", "iframe", "i"} & {tag for tag, _ in tags.found}  # <i> came in by a text
    without_texts = html.replace("http://example.org/", "")
    assert not re.search(r"https?:", without_texts)
    assert "url(" not in html
    assert "@import" not in html
    assert html.count("an &lt;i&gt;answer&lt;/i&gt; &amp; ") == 12  # 3 samples: prompt, reference, base, adapted
    assert "swapped (control)" in html
    assert "rows &amp; more.jsonl" in html


def test_the_tables_state_numbers_and_conditions(tmp_path):
    folder = synthetic(tmp_path / "run")
    write_report(folder)
    markdown = (folder / "table.md").read_text()
    names = ["no TTA", "fixed 5e-2", "best uniform", "step-wise", "layer-wise", "averaged", "swapped (control)"]
    assert re.findall(r"^\| ([\w\s()-]+?) \|", markdown, flags=re.M)[2:9] == names
    assert re.search(r"\| no TTA \| \d\.\d{3} \[\d\.\d\d, \d\.\d\d\] \| – \| – \|", markdown)
    assert "| best uniform | – | " in markdown
    assert "not finite" in markdown
    for stated in ("tiny", "float32", "nq-open", "rows & more.jsonl", "9 of 9", "K=1: 6, K=2: 0.8", "abc1234"):
        assert stated in markdown
    results = json.loads((folder / "results.json").read_text(), parse_constant=pytest.fail)  # strict JSON
    diverged = next(c for c in results["cells"] if (c["method"], c["K"]) == ("uniform", 2))
    assert diverged["nll"] == {"mean": None, "low": None, "high": None, "n": 9}
    header, *lines = (folder / "table.csv").read_text().splitlines()
    assert header.startswith("method,K,n,nll,nll_low,nll_high,nll_n,nll_pooled,against_none,")
    assert len(lines) == 13


def test_figures_and_samples_of_an_unfinished_run(tmp_path):
    folder = synthetic(tmp_path / "run")
    (folder / RECORDS).unlink()
    RecordFile(folder, Record).add([record("fixed", 1, "a", 1.0), record("fixed", 2, "a", 1.0)])
    write_report(folder)
    assert samples([record("none", 0, "a", 1.0, text="t")]) == []


def test_one_schedule_has_no_consistency_figure(tmp_path):
    folder = synthetic(tmp_path / "run")
    path = folder / RECORDS
    path.write_text("".join(f"{line}\n" for line in path.read_text().splitlines() if json.loads(line)["K"] in (0, 1)))
    write_report(folder)
    assert (folder / "figures" / "fig4.png").exists()
    assert not (folder / "figures" / "fig5.png").exists()


@pytest.mark.parametrize("files", [(), (RUN,), (RECORDS,), (RUN, RECORDS)])
def test_a_folder_that_is_no_run_says_what_is_expected(tmp_path, files):
    for name in files:
        (tmp_path / name).write_text("{}" if name == RUN else "")
    with pytest.raises(ValueError, match="ephemera evaluate` wrote is expected"):
        write_report(tmp_path)


def test_names_and_numbers_read_well():
    assert [scientific(x) for x in (0.05, 1e-2, 2.5e-3, 0.5, 6.0, 0.0)] == ["5e-2", "1e-2", "2.5e-3", "0.5", "6", "0"]
    cells = summarize([record("none", 0, "a", 4.651), record("fixed", 1, "a", 4.0)])
    names = method_names({"config": {"fixed_rate": 0.1}})
    assert nll_table(cells, names).rows == [
        ["no TTA", "4.651 (one prompt: no interval)", "–"],
        ["fixed 0.1", "–", "4.000 (one prompt: no interval)"],
    ]
    assert details_table(cells, names).rows[1][:6] == [
        *("fixed 0.1", "1", "1", "−0.651 (one prompt: no interval)"),
        *("–", "0 %"),
    ]
