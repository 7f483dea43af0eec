"""What adapting to some prompts gives: their adapters, and how those came about."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from ephemera.batch import TokenBatch
from ephemera.llm.cached_layers import CachedLayers
from ephemera.llm.frozen_lm import FrozenLM
from ephemera.llm.prefill import Prefill, prefill
from ephemera.lora import LoraBatch
from ephemera.made_for import Format, MadeFor, Reach
from ephemera.peft_export import export_peft
from ephemera.rates import Rate, default_steps

UNCHANGED = "one-token prompt: nothing to learn from, answered unadapted"
FELL_BACK = "non-finite loss or update: answered unadapted"
ABSTAINED = "abstained: adapting to this prompt would probably make its answer worse, answered unadapted"
ALIKE = 1e-3  # nats per token: losses that differ by less are the same


def steps_of(rule: Rate | None, steps: int | None) -> int:
    """How many steps to take: as asked, else what the rate was validated at. ValueError where the rate takes no so many."""
    steps = default_steps(rule) if steps is None else steps
    if steps < 0:
        raise ValueError(f"steps is {steps}; it must be 0 or more.")
    if steps and rule is None:
        raise ValueError("steps without a rate: give rate= a number, a folder or a shipped name (`ephemera models`).")
    if rule is not None and rule.max_steps is not None and steps > rule.max_steps:
        raise ValueError(f"steps is {steps}, but this rate was trained for at most {rule.max_steps} (Kmax).")
    return steps


def kept_start(*, fell_back: bool, tokens: int, steps: int, started: bool) -> str | None:
    """Why an answer comes from the adapter's start; `started`: that start is not the base model."""
    note = FELL_BACK if fell_back else UNCHANGED if tokens < 2 and steps else None
    return note.replace("unadapted", "from its start") if note and started else note


def beyond(made: MadeFor | None, format: Format, reach: Reach | None) -> str | None:
    """A sentence if a network is used outside what it was made for: another format, or another reach (None: its own)."""
    if made is None or (made.format == format and reach in (None, made.reach)):
        return None
    return made.words


def risen(nll_K: Sequence[float]) -> str | None:
    """Words where steps left the prompt no likelier: rates that were trained from another start, or are too bold.

    `nll_K`: the losses that each step saw and, where adapters act on the prompt, the one that the last step left.
    """
    if len(nll_K) < 2 or not nll_K[-1] > nll_K[0] - ALIKE:
        return None
    did = "raised the prompt's loss" if nll_K[-1] > nll_K[0] + ALIKE else "left the prompt's loss as it was"
    return (
        f"the steps {did} ({nll_K[0]:.2f} to {nll_K[-1]:.2f} nats per token), so the answer may be "
        "worse than without them; take fewer steps or another method"
    )


def told(*notes: str | None) -> str | None:
    """What there is to say, as one note."""
    return "; ".join(note for note in notes if note) or None


@dataclass(frozen=True, eq=False)
class Adaptation:
    """The adapters of some prompts, and how they came about. A value: keep it, reuse it, or drop it.

    `prompt_nll_BK` [B,K]: prompt NLL in nats per token seen by step k, before its update (a training
    loss, not a result). `rates_BKM` [B,K,M]: learning rate of each step and projection, in the order of
    `lora.projections`. `lora`, `initial_lora`: the adapters after and before. `notes[b]` says what a user should know of
    row b's answer, or is None. `seconds`: wall time of the whole adaptation.

    `reach`: where the adapters act (made_for.py). With "answer", `readings` holds the base model's keys and values of the
    prompts, by batch, so that every answer to them, adapted or not, begins there. Dropping the adaptation frees them.
    `whole_loss`: the losses are the whole model's over the whole prompt, not an early exit's or some tokens'.
    """

    prompts: tuple[str, ...]
    lora: LoraBatch
    initial_lora: LoraBatch
    prompt_nll_BK: Tensor
    rates_BKM: Tensor
    notes: tuple[str | None, ...]
    seconds: float
    base_model: str = field(default="")
    reach: Reach = "all"
    readings: dict[tuple[int, ...], CachedLayers] = field(default_factory=dict, repr=False)
    whole_loss: bool = True

    @property
    def steps(self) -> int:
        """K, the steps that every row took."""
        return self.prompt_nll_BK.shape[1]

    @property
    def fallback_B(self) -> Tensor:
        """Rows that fell back to the unadapted model because something was not finite: bool [B]."""
        return torch.tensor([(note or "").startswith(FELL_BACK.partition(":")[0]) for note in self.notes])

    def read(
        self, backbone: FrozenLM, batch: TokenBatch, rows: Sequence[int], lower: CachedLayers | None = None
    ) -> Prefill:
        """The prompts of some rows, read with their adapters. `lower`: as in `prefill`; both it and a reading that is kept
        are left where an answer's room has cut a prompt since."""
        reading = self.readings.get(tuple(rows)) or lower
        if reading is not None and not torch.equal(reading.ids_BT, batch.ids_BT):
            reading = None
        lora, initial = self.lora.rows(rows), self.initial_lora.rows(rows)
        return prefill(backbone, batch, lora, initial, lower=reading, reach=self.reach)

    def unadapted(self) -> Adaptation:
        """The same prompts with adapters that do nothing; with reach `answer`, over the same readings: nothing is read again."""
        zero = self.initial_lora.with_buffers(*(torch.zeros_like(t) for t in self.initial_lora.buffers))
        return replace(
            self,
            lora=zero,
            initial_lora=zero,
            prompt_nll_BK=self.prompt_nll_BK[:, :0],
            rates_BKM=self.rates_BKM[:, :0],
            notes=(None,) * len(self.prompts),
            seconds=0.0,
        )

    def after_reading(self, left_B: Sequence[float] | None) -> Adaptation:
        """With notes where the steps did not lower a prompt's loss. `left_B`: the losses that the last steps left.

        None where those are not to be compared: with reach `answer` no adapter acts on the prompt. Then what the first and
        the last step saw is.
        """
        notes = []
        for row, note in enumerate(self.notes):
            seen_K = self.prompt_nll_BK[row].tolist()
            kept = (note or "").startswith(
                tuple(words.partition(":")[0] for words in (FELL_BACK, UNCHANGED, ABSTAINED))
            )
            loss = None if kept else risen(seen_K if left_B is None or not seen_K else [*seen_K, left_B[row]])
            notes.append(told(note, loss))
        return replace(self, notes=tuple(notes))

    def export_peft(self, folder: str | Path, row: int = 0) -> Path:
        """Write one row's adapter in PEFT's format; PEFT opens it with the same logits.

        With reach `answer` those are PEFT's activated LoRA's (the folder's README.md).
        """
        found = [(rows.index(row), reading) for rows, reading in self.readings.items() if row in rows]
        last = next((int(reading.ids_BT[place, -1]) for place, reading in found), None)
        return export_peft(self.lora, row, Path(folder), base_model=self.base_model, last_token=last)
