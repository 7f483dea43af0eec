"""Adaptation's speed: ephemera, a PEFT + SGD loop, other peers, and the floor that the arithmetic sets.

    python -m benchmarks.adapt [--json] [--peers peft,vmap,einsum] [--lengths short,long] [--dtypes float32,bfloat16]
    python -m benchmarks.adapt --device cuda --lengths short --batch 64

All take turns on the same prompts in one run, so that a machine that slows down slows them alike.
`vs_peft` is ephemera's prompts/s over PEFT's (higher is better), `vs_floor` ephemera's seconds over the
floor's (lower is better, 1 is the best there can be). Exits with 1 if in float32 ephemera's adapters are not those of
a PEFT loop in float64, which takes a few of the prompts (on the CPU). `--memory` measures peak memory too, in fresh processes.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
import transformers

from benchmarks.memory import measure
from benchmarks.peers import PEERS, EinsumLoop, VmapLoop
from benchmarks.report import table
from ephemera.bench.contenders import PeftLoop, adapt_batched, encoded, initial_lora, max_relative_difference
from ephemera.bench.floor import Floor, count
from ephemera.bench.prompts import LENGTHS
from ephemera.bench.timing import DTYPES, machine, native_dtypes, spread, timed, turns
from ephemera.downloads import DEFAULT_MODEL
from ephemera.llm.frozen_lm import FrozenLM
from ephemera.llm.load import find_device, load_backbone
from ephemera.lora import LoraBatch
from ephemera.messages import unknown

TOLERANCE = 1e-4  # of float32 adapters, against steps in float64; bfloat16's differ by rounding
# Between two float32 loops: torch's own softmax over 49,152 words loses up to 7e-4 where vectors are short (AVX2)
PEER_TOLERANCE = 5e-3
EXACT = {"short": 2, "long": 1}  # prompts of which float64 adapters are made, the first ones
BATCH = {"short": 8, "long": 4}  # long prompts adapt two at a time on a CPU: four show what eight would
MINUTES = 5.0  # of timed rounds in all, unless two rounds of each comparison take longer


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}. See python -m benchmarks.adapt --help.")


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = _Parser(prog="python -m benchmarks.adapt", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="the last line on stdout is one JSON object")
    parser.add_argument("--model", default=DEFAULT_MODEL, help="a name or a folder (default: %(default)s)")
    parser.add_argument("--batch", type=int, help="prompts (default: 8 short ones, 4 long ones)")
    parser.add_argument("--device", default="cpu", help="e.g. cuda (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=3, help="gradient steps K (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="rounds at most (default: %(default)s)")
    parser.add_argument(
        "--minutes", type=float, default=MINUTES, help="of rounds in all; two are always made (default: %(default)s)"
    )
    parser.add_argument("--peers", default="peft", help=f"of {','.join(PEERS)}; PEFT always (default: %(default)s)")
    parser.add_argument("--lengths", default=",".join(LENGTHS), help="of %(default)s")
    parser.add_argument(
        "--dtypes",
        help=f"of {','.join(DTYPES)} (default: both, on a CPU without instructions for bfloat16 float32 alone)",
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="(default: %(default)s)")
    parser.add_argument(
        "--memory", action=argparse.BooleanOptionalAction, default=False, help="peak memory too (default: no)"
    )
    parser.add_argument("--output", type=Path, help="a folder for results.json and results.md")
    args = parser.parse_args(argv)
    for name in ("batch", "steps", "repeats", "threads"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"--{name} is {getattr(args, name)}; it must be 1 or more.")
    args.lengths = _among("length", args.lengths, LENGTHS)
    if args.memory and args.device != "cpu":
        raise ValueError(f"--memory measures on the CPU alone; leave it out with --device {args.device}.")
    native = native_dtypes(find_device(args.device))
    args.left_out = [dtype for dtype in DTYPES if args.dtypes is None and dtype not in native]
    args.dtypes = native if args.dtypes is None else _among("dtype", args.dtypes, DTYPES)
    args.peers = _among("peer", f"peft,{args.peers}", PEERS)
    return args


def _among(what: str, given: str, allowed: Sequence[str]) -> list[str]:
    names = [name.strip() for name in given.split(",")]
    for name in names:
        if name not in allowed:
            raise unknown(what, name, allowed)
    return [name for name in allowed if name in names]


class Comparison:
    """One length and dtype: everyone adapts to the same prompts, in turns."""

    def __init__(self, backbone: FrozenLM, peers: dict[str, Any], length: str, batch: int, steps: int):
        self.backbone, self.length, self.batch, self.steps = backbone, length, batch, steps
        self.prompts = [row.prompt for row in encoded(backbone, length, batch)]
        self.initial = initial_lora(backbone, self.prompts)
        self.floor = Floor(count(backbone, self.prompts), steps, backbone.dtype, backbone.device)
        self.peers = peers
        self.results: dict[str, Any] = {}

    def run(self, rounds: int, budget_s: float) -> dict[str, Any]:
        """A step on one prompt to warm up, then up to `rounds` timed rounds; the first one's results are compared."""
        some, first = self.prompts[:1], self.initial.rows([0])
        adapt_batched(self.backbone, some, 1)
        for peer in self.peers.values():
            peer.adapt_all(some, first, 1)
        contenders: dict[str, Callable[[], float]] = {
            "ephemera": self._timed("ephemera", lambda: adapt_batched(self.backbone, self.prompts, self.steps))
        }
        for name, peer in self.peers.items():
            contenders[name] = self._timed(
                name, lambda peer=peer: peer.adapt_all(self.prompts, self.initial, self.steps)
            )
        contenders["floor"] = self.floor.seconds
        return self._cell(turns(contenders, rounds, budget_s=budget_s))

    def _timed(self, name: str, call: Callable[[], Any]) -> Callable[[], float]:
        def turn() -> float:
            return timed(lambda: self.results.__setitem__(name, call()))

        return turn

    def _cell(self, seconds: dict[str, list[float]]) -> dict[str, Any]:
        spreads = {who: spread(values) for who, values in seconds.items()}
        cell: dict[str, Any] = {
            who: {"seconds": values, "prompts_per_second": self.batch / values["median"]}
            for who, values in spreads.items()
        }
        mine = self.results["ephemera"]
        for name in self.peers:
            cell[name]["max_relative_difference"] = max_relative_difference(mine, rows_of(self.results[name]))
            cell[f"vs_{name}"] = spreads[name]["median"] / spreads["ephemera"]["median"]
            cell[f"vs_{name}_rounds"] = [p / e for e, p in zip(seconds["ephemera"], seconds[name], strict=True)]
        gflop = self.steps * self.floor.work.flops / 1e9
        cell["floor"] |= {"gflop": gflop, "gflop_per_second": gflop / spreads["floor"]["median"]}
        return {
            "length": self.length,
            "dtype": str(self.backbone.dtype).removeprefix("torch."),
            "batch": self.batch,
            "rounds": len(seconds["ephemera"]),
            "tokens": [len(ids) for ids in self.prompts],
            **cell,
            "vs_floor": spreads["ephemera"]["median"] / spreads["floor"]["median"],
            "vs_floor_rounds": [e / f for e, f in zip(seconds["ephemera"], seconds["floor"], strict=True)],
            "max_relative_difference": cell["peft"]["max_relative_difference"],
        }


