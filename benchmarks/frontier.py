"""A cheaper gradient: share of the full NLL gain kept, against time to first token in plain prefills.

    python -m benchmarks.frontier quality --source data/nq_open --lens runs/lens/network --output docs/results/frontier
    python -m benchmarks.frontier time --output docs/results/frontier
    python -m benchmarks.frontier report --output docs/results/frontier

`quality` fills in what results.json lacks (validation rows of NQ-Open: the best uniform rate of each point on `--search`
rows, then the answers' NLL on `--rows` others). `time` measures all points in turns on one batch, each between two plain
prefills: its price is the median of its ratios to them. `report` writes table.md and frontier.png. On the CPU.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.frontier_points import Point, points
from benchmarks.frontier_report import write_report
from ephemera.artifact import shipped
from ephemera.batch import TokenBatch
from ephemera.begin import adapt_from, reach_of
from ephemera.bench.prompts import examples
from ephemera.bench.timing import DTYPES, machine, native_dtypes, spread, timed
from ephemera.downloads import DEFAULT_MODEL
from ephemera.early_exit.lens import Lens, load_lens
from ephemera.inits import ZeroInit
from ephemera.llm.frozen_lm import FrozenLM
from ephemera.llm.load import load_backbone
from ephemera.llm.prefill import Prefill, prefill
from ephemera.made_for import Reach
from ephemera.prompt_loss import PROMPT, PromptLoss
from ephemera.rate_search import LATER_GRID
from ephemera.rates import FixedRate, Rate, Trains, adapted_by, load_rate
from ephemera.scoring import Encoded, batches_of, encode_examples, prompt_batch
from ephemera.tasks import load_dataset

INIT = ZeroInit()
BATCH = 16
STEP = 2.0  # between neighbouring rates of a search
RESULTS = "results.json"


@dataclass(frozen=True)
class Schedule:
    """A uniform rate for each step."""

    rates: tuple[float, ...]
    objective: PromptLoss = PROMPT
    reach: Reach = "all"
    made_for: None = None
    trained_for: None = None
    gate: None = None
    trains: Trains = "both"
    label: str = "schedule"

    @property
    def max_steps(self) -> int:
        return len(self.rates)

    @property
    def uses_representation(self):
        return FixedRate(0).uses_representation

    def rates_BM(self, h_BH: Tensor | None, k: int, K: int, *, like: Tensor, projections: int) -> Tensor:
        return like.new_full((like.shape[0], projections), self.rates[k - 1])

    def check(self, backbone: FrozenLM) -> None:
        self.objective.check(backbone)


def objective_of(point: Point, lens: Lens | None) -> PromptLoss:
    if point.exit_layer is None:
        return PromptLoss(vocabulary=point.vocabulary)
    through = None if lens is None or not point.lens else lens.only(point.exit_layer)
    return PromptLoss(point.exit_layer, through, point.vocabulary)


def answer_nlls(backbone: FrozenLM, rows: Sequence[Encoded], rule: Rate | None, K: int) -> list[float]:
    """Each row's answer NLL after K steps, in the order of the rows."""
    found: dict[str, float] = {}
    for batch_rows in batches_of(backbone, rows, BATCH):
        batch = prompt_batch(backbone, batch_rows)
        nll_B = adapted(backbone, batch, rule, K).answer_nll([row.answer for row in batch_rows])
        found |= {row.id: nll for row, nll in zip(batch_rows, nll_B.tolist(), strict=True)}
    return [found[row.id] for row in rows]


def adapted(backbone: FrozenLM, batch: TokenBatch, rule: Rate | None, K: int) -> Prefill:
    """K steps and the reading that answers begin from, as the rate's reach and gate have it."""
    reach = reach_of(INIT, rule)
    trace, read = adapt_from(backbone, batch, INIT, [0] * len(batch.ids_BT), rule, K, reach)
    if read is None:
        read = prefill(backbone, batch, trace.lora, trace.initial_lora, reach=reach, cached=trace.reading)
    return read


def mean(values: Sequence[float]) -> float:
    total = sum(values) / len(values)
    return total if math.isfinite(total) else math.inf


def climb(loss: Callable[[float], float], start: float) -> dict[float, float]:
    """{rate: loss} around the lowest: from `start`, by factors of STEP, until both neighbours are higher."""
    seen = {start: loss(start)}
    while True:
        best = min(seen, key=lambda rate: seen[rate])
        missing = [rate for rate in (best / STEP, best * STEP) if rate not in seen]
        if not missing:
            return seen
        seen |= {rate: loss(rate) for rate in missing}


