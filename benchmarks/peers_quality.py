"""Other methods of test-time compute beside ours, on the same prompts and rows: quality, harm, price in prefills.

    python -m benchmarks.peers_quality --source "data/{task}" --output docs/results/peers

The methods stand in benchmarks/peers_methods.py. Each gets its rate on validation rows: the one setting with the lowest
answer NLL, mean over the sets. Test rows are then read once, some of each set in turn, in an order drawn by the seed: a
stopped run has a random part of them, and goes on where it was. The folder gets validation.json, records.jsonl (per prompt,
without texts), results.json and table.md.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
import transformers

from benchmarks.peers_methods import GRID, Ready, Setting, majority, narrowed, read, votes_for
from ephemera.config import DataSettings, fill
from ephemera.cost import from_config
from ephemera.downloads import DEFAULT_MODEL
from ephemera.evaluation.nll.tables import EMPTY, RESULTS, TABLE_MD, Table, signed_interval
from ephemera.evaluation.shared.records import RecordFile, SurveyRecord, read_json, write_bytes, write_json
from ephemera.evaluation.shared.rouge import rouge_lsum
from ephemera.evaluation.shared.statistics import LEVEL
from ephemera.evaluation.survey.tables import HARM, SurveyCell, cells_of
from ephemera.llm.frozen_lm import FrozenLM
from ephemera.llm.load import load_backbone
from ephemera.rates import PerProjectionRate, ScaleNet, adapted_by, load_rate, place_rate
from ephemera.rows import TaskRows, rows_of
from ephemera.run_info import commit, versions
from ephemera.scoring import Encoded, batches_of
from ephemera.tasks import Example, Task
from ephemera.tasks.choice import parse

VALIDATION = "validation.json"
METHODS = ("none", *GRID, "ungated", "network", "vote")
TASKS = "snli+nq-open+adapteval/medicine+boolq"
TEMPERATURE = 0.7  # of sampled answers
SAMPLED = 64  # answers that are sampled at once
NOTE = (
    f"Differences to the base model, paired by prompt, with {LEVEL} % bootstrap intervals. NLL: nats per answer token, mean "
    f"over prompts, below zero is better. Harmed: share of prompts whose NLL rose by more than {HARM}. Left alone: no step. "
    "Quality: accuracy of generated answers (a) or their ROUGE-Lsum (r), above zero is better. Price: processor time to the "
    "first token in plain prefills. `vote` samples answers, so it has no NLL; `n` answers cost the FLOPs of one adapted answer."
)

Network = ScaleNet | PerProjectionRate


def rows_for(args: argparse.Namespace, backbone: FrozenLM, task: str, split: str, limit: int) -> TaskRows:
    settings = DataSettings(
        split=split, limit=limit, seed=args.seed, format="chat", cut=600, max_tokens=512, max_answer_tokens=32
    )
    return rows_of(backbone, task, fill(args.source, task), settings, once=True)


def answer_nll(ready: Ready, method: str, setting: Setting, network: Network | None = None) -> list[float]:
    return read(ready, method, setting, network)[0].answer_nll([row.answer for row in ready.rows]).tolist()


def search(args: argparse.Namespace, backbone: FrozenLM, methods: Sequence[str]) -> dict[str, Any]:
    """{method: [{setting, change: {task: mean NLL change}}]} on validation rows; what the folder holds is not made again."""
    path = args.output / VALIDATION
    held: dict[str, Any] = read_json(path) if path.exists() else {}
    wanted = [m for m in methods if m in GRID and m not in held]
    found: dict[str, Any] = {m: [{"setting": s, "change": {}} for s in GRID[m]] for m in wanted}
    for task in args.tasks.split("+") if wanted else ():
        rows = rows_for(args, backbone, task, "validation", args.validation).rows
        changes: dict[tuple[str, int], list[float]] = {(m, i): [] for m in wanted for i in range(len(GRID[m]))}
        for some in batches_of(backbone, rows, args.batch_size):
            ready = Ready(backbone, some, args.seed)
            base = answer_nll(ready, "none", {})
            for method, i in changes:
                mine = answer_nll(ready, method, GRID[method][i])
                changes[method, i] += [a - b for a, b in zip(mine, base, strict=True)]
        for (method, i), values in changes.items():
            found[method][i]["change"][task] = mean(values)
        print(f"{task}: validation done", file=sys.stderr)
    write_json(path, held | found)
    return held | found


def best(entries: Sequence[dict[str, Any]]) -> Setting:
    """The setting with the lowest NLL, mean over the sets; one that is not finite never wins."""

    def score(entry: dict[str, Any]) -> float:
        values = [math.inf if v is None or not math.isfinite(v) else v for v in entry["change"].values()]
        return mean(values)

    return min(entries, key=score)["setting"]


def first_token(ready: Ready, method: str, setting: Setting, network: Network | None) -> float:
    """Seconds of this process: what else the machine does is left out."""
    start = time.process_time()
    read(ready, method, setting, network)
    return time.process_time() - start


def prices(
    backbone: FrozenLM,
    rows: Sequence[Encoded],
    settings: dict[str, Setting],
    network: Network | None,
    rounds: int = 2,
) -> dict[str, float]:
    """Time to the first token in plain prefills: the median over rounds, each beside a prefill of its own."""
    ratios: dict[str, list[float]] = {method: [] for method in settings}
    for _ in range(rounds):
        for method, setting in settings.items():
            base = first_token(Ready(backbone, rows), "none", {}, None)
            ready = Ready(narrowed(backbone) if method == "query-only" else backbone, rows)
            ratios[method].append(first_token(ready, method, setting, network) / base)
    return {method: round(median(values), 2) for method, values in ratios.items()}


def quality(task: Task, example: Example, text: str) -> float | None:
    return rouge_lsum(example.answer, text) if task.correct is None else float(task.correct(text, example))


def texts_of(backbone: FrozenLM, ids: list[list[int]]) -> list[str]:
    return list(backbone.tokenizer.batch_decode(ids, skip_special_tokens=True))


def fill_batch(
    ready: Ready, task: TaskRows, method: str, setting: Setting, network: Network | None, longest: int
) -> list[SurveyRecord]:
    """A batch's records under one method that answers greedily."""
    made, share_B = read(ready, method, setting, network)
    nll = made.answer_nll([row.answer for row in ready.rows]).tolist()
    texts = texts_of(ready.backbone, made.generate(max_new_tokens=longest))
    return [
        SurveyRecord(
            task=task.task.name,
            method=method,
            id=row.id,
            nll=nll[b],
            tokens=len(row.answer),
            share=share_B[b].item(),
            quality=quality(task.task, task.examples[row.id], texts[b]),
            judged=task.task.correct is not None,
        )
        for b, row in enumerate(ready.rows)
    ]


