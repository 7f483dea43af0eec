"""One training loop: batches by length, AdamW, checkpoints that resume to the same weights."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from ephemera.batch import batch_tokens, length_batches
from ephemera.config import OptimizerSettings
from ephemera.llm import processes
from ephemera.saving import json_text, save_tensors
from ephemera.scoring import Encoded
from ephemera.training.spread import as_the_first

SKIPS = 10  # steps in a row without a finite gradient, after which training stops
BUCKET = 50  # batches that are sorted by length together
LOST = (
    f"the gradient was not finite {SKIPS} steps in a row (up to step {{step}}); training stopped. The last good weights "
    "are kept in {checkpoints}. Start anew with a lower optimizer.learning_rate or optimizer.clip_norm, or with "
    "model.dtype=float32."
)


class Trainee(Protocol):
    """What the loop trains: a network, one step's gradients, and how it does on validation rows."""

    @property
    def network(self) -> nn.Module: ...

    @property
    def learning_rates(self) -> dict[str, float]:
        """Factor on the learning rate of the parameters whose names begin so, in the network's order."""
        ...

    def backward(self, rows: Sequence[Encoded], step: int) -> dict[str, float] | None:
        """Leave gradients in the network; None where this step has none to give."""
        ...

    def validate(self) -> dict[str, float]: ...


@dataclass(frozen=True)
class Schedule:
    """When the loop saves and validates, in optimiser steps."""

    checkpoint_every: int
    validate_every: int


def batches(lengths: Sequence[int], *, batch_size: int, total: int, seed: int) -> Iterator[list[int]]:
    """Row indices of each optimiser step: a shuffle an epoch, similar lengths together, `total` rows in all.

    A pure function of its arguments, so that a resumed run sees the same batches.
    """
    given = 0
    epoch = 0
    while given < total:
        rng = random.Random(f"{seed}:{epoch}")
        order = list(range(len(lengths)))
        rng.shuffle(order)
        made: list[list[int]] = []
        for start in range(0, len(order), BUCKET * batch_size):
            bucket = sorted(order[start : start + BUCKET * batch_size], key=lambda i: lengths[i])
            made += [bucket[i : i + batch_size] for i in range(0, len(bucket), batch_size)]
        rng.shuffle(made)
        for batch in made:
            if given >= total:
                return
            yield batch[: total - given]
            given += len(batch)
        epoch += 1


def learning_rate(step: int, steps: int, settings: OptimizerSettings) -> float:
    """Linear warm-up, then cosine decay to a tenth."""
    if step < settings.warmup:
        return settings.learning_rate * (step + 1) / settings.warmup
    progress = (step - settings.warmup) / max(1, steps - settings.warmup)
    return settings.learning_rate * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress)))


