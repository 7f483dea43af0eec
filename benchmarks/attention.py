"""Attention of one layer, forward and backward: written out over packed prompts, against torch's fused kernel.

    python -m benchmarks.attention [--output docs/results/benchmark]

At SmolLM2-135M's shapes (9 query heads, 3 of keys and values, 64 wide), 8 prompts of 29 to 37 tokens and 2 of about
435. Both start from and end in packed tokens. The best of `--repeats` turns; CPU.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ephemera import packed
from ephemera.bench.timing import machine, machine_lines
from ephemera.packed import Packing, attention

LENGTHS = {"8 x 29-37": (29, 30, 31, 32, 33, 34, 36, 37), "2 x 430-440": (430, 440)}
DTYPES = (torch.float32, torch.bfloat16)
HEADS, GROUPS, WIDTH = 9, 3, 64


def fused(packing: Packing, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What transformers does with padded rows, between packing and unpacking."""
    rows = [packing.rows(x[0].transpose(0, 1)).transpose(1, 2) for x in (q, k, v)]
    q_BHTC, k_BHTC, v_BHTC = rows[0], *(r.repeat_interleave(HEADS // GROUPS, 1) for r in rows[1:])
    y_BHTC = F.scaled_dot_product_attention(q_BHTC, k_BHTC, v_BHTC, is_causal=True)
    return packing.tokens(y_BHTC.transpose(1, 2))[None]


def written_out(packing: Packing, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attention(torch.nn.Module(), q, k, v, None, packing=packing)[0]


def best(call: Callable[..., Tensor], packing: Packing, inputs: list[Tensor], repeats: int) -> tuple[float, float]:
    """Milliseconds of the forward and of the backward pass."""
    forward, backward = [], []
    for _ in range(repeats):
        start = time.perf_counter()
        y = call(packing, *inputs)
        middle = time.perf_counter()
        torch.autograd.grad(y, inputs, torch.ones_like(y))
        forward.append(middle - start)
        backward.append(time.perf_counter() - middle)
    return min(forward) * 1e3, min(backward) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.attention", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--repeats", type=int, default=40, help="turns (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="a folder for attention.md")
    args = parser.parse_args()
    torch.manual_seed(0)
    packed.FUSED_FROM = 1 << 30  # time the written-out form at every length
    lines = ["| prompts | dtype | | forward ms | backward ms |", "|---|---|---|--:|--:|"]
    for label, lengths in LENGTHS.items():
        for dtype in DTYPES:
            packing = Packing(lengths, torch.device("cpu"))
            inputs = [
                torch.randn(1, sum(lengths), heads, WIDTH, dtype=dtype).transpose(1, 2).requires_grad_()
                for heads in (HEADS, GROUPS, GROUPS)
            ]
            for name, call in (("written out", written_out), ("fused", fused)):
                forward, backward = best(call, packing, inputs, args.repeats)
                kind = str(dtype).removeprefix("torch.")
                lines.append(f"| {label} | {kind} | {name} | {forward:.2f} | {backward:.2f} |")
    text = "\n".join([*machine_lines(machine()), "", *lines])
    print(text)
    if args.output:
        args.output.mkdir(parents=True, exist_ok=True)
        (args.output / "attention.md").write_text(text + "\n")


if __name__ == "__main__":
    main()
