"""Tables of a benchmark: accuracy by log-probability and by generation, NLL, and differences to the first variant."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from ephemera.evaluation.nll.tables import EMPTY, ONE, RESULTS, TABLE_MD, Table
from ephemera.evaluation.shared.execute import pass_at_k
from ephemera.evaluation.shared.records import RECORDS, RUN, AnswerRecord, read_records, write_bytes, write_json
from ephemera.evaluation.shared.statistics import LEVEL, RESAMPLES, SEED, Estimate, bootstrap_mean

Metric = Callable[[AnswerRecord], float | None]
Key = tuple[str, str]  # model, variant
GOLD = "(right answers)"


def by_sum(record: AnswerRecord) -> float | None:
    """Is the likeliest choice the right one?"""
    if not record.choice_logprobs:
        return None
    if not np.isfinite(record.choice_logprobs).all():
        return 0.0
    return float(int(np.argmax(record.choice_logprobs)) == record.gold)


def by_bytes(record: AnswerRecord) -> float | None:
    """The same with each log-probability divided by the choice's length in bytes."""
    if not record.choice_logprobs or not record.choice_bytes:
        return None
    if not np.isfinite(record.choice_logprobs).all():
        return 0.0
    return float(int(np.argmax(np.array(record.choice_logprobs) / record.choice_bytes)) == record.gold)


def by_text(record: AnswerRecord) -> float | None:
    """Share of its generated answers that are right; with one greedy answer, whether that is."""
    return None if record.correct is None else pass_at_k(len(record.correct), sum(record.correct), 1)


def nll(record: AnswerRecord) -> float | None:
    return record.nll


def vote(record: AnswerRecord) -> float | None:
    """Is the choice or number that most of the samples come down to right? (the first of a tie)"""
    if not record.picked or not record.correct or len(record.picked) < 2:
        return None
    counted = Counter(p for p in record.picked if p is not None)
    return float(bool(counted) and record.correct[record.picked.index(counted.most_common(1)[0][0])])


def any_right(record: AnswerRecord) -> float | None:
    """pass@k for k = all of its samples: is one of them right?"""
    return None if record.correct is None or len(record.correct) < 2 else float(any(record.correct))


METRICS: dict[str, tuple[str, Metric]] = {
    "generated": ("Accuracy of generated answers, %", by_text),
    "choices": ("Accuracy by log-probability of the choices, %", by_sum),
    "choices_per_byte": ("Accuracy by log-probability per byte, %", by_bytes),
    "any": ("pass@k, k all samples, %", any_right),
    "vote": ("Accuracy of the majority vote, %", vote),
    "nll": ("Answer NLL, nats per token", nll),
}


def by_row(records: Sequence[AnswerRecord], metric: Metric) -> dict[Key, dict[str, dict[str, float]]]:
    """{(model, variant): {task: {row: value}}}; repeats of a row are averaged, so that n counts rows."""
    values: dict[Key, dict[str, dict[str, list[float]]]] = {}
    for record in records:
        value = metric(record)
        if value is not None:
            tasks = values.setdefault((record.model, record.variant), {})
            tasks.setdefault(record.task, {}).setdefault(record.id, []).append(value)
    return {
        key: {task: {i: float(np.mean(v)) for i, v in rows.items()} for task, rows in tasks.items()}
        for key, tasks in values.items()
    }


def summarize(records: Sequence[AnswerRecord], metric: Metric) -> dict[Key, dict[str, Estimate]]:
    """{(model, variant): {task: mean and interval}}."""
    return {
        key: {task: bootstrap_mean(list(rows.values())) for task, rows in tasks.items()}
        for key, tasks in by_row(records, metric).items()
    }


def differences(records: Sequence[AnswerRecord], metric: Metric, base: str) -> dict[Key, dict[str, Estimate]]:
    """Every variant minus `base` of the same model, paired by row."""
    values = by_row(records, metric)
    found: dict[Key, dict[str, Estimate]] = {}
    for (model, variant), tasks in values.items():
        if variant == base:
            continue
        for task, rows in tasks.items():
            others = values.get((model, base), {}).get(task, {})
            paired = [value - others[i] for i, value in rows.items() if i in others]
            if paired:
                found.setdefault((model, variant), {})[task] = bootstrap_mean(paired)
    return found


