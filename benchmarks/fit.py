"""Do many long prompts fit? AdaptiveLM.adapt in this fresh process, and the most memory that it ever held.

python -m benchmarks.fit [--prompts 64] [--tokens 512] [--steps 1] [--dtype float32] [--checkpoint]
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from collections.abc import Sequence
from itertools import pairwise

import torch
import transformers

from ephemera.bench.contenders import RATE
from ephemera.bench.prompts import examples
from ephemera.downloads import DEFAULT_MODEL
from ephemera.model import AdaptiveLM


def main(argv: Sequence[str] | None = None) -> int:
    transformers.logging.disable_progress_bar()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fit", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default=DEFAULT_MODEL, help="a name or a folder (default: %(default)s)")
    parser.add_argument("--prompts", type=int, default=64, help="(default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=512, help="of each (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=1, help="(default: %(default)s)")
    parser.add_argument("--dtype", default="float32", help="(default: %(default)s)")
    parser.add_argument("--checkpoint", action="store_true", help="layers are run again in the backward pass")
    args = parser.parse_args(argv)
    lm = AdaptiveLM.from_pretrained(
        args.model, rate=RATE, dtype=args.dtype, truncate="left", checkpoint=args.checkpoint
    )
    window = lm.backbone.max_length
    lm.backbone.max_length = min(window, args.tokens)  # longer prompts are cut to it
    articles = [e.prompt for e in examples("long", args.prompts + 1)]
    prompts = [f"{a}\n\n{b}" for a, b in pairwise(articles)]
    loaded = _peak()
    start = time.perf_counter()
    lengths = {len(lm.encode(p)) for p in prompts}
    adaptation = lm.adapt(prompts, steps=args.steps)
    seconds = time.perf_counter() - start
    result = {
        "prompts": len(prompts),
        "tokens": sorted(lengths),
        "steps": args.steps,
        "dtype": args.dtype,
        "checkpoint": args.checkpoint,
        "threads": torch.get_num_threads(),
        "fallbacks": int(adaptation.fallback_B.sum()),
        "seconds": round(seconds, 1),
        "peak_gb": _peak() / 1e9,
        "peak_of_loading_gb": loaded / 1e9,
        "adapters_mb_per_prompt": sum(t.nbytes for t in adaptation.lora.tensors) / len(prompts) / 1e6,
    }
    print(json.dumps(result))
    return 0


def _peak() -> int:
    """The most that this process ever held, the model and Python itself included."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    sys.exit(main())
