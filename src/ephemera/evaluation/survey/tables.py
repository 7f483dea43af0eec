"""What a survey's records add up to: per task and method, paired with the base model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ephemera.evaluation.nll.tables import RESULTS, TABLE_MD, Table, signed_interval
from ephemera.evaluation.shared.records import SurveyRecord, write_bytes, write_json
from ephemera.evaluation.shared.statistics import LEVEL, Estimate, bootstrap_mean

HARM = 0.05  # nats per answer token
NOTE = (
    f"Differences to the base model, paired by prompt, with {LEVEL} % bootstrap intervals. NLL: nats per answer token, mean "
    f"over prompts, below zero is better. Harmed: share of prompts whose NLL rose by more than {HARM}; helped: fell by more. "
    "Quality: accuracy where the task judges answers (a), else ROUGE-Lsum (r), of generated text, above zero is better. "
    "Abstained: share of prompts that the gate left alone."
)


@dataclass(frozen=True)
class SurveyCell:
    """One method on one task."""

    task: str
    method: str
    n: int
    base_nll: float
    change: Estimate
    pooled_change: float
    harmed: float
    helped: float
    abstained: float
    base_quality: float | None
    quality: Estimate | None
    judged: bool


def cells_of(records: Sequence[SurveyRecord]) -> list[SurveyCell]:
    """Tasks in the order of the records, then methods."""
    by: dict[tuple[str, str], dict[str, SurveyRecord]] = {}
    for record in records:
        by.setdefault((record.task, record.method), {})[record.id] = record
    found = []
    for (task, method), mine in by.items():
        base = by.get((task, "none"), {})
        ids = [i for i in mine if i in base]
        if method == "none" or not ids:
            continue
        change = [mine[i].nll - base[i].nll for i in ids]
        tokens = sum(base[i].tokens for i in ids)
        pooled = sum((mine[i].nll - base[i].nll) * base[i].tokens for i in ids) / tokens
        pairs = [(mine[i].quality, base[i].quality) for i in ids]
        both = [(a, b) for a, b in pairs if a is not None and b is not None]
        found.append(
            SurveyCell(
                task=task,
                method=method,
                n=len(ids),
                base_nll=sum(base[i].nll for i in ids) / len(ids),
                change=bootstrap_mean(change),
                pooled_change=pooled,
                harmed=sum(not c <= HARM for c in change) / len(ids),
                helped=sum(c < -HARM for c in change) / len(ids),
                abstained=sum(mine[i].share == 0 for i in ids) / len(ids),
                base_quality=sum(b for _, b in both) / len(both) if both else None,
                quality=bootstrap_mean([a - b for a, b in both]) if both else None,
                judged=mine[ids[0]].judged,
            )
        )
    return found


def table_of(cells: Sequence[SurveyCell]) -> Table:
    header = ["task", "method", "n", "base NLL", "NLL", "harmed", "helped", "abstained", "base quality", "quality"]
    rows = [
        [
            c.task,
            c.method,
            str(c.n),
            f"{c.base_nll:.3f}",
            signed_interval(c.change),
            f"{100 * c.harmed:.1f} %",
            f"{100 * c.helped:.0f} %",
            f"{100 * c.abstained:.0f} %",
            "–" if c.base_quality is None else f"{c.base_quality:.3f} {'a' if c.judged else 'r'}",
            signed_interval(c.quality),
        ]
        for c in cells
    ]
    return Table("What adapting does to the answers", NOTE, header, rows, labels=2)


def write_tables(folder: Path, records: Sequence[SurveyRecord], run: dict[str, Any]) -> None:
    """results.json and table.md, with what was run."""
    cells = cells_of(records)
    if not cells:
        return
    write_json(folder / RESULTS, {"run": run, "cells": [asdict(c) for c in cells]})
    price = ""
    if run["price"] is not None:
        shown = run["config"].get("shown", "network")  # files from before there was a choice
        price = f"\nTime to the first token with {shown}: {run['price']:.2f} plain prefills.\n"
    equal = "".join(
        f"\n{name}: {count} rows equal to another, counted once.\n"
        for name, count in run.get("left_out_as_equal", {}).items()
    )
    made = f"{price}{equal}\nMade by `{run['command']}` at commit {run['commit']}.\n"
    write_bytes(folder / TABLE_MD, (table_of(cells).markdown() + made).encode())


def verdict(cells: Sequence[SurveyCell], price: float, method: str) -> str:
    """One sentence: is adapting by this method worth it on these tasks?"""
    mine = [c for c in cells if c.method == method]
    n = sum(c.n for c in mine)
    better = sum(c.change.high < 0 for c in mine)
    worse = sum(c.change.low > 0 for c in mine)
    change = sum(c.change.mean * c.n for c in mine) / n
    harmed, left = (sum(share * c.n for share, c in pairs) / n for pairs in _shares(mine))
    told = "better" if change < 0 else "no better"
    return (
        f"Over {n} prompts of {len(mine)} kinds the adapted answers are {told} by NLL ({change:+.3f} nats per token): better on "
        f"{better} kinds, worse on {worse}, by intervals that exclude zero; {100 * harmed:.0f} % of prompts harmed, "
        f"{100 * left:.0f} % left alone, for {price:.1f} plain prefills to the first token."
    )


def _shares(cells: Sequence[SurveyCell]) -> tuple[list[tuple[float, SurveyCell]], list[tuple[float, SurveyCell]]]:
    return [(c.harmed, c) for c in cells], [(c.abstained, c) for c in cells]
