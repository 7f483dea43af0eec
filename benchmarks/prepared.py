"""How much faster one step's rates are trained from prompts that are prepared once (reach answer) than sample by sample.

    python -m benchmarks.prepared [--lengths nq-open,squad] [--passes 8] [--output docs/results/benchmark]

`prepared` is `passes` passes over a batch of rows in `ephemera train scalenet` with `reach: answer`, K = 1: each prompt is
read and differentiated once. `reading` is that part of it: what would be left if passes cost nothing. `plain` is the papers' way (adapters everywhere): each pass costs a forward and a backward pass
over the prompts, and one over prompts and answers. One such pass is timed and counted `passes` times. Both take turns.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers

from ephemera.bench.contenders import INIT, RATE, encoded
from ephemera.bench.timing import machine, machine_lines, spread, timed, turns
from ephemera.downloads import DEFAULT_MODEL
from ephemera.llm.frozen_lm import FrozenLM
from ephemera.llm.load import load_backbone
from ephemera.made_for import MadeFor
from ephemera.rates import ScaleNet
from ephemera.scoring import Encoded, batches_of
from ephemera.training.meta_gradient import scalenet_backward
from ephemera.training.one_step import one_step_backward, scored

LENGTHS = ("nq-open", "squad")
SQUAD = 200  # prompt tokens of a SQuAD row, about


def rows_of(backbone: FrozenLM, length: str, batch: int) -> list[Encoded]:
    """NQ-Open's questions; or prompts of SQuAD's length with answers as short."""
    short = encoded(backbone, "short", batch)
    if length == "nq-open":
        return short
    long = encoded(backbone, "long", batch)
    return [Encoded(a.id, b.prompt[:SQUAD], a.answer) for a, b in zip(short, long, strict=True)]


class Contenders:
    def __init__(self, backbone: FrozenLM, rows: Sequence[Encoded], passes: int):
        self.backbone, self.passes = backbone, passes
        self.rows = sorted(rows, key=lambda row: len(row.prompt))
        self.groups = batches_of(backbone, rows, len(rows))
        sizes = {"hidden_size": backbone.hidden_size, "projections": len(backbone.projections), "base_rates": (RATE,)}
        self.answer = ScaleNet(**sizes, made_for=MadeFor(("own",), "plain", "answer", 1))
        self.everywhere = ScaleNet(**sizes)

    def prepared(self) -> None:
        some = scored(self.backbone, INIT, self.rows, self.answer, 0)  # prompts in parts, all answers at once
        for _ in range(self.passes):
            one_step_backward(self.answer, some, clip=1.0)

    def reading(self) -> None:
        scored(self.backbone, INIT, self.rows, self.answer, 0)

    def plain(self) -> None:
        for rows in self.groups:
            scalenet_backward(self.backbone, INIT, self.everywhere, rows, 1, seed=0, clip=1.0)


def compare(backbone: FrozenLM, length: str, batch: int, passes: int, rounds: int) -> dict[str, Any]:
    rows = rows_of(backbone, length, batch)
    them = Contenders(backbone, rows, passes)
    calls = {
        "prepared": lambda: timed(them.prepared),
        "reading": lambda: timed(them.reading),
        "plain": lambda: passes * timed(them.plain),
    }
    for call in calls.values():
        call()  # warm
    seconds = turns(calls, rounds)
    by_round = [p / q for p, q in zip(seconds["plain"], seconds["prepared"], strict=True)]
    return {
        "length": length,
        "tokens": [len(row.prompt) for row in rows],
        "answer_tokens": [len(row.answer) for row in rows],
        "seconds": {name: spread(values) for name, values in seconds.items()},
        "speedup": median(by_round),
        "speedup_rounds": by_round,
        "bound": median(p / q for p, q in zip(seconds["plain"], seconds["reading"], strict=True)),
    }


def table(results: dict[str, Any]) -> str:
    settings = results["settings"]
    lines = [
        f"Model {settings['model']}, float32; {settings['batch']} rows, {settings['passes']} passes, K = 1.",
        *machine_lines(results["machine"]),
        "",
        "| rows | prompt tokens | answer tokens | plain (s) | prepared (s) | speed-up | if passes were free |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for cell in results["cells"]:
        plain, prepared = (cell["seconds"][name]["median"] for name in ("plain", "prepared"))
        low, high = min(cell["speedup_rounds"]), max(cell["speedup_rounds"])
        spans = (f"{min(cell[key])}-{max(cell[key])}" for key in ("tokens", "answer_tokens"))
        lines.append(
            f"| {cell['length']} | {' | '.join(spans)} | {plain:.2f} | {prepared:.2f} | "
            f"{cell['speedup']:.2f} [{low:.2f}, {high:.2f}] | {cell['bound']:.1f} |"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    transformers.logging.disable_progress_bar()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.prepared", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default=DEFAULT_MODEL, help="a name or a folder (default: %(default)s)")
    parser.add_argument("--lengths", default=",".join(LENGTHS), help="(default: %(default)s)")
    parser.add_argument("--batch", type=int, default=32, help="rows (default: %(default)s)")
    parser.add_argument("--passes", type=int, default=8, help="over them (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="(default: %(default)s)")
    parser.add_argument("--output", type=Path, help="a folder for prepared.json and prepared.md")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    backbone = load_backbone(args.model, dtype="float32", device="cpu")
    cells = []
    for length in args.lengths.split(","):
        if length not in LENGTHS:
            print(f"error: unknown length {length!r}; give some of {', '.join(LENGTHS)}.", file=sys.stderr)
            return 2
        print(f"{length} ...", file=sys.stderr)
        cells.append(compare(backbone, length, args.batch, args.passes, args.rounds))
    settings = {key: getattr(args, key) for key in ("model", "batch", "passes", "threads")}
    results = {"machine": machine(), "settings": settings, "cells": cells}
    text = table(results)
    print(text)
    if args.output:
        args.output.mkdir(parents=True, exist_ok=True)
        (args.output / "prepared.json").write_text(json.dumps(results, indent=1) + "\n")
        (args.output / "prepared.md").write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