def train(
    trainee: Trainee,
    rows: Sequence[Encoded],
    settings: OptimizerSettings,
    schedule: Schedule,
    folder: Path,
    accelerator: Accelerator,
    *,
    resume: bool,
    plan: Sequence[Sequence[int]] | None = None,
) -> None:
    """Train to `settings.samples` prompts, writing metrics.jsonl and checkpoints to `folder`.

    `plan`: row indices of each optimiser step, whose batches the trainee takes whole; default: a shuffle an epoch.
    """
    network = trainee.network
    optimizer = _optimizer(trainee, settings)
    lengths = [len(row.prompt) + len(row.answer) for row in rows]
    whole = plan is not None
    plan = plan or list(batches(lengths, batch_size=settings.batch_size, total=settings.samples, seed=settings.seed))
    processes.check_same(
        "rows to train on", ([(row.id, row.prompt, row.answer) for row in rows], plan), accelerator.device
    )
    done = _restore(folder, network, optimizer) if resume and accelerator.is_main_process else 0
    done = as_the_first(network, optimizer, done)
    metrics = Metrics(folder, accelerator, keep_below=done)
    start = time.perf_counter()
    skipped = skipped_in_a_row = 0
    for step in range(done, len(plan)):
        share = plan[step][accelerator.process_index :: accelerator.num_processes]
        for group in optimizer.param_groups:
            group["lr"] = group["factor"] * learning_rate(step, len(plan), settings)
        optimizer.zero_grad(set_to_none=True)
        take = trainee.backward if whole else partial(_backward, trainee, accelerator=accelerator)
        report = take([rows[i] for i in share], step) if share else None
        report = _pooled(processes.gathered((len(share), report)))
        if accelerator.num_processes > 1:
            _average_gradients(network, accelerator, weight=len(share) / len(plan[step]))
        if _has_gradients(network):
            norm = nn.utils.clip_grad_norm_(network.parameters(), settings.clip_norm)
            if bool(norm.isfinite()) and not _lost(report):
                optimizer.step()
                skipped_in_a_row = 0
            else:
                skipped, skipped_in_a_row = skipped + 1, skipped_in_a_row + 1
            rate = optimizer.param_groups[0]["lr"]
            report = {**(report or {}), "grad_norm": norm.item(), "learning_rate": rate, "skipped": skipped}
        if report is not None:
            metrics.log(step + 1, {**report, "seconds": round(time.perf_counter() - start, 3)})
        if skipped_in_a_row == SKIPS:
            if accelerator.is_main_process:  # the weights are those of the last good step
                write_checkpoint(folder, step + 1 - SKIPS, network, optimizer)
            raise ValueError(LOST.format(step=step + 1, checkpoints=folder / "checkpoints"))
        last = step + 1 == len(plan)
        if last or (step + 1) % schedule.validate_every == 0:
            metrics.log(step + 1, trainee.validate())
        if (last or (step + 1) % schedule.checkpoint_every == 0) and accelerator.is_main_process:
            write_checkpoint(folder, step + 1, network, optimizer)


def _optimizer(trainee: Trainee, settings: OptimizerSettings) -> torch.optim.AdamW:
    groups = [
        {"params": [p for name, p in trainee.network.named_parameters() if name.startswith(start)], "factor": factor}
        for start, factor in trainee.learning_rates.items()
    ]
    return torch.optim.AdamW(groups, lr=settings.learning_rate, weight_decay=settings.weight_decay)


def _backward(
    trainee: Trainee, rows: Sequence[Encoded], step: int, *, accelerator: Accelerator
) -> dict[str, float] | None:
    """The batch's mean gradient, from parts of no more tokens than the device likes at once.

    Each part leaves the mean over its own rows on top of what is there. Weighed by its share of the rows the sum is
    the mean over all: what is there is scaled before each part, so that one factor is right for all at the end.
    """
    lengths = [len(row.prompt) + len(row.answer) for row in rows]
    parts = length_batches(lengths, batch_size=len(rows), max_tokens=batch_tokens(accelerator.device))
    if len(parts) == 1:
        return trainee.backward(rows, step)
    reports: list[tuple[int, dict[str, float] | None]] = []
    last = len(parts[0])
    for part in parts:
        _scale_gradients(trainee.network, last / len(part))
        last = len(part)
        report = trainee.backward([rows[i] for i in part], step)
        reports.append((len(part), report))
    _scale_gradients(trainee.network, last / len(rows))
    return _pooled(reports)


def _scale_gradients(network: nn.Module, factor: float) -> None:
    for parameter in network.parameters():
        if parameter.grad is not None:
            parameter.grad.mul_(factor)


def _pooled(parts: Sequence[tuple[int, dict[str, float] | None]]) -> dict[str, float] | None:
    """One report of several parts: rows lost are counted, all else is the mean over the rows that have it."""
    reports = [(n, report) for n, report in parts if report is not None]
    if len(reports) < 2:
        return reports[0][1] if reports else None
    pooled: dict[str, float] = {}
    for key in reports[0][1]:
        if key == "non_finite":
            pooled[key] = sum(report[key] for _, report in reports)
            continue
        rows = [(n - report.get("non_finite", 0) if key == "nll" else n, report[key]) for n, report in reports]
        finite = [(n, value) for n, value in rows if math.isfinite(value)]
        total = sum(n for n, _ in finite)
        pooled[key] = sum(n * value for n, value in finite) / total if total else math.nan
    return pooled


def _lost(report: dict[str, float] | None) -> bool:
    """Did every row of the batch, of all processes, come out non-finite? Then there is nothing to learn from it."""
    return report is not None and not math.isfinite(report.get("nll", 0.0))


def _has_gradients(network: nn.Module) -> bool:
    return any(p.grad is not None for p in network.parameters())