def vertex(seen: dict[float, float]) -> float:
    """The lowest point of the parabola through the best rate and its neighbours, in log rate."""
    best = min(seen, key=lambda rate: seen[rate])
    low, mid, high = seen[best / STEP], seen[best], seen[best * STEP]
    bend = low - 2 * mid + high
    if not math.isfinite(bend) or bend <= 0:
        return best
    return best * STEP ** (0.5 * (low - high) / bend)


def known(network: str) -> bool:
    return network in shipped("rate") or Path(network).exists()


def on(point: Point, whole: FrozenLM) -> FrozenLM:
    targets = point.targets.split("+")
    return whole.with_adapters_on(targets[0] if len(targets) == 1 else targets, point.layers)


def network_of(point: Point, whole: FrozenLM) -> tuple[FrozenLM, Rate]:
    """A trained network, and the model with what it adapts."""
    assert point.network is not None
    rule = load_rate(point.network)
    backbone = whole.with_adapters_on(**(adapted_by(rule) or {"target_modules": point.targets}))
    rule.check(backbone)
    return backbone, rule


def quality(
    point: Point, whole: FrozenLM, lens: Lens | None, search: Sequence[Encoded], rows: Sequence[Encoded]
) -> dict:
    """Rates found on the search rows, and the NLL of each of the other rows under them."""
    if point.network is not None:
        backbone, rule = network_of(point, whole)
        return {"nlls": [round(x, 4) for x in answer_nlls(backbone, rows, rule, point.K)]}
    backbone, objective = on(point, whole), objective_of(point, lens)

    def loss(rates: tuple[float, ...]) -> float:
        return mean(answer_nlls(backbone, search, Schedule(rates, objective, point.reach), len(rates)))

    seen = climb(lambda rate: loss((rate,)), 8.0)
    rates, table = (vertex(seen),), {"first": {f"{r:g}": v for r, v in sorted(seen.items())}}
    for k in range(2, point.K + 1):  # greedily: each later step's share of the first
        shares = {share: loss((*rates, rates[0] * share)) for share in LATER_GRID if share > 0}
        rates = (*rates, rates[0] * min(shares, key=lambda share: shares[share]))
        table[f"share_{k}"] = {f"{s:g}": v for s, v in shares.items()}
    nlls = answer_nlls(backbone, rows, Schedule(rates, objective, point.reach), point.K)
    return {"rates": rates, "search": table, "nlls": [round(x, 4) for x in nlls]}


def asked_for(args: argparse.Namespace) -> list[Point]:
    found = [p for p in points() if not args.only or any(text in p.key for text in args.only.split(";"))]
    if not found:
        raise ValueError(f"--only {args.only!r} is in no point's name; names are like {Point().key!r}.")
    return found


def fill_quality(args: argparse.Namespace, results: dict[str, Any]) -> None:
    dtype = args.dtype or native_dtypes()[-1]
    whole = load_backbone(args.model, dtype=dtype, device="cpu")
    lens = load_lens(args.lens) if args.lens else None
    data = load_dataset("nq-open", split="validation", source=args.source, limit=args.search + args.rows, seed=1)
    rows, _ = encode_examples(whole, data.examples, chat=False, max_tokens=1024)
    search, rows = rows[: args.search], rows[args.search :]
    settings = {"search": len(search), "rows": len(rows), "model": whole.name, "dtype": dtype}
    if results.setdefault("settings", settings) != settings:
        raise ValueError(
            f"{args.output} holds points of other settings ({results['settings']}); give another --output."
        )
    results.setdefault("none", {"nlls": [round(x, 4) for x in answer_nlls(whole, rows, None, 0)]})
    for point in asked_for(args):
        if point.key in results["points"] and "nlls" in results["points"][point.key]:
            continue
        if point.network is not None and not known(point.network):
            print(f"{point.key}: no such network here, left out", file=sys.stderr)
            continue
        if point.exit_layer is not None and point.lens and (lens is None or point.exit_layer not in lens.exit_layers):
            print(f"{point.key}: no lens for that layer, left out", file=sys.stderr)
            continue
        start = time.perf_counter()
        entry = results["points"].setdefault(point.key, {})
        entry.update(quality(point, whole, lens, search, rows))
        took = time.perf_counter() - start
        print(f"{point.key}: NLL {mean(entry['nlls']):.3f}, rates {entry.get('rates')}, {took:.0f} s", file=sys.stderr)
        save(args.output, results)
    save(args.output, results)


