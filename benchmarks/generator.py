"""What generated adapters cost: parameters by model, and time beside the forward passes they ride on.

    python -m benchmarks.generator [--json] [--repeats 7] [--output FOLDER]

`overhead`: (prompt forward + generator + adapted forward) over two plain forwards, at batch 8, less one. `call`: one
generator call over a prompt forward, for the shapes of Qwen3-0.6B with random weights. Parameters are counted from
shapes alone. On the CPU, all contenders in turns.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers

from ephemera.batch import TokenBatch, pad
from ephemera.bench.prompts import examples
from ephemera.bench.timing import machine, native_dtypes, spread
from ephemera.downloads import DEFAULT_MODEL
from ephemera.inits import LoraGenerator
from ephemera.llm.load import load_backbone
from ephemera.llm.tokenize import encode_prompt
from ephemera.lora import Projection


@dataclass(frozen=True)
class Shape:
    """What a generator depends on: hidden size, layers, and (in, out) features of each linear module."""

    name: str
    hidden_size: int
    layers: int
    modules: dict[str, tuple[int, int]]
    fused: bool = False

    def projections(self, kinds: Sequence[str]) -> list[Projection]:
        return [
            Projection(f"layers.{layer}.{kind}", kind, layer, *self.modules[kind])
            for layer in range(self.layers)
            for kind in kinds
        ]


def _llama(name: str, D: int, layers: int, heads: tuple[int, int], head_dim: int, mlp: int) -> Shape:
    q, kv = heads[0] * head_dim, heads[1] * head_dim
    attention = {"q": (D, q), "k": (D, kv), "v": (D, kv), "o": (q, D)}
    return Shape(name, D, layers, {**attention, "gate": (D, mlp), "up": (D, mlp), "down": (mlp, D)})


QWEN = _llama("Qwen3-0.6B", 1024, 28, (16, 8), 128, 3072)
# From the models' published configurations
SHAPES = (
    Shape(
        "Pythia-70M",
        512,
        6,
        {"qkv": (512, 1536), "o": (512, 512), "up": (512, 2048), "down": (2048, 512)},
        fused=True,
    ),
    _llama("SmolLM2-135M", 576, 30, (9, 3), 64, 1536),
    _llama("Gemma-3-270M", 640, 18, (4, 1), 256, 2048),
    QWEN,
    _llama("Llama-3.2-3B", 3072, 28, (24, 8), 128, 8192),
)


def targets(shape: Shape) -> dict[str, list[str]]:
    attention = ["qkv", "o"] if shape.fused else ["q", "k", "v", "o"]
    return {"q/v": ["qkv"] if shape.fused else ["q", "v"], "attention": attention, "all linear": list(shape.modules)}


def sizes() -> list[dict[str, Any]]:
    """Parameters and bfloat16 megabytes of a generator for each model."""
    rows = []
    for shape in SHAPES:
        for label, kinds in targets(shape).items():
            with torch.device("meta"):
                generator = LoraGenerator(projections=shape.projections(kinds), state_size=shape.hidden_size)
            count = sum(p.numel() for p in generator.parameters())
            rows.append({"model": shape.name, "modules": label, "parameters": count, "megabytes": 2 * count / 1e6})
    return rows


def overhead(model: str, batch: int, repeats: int, dtype: str) -> dict[str, Any]:
    """SmolLM2 with its own generator: what generating adds to the two forwards that it rides on."""
    backbone = load_backbone(model, dtype=dtype, device="cpu")
    ids = [encode_prompt(backbone.tokenizer, e.prompt) for e in examples("short", batch)]
    tokens = pad(ids, pad_id=backbone.pad_id)
    generator = _moved(LoraGenerator(projections=backbone.projections, state_size=backbone.hidden_size))
    generator = generator.in_dtype(backbone.dtype)  # as `place_init` has it

    def plain() -> None:
        backbone.forward(tokens)
        backbone.forward(tokens)

    def generated() -> None:
        backbone.forward(tokens, generator(backbone, tokens, [0] * batch))

    return {**_ratio(generated, plain, repeats), "dtype": dtype, "batch": batch, "tokens": tokens.ids_BT.shape[1]}


def call(shape: Shape, batch: int, repeats: int, dtype: str) -> dict[str, Any]:
    """One generator call against one prompt forward of a random model of these shapes."""
    config = transformers.Qwen3Config(
        vocab_size=1000,  # the head is not run, and the embedding is a lookup
        hidden_size=shape.hidden_size,
        num_hidden_layers=shape.layers,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        intermediate_size=shape.modules["up"][1],
        tie_word_embeddings=True,
    )
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).eval()
    ids_BT = torch.randint(1, 1000, (batch, 32), generator=torch.Generator().manual_seed(0))
    tokens = TokenBatch(ids_BT, torch.ones_like(ids_BT).bool())
    generator = _moved(LoraGenerator(projections=shape.projections(["q", "v"]), state_size=shape.hidden_size))
    generator = generator.in_dtype(getattr(torch, dtype))
    h_BH = torch.randn(batch, shape.hidden_size)
    decoder = model.get_submodule(model.base_model_prefix)
    return {
        **_ratio(lambda: generator(h_BH), lambda: decoder(input_ids=tokens.ids_BT), repeats),
        "dtype": dtype,
        "batch": batch,
        "tokens": 32,
    }


def _moved(generator: LoraGenerator) -> LoraGenerator:
    """Heads away from zero, as after training."""
    for parameter in generator.parameters():
        torch.nn.init.normal_(parameter, std=1e-3)
    return generator.eval().requires_grad_(False)


def _ratio(mine: Callable[[], Any], other: Callable[[], Any], repeats: int) -> dict[str, Any]:
    """Medians over turns; the first turn is not counted."""
    times: tuple[list[float], list[float]] = ([], [])
    with torch.no_grad():
        for _ in range(repeats + 1):
            for values, run in zip(times, (mine, other), strict=True):
                start = time.perf_counter()
                run()
                values.append(time.perf_counter() - start)
    first, second = times[0][1:], times[1][1:]
    return {
        "seconds": spread(first),
        "reference_seconds": spread(second),
        "ratio": median(a / b for a, b in zip(first, second, strict=True)),
        "ratios": [a / b for a, b in zip(first, second, strict=True)],
    }


def sizes_table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        "## Parameters of a generator (r 2, hidden size 1,024)\n",
        "From shapes only. Memory in bfloat16.\n",
        "| model | modules | parameters | MB |",
        "|---|---|--:|--:|",
    ]
    lines += [f"| {r['model']} | {r['modules']} | {r['parameters']:,} | {r['megabytes']:.1f} |" for r in rows]
    return "\n".join(lines)


def times_table(results: dict[str, Any]) -> str:
    lines = ["\n## Time\n", "| what | dtype | ratio (median of turns) | lowest | highest |", "|---|---|--:|--:|--:|"]
    for name, label in (
        ("overhead", "prompt forward + generator + adapted forward, over two plain forwards (SmolLM2-135M)"),
        ("call", "generator call over a prompt forward (Qwen3-0.6B's shapes)"),
    ):
        lines += [
            f"| {label} | {c['dtype']} | {c['ratio']:.3f} | {min(c['ratios']):.3f} | {max(c['ratios']):.3f} |"
            for c in results[name]
        ]
    facts = results["machine"]
    lines.append(
        f"\nBatch 8 of {results['overhead'][0]['tokens']} (SmolLM2) and 32 tokens. {facts['cpu']}, {facts['threads']} "
        f"threads, load average {facts['load_average']:.2f} before the run; commit {facts['commit']}."
    )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    transformers.logging.disable_progress_bar()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.generator", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="the last line on stdout is one JSON object")
    parser.add_argument("--model", default=DEFAULT_MODEL, help="a name or a folder (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="prompts (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=7, help="turns (default: %(default)s)")
    parser.add_argument("--sizes-only", action="store_true", help="count parameters, time nothing")
    parser.add_argument("--output", type=Path, help="a folder for generator.json and generator.md")
    args = parser.parse_args(argv)
    results: dict[str, Any] = {"machine": machine(), "sizes": sizes(), "overhead": [], "call": []}
    if args.sizes_only:
        print(json.dumps(results["sizes"]) if args.json else sizes_table(results["sizes"]))
        return 0
    for dtype in native_dtypes():
        results["overhead"].append(overhead(args.model, args.batch, args.repeats, dtype))
        results["call"].append(call(QWEN, args.batch, args.repeats, dtype))
    text = f"{sizes_table(results['sizes'])}\n{times_table(results)}"
    print(text, file=sys.stderr if args.json else sys.stdout)
    if args.output:
        args.output.mkdir(parents=True, exist_ok=True)
        (args.output / "generator.json").write_text(json.dumps(results, indent=1) + "\n")
        (args.output / "generator.md").write_text(text + "\n")
    if args.json:
        print(json.dumps(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