def _average_gradients(network: nn.Module, accelerator: Accelerator, *, weight: float) -> None:
    """Every process's gradient is the mean over its own prompts: weigh them, and add.

    A parameter that has a gradient nowhere (K = 0) keeps none, so that it takes no step, as with one process.
    """
    parameters = list(network.parameters())
    have_P = torch.tensor([float(p.grad is not None) for p in parameters], device=accelerator.device)
    somewhere_P = accelerator.reduce(have_P, reduction="sum") > 0  # pyright: ignore[reportOperatorIssue]
    for parameter, somewhere in zip(parameters, somewhere_P.tolist(), strict=True):
        if somewhere:
            own = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad * weight
            parameter.grad = accelerator.reduce(own, reduction="sum")  # pyright: ignore[reportAttributeAccessIssue]


def write_checkpoint(folder: Path, step: int, network: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Write step-N whole, then drop the one before it: a kill at any moment leaves one that is whole."""
    state = {f"network.{key}": t.contiguous() for key, t in network.state_dict().items()}
    for name, parameter in network.named_parameters():
        moments = optimizer.state.get(parameter, {})
        state |= {f"optimizer.{name}.{key}": torch.as_tensor(value).clone() for key, value in moments.items()}
    place = folder / "checkpoints" / f"step-{step:06d}.safetensors"
    place.parent.mkdir(parents=True, exist_ok=True)
    scratch = place.with_suffix(".partial")
    try:
        save_tensors({key: t.cpu() for key, t in state.items()}, scratch)
        os.replace(scratch, place)
    except (OSError, SafetensorError) as error:
        scratch.unlink(missing_ok=True)
        raise ValueError(
            f"cannot write checkpoint {place}: {error}. Free some disk space; the run goes on from its last "
            "checkpoint with --resume."
        ) from error
    for older in sorted(place.parent.glob("step-*.safetensors"))[:-2]:
        older.unlink()


def _restore(folder: Path, network: nn.Module, optimizer: torch.optim.AdamW) -> int:
    """Load the newest checkpoint that is whole; 0 where there is none."""
    for place in sorted((folder / "checkpoints").glob("step-*.safetensors"), reverse=True):
        try:
            state = load_file(place)
        except (SafetensorError, OSError) as error:
            print(f"{place} is corrupt ({error}); trying the one before it.", file=sys.stderr)
            continue
        network.load_state_dict({k.removeprefix("network."): t for k, t in state.items() if k.startswith("network.")})
        for name, parameter in network.named_parameters():
            moments = {
                key: state[f"optimizer.{name}.{key}"]
                for key in ("step", "exp_avg", "exp_avg_sq")
                if f"optimizer.{name}.{key}" in state
            }
            if moments:
                optimizer.state[parameter] = {
                    key: t if key == "step" else t.to(parameter) for key, t in moments.items()
                }
        return int(place.stem.removeprefix("step-"))
    return 0


def clear(folder: Path) -> None:
    """Make way for a new run, which must not resume from an older one's checkpoints."""
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    (folder / "metrics.jsonl").unlink(missing_ok=True)


class Metrics:
    """metrics.jsonl, one object a line, and any trackers of the accelerator. Main process only."""

    def __init__(self, folder: Path, accelerator: Accelerator, *, keep_below: int):
        self.accelerator = accelerator
        self.path = folder / "metrics.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        if not accelerator.is_main_process:
            return
        # Lines after the checkpoint that a resumed run starts from will come again.
        kept = []
        if self.path.exists():
            for line in self.path.read_text().splitlines():
                try:
                    value = json.loads(line)
                except json.JSONDecodeError:  # the line that was being written at the kill
                    continue
                if value["step"] <= keep_below:
                    kept.append(line)
        self.path.write_text("".join(f"{line}\n" for line in kept))

    def log(self, step: int, values: dict[str, Any]) -> None:
        if not self.accelerator.is_main_process:
            return
        with self.path.open("a") as file:
            file.write(json_text({"step": step, **values}) + "\n")
        self.accelerator.log(values, step=step)
        if "validation" in "".join(values):
            print(f"step {step}: " + ", ".join(f"{k} {v:.4f}" for k, v in values.items()), file=sys.stderr)
