"""Decoding with adapters beside the unadapted model, under the same `generate` settings.

    python -m benchmarks.decode [--json] [--batches 1,8] [--lengths short,long] [--dtypes float32,bfloat16]

All take turns on the same prompts; the time is that of `--tokens` greedy tokens after the prefill. `adapted_vs_plain` is
the adapted model's tokens/s over the unadapted one's (higher is better, 1 is the best there can be). `transformers` is
the unadapted model with the cache that transformers brings along. On the CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers

from ephemera.adapt import adapt
from ephemera.batch import TokenBatch, pad
from ephemera.bench.contenders import INIT, encoded
from ephemera.bench.prompts import LENGTHS
from ephemera.bench.timing import machine, machine_lines, native_dtypes, spread, timed, turns
from ephemera.downloads import DEFAULT_MODEL
from ephemera.llm.cached_layers import CACHE
from ephemera.llm.frozen_lm import FrozenLM
from ephemera.llm.load import load_backbone
from ephemera.llm.prefill import prefill
from ephemera.lora import LoraBatch, attach
from ephemera.rates import FixedRate

RATE = 1.0  # bold: B must not stay near zero


class Decoding:
    """One batch: what each contender does after its prefill, and the tokens that came out."""

    def __init__(self, backbone: FrozenLM, length: str, batch: int, tokens: int):
        self.backbone = backbone
        prompts = [row.prompt[: backbone.max_length - tokens] for row in encoded(backbone, length, batch)]
        self.batch: TokenBatch = pad(prompts, pad_id=backbone.pad_id)
        initial = INIT(backbone, self.batch, [0] * batch)
        self.lora: LoraBatch = adapt(backbone, self.batch, initial, FixedRate(RATE), 1).lora
        self.settings = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
        self.tokens: dict[str, Any] = {}

    def contenders(self) -> dict[str, Callable[[], float]]:
        return {
            "adapted": lambda: self._ours("adapted", self.lora),
            "plain": lambda: self._ours("plain", None),
            "attached": lambda: self._theirs("attached", self.lora),
            "transformers": lambda: self._theirs("transformers", None),
        }

    def _ours(self, name: str, lora: LoraBatch | None) -> float:
        read = prefill(self.backbone, self.batch, lora)
        return timed(lambda: self.tokens.__setitem__(name, read.generate(**self.settings)))

    def _theirs(self, name: str, lora: LoraBatch | None) -> float:
        """transformers' own cache, the layers of training: what decoding would be without `ephemera.fast.decode`."""
        cache = prefill(self.backbone, self.batch, lora).cache
        cache.crop(-1)

        def run() -> None:
            with attach(self.backbone.model, lora):
                ids = self.backbone.model.generate(  # pyright: ignore[reportCallIssue]
                    input_ids=self.batch.ids_BT,
                    attention_mask=self.batch.mask_BT.long(),
                    **{CACHE: cache},
                    pad_token_id=self.backbone.pad_id,
                    **self.settings,
                )
            self.tokens[name] = ids[:, self.batch.ids_BT.shape[1] :].tolist()

        return timed(run)


def compare(backbone: FrozenLM, length: str, batch: int, tokens: int, rounds: int, budget_s: float) -> dict[str, Any]:
    """One cell; a round of two tokens warms up."""
    for warm in Decoding(backbone, length, batch, 2).contenders().values():
        warm()
    decoding = Decoding(backbone, length, batch, tokens)
    seconds = turns(decoding.contenders(), rounds, budget_s=budget_s)
    speeds = {who: spread([batch * tokens / s for s in values]) for who, values in seconds.items()}
    by_round = [p / a for a, p in zip(seconds["adapted"], seconds["plain"], strict=True)]
    return {
        "length": length,
        "dtype": str(backbone.dtype).removeprefix("torch."),
        "batch": batch,
        "prompt_tokens": decoding.batch.ids_BT.shape[1],
        "rounds": len(by_round),
        "tokens_per_second": speeds,
        "adapted_vs_plain": median(by_round),
        "adapted_vs_plain_rounds": by_round,
        "plain_vs_transformers": median(seconds["transformers"]) / median(seconds["plain"]),
        "same_tokens_as_attached": _share(decoding.tokens["adapted"], decoding.tokens["attached"]),
    }


def _share(mine: Sequence[Sequence[int]], other: Sequence[Sequence[int]]) -> float:
    """Rows that came out alike: in bfloat16 another rounding may tip a greedy choice."""
    return sum(a == b for a, b in zip(mine, other, strict=True)) / len(mine)


def table(results: dict[str, Any]) -> str:
    lines = [
        f"Greedy decoding of {results['settings']['tokens']} tokens after the prefill, model "
        f"{results['settings']['model']}; tokens/s, median [lowest, highest].",
        *machine_lines(results["machine"]),
        "",
        "| prompts | dtype | rounds | adapted | unadapted | adapted/unadapted | layers of training | unadapted, transformers' cache |",
        "|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    for cell in results["cells"]:
        columns = {
            who: f"{v['median']:.1f} [{v['min']:.1f}, {v['max']:.1f}]" for who, v in cell["tokens_per_second"].items()
        }
        by_round = cell["adapted_vs_plain_rounds"]
        lines.append(
            f"| {cell['batch']} x {cell['prompt_tokens']} | {cell['dtype']} | {cell['rounds']} | {columns['adapted']} | "
            f"{columns['plain']} | {cell['adapted_vs_plain']:.2f} [{min(by_round):.2f}, {max(by_round):.2f}] | "
            f"{columns['attached']} | {columns['transformers']} |"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decode", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="the last line on stdout is one JSON object")
    parser.add_argument("--model", default=DEFAULT_MODEL, help="a name or a folder (default: %(default)s)")
    parser.add_argument("--batches", default="1,8", help="numbers of prompts (default: %(default)s)")
    parser.add_argument("--lengths", default="short", help=f"of {','.join(LENGTHS)} (default: %(default)s)")
    parser.add_argument("--dtypes", default=",".join(native_dtypes()), help="(default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=32, help="new tokens (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="at most (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=2.5, help="of rounds in all (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="(default: %(default)s)")
    parser.add_argument("--output", type=Path, help="a folder for decode.json and decode.md")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    facts = machine()
    cells = []
    dtypes, lengths = args.dtypes.split(","), args.lengths.split(",")
    batches = [int(b) for b in args.batches.split(",")]
    budget_s = 60 * args.minutes / (len(dtypes) * len(lengths) * len(batches))
    for dtype in dtypes:
        backbone = load_backbone(args.model, dtype=dtype, device="cpu")
        for length in lengths:
            for batch in batches:
                print(f"{batch} {length} {dtype} ...", file=sys.stderr)
                cells.append(compare(backbone, length, batch, args.tokens, args.rounds, budget_s))
        del backbone
    settings = {"model": args.model, "tokens": args.tokens, "threads": args.threads}
    results = {"machine": facts, "settings": settings, "cells": cells}
    text = table(results)
    print(text, file=sys.stderr if args.json else sys.stdout)
    if args.output:
        args.output.mkdir(parents=True, exist_ok=True)
        (args.output / "decode.json").write_text(json.dumps(results, indent=1) + "\n")
        (args.output / "decode.md").write_text(text + "\n")
    if args.json:
        print(json.dumps(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