def vote_batch(ready: Ready, task: TaskRows, n: int, longest: int) -> list[SurveyRecord]:
    """Records of the majority of n sampled answers: which choice each names."""
    made, _ = read(ready, "none", {})
    sampling: dict[str, Any] = {"do_sample": True, "temperature": TEMPERATURE, "top_k": 0, "top_p": 1.0}
    ids = made.generate(max_new_tokens=longest, num_return_sequences=n, **sampling)
    texts = texts_of(ready.backbone, ids)
    records = []
    for b, row in enumerate(ready.rows):
        example = task.examples[row.id]
        winner = majority([parse(text, example.choices) for text in texts[b * n : (b + 1) * n]])
        told = {"task": task.task.name, "method": "vote", "id": row.id, "tokens": len(row.answer), "judged": True}
        records.append(SurveyRecord(**told, nll=math.nan, quality=float(winner == example.answer)))
    return records


def fill_rows(
    args: argparse.Namespace,
    backbone: FrozenLM,
    task: TaskRows,
    rows: Sequence[Encoded],
    settings: dict[str, Setting],
    network: Network | None,
    records: RecordFile[SurveyRecord],
) -> int | None:
    """The records of some rows of a set; how many answers vote, if it has choices."""
    name, longest = task.task.name, min(args.max_new_tokens, task.task.max_new_tokens)
    for some in batches_of(backbone, rows, args.batch_size):
        ready = Ready(backbone, some, args.seed)
        for method, setting in settings.items():
            if not records.has((name, method, row.id) for row in some):
                records.add(fill_batch(ready, task, method, setting, network, longest))
    if task.task.choices is None or "vote" not in args.methods:
        return None
    tokens = mean(len(row.prompt) for row in task.rows)
    n = votes_for(from_config(backbone.name, backbone.model.config.to_dict()), tokens, longest)
    for some in batches_of(backbone, rows, max(1, SAMPLED // n)):
        if not records.has((name, "vote", row.id) for row in some):
            torch.manual_seed(args.seed + len(records.records))
            records.add(vote_batch(Ready(backbone, some, args.seed), task, n, longest))
    return n


def told(setting: Setting) -> str:
    return ", ".join(f"{key.replace('_', ' ')} {value:g}" for key, value in setting.items()) or EMPTY


def table_of(cells: Sequence[SurveyCell], run: dict[str, Any]) -> Table:
    header = ["set", "method", "setting", "n", "base NLL", "NLL", "harmed", "left alone", "base quality", "quality"]
    rows = []
    for c in cells:
        vote = c.method == "vote"
        setting = f"n {run['votes'][c.task]}" if vote else told(run["settings"].get(c.method, {}))
        price = run["price"].get(c.method)
        rows.append(
            [
                *(c.task, c.method, setting, str(c.n), f"{c.base_nll:.3f}"),
                *((EMPTY,) * 3 if vote else (signed_interval(c.change), share(c.harmed), share(c.abstained))),
                EMPTY if c.base_quality is None else f"{c.base_quality:.3f} {'a' if c.judged else 'r'}",
                signed_interval(c.quality),
                EMPTY if price is None else f"{price:.2f}",
            ]
        )
    return Table("Peers on the same prompts", NOTE, [*header, "price"], rows, labels=3)


def share(value: float) -> str:
    return f"{100 * value:.0f} %"


def write_tables(folder: Path, records: Sequence[SurveyRecord], run: dict[str, Any]) -> None:
    """results.json and table.md. A vote has no NLL: null."""
    cells = cells_of(records)
    plain = [replace(c, harmed=math.nan, helped=math.nan) if c.method == "vote" else c for c in cells]
    write_json(folder / RESULTS, {"run": run, "cells": [asdict(c) for c in plain]})
    made = f"\nMade by `{run['command']}` at commit {run['commit']}.\n"
    write_bytes(folder / TABLE_MD, (table_of(cells, run).markdown() + made).encode())


def run(args: argparse.Namespace) -> None:
    network = None if args.network == "none" else load_rate(args.network)
    if network is not None and (not isinstance(network, Network) or network.reach != "answer"):
        raise ValueError(f"--network {args.network}: give a trained network with reach answer, or none.")
    backbone = load_backbone(args.model, dtype="float32", device="cpu", **adapted_by(network))
    if network is not None:
        place_rate(network, backbone)
    args.output.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {
        "command": args.command,
        "commit": commit(),
        "versions": versions(),
        "model": {"name": backbone.name, "fingerprint": backbone.fingerprint()},
        "rows": {"validation": args.validation, "test": args.limit},
        "votes": {},
        "price": read_json(args.output / RESULTS)["run"]["price"] if (args.output / RESULTS).exists() else {},
    }
    grid = search(args, backbone, args.methods)
    settings: dict[str, Setting] = {}
    for method in args.methods:
        if method != "vote" and (network is not None or method not in ("ungated", "network")):
            settings[method] = best(grid[method]) if method in GRID else {}
    found |= {"settings": settings, "validation": grid}
    fill_all(args, backbone, settings, network, found)


def fill_all(
    args: argparse.Namespace,
    backbone: FrozenLM,
    settings: dict[str, Setting],
    network: Network | None,
    found: dict[str, Any],
) -> None:
    """Test rows, a batch of each set in turn; tables after each turn, prices after the first."""
    records = RecordFile(args.output, SurveyRecord)
    tasks = [rows_for(args, backbone, name, "test", args.limit) for name in args.tasks.split("+")]
    drawn = [random.Random(args.seed).sample(task.rows, len(task.rows)) for task in tasks]
    for start in range(0, max(map(len, drawn)), args.batch_size):
        for task, rows in zip(tasks, drawn, strict=True):
            some = rows[start : start + args.batch_size]
            n = fill_rows(args, backbone, task, some, settings, network, records) if some else None
            found["votes"] |= {} if n is None else {task.task.name: n}
            print(f"{task.task.name}: {start + len(some)} rows", file=sys.stderr)
        write_tables(args.output, records.records, found)
        if not found["price"]:
            timed = {method: setting for method, setting in settings.items() if method != "none"}
            found["price"] = prices(backbone, tasks[0].rows[:2], timed, network)
            write_tables(args.output, records.records, found)


def main(argv: Sequence[str] | None = None) -> int:
    transformers.logging.disable_progress_bar()
    given = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers_quality", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--source", required=True, help="rows: a file or folder, {task} filled in")
    parser.add_argument("--tasks", default=TASKS, help="joined by + (default: %(default)s)")
    parser.add_argument("--methods", default=",".join(METHODS), help="(default: %(default)s)")
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--network", default="universal", help="a network with reach answer, or none")
    parser.add_argument("--validation", type=int, default=40, help="rows of each set to pick settings on")
    parser.add_argument("--limit", type=int, default=100, help="test rows of each set")
    parser.add_argument("--max-new-tokens", type=int, default=32, help="of an answer, or fewer where the task says so")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True, help="a folder")
    args = parser.parse_args(given)
    args.methods = args.methods.split(",")
    args.command = " ".join(["python -m benchmarks.peers_quality", *(f'"{x}"' if "{" in x else x for x in given)])
    unknown = [m for m in args.methods if m not in METHODS]
    if unknown or "none" not in args.methods:
        print(f"error: --methods needs none, and knows {', '.join(METHODS)}; got {args.methods}.", file=sys.stderr)
        return 2
    try:
        run(args)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
