"""Contenders that take turns, and the machine their times belong to."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import peft
import torch

from ephemera.llm.precision import multiplies_bfloat16
from ephemera.run_info import commit, versions

DTYPES = ("float32", "bfloat16")
CPU = torch.device("cpu")


def native_dtypes(device: torch.device = CPU) -> list[str]:
    """Those that a device is measured in: on a CPU without instructions for bfloat16 that one would take hours."""
    native = device.type != "cpu" or multiplies_bfloat16()
    return [dtype for dtype in DTYPES if dtype == "float32" or native]


def spread(seconds: Sequence[float]) -> dict[str, Any]:
    return {"median": median(seconds), "min": min(seconds), "max": max(seconds), "all": list(seconds)}


def timed(call: Callable[[], Any]) -> float:
    """Seconds until the call's work is done, an accelerator's too."""
    _wait()
    start = time.perf_counter()
    call()
    _wait()
    return time.perf_counter() - start


def _wait() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def turns(
    contenders: Mapping[str, Callable[[], float]], rounds: int, *, budget_s: float = float("inf"), least: int = 2
) -> dict[str, list[float]]:
    """Seconds of each contender, round by round, so that a machine that slows down slows them alike.

    Each says its own seconds. Ends early, but not before `least` rounds, where one more would outlast `budget_s`.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    start = time.perf_counter()
    for done in range(rounds):
        spent = time.perf_counter() - start
        if done >= least and spent * (done + 1) / done > budget_s:
            break
        for name, contender in contenders.items():
            seconds[name].append(contender())
    return seconds


def ratios(above: Sequence[float], below: Sequence[float]) -> dict[str, Any]:
    """One contender's seconds over another's: of the medians, and round by round."""
    return {
        "ratio": median(above) / median(below),
        "rounds": [a / b for a, b in zip(above, below, strict=True)],
    }


def machine(device: torch.device = CPU) -> dict[str, Any]:
    """What the numbers of that device depend on. `load_average` is that of the last minute, before the benchmark began."""
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "accelerator": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "system": platform.platform(),
        "load_average": os.getloadavg()[0],
        "versions": {**versions(), "peft": peft.__version__},
        "commit": commit(),
    }


def machine_lines(facts: dict[str, Any]) -> list[str]:
    """The same for the head of a table."""
    return [
        f"Machine: {facts['cpu']}, {facts['cores']} cores, {facts['threads']} threads, {facts['instructions']}, "
        + (f"{facts['accelerator']}, " if facts.get("accelerator") else "")
        + f"load average {facts['load_average']:.2f} before the run.",
        "Versions: " + ", ".join(f"{k} {v}" for k, v in facts["versions"].items()) + f"; commit {facts['commit']}.",
    ]


def _cpu() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
