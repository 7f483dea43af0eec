"""One table of starts x ways to move, from the runs that docs/results/both/make.sh made.

python -m benchmarks.both RUNS --output docs/results/both
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ephemera.evaluation.nll.tables import EMPTY, signed_interval, with_interval
from ephemera.evaluation.shared.records import RECORDS, RUN, Record, read_records
from ephemera.evaluation.shared.statistics import Estimate, bootstrap_mean

STARTS = {"zero": "zero", "taskweaver": "generated", "joint": "generated, trained jointly"}
METHODS = {
    "none": "no steps",
    "fixed": "fixed 5e-2",
    "uniform": "best uniform",
    "stepwise": "step-wise",
    "layerwise": "layer-wise",
    "averaged": "averaged",
    "swapped": "layer-wise, swapped",
}


def nlls(folder: Path) -> dict[str, dict[str, float]]:
    """{method: {prompt id: NLL}} of one evaluation, at its one K."""
    found: dict[str, dict[str, float]] = {}
    for record in read_records(folder / RECORDS, Record):
        found.setdefault(record.method, {})[record.id] = record.nll
    return found


def difference(mine: dict[str, float], other: dict[str, float]) -> Estimate:
    return bootstrap_mean([mine[i] - other[i] for i in mine if i in other])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.both", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("runs", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args(argv)
    folders = sorted(args.runs.glob("evaluate-*-*"))
    if not folders:
        raise SystemExit(f"{args.runs} holds no evaluate-START-TASK folders; docs/results/both/make.sh makes them.")
    cells: dict[str, dict[str, dict[str, dict[str, float]]]] = {}
    stated: dict[str, Any] = {}
    for folder in folders:
        start, task = folder.name.removeprefix("evaluate-").split("-", 1)
        cells.setdefault(task, {})[start] = nlls(folder)
        run = json.loads((folder / RUN).read_text())
        stated[folder.name] = {
            "rows": run["rows"],
            "uniform_rates": run["uniform_rates"],
            "commit": run["commit"],
            "seed": run["config"]["seed"],
            "weights": run["model"]["fingerprint"],
        }
    lines = [
        "# Starts and steps together\n",
        "Answer NLL in nats per token (lower is better), K=1, with 95 % intervals.\n",
    ]
    results: list[dict[str, Any]] = []
    for task, starts in cells.items():
        lines += [f"## {task}\n", "| start | " + " | ".join(METHODS.values()) + " |", "|---|" + "--:|" * len(METHODS)]
        for start in [s for s in STARTS if s in starts]:
            row = []
            for method in METHODS:
                values = starts[start].get(method)
                estimate = bootstrap_mean(list(values.values())) if values else None
                row.append(with_interval(estimate))
                if estimate:
                    results.append({"task": task, "start": start, "method": method, **vars(estimate)})
            lines.append(f"| {STARTS[start]} | " + " | ".join(row) + " |")
        lines.append("")
        lines += _comparisons(starts)
    first = next(iter(stated.values()))
    rows = ", ".join(f"{name} {facts['rows']}" for name, facts in stated.items())
    lines.append(
        f"Rows: {rows}. Seed {first['seed']}, commit {first['commit']}. Made by `sh docs/results/both/make.sh DATA`."
    )
    (args.output / "table.md").write_text("\n".join(lines) + "\n")
    (args.output / "results.json").write_text(json.dumps({"runs": stated, "cells": results}, indent=1) + "\n")
    print("\n".join(lines))
    return 0


def _comparisons(starts: dict[str, dict[str, dict[str, float]]]) -> list[str]:
    """Does the combination beat each half? Paired by prompt."""
    if not {"zero", "taskweaver"} <= set(starts):
        return []
    both = {"generated + layer-wise": starts["taskweaver"].get("layerwise")}
    both["trained jointly + layer-wise"] = starts.get("joint", {}).get("layerwise")
    halves = {
        "the generated start alone": starts["taskweaver"]["none"],
        "layer-wise steps alone": starts["zero"].get("layerwise"),
    }
    lines = ["| | " + " | ".join(f"against {name}" for name in halves) + " |", "|---|" + "--:|" * len(halves)]
    for name, values in both.items():
        if values:
            row = [signed_interval(difference(values, half)) if half else EMPTY for half in halves.values()]
            lines.append(f"| {name} | " + " | ".join(row) + " |")
    return [*lines, ""]


if __name__ == "__main__":
    main()
