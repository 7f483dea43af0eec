"""results.json, table.csv and table.md: the numbers of a run, and the conditions they hold under."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ephemera.config import CONTROLS, METHODS
from ephemera.evaluation.shared.records import write_bytes, write_json
from ephemera.evaluation.shared.statistics import LEVEL, RESAMPLES, SEED, Cell, Consistency, Estimate, Spread

RESULTS, TABLE_CSV, TABLE_MD = "results.json", "table.csv", "table.md"
EMPTY = "–"
ESTIMATES = (
    "nll",
    "against_none",
    "against_uniform",
    "against_layerwise",
    "kept",
    "rouge_lsum",
    "rouge_lsum_against_none",
)
ONE = "(one prompt: no interval)"
NLL_NOTE = f"Mean over prompts, nats per answer token, lower is better; in brackets the {LEVEL} % interval."
DETAILS_NOTE = (
    "Differences are paired by prompt, over the n prompts that every method of this run holds; below zero is better "
    "for NLL, above zero for ROUGE-Lsum. Harmed: prompts whose NLL rose. Fallbacks: prompts answered by the unadapted "
    "model because something was not finite. Pooled: over answer tokens instead of prompts. Seconds: median per prompt "
    "of adaptation and reading the prompt, its batch's time shared among its rows."
)

KEPT_NOTE = (
    "What of the layer-wise network's gain each method keeps, at the same K. Share: its gain over no TTA divided by the "
    f"network's, both over the same prompts; in brackets the {LEVEL} % paired bootstrap interval. There is none where the "
    "interval of the network's own gain reaches zero."
)


@dataclass(frozen=True)
class Table:
    """Rows of text under a header; `labels` of its first columns say what a row is."""

    title: str
    note: str
    header: list[str]
    rows: list[list[str]]
    labels: int = 1

    def markdown(self) -> str:
        ruler = ["---"] * self.labels + ["--:"] * (len(self.header) - self.labels)
        lines = [self.header, ruler, *self.rows]
        return f"## {self.title}\n\n{self.note}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def method_names(run: dict[str, Any]) -> dict[str, str]:
    """How a table or figure calls each method."""
    return {
        "none": "no TTA",
        "fixed": f"fixed {scientific(run['config']['fixed_rate'])}",
        "uniform": "best uniform",
        "stepwise": "step-wise",
        "layerwise": "layer-wise",
        "averaged": "averaged",
        "first": "best first step, then none",
        **{decay: f"{decay} decay" for decay in ("linear", "cosine", "exponential")},
        "constants": "constants",
        **{control: f"{control} (control)" for control in CONTROLS},
    }


def scientific(rate: float) -> str:
    """0.05 -> 5e-2"""
    digits, exponent = f"{rate:e}".split("e")
    return f"{float(digits):g}e{int(exponent)}" if 0 < rate < 0.1 else f"{rate:g}"


def with_interval(estimate: Estimate | None, digits: int = 2) -> str:
    """4.651 [4.32, 4.99]; `digits` are those of the interval."""
    if estimate is None:
        return EMPTY
    if not math.isfinite(estimate.mean):
        return "not finite"
    if estimate.n == 1:
        return f"{estimate.mean:.3f} {ONE}"
    return f"{estimate.mean:.3f} [{estimate.low:.{digits}f}, {estimate.high:.{digits}f}]"


def signed_interval(estimate: Estimate | None) -> str:
    """−0.312 [−0.401, −0.220]"""
    if estimate is None:
        return EMPTY
    if not math.isfinite(estimate.mean):
        return "not finite"
    if estimate.n == 1:
        return f"{estimate.mean:+.3f} {ONE}".replace("-", "−")
    return f"{estimate.mean:+.3f} [{estimate.low:+.3f}, {estimate.high:+.3f}]".replace("-", "−")


def nll_table(cells: Sequence[Cell], names: dict[str, str]) -> Table:
    """Methods by K."""
    by_key = {(c.method, c.K): c for c in cells}
    columns = sorted({c.K for c in cells})
    rows = []
    for method in METHODS:
        found = [by_key.get((method, K)) for K in columns]
        if any(found):
            rows.append([names[method], *(with_interval(c.nll if c else None) for c in found)])
    return Table("Answer NLL", NLL_NOTE, ["method", *(f"K = {K}" for K in columns)], rows)


def details_table(cells: Sequence[Cell], names: dict[str, str]) -> Table:
    """One row per method and K: paired differences, harm, cost, generated answers."""
    header = [
        *("method", "K", "n", "vs no TTA", "vs best uniform", "harmed", "fallbacks", "seconds/prompt", "pooled NLL"),
        *("ROUGE-Lsum", "ROUGE-Lsum vs no TTA"),
    ]
    rows = [
        [
            names[c.method],
            str(c.K),
            str(c.against_none.n if c.against_none else c.n),
            signed_interval(c.against_none),
            signed_interval(c.against_uniform),
            EMPTY if c.harmed is None else f"{100 * c.harmed:.0f} %",
            str(c.fallbacks),
            f"{c.seconds:.3g}",
            f"{c.nll_pooled:.3f}" if math.isfinite(c.nll_pooled) else "not finite",
            with_interval(c.rouge_lsum, digits=3),
            signed_interval(c.rouge_lsum_against_none),
        ]
        for c in cells
    ]
    return Table("Differences, harm and cost", DETAILS_NOTE, header, rows, labels=2)


def kept_table(cells: Sequence[Cell], names: dict[str, str], spreads: Sequence[Spread]) -> Table | None:
    """The share of the layer-wise gain that each other method keeps; None without a control."""
    if not any(c.method in CONTROLS and c.against_layerwise for c in cells):
        return None
    rows = [
        [
            names[c.method],
            str(c.K),
            signed_interval(c.against_none),
            signed_interval(c.against_layerwise),
            percent_interval(c.kept),
            EMPTY if c.harmed is None else f"{100 * c.harmed:.0f} %",
        ]
        for c in cells
        if c.against_layerwise or c.method == "layerwise"
    ]
    note = " ".join([KEPT_NOTE, *map(spread_words, spreads)])
    return Table(
        "Controls", note, ["method", "K", "vs no TTA", "vs layer-wise", "share of its gain", "harmed"], rows, 2
    )


def percent_interval(estimate: Estimate | None) -> str:
    """84 % [75, 93]"""
    if estimate is None:
        return EMPTY
    if not math.isfinite(estimate.mean):
        return "not finite"
    mean, low, high = (f"{100 * x:.0f}".replace("-", "−") for x in (estimate.mean, estimate.low, estimate.high))
    return f"{mean} % {ONE}" if estimate.n == 1 else f"{mean} % [{low}, {high}]"


def spread_words(spread: Spread) -> str:
    return (
        f"At K = {spread.K} another draw of A moves a prompt's NLL by a deviation of {spread.of_A:.3f}; the gain's deviation "
        f"over prompts is {spread.of_gain:.3f}, so A's share of its variance is {100 * spread.share:.1f} %."
    )


def conditions(run: dict[str, Any], cells: Sequence[Cell]) -> list[tuple[str, str]]:
    """What was run, on what: everything needed to run it again."""
    config, data = run["config"], run["config"]["data"]
    held = max(c.n for c in cells)
    left_out = f"{run['left_out_as_too_long']} longer than {data['max_tokens']} tokens left out"
    if run.get("left_out_as_equal"):
        left_out += f", {run['left_out_as_equal']} equal to another row and counted once"
    uniform = run["uniform_rates"] or {}
    lora = config["model"]["lora"]
    return [
        ("Model", f"{run['model']['name']} (weights {run['model']['fingerprint']})"),
        ("Number type", run["model"]["dtype"].removeprefix("torch.")),
        ("Start", config.get("init", "zero")),
        ("LoRA", f"r {lora['r']}, alpha {lora['lora_alpha']:g}, on {lora['target_modules']}"),
        ("Task", f"{data['task']}, {data['split']} rows, {data['format']} prompts"),
        ("Source", run["source"]),
        ("Prompts", f"{held} of {run['rows']} ({left_out}, {run['dropped_without_answer']} rows without an answer)"),
        ("Seed", f"{config['seed']} (adapters), {data['seed']} (choice of rows)"),
        ("Best uniform rates", ", ".join(f"K={K}: {uniform[K]:g}" for K in sorted(uniform, key=int)) or "not used"),
        ("Rate networks", _networks(config)),
        ("Intervals", f"{LEVEL} %, percentile bootstrap over prompts, {RESAMPLES:,} resamples, seed {SEED}"),
        ("Versions", ", ".join(f"{name} {version}" for name, version in run["versions"].items())),
        ("Commit", run["commit"] or "not a checkout"),
        ("Command", run["command"]),
    ]


def _networks(config: dict[str, Any]) -> str:
    wanted = [m for m in ("stepwise", "layerwise", "averaged") if m in config["methods"]]
    if set(config["methods"]) & set(CONTROLS) and "layerwise" not in wanted:
        wanted.append("layerwise")
    return ", ".join(f"{m}: {config[m] or 'beside layerwise'}" for m in wanted) or "not used"


def write_tables(
    folder: Path,
    run: dict[str, Any],
    cells: Sequence[Cell],
    consistency: Consistency | None,
    spreads: Sequence[Spread],
    cross: dict[str, Any] | None,
    tables: Sequence[Table],
) -> None:
    """results.json, table.csv and table.md, which holds `tables`; each file appears whole or not at all."""
    stated = conditions(run, cells)
    results = {
        "conditions": dict(stated),
        "cells": [asdict(c) for c in cells],
        "schedule_consistency": asdict(consistency) if consistency else None,
        "spread_of_A": [asdict(spread) for spread in spreads],
        "cross_gradient": cross,
    }
    write_json(folder / RESULTS, results)
    write_bytes(folder / TABLE_CSV, table_csv(cells).encode())
    write_bytes(folder / TABLE_MD, table_md(run, tables, stated).encode())


def table_md(run: dict[str, Any], tables: Sequence[Table], stated: Sequence[tuple[str, str]]) -> str:
    title = f"# {run['model']['name']} on {run['config']['data']['task']}\n"
    lines = "\n".join(f"- {key}: {f'`{value}`' if key == 'Command' else value}" for key, value in stated)
    return "\n".join([title, *(table.markdown() for table in tables), f"## Conditions\n\n{lines}\n"])


def table_csv(cells: Sequence[Cell]) -> str:
    """One line per method and K; an estimate x takes the columns x, x_low, x_high and x_n."""
    lines = [_csv_row(cell) for cell in cells]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def _csv_row(cell: Cell) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for key, value in vars(cell).items():
        if key in ESTIMATES:
            parts = (value.mean, value.low, value.high, value.n) if value else ("", "", "", "")
            row |= dict(zip((key, f"{key}_low", f"{key}_high", f"{key}_n"), parts, strict=True))
        else:
            row[key] = "" if value is None else value
    return row
