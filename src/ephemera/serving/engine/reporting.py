"""How the adaptations of a group went: the `ephemera` object of each response."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ephemera.adaptation import Adaptation, LeftAlone, left_alone, risen, told
from ephemera.batch import TokenBatch
from ephemera.llm.frozen_lm import FrozenLM
from ephemera.llm.model_files import called
from ephemera.llm.prefill import Prefill
from ephemera.serving.engine.decode_batch import out_of_memory
from ephemera.serving.engine.messages import Job, Report
from ephemera.serving.http.adapter import zipped


@dataclass(frozen=True)
class Times:
    """Seconds that adapting took, and when the first tokens were out."""

    adapting: float
    first: float


def reports(
    backbone: FrozenLM,
    group: Sequence[Job],
    made: Adaptation | None,
    read: Prefill,
    times: Times,
) -> list[tuple[Report, LeftAlone | None]]:
    """A report for each job, and why its answer came from the adapter's start, if it did.

    Made when the first tokens are out, as the loss after the last step takes a fifth of a prefill.
    """
    taken = made.steps if made else 0
    last_B = _last_nll(backbone, read, group, taken)
    none_B = torch.zeros_like(read.fallback_B)
    fell_B, alone_B = (made.fallback_B | read.fallback_B, made.abstained_B) if made else (none_B, none_B)
    nll_BK = made.prompt_nll_BK.tolist() if made else [[]] * len(group)
    reported = []
    for row, (job, fell, alone) in enumerate(zip(group, fell_B.tolist(), alone_B.tolist(), strict=True)):
        method, seen_K = job.method, nll_BK[row]
        left = left_alone(fell_back=fell, tokens=len(job.ids), steps=job.steps, abstained=alone)
        if left is LeftAlone.ABSTAINED and method.gate(job.steps) is None:  # what is left is the bound's
            left = LeftAlone.TOO_FAR
        nll_K = (*seen_K, *last_B[row])
        if left is None:
            note = told(method.beyond(job.format, job.steps), risen(nll_K if _whole(job) else seen_K))
        else:
            note = left.words(started=method.started(job.steps))
        facts = {
            "method": method.name,
            "steps": job.steps,
            "steps_taken": taken,
            "reach": method.reach if method.init is not None else None,
            "abstained": left is LeftAlone.ABSTAINED,
            "note": note,
            "prompt_nll": [_number(x) for x in nll_K],
            "adapt_seconds": times.adapting if made else 0.0,
            "first_token_seconds": times.first - job.arrived,
            "trace": _rates(backbone, made, row) if job.trace else None,
        }
        packed = None
        if job.adapter and read.lora is not None:
            token = job.ids[-1] if read.base_BD is not None else None
            packed = zipped(read.lora, row, base_model=called(backbone.name), last_token=token)
        reported.append((Report(facts, packed), left))
    return reported


def _whole(job: Job) -> bool:
    """Whether the steps' losses are the whole model's: an early exit's are others."""
    return job.method.rate is None or job.method.rate.objective.describe() is None


def _last_nll(backbone: FrozenLM, read: Prefill, group: Sequence[Job], taken: int) -> list[list[float]]:
    """The loss that the last step left, where it is asked for or to be compared; with reach `answer` there is none.

    No answer is lost where memory is too short for it.
    """
    found: list[list[float]] = [[] for _ in group]
    if read.base_BD is not None:
        return found
    rows = [row for row, job in enumerate(group) if job.trace or (taken and _whole(job))]
    if not rows:
        return found
    try:
        batch = TokenBatch(read.batch.ids_BT[rows], read.batch.mask_BT[rows])
        with torch.no_grad():
            last = backbone.mean_nll(read.hidden_BTD[rows], batch).tolist()
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        last = [math.nan] * len(rows)
    for row, nll in zip(rows, last, strict=True):
        found[row] = [nll]
    return found


def _rates(backbone: FrozenLM, made: Adaptation | None, row: int) -> dict[str, Any]:
    projections = [{"layer": p.layer, "kind": p.kind, "name": p.name} for p in backbone.projections]
    rates_KM = made.rates_BKM[row].tolist() if made else []
    return {"projections": projections, "rates": [[_number(x) for x in step] for step in rates_KM]}


def _number(x: float) -> float | None:
    """JSON has no NaN."""
    return x if math.isfinite(x) else None