def rows_of(result: LoraBatch | list[list[torch.Tensor]]) -> list[list[torch.Tensor]]:
    """Every prompt's tensors, of a peer that adapts one prompt after the other or all together."""
    if isinstance(result, LoraBatch):
        return [[t[row] for t in result.tensors] for row in range(result.batch_size)]
    return result


@dataclass(frozen=True, eq=False)
class Exactness:
    """Some prompts' float32 adapters, to be compared with those of a PEFT loop in float64."""

    prompts: list[list[int]]
    initial: LoraBatch
    found: dict[str, LoraBatch]

    @classmethod
    def of(cls, comparison: Comparison) -> Exactness:
        count = min(EXACT[comparison.length], len(comparison.prompts))
        initial = comparison.initial.rows(range(count))
        found = {
            who: initial.with_tensors([torch.stack(column) for column in zip(*rows_of(result)[:count], strict=True)])
            for who, result in comparison.results.items()
        }
        return cls(comparison.prompts[:count], initial, found)

    def compare(self, exact: PeftLoop, steps: int) -> dict[str, Any]:
        wide = self.initial.with_tensors([t.double() for t in self.initial.tensors]).to("cpu")
        want = exact.adapt_all(self.prompts, wide, steps)
        return {"prompts": len(self.prompts)} | {
            who: max_relative_difference(lora.with_tensors([t.double() for t in lora.tensors]), want)
            for who, lora in self.found.items()
        }


