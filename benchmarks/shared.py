"""One adapter for all prompts of a task beside one for each: answer NLL of the same test rows, with paired intervals.

python -m benchmarks.shared --task nq-open --source data/nq_open --rate scalenet-nq-open --output runs/shared
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from ephemera import AdaptiveLM
from ephemera.evaluation.shared.statistics import bootstrap_mean
from ephemera.run_info import command, commit, versions
from ephemera.tasks.load import load_dataset

HARM = 0.05  # nats per token


def measured(lm: AdaptiveLM, prompts: list[str], answers: list[str], **how: Any) -> tuple[list[float], float]:
    """Answer NLL of each row in nats per token, and seconds of adapting to all of them."""
    made = lm.adapt(prompts, **how)
    return lm.answer_nll(prompts, answers, made).tolist(), made.seconds


def arms(lm: AdaptiveLM, folder: Path, learn: list[str], small: list[float], rows: tuple[list[str], list[str]]) -> dict:
    """{name: (NLL of each row, seconds)}; every shared adapter is exported, and read again as a PEFT adapter."""
    found = {"none": measured(lm, *rows, steps=0), "per prompt, 1 step": measured(lm, *rows, steps=1)}
    for steps in (1, 3):
        begun = time.perf_counter()
        start = str(lm.adapt_together(learn, steps=steps).export_peft(folder / f"adapter-{steps}"))
        print(f"shared, {steps} steps, made in {time.perf_counter() - begun:.1f} s", flush=True)
        name = f"shared by {len(learn)} ({steps} step{'s' * (steps > 1)})"
        found[name] = measured(lm, *rows, init=start, steps=0)
        if steps == 1:
            for rate in small:
                found[f"{name} + 1 step at {rate:g}"] = measured(lm, *rows, init=start, steps=1, rate=rate)
            found[f"{name} + 1 step of the network"] = measured(lm, *rows, init=start, steps=1)
    return found


def table(found: dict) -> list[str]:
    base, each = found["none"][0], found["per prompt, 1 step"][0]
    lines = [
        "| adapters | NLL | against none | against per prompt | harmed | seconds of adapting |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for name, (nll, seconds) in found.items():
        cells = [f"{sum(nll) / len(nll):.3f}"]
        for other in (base, each):
            change = bootstrap_mean([a - b for a, b in zip(nll, other, strict=True)])
            cells.append("" if nll is other else f"{change.mean:+.3f} [{change.low:+.3f}, {change.high:+.3f}]")
        harmed = sum(a > b + HARM for a, b in zip(nll, base, strict=True)) / len(nll)
        lines.append(f"| {name} | {' | '.join(cells)} | {harmed:.0%} | {seconds:.1f} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--task", default="nq-open")
    parser.add_argument("--source", required=True)
    parser.add_argument("--rate", default="scalenet-nq-open")
    parser.add_argument("--small", default="0.3,0.03,0.003,0.0003", help="rates of one step from the shared adapter")
    parser.add_argument("--learn", type=int, default=16, help="training prompts, without labels")
    parser.add_argument("--rows", type=int, default=60, help="test rows")
    parser.add_argument("--chat", action="store_true")
    parser.add_argument("--output", type=Path, default=Path("runs/shared"))
    args = parser.parse_args()
    lm = AdaptiveLM.from_pretrained(args.model, rate=args.rate, chat=args.chat)
    learn = load_dataset(args.task, split="train", source=args.source, limit=args.learn, seed=0).examples
    test = load_dataset(args.task, split="test", source=args.source, limit=args.rows, seed=0).examples
    rows = [e.prompt for e in test], [e.answer for e in test]
    found = arms(lm, args.output, [e.prompt for e in learn], [float(x) for x in args.small.split(",")], rows)
    told = command().replace("shared.py", "python -m benchmarks.shared", 1)
    page = [f"{len(test)} {args.task} test rows, {lm.format} prompts, {args.rate}; `{told}`", "", *table(found)]
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "table.md").write_text("\n".join(page) + "\n")
    facts = {"commit": commit(), "versions": versions(), "command": told, "harmed_above": HARM}
    records = {name: {"nll": [round(x, 5) for x in nll], "seconds": s} for name, (nll, s) in found.items()}
    (args.output / "results.json").write_text(json.dumps({**facts, "arms": records}, indent=1) + "\n")
    print("\n".join(page))


if __name__ == "__main__":
    main()
