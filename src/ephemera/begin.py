"""Start, steps and gate of a batch of prompts: how model, server and evaluation adapt."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ephemera.adapt import adapt
from ephemera.adaptation import Adaptation
from ephemera.batch import TokenBatch
from ephemera.gate import Gate
from ephemera.guard import guard
from ephemera.inits import Init
from ephemera.llm.frozen_lm import FrozenLM
from ephemera.llm.prefill import Prefill, whole_reading
from ephemera.made_for import Reach
from ephemera.rates import Rate


def reach_of(init: Init | None, rule: Rate | None) -> Reach:
    """Where adapters act if nobody says: as the rate was trained for, else as the generator was."""
    if rule is not None:
        return rule.reach
    return "all" if init is None else init.reach


def gate_of(rule: Rate | None, reach: Reach, init: Init) -> Gate | None:
    """The gate that a rate's adapters pass; it was calibrated for reach `answer` from the zero start."""
    return rule.gate if rule is not None and reach == "answer" and init.zero else None


def adapt_from(
    backbone: FrozenLM,
    batch: TokenBatch,
    init: Init,
    seeds: Sequence[int],
    rule: Rate | None,
    steps: int,
    reach: Reach,
    *,
    after_step: Callable[[int], None] | None = None,
) -> tuple[Adaptation, Prefill | None]:
    """`adapt` from an init, and what the rate's gate leaves of its adapters.

    With reach `answer` the prompts are read without adapters once: by the first step from B = 0, or for a generator's h.
    The prompts as they were read then are the gate's; None without one.
    """
    reading = None
    with torch.no_grad():
        if reach == "answer" and init.reads_prompts:
            reading = whole_reading(backbone, batch, None)
            lora = init.after(backbone, batch, reading)
        else:
            lora = init(backbone, batch, seeds)
    keeps = reach == "answer" and init.zero  # from another start the first pass has adapters
    made = adapt(backbone, batch, lora, rule, steps, keep_reading=keeps, after_step=after_step)
    if reading is not None:
        made = made.with_reading(reading)
    gate = gate_of(rule, reach, init) if steps else None
    return (made, None) if gate is None else guard(gate, backbone, batch, made)