def commonest_place(records: Sequence[AnswerRecord]) -> dict[Key, dict[str, float]]:
    """Share of rows whose likeliest choice stands at the place chosen most; under (model, "right answers") the gold's."""
    places: dict[Key, dict[str, Counter[int]]] = {}
    for record in records:
        if record.choice_logprobs and record.gold is not None and np.isfinite(record.choice_logprobs).all():
            for variant, place in ((record.variant, int(np.argmax(record.choice_logprobs))), (GOLD, record.gold)):
                places.setdefault((record.model, variant), {}).setdefault(record.task, Counter())[place] += 1
    return {
        key: {task: found.most_common(1)[0][1] / found.total() for task, found in tasks.items()}
        for key, tasks in places.items()
    }


def by_repeat(records: Sequence[AnswerRecord], metric: Metric) -> dict[Key, dict[str, list[float]]]:
    """{(model, variant): {task: mean over rows of each repeat}}; a repeat that was not finished is left out."""
    values: dict[Key, dict[str, dict[int, list[float]]]] = {}
    for record in records:
        value = metric(record)
        if value is not None:
            repeats = values.setdefault((record.model, record.variant), {}).setdefault(record.task, {})
            repeats.setdefault(record.repeat, []).append(value)
    return {
        key: {
            task: [float(np.mean(v)) for _, v in sorted(found.items()) if len(v) == max(map(len, found.values()))]
            for task, found in tasks.items()
        }
        for key, tasks in values.items()
    }


def write_tables(folder: Path) -> Path:
    """results.json and table.md from the folder's records."""
    run: dict[str, Any] = json.loads((folder / RUN).read_text())
    variants = {v["name"] for v in run["config"]["variants"]}
    models = {m["name"] for m in run["config"]["models"]}
    tasks = [entry["task"] for entry in run["config"]["data"]["tasks"]]
    # The folder keeps all that was ever run; the tables show what is asked for.
    records = [
        r
        for r in read_records(folder / RECORDS, AnswerRecord)
        if r.variant in variants and r.model in models and r.task in tasks
    ]
    bases = run["config"].get("against") or [run["config"]["variants"][0]["name"]]
    results: dict[str, Any] = {"conditions": dict(_conditions(run, records))}
    parts = [f"# Benchmark: {', '.join(m['name'] for m in run['config']['models'])}\n"]
    for name, (title, metric) in METRICS.items():
        means = summarize(records, metric)
        if not means:
            continue
        percent = name != "nll"
        results[name] = _plain(means)
        note = f"In brackets the {LEVEL} % interval over rows. {'Higher' if percent else 'Lower'} is better."
        parts.append(_table(title, note, means, tasks, percent, signed=False).markdown())
        for base in bases:
            paired = differences(records, metric, base)
            if paired:
                results[f"{name}_against_{base}"] = _plain(paired)
                note = f"Paired by row, with its {LEVEL} % interval."
                heading = f"{title}: difference to {base}"
                parts.append(_table(heading, note, paired, tasks, percent, signed=True).markdown())
        repeats = by_repeat(records, metric) if run["config"]["repeats"] > 1 else {}
        if repeats:
            results[f"{name}_by_repeat"] = [
                {"model": model, "variant": variant, "task": task, "means": found}
                for (model, variant), cells in repeats.items()
                for task, found in cells.items()
            ]
            note = "Mean over rows of each whole evaluation: their mean, and in brackets the lowest and the highest."
            spread = {key: {t: _spread(v) for t, v in cells.items()} for key, cells in repeats.items()}
            parts.append(
                _table(f"{title}: from repeat to repeat", note, spread, tasks, percent, signed=False).markdown()
            )
    places = commonest_place(records)
    if places:
        results["commonest_place"] = [
            {"model": model, "variant": variant, "task": task, "share": share}
            for (model, variant), cells in places.items()
            for task, share in cells.items()
        ]
        shown = [t for t in tasks if any(t in cells for cells in places.values())]
        rows = [
            [*key, *(f"{100 * cells[t]:.0f}" if t in cells else EMPTY for t in shown)] for key, cells in places.items()
        ]
        note = "A variant that always takes the same place of the list (entailment, yes, the first ending) has 100."
        title = "Rows with the place chosen most often, by log-probability, %"
        parts.append(Table(title, note, ["model", "variant", *shown], rows, labels=2).markdown())
    stated = "\n".join(f"- {k}: {f'`{v}`' if k == 'Command' else v}" for k, v in _conditions(run, records))
    write_json(folder / RESULTS, results)
    write_bytes(folder / TABLE_MD, ("\n".join(parts) + f"\n## Conditions\n\n{stated}\n").encode())
    return folder / TABLE_MD


