"""Peak memory of one contender over its loaded model, each in a process of its own.

`python -m benchmarks.memory '{"who": "ephemera", ...}'` prints one JSON object; `benchmarks.adapt` calls it.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ephemera.adapt import adapt
from ephemera.bench.contenders import INIT, RATE, PeftLoop, adapt_batched, encoded, initial_lora
from ephemera.llm.frozen_lm import FrozenLM
from ephemera.llm.load import load_backbone
from ephemera.rates import FixedRate, ScaleNet
from ephemera.scoring import Encoded, prompt_batch
from ephemera.training.meta_gradient import scalenet_backward

ROOT = Path(__file__).parent.parent
STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")
Contender = Callable[[Sequence[Encoded], int], Any]  # rows, steps


def measure(who: str, **settings: Any) -> dict[str, int]:
    """Peak bytes over the loaded model in a fresh process, and the bytes of one step's gradients.

    glibc is told to give large blocks back: by default it comes to hoard them, and the peak then grows
    with the number of steps though no more is in use at once.
    """
    command = [sys.executable, "-m", "benchmarks.memory", json.dumps({"who": who, **settings})]
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(128 * 1024)}
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    if result.returncode:
        last = (result.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise ValueError(f"measuring the memory of {who} failed with exit status {result.returncode}: {last}")
    return json.loads(result.stdout.splitlines()[-1])


def run(*, who: str, model: str, dtype: str, length: str, batch: int, steps: int, threads: int) -> dict[str, int]:
    torch.set_num_threads(threads)
    backbone = load_backbone(model, dtype=dtype, device="cpu")
    rows = encoded(backbone, length, batch)
    gradient_bytes = sum(t.nbytes for t in initial_lora(backbone, [row.prompt for row in rows]).tensors)
    contender = {"ephemera": _ephemera, "peft": _peft, "step": _step, "scalenet": _scalenet}[who](backbone, steps, rows)
    del backbone  # PEFT has loaded a model of its own
    tiny = [Encoded("warm-up", rows[0].prompt[:2], rows[0].answer[:1])]
    contender(tiny, 1)  # lazy imports and thread stacks are not the contender's
    loaded = _loaded()
    contender(rows, steps)
    return {"peak_bytes": _peak() - loaded, "loaded_bytes": loaded, "gradient_bytes": gradient_bytes}


def _ephemera(backbone: FrozenLM, steps: int, rows: Sequence[Encoded]) -> Contender:
    return lambda rows, steps: adapt_batched(backbone, [row.prompt for row in rows], steps)


def _peft(backbone: FrozenLM, steps: int, rows: Sequence[Encoded]) -> Contender:
    loop = PeftLoop(backbone)
    initial = initial_lora(backbone, [row.prompt for row in rows])
    return lambda rows, steps: loop.adapt_all([row.prompt for row in rows], initial, steps)


def _step(backbone: FrozenLM, steps: int, rows: Sequence[Encoded]) -> Contender:
    """One step on the batch that ScaleNet's training adapts to."""

    def contender(rows: Sequence[Encoded], steps: int) -> Any:
        batch = prompt_batch(backbone, rows)
        return adapt(backbone, batch, INIT(backbone, batch, [0] * len(rows)), FixedRate(RATE), 1)

    return contender


def _scalenet(backbone: FrozenLM, steps: int, rows: Sequence[Encoded]) -> Contender:
    network = ScaleNet(
        hidden_size=backbone.hidden_size, projections=len(backbone.projections), base_rates=(RATE,) * steps
    )
    return lambda rows, steps: scalenet_backward(backbone, INIT, network, rows, steps, seed=0)


def _loaded() -> int:
    """Bytes in memory now, from which the peak starts anew where the system allows it (Linux)."""
    gc.collect()
    if not CLEAR_REFS.exists():
        return _peak()
    ctypes.CDLL(None).malloc_trim(0)
    CLEAR_REFS.write_text("5")
    return _status("VmRSS")


def _peak() -> int:
    """Highest bytes in memory since the start, or since `_loaded` where that could begin anew.

    Not ru_maxrss on Linux: it never falls below what the process that started this one had.
    """
    if CLEAR_REFS.exists():
        return _status("VmHWM")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _status(key: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{key}:"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    print(json.dumps(run(**json.loads(sys.argv[1]))))
