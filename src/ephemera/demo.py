"""`ephemera demo`: what the default does to chat answers, on real questions and on this project's own examples."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.text import Text

from ephemera.config import DataSettings, Survey
from ephemera.config.evaluate import SurveyMethod
from ephemera.downloads import DEFAULT_MODEL
from ephemera.evaluation.shared.records import RECORDS, RUN, SurveyRecord, read_json, read_records
from ephemera.evaluation.survey.report import changed, pairs_of
from ephemera.evaluation.survey.run import survey
from ephemera.evaluation.survey.tables import SurveyCell, cells_of, verdict
from ephemera.inits import DEFAULT_STARTS

HERE = Path(__file__).parent
KINDS = {
    "nq-open": "questions (NQ-Open)",
    "boolq": "yes or no about a passage (BoolQ)",
    "commonsense-qa": "multiple choice (CommonsenseQA)",
    "xsum": "news to sum up (XSum)",
    "own": "passages, summaries and instructions of this project",
}
METHOD: SurveyMethod = "generated"  # what answers a chat if nobody names a method
SHOWN = 2  # prompts of each kind, the first ones: not the best ones


def examples() -> Path:
    """examples/prompts.jsonl of the checkout, or of the installed package."""
    checkout = HERE.parent.parent / "examples" / "prompts.jsonl"
    return checkout if checkout.exists() else HERE / "examples" / "prompts.jsonl"


def run(output: Path, rows: int) -> None:
    """Answer with and without adapting, show both and what was expected, and end with one sentence of verdict."""
    start = time.perf_counter()
    folder = survey(_settings(output, rows))
    records, price = read_records(folder / RECORDS, SurveyRecord), read_json(folder / RUN)["price"]
    cells = cells_of(records)
    console = Console(width=None if sys.stdout.isatty() else 110, highlight=False)
    for task, title in KINDS.items():
        _show(console, title, [r for r in records if r.task == task], [c for c in cells if c.task == task])
    console.print(Text(verdict(cells, price, METHOD), style="bold"))
    print(f"report: {folder / 'report.html'} ({time.perf_counter() - start:.0f} s)", file=sys.stderr)


def _settings(output: Path, rows: int) -> Survey:
    sources = {task: "wheel" for task in KINDS if task != "own"} | {"own": str(examples())}
    data = DataSettings(task="+".join(KINDS), sources=sources, limit=rows, format="chat", cut=800, max_tokens=400)
    methods: list[SurveyMethod] = ["none", METHOD]
    return Survey(
        output=str(output),
        generator=DEFAULT_STARTS[DEFAULT_MODEL]["chat"],
        methods=methods,
        generate=methods,
        shown=METHOD,
        data=data,
        max_new_tokens=40,
    )


def _show(console: Console, title: str, records: Sequence[SurveyRecord], cells: Sequence[SurveyCell]) -> None:
    """A kind's first prompts, three lines each, and its figures."""
    console.print(Text(title, style="bold underline"))
    for base, mine in pairs_of(records, METHOD)[:SHOWN]:
        console.print(Text(f"... {_line(mine.prompt or '')[-90:]}", style="dim"))
        console.print(Text(f"  base      {_line(base.text or '')}  (NLL {base.nll:.2f})"))
        if mine.share == 0:
            console.print(Text(f"  adapted   = left alone by the gate  (NLL {mine.nll:.2f})"))
        elif _line(base.text or "") == _line(mine.text or ""):
            console.print(Text(f"  adapted   = the same answer  (NLL {mine.nll:.2f})"))
        else:
            console.print(_marked(base.text or "", mine.text or "").append(f"  (NLL {mine.nll:.2f})"))
        console.print(Text(f"  expected  {_line(mine.answer or '')}"))
    for cell in cells:
        quality = ""
        if cell.quality is not None and cell.base_quality is not None:
            name = "accuracy" if cell.judged else "ROUGE-Lsum"
            quality = f", {name} {cell.base_quality:.3f} -> {cell.base_quality + cell.quality.mean:.3f}"
        console.print(
            f"  {cell.n} prompts: NLL {cell.base_nll:.3f} -> {cell.base_nll + cell.change.mean:.3f}{quality}, harmed "
            f"{100 * cell.harmed:.0f} %, left alone {100 * cell.abstained:.0f} %\n"
        )


def _marked(base: str, adapted: str) -> Text:
    """The adapted answer; words that the base model's answer has not are bold, or stand in *stars* where nothing is bold."""
    line = Text("  adapted   ")
    for word, new in changed(base, _line(adapted)):
        shown = word if sys.stdout.isatty() or not new else f"*{word}*"
        line.append(f"{shown} ", style="bold green" if new else "")
    return line


def _line(text: str) -> str:
    words = " ".join(text.split())
    return words if len(words) <= 200 else words[:197] + "..."
