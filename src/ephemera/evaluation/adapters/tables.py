"""results.json and table.md of an analysis, with the conditions they hold under."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from ephemera.evaluation.adapters.analysis import CONTROLS, Analysis, Control
from ephemera.evaluation.adapters.grouping import NEIGHBOURS, SHUFFLES, Score
from ephemera.evaluation.nll.tables import EMPTY, RESULTS, TABLE_MD, Table, signed_interval, with_interval
from ephemera.evaluation.shared.records import write_bytes, write_json
from ephemera.evaluation.shared.statistics import LEVEL

CONTROLS_NOTE = (
    f"Answer NLL in nats per token, mean over prompts; in brackets {LEVEL} % intervals, those of differences paired by "
    "prompt. A generator that ignores its input scores the same with every adapter. The mean adapter is the one "
    "generated from the mean h of all prompts (the mean of the factors A and B is not the mean of B A); a random h is "
    "drawn from the normal fitted to the prompts' h, feature by feature."
)
GROUPING_NOTE = (
    "Of the whole updates (alpha / r) B A, from their inner products, and of the h they are generated from, as the "
    f"generator standardises it. In brackets: mean and 97.5th percentile over {SHUFFLES} shufflings of the task labels. "
    f"Nearest neighbours: leave one out, majority of {NEIGHBOURS}; silhouette and neighbours by Euclidean distance."
)
COSINES_NOTE = "Mean over pairs of different prompts; on the diagonal, pairs of the same task."
NORMS_NOTE = "Frobenius norm of (alpha / r) B A, mean over prompts: of all projections together, and the mean of one."


def write_tables(analysis: Analysis) -> Path:
    """Returns the path of table.md; each file appears whole or not at all."""
    folder = analysis.folder
    write_json(folder / RESULTS, _results(analysis))
    path = folder / TABLE_MD
    write_bytes(path, table_md(analysis).encode())
    return path


def _results(analysis: Analysis) -> dict[str, object]:
    norms_by_task = {
        name: analysis.norms_NM[analysis.task_N == s].mean(0).tolist() for s, name in enumerate(analysis.tasks)
    }
    return {
        "conditions": analysis.conditions,
        "config": analysis.config.model_dump(mode="json"),
        "tasks": {name: int((analysis.task_N == s).sum()) for s, name in enumerate(analysis.tasks)},
        "controls": {name: [asdict(c) for c in found] for name, found in analysis.controls.items()},
        "updates": asdict(analysis.updates),
        "states": asdict(analysis.states),
        "norms": {"projections": analysis.projections, "mean_by_task": norms_by_task},
        "pca_shares": analysis.pca_shares,
    }


def table_md(analysis: Analysis) -> str:
    tables = [
        controls_table(analysis.controls["all"]),
        controls_by_task(analysis),
        grouping_table(analysis),
        norms_table(analysis),
        cosines_table(analysis.tasks, analysis.updates.cosines, "Cosines between updates"),
        cosines_table(analysis.tasks, analysis.updates.cosines_centred, "Cosines after the mean update was subtracted"),
    ]
    stated = "\n".join(
        f"- {key}: {f'`{value}`' if key == 'Command' else value}" for key, value in analysis.conditions.items()
    )
    title = "# What the generator's adapters depend on\n"
    return "\n".join([title, *(table.markdown() for table in tables), f"## Conditions\n\n{stated}\n"])


def controls_table(controls: Sequence[Control]) -> Table:
    own = next(c for c in controls if c.name == "own").against_base
    rows = [
        [
            CONTROLS[c.name],
            str(c.nll.n),
            with_interval(c.nll),
            EMPTY if c.name == "own" else signed_interval(c.against_own),
            EMPTY if c.name == "base" else signed_interval(c.against_base),
            f"{100 * c.against_base.mean / own.mean:.0f} %" if own.high < 0 and c.name != "base" else EMPTY,
        ]
        for c in controls
    ]
    header = ["adapter", "n", "answer NLL", "vs own", "vs no adapter", "share of own's gain"]
    return Table("Does it ignore its input?", CONTROLS_NOTE, header, rows)


def controls_by_task(analysis: Analysis) -> Table:
    """One row per task: NLL with its own adapter, then each control's difference to it."""
    names = [c.name for c in analysis.controls["all"] if c.name != "own"]
    rows = []
    for task in analysis.tasks:
        found = {c.name: c for c in analysis.controls[task]}
        differences = [signed_interval(found[name].against_own) for name in names]
        rows.append([task, str(found["own"].nll.n), with_interval(found["own"].nll), *differences])
    note = "Differences to the NLL with the prompt's own adapter; above zero, its own is better."
    return Table("By task", note, ["task", "n", "own adapter", *(CONTROLS[name] for name in names)], rows)


def grouping_table(analysis: Analysis) -> Table:
    both = (analysis.updates, analysis.states)
    rows = [
        ["squared norm that all prompts share", *(_number(g.shared, _percent) for g in both)],
        ["variance over prompts that the task explains", *(_score(g.variance_by_task, _percent) for g in both)],
        ["silhouette by task", *(_score(g.silhouette, _plain) for g in both)],
        ["nearest neighbours' task is right", *(_score(g.neighbour_accuracy, _percent) for g in both)],
    ]
    return Table("How adapters group by task", GROUPING_NOTE, ["", "updates", "h"], rows)


def norms_table(analysis: Analysis) -> Table:
    kinds = list(dict.fromkeys(kind for _, kind in analysis.projections))
    places = {kind: [m for m, (_, k) in enumerate(analysis.projections) if k == kind] for kind in kinds}
    rows = []
    for s, task in enumerate(analysis.tasks):
        norms_NM = analysis.norms_NM[analysis.task_N == s]
        by_kind = [f"{norms_NM[:, places[kind]].mean().item():.3g}" for kind in kinds]
        rows.append([task, str(len(norms_NM)), f"{norms_NM.norm(dim=1).mean().item():.3g}", *by_kind])
    return Table("Norms", NORMS_NOTE, ["task", "n", "all together", *kinds], rows)


def cosines_table(tasks: Sequence[str], cosines_SS: Sequence[Sequence[float]], title: str) -> Table:
    rows = [[task, *(_number(c, _plain) for c in line)] for task, line in zip(tasks, cosines_SS, strict=True)]
    return Table(title, COSINES_NOTE, ["", *tasks], rows)


def _plain(value: float) -> str:
    return f"{value:.2f}".replace("-", "−")


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %".replace("-", "−")


def _number(value: float, form: Callable[[float], str]) -> str:
    return form(value) if math.isfinite(value) else EMPTY


def _score(score: Score, form: Callable[[float], str]) -> str:
    """0.41 (−0.02, 0.00)"""
    if not math.isfinite(score.value):
        return EMPTY
    return f"{form(score.value)} ({form(score.chance)}, {form(score.chance_high)})"
