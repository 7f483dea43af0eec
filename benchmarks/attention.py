"""Attention of one layer, forward and backward: written out over packed prompts, against torch's fused kernel.

    python -m benchmarks.attention [--output docs/results/benchmark]

At SmolLM2-135M's shapes (9 query heads, 3 of keys and values, 64 wide), in batches of about 1,024 padded tokens at
most, each prompt a token or two shorter than the one before. `blocks`: queries in blocks, as `fast/packing.py` has them.
`remade`: the same with probabilities computed again in the backward pass. `square`: in one block, keys above the
diagonal too. All start from and end in packed tokens. The best of `--repeats` turns; CPU.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ephemera.bench.timing import machine, machine_lines
from ephemera.fast import cpu_attention as packed
from ephemera.fast.cpu_attention import attention
from ephemera.fast.packing import Packing

BATCHES = ((8, 32), (8, 64), (8, 128), (4, 256), (2, 435), (2, 512), (1, 768), (1, 1024))
DTYPES = (torch.float32, torch.bfloat16)
HEADS, GROUPS, WIDTH = 9, 3, 64
LARGE = 1 << 40
BLOCKS, OTHER_BLOCK = packed.BLOCK, packed.OTHER_BLOCK


def fused(packing: Packing, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What transformers does with padded rows, between packing and unpacking."""
    rows = [packing.rows(x[0].transpose(0, 1)).transpose(1, 2) for x in (q, k, v)]
    q_BHTC, k_BHTC, v_BHTC = rows[0], *(r.repeat_interleave(HEADS // GROUPS, 1) for r in rows[1:])
    y_BHTC = F.scaled_dot_product_attention(q_BHTC, k_BHTC, v_BHTC, is_causal=True)
    return packing.tokens(y_BHTC.transpose(1, 2))[None]


def written_out(block: int | None, kept_bytes: int) -> Callable[..., Tensor]:
    def call(packing: Packing, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        packed.FUSED_FROM, packed.KEPT_BYTES = LARGE, kept_bytes
        packed.BLOCK, packed.OTHER_BLOCK = (BLOCKS, OTHER_BLOCK) if block is None else ({}, block)
        return attention(torch.nn.Module(), q, k, v, None, packing=packing)[0]

    return call


CONTENDERS = {
    "blocks": written_out(None, LARGE),
    "remade": written_out(None, 0),
    "square": written_out(LARGE, LARGE),
    "fused": fused,
}


def best(packing: Packing, inputs: list[Tensor], repeats: int) -> dict[str, tuple[float, float]]:
    """Milliseconds of the forward and of the backward pass of each contender, in turns."""
    found = {name: (float("inf"), float("inf")) for name in CONTENDERS}
    for _ in range(repeats):
        for name, call in CONTENDERS.items():
            start = time.perf_counter()
            y = call(packing, *inputs)
            middle = time.perf_counter()
            torch.autograd.grad(y, inputs, torch.ones_like(y))
            end = time.perf_counter()
            found[name] = min(found[name][0], (middle - start) * 1e3), min(found[name][1], (end - middle) * 1e3)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.attention", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--repeats", type=int, default=20, help="turns (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="a folder for attention.md")
    args = parser.parse_args()
    torch.manual_seed(0)
    lines = [
        "Milliseconds forward + backward.",
        "",
        f"| prompts | dtype | {' | '.join(CONTENDERS)} |",
        f"|---|---|{'--:|' * len(CONTENDERS)}",
    ]
    for dtype in DTYPES:
        for count, longest in BATCHES:
            packing = Packing(tuple(longest - i for i in range(count)))
            inputs = [
                torch.randn(1, sum(packing.lengths), heads, WIDTH, dtype=dtype).transpose(1, 2).requires_grad_()
                for heads in (HEADS, GROUPS, GROUPS)
            ]
            cells = [f"{f:.2f} + {b:.2f}" for f, b in best(packing, inputs, args.repeats).values()]
            print(f"{dtype} {count} x {longest}: {', '.join(cells)}", file=sys.stderr, flush=True)
            lines.append(f"| {count} x {longest} | {str(dtype).removeprefix('torch.')} | {' | '.join(cells)} |")
    text = "\n".join([*machine_lines(machine()), "", *lines])
    print(text)
    if args.output:
        args.output.mkdir(parents=True, exist_ok=True)
        (args.output / "attention.md").write_text(text + "\n")


if __name__ == "__main__":
    main()
