"""Adaptation's speed and memory: ephemera, a PEFT + SGD loop, and the floor that the arithmetic sets.

    python -m benchmarks.adapt [--json] [--lengths short,long] [--dtypes float32,bfloat16]

All three take turns on the same prompts in one run, so that a machine that slows down slows them alike.
`vs_peft` is ephemera's prompts/s over PEFT's (higher is better), `vs_floor` ephemera's seconds over the
floor's (lower is better, 1 is the best there can be). Exits with 1 if in float32 the two end in
different adapters. On the CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
import transformers

from benchmarks.contenders import PeftLoop, adapt_batched, encoded, initial_lora, max_relative_difference
from benchmarks.floor import Floor, count
from benchmarks.memory import measure
from benchmarks.prompts import LENGTHS
from benchmarks.report import machine, spread, table
from ephemera.backbone import Backbone, load_backbone
from ephemera.errors import unknown
from ephemera.store import DEFAULT_MODEL

DTYPES = ("float32", "bfloat16")
TOLERANCE = 1e-4  # of float32 adapters; bfloat16's differ by rounding


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}. See python -m benchmarks.adapt --help.")


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = _Parser(prog="python -m benchmarks.adapt", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="the last line on stdout is one JSON object")
    parser.add_argument("--model", default=DEFAULT_MODEL, help="a name or a folder (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="prompts (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=3, help="gradient steps K (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="rounds (default: %(default)s)")
    parser.add_argument("--lengths", default=",".join(LENGTHS), help="of %(default)s")
    parser.add_argument("--dtypes", default=",".join(DTYPES), help="of %(default)s")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="(default: %(default)s)")
    parser.add_argument("--no-memory", action="store_true", help="leave out the peak memory")
    parser.add_argument("--output", type=Path, help="a folder for results.json and results.md")
    args = parser.parse_args(argv)
    for name in ("batch", "steps", "repeats", "threads"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} is {getattr(args, name)}; it must be 1 or more.")
    args.lengths = _among("length", args.lengths, LENGTHS)
    args.dtypes = _among("dtype", args.dtypes, DTYPES)
    return args


def _among(what: str, given: str, allowed: Sequence[str]) -> list[str]:
    names = [name.strip() for name in given.split(",")]
    for name in names:
        if name not in allowed:
            raise unknown(what, name, allowed)
    return [name for name in allowed if name in names]


def compare(backbone: Backbone, loop: PeftLoop, length: str, batch: int, steps: int, repeats: int) -> dict[str, Any]:
    """One length and dtype: a round to warm up and compare results, then `repeats` timed ones, taking turns."""
    prompts = [row.prompt for row in encoded(backbone, length, batch)]
    initial = initial_lora(backbone, prompts)
    work = count(backbone, prompts)
    floor = Floor(work, steps, backbone.dtype)
    lora, rows = adapt_batched(backbone, prompts, steps), loop.adapt_all(prompts, initial, steps)
    seconds: dict[str, list[float]] = {"ephemera": [], "peft": [], "floor": []}
    for _ in range(repeats):
        seconds["ephemera"].append(_timed(lambda: adapt_batched(backbone, prompts, steps)))
        seconds["peft"].append(_timed(lambda: loop.adapt_all(prompts, initial, steps)))
        seconds["floor"].append(floor.seconds())
    spreads = {who: spread(values) for who, values in seconds.items()}
    cell: dict[str, Any] = {
        who: {"seconds": values, "prompts_per_second": batch / values["median"]} for who, values in spreads.items()
    }
    gflop = steps * work.flops / 1e9
    cell["floor"] |= {"gflop": gflop, "gflop_per_second": gflop / spreads["floor"]["median"]}
    return {
        "length": length,
        "dtype": str(backbone.dtype).removeprefix("torch."),
        "tokens": [len(ids) for ids in prompts],
        **cell,
        "vs_peft": spreads["peft"]["median"] / spreads["ephemera"]["median"],
        "vs_floor": spreads["ephemera"]["median"] / spreads["floor"]["median"],
        "vs_peft_rounds": [p / e for e, p in zip(seconds["ephemera"], seconds["peft"], strict=True)],
        "vs_floor_rounds": [e / f for e, f in zip(seconds["ephemera"], seconds["floor"], strict=True)],
        "max_relative_difference": max_relative_difference(lora, rows),
    }


def _timed(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def peak_memory(settings: dict[str, Any]) -> dict[str, Any]:
    """Bytes over the loaded model, each in a fresh process; training against one step and its stored gradients."""
    found = {who: measure(who, **settings) for who in ("ephemera", "peft", "step", "scalenet")}
    bound = found["step"]["peak_bytes"] + settings["steps"] * found["step"]["gradient_bytes"]
    peaks = {who: values["peak_bytes"] for who, values in found.items()}
    return {**peaks, "scalenet_bound": bound, "scalenet_ratio": peaks["scalenet"] / bound}


def benchmark(args: argparse.Namespace) -> dict[str, Any]:
    """The whole result: one object per length, and everything else under `details`."""
    torch.set_num_threads(args.threads)
    facts = machine()
    if facts["load_average"] > 0.5:
        _say(f"warning: other programs are running (load average {facts['load_average']:.1f}); times will be noise.")
    results: dict[str, Any] = {length: {} for length in args.lengths}
    cells = []
    for dtype in args.dtypes:
        _say(f"loading {args.model} in {dtype}, twice ...")
        backbone = load_backbone(args.model, dtype=dtype, device="cpu")
        if any(p.rows is not None for p in backbone.projections) or backbone.path.suffix == ".gguf":
            raise ValueError(
                f"{args.model} is a GGUF file or fuses query and value; the PEFT loop needs a folder of safetensors "
                "with separate projections."
            )
        loop = PeftLoop(backbone)
        for length in args.lengths:
            _say(f"{length} {dtype}: {args.repeats} rounds of ephemera, PEFT and the floor ...")
            cell = compare(backbone, loop, length, args.batch, args.steps, args.repeats)
            cells.append(cell)
            results[length] |= {f"{key}_{dtype}": cell[key] for key in ("vs_peft", "vs_floor")}
        del backbone, loop
    for cell in cells if not args.no_memory else []:
        _say(f"{cell['length']} {cell['dtype']}: peak memory in fresh processes ...")
        where = {key: cell[key] for key in ("length", "dtype")}
        sizes = {key: getattr(args, key) for key in ("model", "batch", "steps", "threads")}
        cell["memory"] = peak_memory(where | sizes)
    settings = {key: getattr(args, key) for key in ("model", "batch", "steps", "repeats", "threads")}
    return {**results, "details": {"machine": facts, "settings": settings, "cells": cells}}


def main(argv: Sequence[str] | None = None) -> int:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    transformers.logging.disable_progress_bar()
    try:
        args = arguments(argv)
        results = benchmark(args)
    except ValueError as error:
        _say(f"error: {error}")
        return 2
    text = table(results["details"])
    print(text, file=sys.stderr if args.json else sys.stdout)
    if args.output:
        args.output.mkdir(parents=True, exist_ok=True)
        (args.output / "results.json").write_text(json.dumps(results, indent=1) + "\n")
        (args.output / "results.md").write_text(text + "\n")
    if args.json:
        print(json.dumps(results))
    differing = [
        f"{c['length']} ({c['max_relative_difference']:.1e})"
        for c in results["details"]["cells"]
        if c["dtype"] == "float32" and c["max_relative_difference"] >= TOLERANCE
    ]
    if differing:
        _say(f"error: float32 adapters of ephemera and PEFT differ by more than {TOLERANCE}: {', '.join(differing)}.")
    return 1 if differing else 0


def _say(line: str) -> None:
    print(line, file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
