"""The benchmark's results as one Markdown table, with the machine they belong to."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import peft
import torch

from ephemera.evaluation.grid import commit, versions


def spread(seconds: Sequence[float]) -> dict[str, Any]:
    return {"median": median(seconds), "min": min(seconds), "max": max(seconds), "all": list(seconds)}


def machine() -> dict[str, Any]:
    """What the numbers depend on. `load_average` is that of the last minute, before the benchmark began."""
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "system": platform.platform(),
        "load_average": os.getloadavg()[0],
        "versions": {**versions(), "peft": peft.__version__},
        "commit": commit(),
    }


def _cpu() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def table(details: dict[str, Any]) -> str:
    """Every measured length and dtype, three rows each."""
    facts, settings = details["machine"], details["settings"]
    lines = [
        f"Model {settings['model']}, {settings['batch']} prompts, {settings['steps']} steps, "
        f"{settings['repeats']} rounds; median [lowest, highest].",
        f"Machine: {facts['cpu']}, {facts['cores']} cores, {facts['threads']} threads, {facts['instructions']}, "
        f"load average {facts['load_average']:.2f} before the run.",
        "Versions: " + ", ".join(f"{k} {v}" for k, v in facts["versions"].items()) + f"; commit {facts['commit']}.",
        "",
        "| prompts | dtype | | seconds | prompts/s | vs PEFT | vs floor | peak memory (MB) |",
        "|---|---|---|---|---|---|---|---|",
    ]
    notes = []
    for cell in details["cells"]:
        tokens = cell["tokens"]
        label = f"{cell['length']} ({min(tokens)}-{max(tokens)} tokens)"
        memory = cell.get("memory", {})
        for who in ("ephemera", "peft", "floor"):
            seconds = cell[who]["seconds"]
            ratios = ("", "")
            if who == "ephemera":
                ratios = (f"{cell['vs_peft']:.2f}", f"{cell['vs_floor']:.2f}")
            elif who == "peft":
                ratios = ("1", f"{seconds['median'] / cell['floor']['seconds']['median']:.2f}")
            peak = f"{memory[who] / 1e6:.0f}" if who in memory else ""
            lines.append(
                f"| {label} | {cell['dtype']} | {who} | {seconds['median']:.3g} [{seconds['min']:.3g}, "
                f"{seconds['max']:.3g}] | {cell[who]['prompts_per_second']:.2f} | {ratios[0]} | {ratios[1]} | {peak} |"
            )
        notes.append(
            f"{cell['length']} {cell['dtype']}: adapters differ from PEFT's by at most "
            f"{cell['max_relative_difference']:.1e}; floor {cell['floor']['gflop']:.0f} GFLOP at "
            f"{cell['floor']['gflop_per_second']:.0f} GFLOP/s"
            + (
                f"; training ScaleNet peaks at {memory['scalenet'] / 1e6:.0f} MB, {memory['scalenet_ratio']:.2f} times "
                "one step and its stored gradients"
                if memory
                else ""
            )
            + "."
        )
    return "\n".join([*lines, "", *(f"- {note}" for note in notes)])
