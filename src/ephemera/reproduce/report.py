"""From finished stages to the paper's table or figure, with the paper's own figures beside it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from ephemera.config import CONTROLS, LdttaRecipe, Recipe, TaskWeaverRecipe
from ephemera.evaluation.accuracy.tables import write_tables as accuracy_tables
from ephemera.evaluation.nll.tables import EMPTY, RESULTS, TABLE_MD, Table, signed_interval, with_interval
from ephemera.evaluation.shared.records import RECORDS, RUN, Record, read_records, write_bytes, write_json
from ephemera.evaluation.shared.statistics import LEVEL, Cell, schedule_consistency, summarize
from ephemera.reproduce.stages import Stage
from ephemera.run_info import command, commit, versions

NAMES = {"none": "no TTA", "fixed": "fixed", "uniform": "best uniform", "stepwise": "step-wise"}
NAMES |= {
    "layerwise": "layer-wise",
    "averaged": "averaged",
    "constants": "constants",
    "first": "best first step, then none",
}
NAMES |= {"linear": "linear decay", "cosine": "cosine decay", "exponential": "exponential decay"}
NAMES |= {control: f"{control} (control)" for control in CONTROLS}
NOTE = (
    "Mean over prompts, in brackets the {level} % bootstrap interval over prompts; a prompt's figure is its mean over "
    "training seeds. Differences to no TTA are paired by prompt. Harmed: prompts whose NLL rose."
)


def combined(stages: Sequence[Stage]) -> list[Record]:
    """Records of one data set and format over tasks and seeds: each prompt once, its figures the mean over seeds."""
    found: dict[tuple[str, int, str], list[Record]] = {}
    for stage in stages:
        for record in read_records(stage.folder / RECORDS, Record):
            own = record.model_copy(update={"id": f"{stage.tags['task']}:{record.id}"})
            found.setdefault(own.key, []).append(own)
    return [_mean(records) for records in found.values()]


def _mean(records: Sequence[Record]) -> Record:
    first = records[0]
    rouges = [r.rouge_lsum for r in records if r.rouge_lsum is not None]
    rates = [np.array(r.rates, dtype=float) for r in records if r.rates is not None]
    return first.model_copy(
        update={
            "nll": float(np.mean([r.nll for r in records])),
            "rouge_lsum": float(np.mean(rouges)) if rouges else None,
            "rates": np.mean(rates, 0).tolist() if rates else None,
            "fallback": any(r.fallback for r in records),
        }
    )


def write_ldtta(recipe: LdttaRecipe, model: str, stages: Sequence[Stage], folder: Path) -> Path:
    """table.md and results.json, and the figure if the result is one."""
    parts, results, every = [f"# {recipe.title}: {model}\n"], dict[str, Any](), list[Record]()
    projections: list[tuple[int, str]] = []
    for format in recipe.formats:
        for dataset in recipe.datasets:
            mine = [s for s in stages if s.kind == "evaluate" and s.tags["dataset"] == dataset]
            mine = [s for s in mine if s.tags["format"] == format]
            records = combined(mine)
            cells = summarize(records)
            results[f"{dataset} {format}"] = [asdict(cell) for cell in cells]
            parts.append(_table(f"{dataset}, {format} prompts", cells).markdown())
            every += [r.model_copy(update={"id": f"{format}:{dataset}:{r.id}"}) for r in records]
            projections = json.loads((mine[0].folder / RUN).read_text())["projections"]
            if recipe.result == "fig3":
                _figure(folder, f"fig3-{dataset}-{format}", cells)
    consistency = schedule_consistency(every) if recipe.result in ("fig4", "fig5") else None
    if recipe.result == "fig4":
        _heat_map(folder, every, projections)
    if consistency is not None and recipe.result == "fig5":
        _consistency(folder, consistency)
        results["schedule_consistency"] = asdict(consistency)
    return _write(recipe, folder, parts, results)


def _table(title: str, cells: Sequence[Cell]) -> Table:
    header = ["method", "K", "n", "NLL", "to no TTA", "harmed", "pooled NLL", "ROUGE-Lsum", "to no TTA"]
    rows = [
        [
            NAMES[c.method],
            str(c.K),
            str(c.n),
            with_interval(c.nll),
            signed_interval(c.against_none),
            EMPTY if c.harmed is None else f"{100 * c.harmed:.0f} %",
            f"{c.nll_pooled:.3f}",
            with_interval(c.rouge_lsum, 3),
            signed_interval(c.rouge_lsum_against_none),
        ]
        for c in cells
    ]
    return Table(title, NOTE.format(level=LEVEL), header, rows, labels=2)


def _figure(folder: Path, name: str, cells: Sequence[Cell]) -> None:
    from ephemera.evaluation.nll.figures import nll_against_steps, save_figure, styled

    with styled():
        save_figure(folder, name, nll_against_steps(cells, NAMES))


def _heat_map(folder: Path, records: Sequence[Record], projections: Sequence[tuple[int, str]]) -> None:
    from ephemera.evaluation.nll.figures import rate_heat_map, save_figure, styled
    from ephemera.evaluation.shared.statistics import layerwise_rates

    rates = layerwise_rates(records)
    with styled():
        save_figure(folder, "fig4", rate_heat_map(rates[max(rates)].mean(0), projections))


def _consistency(folder: Path, consistency: Any) -> None:
    from ephemera.evaluation.nll.figures import consistency_bars, save_figure, styled

    with styled():
        save_figure(folder, "fig5", consistency_bars(consistency))


def write_taskweaver(recipe: TaskWeaverRecipe, model: str, stages: Sequence[Stage], folder: Path) -> Path:
    """The stages' own tables, one after the other: accuracy by task, or the analysis."""
    parts, results = [f"# {recipe.title}: {model}\n"], dict[str, Any]()
    for stage in stages:
        if stage.kind == "benchmark":
            accuracy_tables(stage.folder)
            results[stage.name] = json.loads((stage.folder / RESULTS).read_text())
        if stage.kind in ("benchmark", "analyse"):
            text = (stage.folder / TABLE_MD).read_text()
            parts.append(f"# {stage.name}\n\n" + text.partition("\n")[2].lstrip())
    return _write(recipe, folder, parts, results)


def _write(recipe: Recipe, folder: Path, parts: list[str], results: dict[str, Any]) -> Path:
    if recipe.published:
        lines = [
            f"| {model} | {row} | {', '.join(f'{x:g}' for x in values)} |"
            for model, table in recipe.published.items()
            for row, values in table.items()
        ]
        parts.append("\n".join(["## As published\n", "| model | row | values |", "| --- | --- | --: |", *lines]) + "\n")
    parts.append(f"Made by `{command()}` at commit {commit()}.\n")
    run = {"recipe": recipe.model_dump(mode="json"), "versions": versions(), "commit": commit(), "command": command()}
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / RESULTS, {"run": run, "results": results})
    write_bytes(folder / TABLE_MD, "\n".join(parts).encode())
    return folder / TABLE_MD
