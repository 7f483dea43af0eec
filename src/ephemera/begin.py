"""Start, steps and gate of a batch of prompts: how model, server and evaluation adapt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from ephemera.adapt import adapt
from ephemera.adaptation import Adaptation
from ephemera.batch import TokenBatch
from ephemera.gate import Gate
from ephemera.guard import bounded, guard
from ephemera.inits import Init
from ephemera.inits.generator import last_state
from ephemera.llm.frozen_lm import FrozenLM
from ephemera.llm.prefill import Prefill, whole_reading
from ephemera.made_for import Reach
from ephemera.rates import Rate


def reach_of(init: Init | None, rule: Rate | None) -> Reach:
    """Where adapters act if nobody says: as the rate was trained for, else as the generator was."""
    if rule is not None:
        return rule.reach
    return "all" if init is None else init.reach


def gate_of(rule: Rate | None, reach: Reach, init: Init, steps: int) -> Gate | None:
    """The gate that adapters pass, calibrated for reach `answer`: a rate's from the zero start, a generator's without steps."""
    if reach != "answer":
        return None
    if steps:
        return rule.gate if rule is not None and init.zero else None
    return init.gate


def from_base(made: Adaptation, batch: TokenBatch) -> Adaptation:
    """Generated adapters as a change of the base model: a gate's share of zero is then the base model's answer."""
    assert made.reading is not None, "a generator with reach answer begins there"
    return replace(_no_start(made), h_BH=last_state(made.reading.hidden_BTD, batch))


def _no_start(made: Adaptation) -> Adaptation:
    return replace(made, initial_lora=made.lora.with_buffers(made.lora.A_BN, torch.zeros_like(made.lora.B_BN)))


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
    max_kl: float | None = None,
) -> tuple[Adaptation, Prefill | None]:
    """`adapt` from an init, and what the gate leaves of its adapters; and what a bound on the first token's KL leaves.

    With reach `answer` the prompts are read without adapters once: by the first step from B = 0, or for a generator's h.
    The prompts as they were read then are the gate's or the bound's; None without either.
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
    gate = gate_of(rule, reach, init, steps)
    if gate is None and max_kl is None:
        return made, None
    if gate is not None:
        return guard(gate, backbone, batch, made if init.zero else from_base(made, batch), max_kl)
    assert max_kl is not None
    return bounded(max_kl, backbone, batch, _no_start(made) if init.reads_prompts else made, reach)