def peak_memory(settings: dict[str, Any]) -> dict[str, Any]:
    """Bytes over the loaded model, each in a fresh process; training against one step and its stored gradients."""
    found = {who: measure(who, **settings) for who in ("ephemera", "peft", "step", "scalenet")}
    bound = found["step"]["peak_bytes"] + settings["steps"] * found["step"]["gradient_bytes"]
    peaks = {who: values["peak_bytes"] for who, values in found.items()}
    return {**peaks, "scalenet_bound": bound, "scalenet_ratio": peaks["scalenet"] / bound}


def benchmark(args: argparse.Namespace) -> dict[str, Any]:
    """The whole result: one object per length, and everything else under `details`."""
    torch.set_num_threads(args.threads)
    facts = machine(find_device(args.device))
    if facts["load_average"] > 0.5:
        _say(f"warning: other programs are running (load average {facts['load_average']:.1f}); times will be noise.")
    results: dict[str, Any] = {length: {} for length in args.lengths}
    cells, exact_of = [], []
    todo = len(args.dtypes) * len(args.lengths)
    left_s = 60 * args.minutes
    if args.left_out:
        _say(f"without {', '.join(args.left_out)}, for which this CPU has no instructions (null in the JSON).")
    for dtype in args.dtypes:
        _say(f"loading {args.model} in {dtype}, twice ...")
        backbone = load_backbone(args.model, dtype=dtype, device=args.device)
        if any(p.rows is not None for p in backbone.projections) or backbone.path.suffix == ".gguf":
            raise ValueError(
                f"{args.model} is a GGUF file or fuses query and value; the PEFT loop needs a folder of safetensors "
                "with separate projections."
            )
        loop = PeftLoop(backbone)
        every = {"peft": loop, "vmap": VmapLoop(backbone, loop), "einsum": EinsumLoop(backbone)}
        peers = {name: every[name] for name in args.peers}
        for length in args.lengths:
            _say(f"{length} {dtype}: up to {args.repeats} rounds of ephemera, {', '.join(peers)} and the floor ...")
            start = time.perf_counter()
            comparison = Comparison(backbone, peers, length, args.batch or BATCH[length], args.steps)
            cell = comparison.run(args.repeats, left_s / todo)
            todo, left_s = todo - 1, left_s - (time.perf_counter() - start)
            cells.append(cell)
            results[length] |= {f"{key}_{dtype}": cell[key] for key in ("vs_peft", "vs_floor")}
            results[length] |= {f"vs_{name}_{dtype}": cell[f"vs_{name}"] for name in peers if name != "peft"}
            if dtype == "float32":
                exact_of.append((cell, Exactness.of(comparison)))
            del comparison
        del backbone, loop, every, peers
    if exact_of:
        _say("float64: a PEFT loop on a few of the prompts, to compare with ...")
        exact = PeftLoop(load_backbone(args.model, dtype="float64", device="cpu"))
        for cell, some in exact_of:
            cell["exact"] = some.compare(exact, args.steps)
    for cell in cells if args.memory else []:
        _say(f"{cell['length']} {cell['dtype']}: peak memory in fresh processes ...")
        where = {key: cell[key] for key in ("length", "dtype", "batch")}
        sizes = {key: getattr(args, key) for key in ("model", "steps", "threads")}
        cell["memory"] = peak_memory(where | sizes)
    for length in args.lengths:  # the same keys on every machine
        for dtype in args.left_out:
            results[length] |= dict.fromkeys((f"vs_peft_{dtype}", f"vs_floor_{dtype}"))
    settings = {key: getattr(args, key) for key in ("model", "device", "steps", "repeats", "threads")}
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
    float32 = [c for c in results["details"]["cells"] if c["dtype"] == "float32"]
    differing = [
        f"those of {peer} on {c['length']} prompts ({c[peer]['max_relative_difference']:.1e}, at most {PEER_TOLERANCE})"
        for c in float32
        for peer in args.peers
        if not c[peer]["max_relative_difference"] < PEER_TOLERANCE
    ]
    differing += [
        f"a float64 loop's on {c['length']} prompts ({c['exact']['ephemera']:.1e}, at most {TOLERANCE})"
        for c in float32
        if not c["exact"]["ephemera"] < TOLERANCE
    ]
    if differing:
        _say(f"error: float32 adapters of ephemera differ from {', and '.join(differing)}.")
    return 1 if differing else 0


def _say(line: str) -> None:
    print(line, file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
