"""Runs a result's stages: finished ones are kept, a stopped one goes on where it was."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from ephemera.config import Analyse, Benchmark, Evaluate, TrainGenerator, TrainScaleNet, TrainTaskLora
from ephemera.cost import Device
from ephemera.evaluation.nll.tables import Table
from ephemera.reproduce.stages import Stage
from ephemera.run_info import commit
from ephemera.saving import json_text

DONE = "done.json"
NOTE = (
    "FLOPs: two for each weight and token, forward; as many again for a backward pass by activations. Memory: weights, a "
    "batch's activations, logits and adapters. Hours: at {flops:.3g} FLOP/s, what {device} reaches in {dtype} by its data sheet "
    "or our measurements; a plan, not a measurement."
)


def done(stage: Stage) -> bool:
    return (stage.folder / DONE).exists()


def plan_table(title: str, stages: Sequence[Stage], device: Device, dtype: str) -> Table:
    """What each stage takes on a device, from the configuration alone."""
    speed, rows = device.flops[dtype], []
    for stage in stages:
        hours = "done" if done(stage) else f"{stage.flops / speed / 3600:.3g}"
        fits = "" if stage.bytes <= device.bytes else " (more than it has)"
        rows.append(
            [stage.name, f"{stage.samples:,}", f"{stage.flops / 1e12:,.0f}", f"{stage.bytes / 1e9:.1f}{fits}", hours]
        )
    left = [stage for stage in stages if not done(stage)]
    flops, bytes = sum(s.flops for s in left), max((s.bytes for s in left), default=0.0)
    whole = [f"{flops / 1e12:,.0f}", f"{bytes / 1e9:.1f}", f"{flops / speed / 3600:.3g}"]
    rows.append([f"{len(left)} stages to run", f"{sum(s.samples for s in left):,}", *whole])
    note = NOTE.format(flops=speed, device=device.name, dtype=dtype)
    return Table(title, note, ["stage", "rows", "TFLOP", "GB", f"hours on {device.name}"], rows)


def run_stages(stages: Sequence[Stage], speed: float) -> None:
    """One line on stderr for each stage, with an estimate: at `speed` FLOP/s, then at what finished stages reached."""
    for number, stage in enumerate(stages, 1):
        if done(stage):
            continue
        left = [s for s in stages[number - 1 :] if not done(s)]
        seconds = sum(s.flops for s in left) / (measured_speed(stages) or speed)
        print(f"[{number}/{len(stages)}] {stage.name}; about {duration(seconds)} left", file=sys.stderr, flush=True)
        start = time.perf_counter()
        execute(stage)
        told = {"seconds": round(time.perf_counter() - start, 1), "flops": stage.flops, "commit": commit()}
        (stage.folder / DONE).write_text(json_text(told) + "\n")


def measured_speed(stages: Sequence[Stage]) -> float | None:
    """FLOP/s of the stages that are done; None if none is."""
    told = [json.loads((stage.folder / DONE).read_text()) for stage in stages if done(stage)]
    seconds = sum(one["seconds"] for one in told)
    return sum(one["flops"] for one in told) / seconds if seconds else None


def duration(seconds: float) -> str:
    """45 s, 12 min, 3 h 20 min"""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def execute(stage: Stage) -> Path:
    """The stage's command; it resumes what its folder holds."""
    settings = stage.settings
    if isinstance(settings, TrainScaleNet):
        from ephemera.training.scalenet import train_scalenet

        return train_scalenet(settings, resume=True)
    if isinstance(settings, TrainTaskLora):
        from ephemera.training.task_lora import train_task_lora

        return train_task_lora(settings, resume=True)
    if isinstance(settings, TrainGenerator):
        from ephemera.training.generator import train_generator

        return train_generator(settings, resume=True)
    if isinstance(settings, Evaluate):
        from ephemera.evaluation.nll.grid import evaluate
        from ephemera.evaluation.nll.report import write_report

        return write_report(evaluate(settings))
    if isinstance(settings, Benchmark):
        from ephemera.evaluation.accuracy.run import benchmark
        from ephemera.evaluation.accuracy.tables import write_tables

        return write_tables(benchmark(settings))
    assert isinstance(settings, Analyse)
    from ephemera.evaluation.adapters.analysis import analyse
    from ephemera.evaluation.adapters.figures import write_figures
    from ephemera.evaluation.adapters.tables import write_tables as write_analysis

    analysis = analyse(settings)
    write_figures(analysis)
    return write_analysis(analysis)