@torch.no_grad()
def first_token(backbone: FrozenLM, batch: TokenBatch, rule: Rate | None, K: int) -> Tensor:
    """What a user waits for: K steps, the prefill, the first token."""
    read = adapted(backbone, batch, rule, K) if K else prefill(backbone, batch, None)
    return backbone.logits(read.hidden_BTD[:, -1]).argmax(-1)


def fill_times(args: argparse.Namespace, results: dict[str, Any]) -> None:
    """Rounds in which every point and two plain prefills take turns; a point's price is its median over theirs."""
    torch.set_num_threads(args.threads)
    dtype = args.dtype or native_dtypes()[-1]
    whole = load_backbone(args.model, dtype=dtype, device="cpu")
    made = examples("short", args.batch)
    rows, _ = encode_examples(whole, made, chat=False, max_tokens=1024)
    batch = prompt_batch(whole, rows)
    runs: dict[str, Callable[[], Tensor]] = {"plain": lambda: first_token(whole, batch, None, 0)}
    for point in asked_for(args):
        if point.network is not None and not known(point.network):
            continue
        runs[point.key] = _timed(point, whole, batch)
    plain = runs.pop("plain")
    for run in (plain, *runs.values()):
        run()  # warm
    seconds: dict[str, list[float]] = {key: [] for key in runs}
    beside: dict[str, list[float]] = {key: [] for key in runs}  # the mean of the plain prefills before and after
    every = [timed(plain)]
    for _ in range(args.rounds):
        for key, run in runs.items():
            seconds[key].append(timed(run))
            every.append(timed(plain))
            beside[key].append((every[-2] + every[-1]) / 2)
    for key, taken in seconds.items():
        prices = [a / b for a, b in zip(taken, beside[key], strict=True)]
        entry = results["points"].setdefault(key, {})
        entry["time"] = {"prefills": median(prices), "rounds": prices, "seconds": spread(taken)}
    results["machine"] = machine()
    results["timing"] = {"batch": args.batch, "rounds": args.rounds, "threads": args.threads, "plain": spread(every)}
    results["timing"]["dtype"] = dtype
    save(args.output, results)


def _timed(point: Point, whole: FrozenLM, batch: TokenBatch) -> Callable[[], Tensor]:
    if point.network is not None:
        backbone, rule = network_of(point, whole)
    else:
        backbone = on(point, whole)
        objective = objective_of(replace(point, lens=False), None)
        if point.lens and point.exit_layer is not None:  # what it holds does not change what it costs
            lens = Lens(hidden_size=whole.hidden_size, exit_layers=[point.exit_layer]).requires_grad_(False)
            objective = replace(objective, lens=lens)
        rule = Schedule((1e-3,) * point.K, objective, point.reach)
    return lambda: first_token(backbone, batch, rule, point.K)


def save(folder: Path, results: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    scratch = folder / "results.partial"
    scratch.write_text(json.dumps(results, indent=1) + "\n")
    scratch.replace(folder / RESULTS)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.frontier", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=("quality", "time", "report"))
    parser.add_argument("--output", type=Path, default=Path("docs/results/frontier"), help="(default: %(default)s)")
    parser.add_argument("--model", default=DEFAULT_MODEL, help="a name or a folder (default: %(default)s)")
    parser.add_argument("--source", help="folder of NQ-Open's rows (default: the hub)")
    parser.add_argument("--lens", help="folder of a lens for the exit layers")
    parser.add_argument("--search", type=int, default=40, help="rows that rates are chosen on (default: %(default)s)")
    parser.add_argument("--rows", type=int, default=100, help="rows that are reported (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="prompts of a timing (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="of a timing (default: %(default)s)")
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="of a timing (default: %(default)s)"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="(default: bfloat16 where the CPU multiplies it, else float32)")
    parser.add_argument("--only", help="points whose names hold one of these texts, joined by semicolons")
    args = parser.parse_args(argv)
    path = args.output / RESULTS
    results = json.loads(path.read_text()) if path.exists() else {"points": {}}
    try:
        if args.what == "quality":
            fill_quality(args, results)
        elif args.what == "time":
            fill_times(args, results)
    except ValueError as error:
        sys.exit(f"error: {error}")
    write_report(args.output, results)


if __name__ == "__main__":
    main()