def _table(
    title: str, note: str, cells: dict[Key, dict[str, Estimate]], tasks: Sequence[str], percent: bool, *, signed: bool
) -> Table:
    shown = [t for t in tasks if any(t in row for row in cells.values())]
    rows = [
        [model, variant, *(_cell(row.get(task), percent, signed) for task in shown)]
        for (model, variant), row in cells.items()
    ]
    return Table(title, note, ["model", "variant", *shown], rows, labels=2)


def _spread(means: Sequence[float]) -> Estimate:
    return Estimate(float(np.mean(means)), min(means), max(means), len(means))


def _cell(estimate: Estimate | None, percent: bool, signed: bool) -> str:
    if estimate is None:
        return EMPTY
    scale, digits = (100, 1) if percent else (1, 3)
    sign = "+" if signed else ""
    numbers = [f"{scale * x:{sign}.{digits}f}" for x in (estimate.mean, estimate.low, estimate.high)]
    shown = f"{numbers[0]} {ONE}" if estimate.n == 1 else f"{numbers[0]} [{numbers[1]}, {numbers[2]}]"
    return shown.replace("-", "−")


def _plain(cells: dict[Key, dict[str, Estimate]]) -> list[dict[str, Any]]:
    return [
        {"model": model, "variant": variant, "task": task, **asdict(estimate)}
        for (model, variant), row in cells.items()
        for task, estimate in row.items()
    ]


def _conditions(run: dict[str, Any], records: Sequence[AnswerRecord]) -> list[tuple[str, str]]:
    config = run["config"]
    counts = Counter((r.task, r.id) for r in records)
    per_task = Counter(task for task, _ in counts)
    variants = []
    for v in config["variants"]:
        steps = f"{v['steps']} steps at {v['rate']}" if v["steps"] else "no steps"
        variants.append(f"{v['name']} (init {v['init'] or 'zero'}, {steps})")
    return [
        ("Models", ", ".join(f"{name} (weights {print_})" for name, print_ in run["models"].items())),
        ("Number type", ", ".join(str(m["dtype"] or "default") for m in config["models"])),
        ("Variants", "; ".join(variants)),
        ("Rows", ", ".join(f"{task} {n}" for task, n in per_task.items()) + f" ({config['data']['split']})"),
        ("Left out as too long", ", ".join(f"{t} {n}" for t, n in run["left_out_as_too_long"].items()) or "none"),
        (
            "Equal to another row and counted once",
            ", ".join(f"{t} {n}" for t, n in run.get("left_out_as_equal", {}).items() if n) or "none",
        ),
        (
            "Prompts",
            f"{config['data']['format']}, temperature {config['temperature']:g}, {config['samples']} sample(s)",
        ),
        (
            "Repeats",
            f"{config['repeats']}, seed {config['seed']} (adapters, sampling), {config['data']['seed']} (rows)",
        ),
        ("Fallbacks", str(sum(r.fallback for r in records))),
        ("Intervals", f"{LEVEL} %, percentile bootstrap over rows, {RESAMPLES:,} resamples, seed {SEED}"),
        ("Versions", ", ".join(f"{name} {version}" for name, version in run["versions"].items())),
        ("Commit", run["commit"] or "not a checkout"),
        ("Command", run["command"]),
    ]
