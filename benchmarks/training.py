"""What training costs beside the passes it cannot do without: K adaptation steps and one pass over the answers.

    python -m benchmarks.training [--json] [--networks scalenet,generator,joint] [--lengths short,long]

`training` is `ephemera train`'s own loop (batches, forward and backward passes, clipping, AdamW, metrics) over some
optimiser steps; `passes` are the same steps' rows adapted at a fixed rate, and a forward and backward pass over their
answers (for a generator also the prompt's own forward). `ratio` is the first over the second. `waiting` is the share of
training's time outside the trainee: preparing batches, clipping, AdamW, metrics.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from accelerate import Accelerator

from ephemera.adapt import adapt
from ephemera.batch import batch_tokens, length_batches
from ephemera.bench.contenders import INIT, RATE, encoded
from ephemera.bench.prompts import LENGTHS
from ephemera.bench.timing import machine, machine_lines, native_dtypes, spread, timed, turns
from ephemera.config import JointSettings, OptimizerSettings
from ephemera.downloads import DEFAULT_MODEL
from ephemera.inits import LoraGenerator
from ephemera.llm.frozen_lm import FrozenLM
from ephemera.llm.load import load_backbone
from ephemera.rates import FixedRate, ScaleNet
from ephemera.scoring import Encoded, answer_gradient, prompt_batch
from ephemera.training.generator import GeneratorTrainee
from ephemera.training.loop import Schedule, Trainee, batches, train
from ephemera.training.many_steps import ScaleNetTrainee

NETWORKS = ("scalenet", "generator", "joint")
NEVER = Schedule(checkpoint_every=1 << 30, validate_every=1 << 30)
KMAX = 5


class Watched:
    """A trainee whose own seconds are counted, and which is not validated."""

    def __init__(self, trainee: Trainee):
        self.trainee = trainee
        self.seconds = 0.0

    @property
    def network(self) -> torch.nn.Module:
        return self.trainee.network

    @property
    def learning_rates(self) -> dict[str, float]:
        return self.trainee.learning_rates

    def backward(self, rows: Sequence[Encoded], step: int) -> dict[str, float] | None:
        start = time.perf_counter()
        report = self.trainee.backward(rows, step)
        self.seconds += time.perf_counter() - start
        return report

    def validate(self) -> dict[str, float]:
        return {}


class Training:
    """One network and length: the loop, and the bare passes of the same plan."""

    def __init__(
        self, backbone: FrozenLM, network: str, length: str, batch: int, steps: int, hidden_size: int, seed: int = 0
    ):
        self.backbone, self.network, self.length = backbone, network, length
        self.rows = encoded(backbone, length, 2 * batch)
        self.settings = OptimizerSettings(samples=batch * steps, batch_size=batch, seed=seed)
        lengths = [len(row.prompt) + len(row.answer) for row in self.rows]
        self.plan = list(batches(lengths, batch_size=batch, total=batch * steps, seed=seed))
        least = 1 if network == "scalenet" else 0  # K = 0 still trains a generator
        draws = (random.Random(f"{seed}:{step}").randint(least, KMAX) for step in range(steps))
        self.Ks = [0] * steps if network == "generator" else list(draws)
        self.hidden_size = hidden_size
        self.waiting: list[float] = []

    def train(self) -> float:
        """The loop's own seconds, by its metrics: its last checkpoint is not training."""
        trainee = Watched(self._trainee())
        with tempfile.TemporaryDirectory() as folder:
            train(trainee, self.rows, self.settings, NEVER, Path(folder), Accelerator(cpu=True), resume=False)
            lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
        seconds = max(value["seconds"] for value in map(json.loads, lines) if "seconds" in value)
        self.waiting.append(1 - trainee.seconds / seconds)
        return seconds

    def passes(self) -> float:
        return timed(lambda: [self._passes([self.rows[i] for i in rows], K) for rows, K in self.steps()])

    def steps(self) -> list[tuple[list[int], int]]:
        return [(rows, K) for rows, K in zip(self.plan, self.Ks, strict=True) if K or self.network != "scalenet"]

    def _passes(self, rows: Sequence[Encoded], K: int) -> None:
        lengths = [len(row.prompt) + len(row.answer) for row in rows]
        for part in length_batches(lengths, batch_size=len(rows), max_tokens=batch_tokens(self.backbone.device)):
            some = [rows[i] for i in part]
            batch = prompt_batch(self.backbone, some)
            if self.network != "scalenet":
                with torch.no_grad():
                    self.backbone.forward(batch)
            trace = adapt(self.backbone, batch, INIT(self.backbone, batch, [0] * len(some)), FixedRate(RATE), K)
            answer_gradient(self.backbone, some, trace.lora)

    def _trainee(self) -> Trainee:
        backbone = self.backbone
        scalenet = ScaleNet(
            hidden_size=backbone.hidden_size, projections=len(backbone.projections), base_rates=(RATE,) * KMAX
        )
        if self.network == "scalenet":
            return ScaleNetTrainee(
                backbone,
                INIT,
                scalenet,
                validation=[],
                validation_steps=[],
                batch_size=self.settings.batch_size,
                clip_prompt=1.0,
                seed=self.settings.seed,
            )
        generator = LoraGenerator(
            projections=backbone.projections, state_size=backbone.hidden_size, hidden_size=self.hidden_size
        )
        joint = None if self.network == "generator" else JointSettings(base_rates=[RATE] * KMAX)
        return GeneratorTrainee(
            backbone,
            generator.train(),
            validation={},
            scalenet=None if joint is None else scalenet,
            joint=joint,
            seed=self.settings.seed,
        )

    def compare(self, rounds: int, budget_s: float) -> dict[str, Any]:
        contenders: dict[str, Callable[[], float]] = {"training": self.train, "passes": self.passes}
        rows, K = self.steps()[0]
        self._passes([self.rows[i] for i in rows[:1]], K)
        seconds = turns(contenders, rounds, budget_s=budget_s)
        by_round = [t / p for t, p in zip(seconds["training"], seconds["passes"], strict=True)]
        return {
            "network": self.network,
            "length": self.length,
            "dtype": str(self.backbone.dtype).removeprefix("torch."),
            "batch": self.settings.batch_size,
            "tokens": [len(row.prompt) + len(row.answer) for row in self.rows],
            "K": [K for _, K in self.steps()],
            "rounds": len(by_round),
            "seconds": {name: spread(values) for name, values in seconds.items()},
            "ratio": median(by_round),
            "ratio_rounds": by_round,
            "waiting": median(self.waiting),
        }


