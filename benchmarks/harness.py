"""One choice task by our own evaluator and by lm-evaluation-harness, on the same rows and adapters.

    python -m benchmarks.harness --task snli --source data/snli [--init taskweaver] [--rate 0.1 --steps 1]

Prints both accuracies by log-probability, and on how many rows the two choose differently. Needs the extra `lm-eval`.
"""
# pyright: reportMissingImports=false

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import transformers

from ephemera.config import Benchmark, check_config
from ephemera.downloads import DEFAULT_MODEL
from ephemera.evaluation.accuracy.run import benchmark
from ephemera.evaluation.accuracy.tables import by_bytes, by_sum, summarize
from ephemera.evaluation.shared.records import RECORDS, AnswerRecord, read_records
from ephemera.tasks import Example, load_dataset


def ours(args: argparse.Namespace, folder: Path) -> list[AnswerRecord]:
    variant = {"name": "x", "init": args.init, "rate": args.rate, "steps": args.steps}
    values = {
        "output": str(folder / "run"),
        "models": [{"name": args.model, "dtype": "float32"}],
        "variants": [variant],
        "data": {"tasks": [{"task": args.task}], "source": args.source, "limit": args.limit},
        "scoring": ["choices"],
    }
    return read_records(benchmark(check_config(Benchmark, values)) / RECORDS, AnswerRecord)


def theirs(args: argparse.Namespace, examples: Sequence[Example], folder: Path) -> dict[str, list[float]]:
    """{example id: log-probability of each choice} by lm-eval's `simple_evaluate` with our model class."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    import ephemera.evaluation.lm_eval  # noqa: F401  (registers the model)

    docs = [
        {"id": e.id, "prompt": e.prompt, "choices": list(e.choices), "gold": e.choices.index(e.answer)}
        for e in examples
    ]
    (folder / "docs.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    task = {
        "task": f"ephemera_{args.task}",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "docs.jsonl")}, "cache_dir": str(folder / "cache")},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{prompt}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "gold",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    model: dict[str, Any] = {"pretrained": args.model, "dtype": "float32", "steps": args.steps, "batch_size": 8}
    model |= {key: value for key, value in (("init", args.init), ("rate", args.rate)) if value is not None}
    found: Any = simple_evaluate(
        model="ephemera",
        model_args=model,
        tasks=[task],
        log_samples=True,
        bootstrap_iters=0,
        task_manager=TaskManager(include_defaults=False),
    )

    samples = found["samples"][f"ephemera_{args.task}"]
    return {s["doc"]["id"]: [float(r[0]) for r in s["filtered_resps"]] for s in samples}


def main(argv: Sequence[str] | None = None) -> int:
    transformers.logging.disable_progress_bar()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.harness", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--task", required=True, help="a choice task")
    parser.add_argument("--source", required=True, help="its rows: a file or folder")
    parser.add_argument("--limit", type=int, default=50, help="rows (default: %(default)s)")
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--init", help="a generator or PEFT folder (default: the zero start)")
    parser.add_argument("--rate", help="a rate")
    parser.add_argument("--steps", type=int, default=0)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        records = ours(args, folder)
        data = load_dataset(args.task, source=args.source, limit=args.limit)
        table = theirs(args, data.examples, folder)
    other = [r.model_copy(update={"variant": "lm-eval", "choice_logprobs": table[r.id]}) for r in records]
    result: dict[str, Any] = {"task": args.task, "rows": len(records)}
    for name, metric in (("acc", by_sum), ("acc_per_byte", by_bytes)):
        for who, rows in (("ours", records), ("lm_eval", other)):
            (estimate,) = [row[args.task] for row in summarize(rows, metric).values()]
            result[f"{name}_{who}"] = [round(x, 4) for x in (estimate.mean, estimate.low, estimate.high)]
    pairs = list(zip(records, other, strict=True))
    result["rows_that_differ"] = sum(
        int(np.argmax(a.choice_logprobs or [])) != int(np.argmax(b.choice_logprobs or [])) for a, b in pairs
    )
    gaps = [abs(x - y) for a, b in pairs for x, y in zip(a.choice_logprobs or [], b.choice_logprobs or [], strict=True)]
    result["largest_difference_nats"] = max(gaps)
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
