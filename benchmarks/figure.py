"""What adaptation costs, in plain prefills of the same prompts: against K, batch, length and adapted share.

    python -m benchmarks.figure --output docs/results/benchmark

Writes cost.png, cost.json and cost.md. Every point takes turns with the prefill that it is measured in: 2 would mean
that adapting takes as long as reading the prompts twice. Adapted share: query and value of the first or the last layers
alone. On the CPU.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import matplotlib
import torch
import transformers

from ephemera.adapt import adapt
from ephemera.batch import TokenBatch, pad
from ephemera.bench.contenders import INIT, RATE, encoded
from ephemera.bench.timing import machine, machine_lines, native_dtypes, timed, turns
from ephemera.downloads import DEFAULT_MODEL
from ephemera.llm.frozen_lm import FrozenLM
from ephemera.llm.load import load_backbone
from ephemera.llm.prefill import prefill
from ephemera.lora import Projection
from ephemera.rates import FixedRate

POINT_S = 2.5  # of turns of one point, unless two take longer
BATCH, LENGTH = 4, 32  # where they are not what changes
STEPS = (1, 2, 3, 5)
BATCHES = (1, 2, 4, 8, 16)
LENGTHS = (16, 32, 64, 128, 256)
SHARES = (0.1, 0.25, 0.5, 1.0)
AXES = {
    "steps": "K",
    "batch": "prompts",
    "length": "tokens of a prompt",
    "first": "adapted share",
    "last": "adapted share",
}
TITLES = {"steps": "steps", "batch": "batch", "length": "length", "share": "adapted share of the layers"}


@dataclass(frozen=True)
class Point:
    """One adaptation: what changes, its value, and everything that it needs."""

    axis: str
    x: float
    steps: int
    batch: int
    length: int
    projections: tuple[Projection, ...]


def points(backbone: FrozenLM) -> Iterator[Point]:
    every = backbone.projections
    layers = 1 + max(p.layer for p in every)
    for steps in STEPS:
        yield Point("steps", steps, steps, BATCH, LENGTH, every)
    for batch in BATCHES:
        yield Point("batch", batch, 1, batch, LENGTH, every)
    for length in LENGTHS:
        yield Point("length", length, 1, BATCH, length, every)
    for share in SHARES:
        count = max(1, round(share * layers))
        first = tuple(p for p in every if p.layer < count)
        last = tuple(p for p in every if p.layer >= layers - count)
        yield Point("first", count / layers, 1, BATCH, LENGTH, first)
        yield Point("last", count / layers, 1, BATCH, LENGTH, last)


def tokens(backbone: FrozenLM, batch: int, length: int) -> TokenBatch:
    """Prompts of exactly this length, from the long ones."""
    rows = encoded(backbone, "long", batch)
    return pad([row.prompt[:length] for row in rows], pad_id=backbone.pad_id)


def measure(backbone: FrozenLM, point: Point, rounds: int, budget_s: float = POINT_S) -> dict[str, Any]:
    every = backbone.projections
    batch = tokens(backbone, point.batch, point.length)
    try:
        backbone.projections = point.projections
        initial = INIT(backbone, batch, [0] * point.batch)
    finally:
        backbone.projections = every
    contenders = {
        "adapt": lambda: timed(lambda: adapt(backbone, batch, initial, FixedRate(RATE), point.steps)),
        "prefill": lambda: timed(lambda: prefill(backbone, batch, None)),
    }
    for warm in contenders.values():
        warm()
    seconds = turns(contenders, rounds, budget_s=budget_s)
    costs = [a / p for a, p in zip(seconds["adapt"], seconds["prefill"], strict=True)]
    return {
        "axis": point.axis,
        "x": point.x,
        "steps": point.steps,
        "batch": point.batch,
        "length": point.length,
        "dtype": str(backbone.dtype).removeprefix("torch."),
        "cost": median(seconds["adapt"]) / median(seconds["prefill"]),
        "costs": costs,
        "quartiles": _quartiles(costs),
        "seconds": median(seconds["adapt"]),
        "prefill_seconds": median(seconds["prefill"]),
    }


def _quartiles(values: Sequence[float]) -> tuple[float, float]:
    first, _, third = quantiles(values, n=4, method="inclusive")
    return first, third


def draw(cells: Sequence[dict[str, Any]], path: Path) -> None:
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 4, figsize=(14, 3.4), constrained_layout=True)
    groups = (("steps",), ("batch",), ("length",), ("first", "last"))
    for panel, axes in zip(panels, groups, strict=True):
        for axis in axes:
            for dtype, color in (("float32", "tab:blue"), ("bfloat16", "tab:orange")):
                some = [c for c in cells if (c["axis"], c["dtype"]) == (axis, dtype)]
                if not some:
                    continue
                label = dtype if len(axes) == 1 else f"{dtype}, {axis} layers"
                xs, ys = [c["x"] for c in some], [c["cost"] for c in some]
                panel.plot(xs, ys, "o--" if axis == "last" else "o-", color=color, label=label)
                low, high = zip(*(c["quartiles"] for c in some), strict=True)
                panel.fill_between(xs, low, high, color=color, alpha=0.15)
        panel.set_title(TITLES["share" if len(axes) > 1 else axes[0]])
        panel.set_xlabel(AXES[axes[0]])
        panel.set_ylim(bottom=0)
        if axes[0] in ("batch", "length"):
            panel.set_xscale("log", base=2)
            panel.set_xticks(
                [c["x"] for c in cells if c["axis"] == axes[0]], [c["x"] for c in cells if c["axis"] == axes[0]]
            )
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("cost in plain prefills")
    panels[0].legend()
    panels[3].legend(fontsize=8)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def table(results: dict[str, Any]) -> str:
    lines = [
        f"Seconds of adaptation over those of a plain prefill of the same prompts; model {results['model']}, "
        f"{BATCH} prompts of {LENGTH} tokens and K=1 where nothing else is said. Ratio of the medians of up to "
        f"{results['rounds']} turns [middle half of the turns].",
        *machine_lines(results["machine"]),
        "",
        "| what changes | value | dtype | cost in prefills | seconds |",
        "|---|--:|---|--:|--:|",
    ]
    names = {"first": "adapted share, first layers", "last": "adapted share, last layers"}
    lines += [
        f"| {names.get(c['axis'], AXES[c['axis']])} | {c['x']:.3g} | {c['dtype']} | {c['cost']:.2f} "
        f"[{c['quartiles'][0]:.2f}, {c['quartiles'][1]:.2f}] | {c['seconds']:.3f} |"
        for c in results["cells"]
    ]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    transformers.logging.disable_progress_bar()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.figure", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default=DEFAULT_MODEL, help="a name or a folder (default: %(default)s)")
    parser.add_argument("--dtypes", default=",".join(native_dtypes()), help="(default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=9, help="turns of a point at most (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="(default: %(default)s)")
    parser.add_argument("--output", type=Path, required=True, help="a folder for cost.png, cost.json and cost.md")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    facts, cells = machine(), []
    for dtype in args.dtypes.split(","):
        print(f"{dtype} ...", file=sys.stderr)
        backbone = load_backbone(args.model, dtype=dtype, device="cpu")
        cells += [measure(backbone, point, args.rounds) for point in points(backbone)]
        del backbone
    results = {"machine": facts, "model": args.model, "rounds": args.rounds, "cells": cells}
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "cost.json").write_text(json.dumps(results, indent=1) + "\n")
    (args.output / "cost.md").write_text(table(results) + "\n")
    draw(cells, args.output / "cost.png")
    print(table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