def table(results: dict[str, Any]) -> str:
    lines = [
        f"Model {results['settings']['model']}; optimiser steps of {results['settings']['batch']} rows; generator "
        f"{results['settings']['hidden']} wide.",
        *machine_lines(results["machine"]),
        "",
        "| network | rows | dtype | K of the steps | rounds | training (s) | its passes (s) | ratio | outside the passes |",
        "|---|---|---|---|--:|--:|--:|--:|--:|",
    ]
    for cell in results["cells"]:
        training, passes = (cell["seconds"][name]["median"] for name in ("training", "passes"))
        by_round = cell["ratio_rounds"]
        lines.append(
            f"| {cell['network']} | {cell['length']} ({min(cell['tokens'])}-{max(cell['tokens'])} tokens) | "
            f"{cell['dtype']} | {', '.join(map(str, cell['K']))} | {cell['rounds']} | {training:.2f} | {passes:.2f} | "
            f"{cell['ratio']:.3f} [{min(by_round):.3f}, {max(by_round):.3f}] | {100 * cell['waiting']:.2f} % |"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    transformers.logging.disable_progress_bar()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="the last line on stdout is one JSON object")
    parser.add_argument("--model", default=DEFAULT_MODEL, help="a name or a folder (default: %(default)s)")
    parser.add_argument("--networks", default=",".join(NETWORKS), help="of %(default)s")
    parser.add_argument("--lengths", default="short", help=f"of {','.join(LENGTHS)} (default: %(default)s)")
    parser.add_argument("--dtypes", default=native_dtypes()[-1], help="(default: %(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="rows of a step (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=4, help="optimiser steps of a round (default: %(default)s)")
    parser.add_argument(
        "--hidden", type=int, default=512, help="width of the generator (default: %(default)s, as shipped)"
    )
    parser.add_argument("--rounds", type=int, default=3, help="at most (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=2.5, help="of rounds in all (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="(default: %(default)s)")
    parser.add_argument("--output", type=Path, help="a folder for training.json and training.md")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    facts = machine()
    networks, lengths, dtypes = (getattr(args, key).split(",") for key in ("networks", "lengths", "dtypes"))
    budget_s = 60 * args.minutes / (len(networks) * len(lengths) * len(dtypes))
    cells = []
    for dtype in dtypes:
        backbone = load_backbone(args.model, dtype=dtype, device="cpu")
        for network in networks:
            for length in lengths:
                print(f"{network} {length} {dtype} ...", file=sys.stderr)
                training = Training(backbone, network, length, args.batch, args.steps, args.hidden)
                cells.append(training.compare(args.rounds, budget_s))
        del backbone
    settings = {key: getattr(args, key) for key in ("model", "batch", "steps", "hidden", "threads")}
    results = {"machine": facts, "settings": settings, "cells": cells}
    text = table(results)
    print(text, file=sys.stderr if args.json else sys.stdout)
    if args.output:
        args.output.mkdir(parents=True, exist_ok=True)
        (args.output / "training.json").write_text(json.dumps(results, indent=1) + "\n")
        (args.output / "training.md").write_text(text + "\n")
    if args.json:
        print(json.dumps(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
