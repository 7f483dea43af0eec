"""What adapting to some prompts gives: their adapters, and how those came about."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path

import torch
from torch import Tensor

from ephemera.batch import TokenBatch
from ephemera.engine_export import export_all
from ephemera.llm.cached_layers import CachedLayers
from ephemera.llm.frozen_lm import FrozenLM
from ephemera.llm.prefill import Prefill, prefill
from ephemera.llm.share import Share
from ephemera.llm.tokenize import Prompt
from ephemera.lora import LoraBatch
from ephemera.made_for import Format, MadeFor, Reach
from ephemera.peft_export import export_peft
from ephemera.rates import Rate, default_steps

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


class LeftAlone(Enum):
    """Why an answer comes from the adapter's start."""

    ONE_TOKEN = "one-token prompt: nothing to learn from, answered {how}"
    NOT_FINITE = "non-finite loss or update: answered {how}"
    ABSTAINED = "abstained: adapting to this prompt would probably make its answer worse, answered {how}"
    TOO_FAR = "the adapter would move the answer's first token further than the server allows, answered {how}"

    def words(self, *, started: bool = False) -> str:
        """`started`: that start is not the base model."""
        return self.value.format(how="from its start" if started else "unadapted")


def left_alone(*, fell_back: bool, tokens: int, steps: int, abstained: bool = False) -> LeftAlone | None:
    """Why a prompt of so many tokens is answered from the adapter's start; None if it is not."""
    if fell_back:
        return LeftAlone.NOT_FINITE
    if tokens < 2 and steps:
        return LeftAlone.ONE_TOKEN
    return LeftAlone.ABSTAINED if abstained else None


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

    `lora`, `initial_lora`: the adapters after and before. `prompt_nll_BK` [B,K]: prompt NLL in nats per token seen by step k,
    before its update (a training loss, not a result). `rates_BKM` [B,K,M]: learning rate of each step and projection, in the
    order of `lora.projections`. `fallback_B`: rows whose losses or updates were not finite; their `lora` is `initial_lora`.
    `share_B`, `kl_B`: what the gate left of each adapter (0: it abstained) and how far that moves the first token; None
    without a gate. `cached`: by rows, what the base model made of the prompts, in its lower layers or in all of them; with
    reach "answer" every answer, adapted or not, begins there. `grads`: each step's gradients, if they were kept. `h_BH`: the
    first step's h(x), if the rate looked at it.

    Of texts that `AdaptiveLM` adapted to: `prompts`, `left` (why a row was left alone), `remarks` (what else to know of its
    answer), `started` (the start is not the base model), `seconds` of wall time, `reach` (where the adapters act), and
    `whole_loss` (the losses are the whole model's, not an early exit's). `after_B` [B]: prompt NLL that the last step left,
    where `reply` read the prompts with their adapters; None with reach "answer", whose adapters leave the prompt alone.
    """

    lora: LoraBatch
    initial_lora: LoraBatch
    prompt_nll_BK: Tensor
    rates_BKM: Tensor
    fallback_B: Tensor
    share_B: Tensor | None = None
    kl_B: Tensor | None = None
    cached: dict[tuple[int, ...], CachedLayers] = field(default_factory=dict, repr=False)
    grads: list[LoraBatch] = field(default_factory=list, repr=False)
    h_BH: Tensor | None = None
    prompts: tuple[Prompt, ...] = ()
    left: tuple[LeftAlone | None, ...] = ()
    remarks: tuple[str | None, ...] = ()
    started: bool = False
    seconds: float = 0.0
    base_model: str = ""
    reach: Reach = "all"
    whole_loss: bool = True
    after_B: Tensor | None = None

    @staticmethod
    def joined(parts: Sequence[Adaptation], shares: Sequence[Share]) -> Adaptation:
        """One of all rows of all processes, on the host but for the adapters: part n is of this process's `shares[n]`."""
        cached = {tuple(s.own): p.reading for p, s in zip(parts, shares, strict=True) if p.reading is not None}
        parts = [part.of_all(share) for part, share in zip(parts, shares, strict=True)]
        back = torch.tensor([i for share in shares for i in share.order]).argsort()
        return Adaptation(
            lora=LoraBatch.cat([part.lora for part in parts]).rows(back),
            initial_lora=LoraBatch.cat([part.initial_lora for part in parts]).rows(back),
            prompt_nll_BK=torch.cat([part.prompt_nll_BK for part in parts]).cpu()[back],
            rates_BKM=torch.cat([part.rates_BKM.detach() for part in parts]).cpu()[back],
            fallback_B=torch.cat([part.fallback_B for part in parts]).cpu()[back],
            share_B=_of_all([part.share_B for part in parts], back),
            kl_B=_of_all([part.kl_B for part in parts], back),
            cached=cached,
        )

    def of_all(self, share: Share) -> Adaptation:
        """The adapters of every process's rows of a batch, in `share.order`, and how they came about."""
        lora, initial = (x.with_buffers(*map(share.all_rows, x.buffers)) for x in (self.lora, self.initial_lora))
        return replace(
            self,
            lora=lora,
            initial_lora=initial,
            prompt_nll_BK=share.all_rows(self.prompt_nll_BK),
            rates_BKM=share.all_rows(self.rates_BKM.detach()),
            fallback_B=share.all_rows(self.fallback_B),
            share_B=None if self.share_B is None else share.all_rows(self.share_B),
            kl_B=None if self.kl_B is None else share.all_rows(self.kl_B),
        )

    @property
    def steps(self) -> int:
        """K, the steps that every row took."""
        return self.prompt_nll_BK.shape[1]

    @property
    def reading(self) -> CachedLayers | None:
        """What was cached of a single batch."""
        return next(iter(self.cached.values()), None)

    def with_reading(self, reading: CachedLayers | None) -> Adaptation:
        """With this cached of a single batch."""
        rows = tuple(range(self.lora.batch_size))
        return replace(self, cached={} if reading is None else {rows: reading})

    @property
    def leaves_a_loss(self) -> bool:
        """Whether the prompts under their adapters have a loss that compares with what the steps saw."""
        return self.reach == "all" and self.whole_loss and self.steps > 0

    @property
    def abstained_B(self) -> Tensor:
        """Rows that the gate left alone: bool [B]."""
        return torch.zeros_like(self.fallback_B) if self.share_B is None else self.share_B == 0

    @property
    def notes(self) -> tuple[str | None, ...]:
        """What a user should know of each row's answer."""
        pairs = zip(self.left, self.remarks, strict=True)
        return tuple(remark if left is None else left.words(started=self.started) for left, remark in pairs)

    def read(self, backbone: FrozenLM, batch: TokenBatch, rows: Sequence[int]) -> Prefill:
        """The prompts of some rows, read with their adapters. What is cached is left if an answer's room has cut a prompt
        since."""
        cached = self.cached.get(tuple(rows))
        if backbone.anywhere(cached is not None and not torch.equal(cached.ids_BT, batch.ids_BT)):
            cached = None
        lora, initial = self.lora.rows(rows), self.initial_lora.rows(rows)
        return prefill(backbone, batch, lora, initial, cached=cached, reach=self.reach)

    def unadapted(self) -> Adaptation:
        """The same prompts with adapters that do nothing; with reach `answer`, over the same readings: nothing is read again."""
        zero = self.initial_lora.with_buffers(*(torch.zeros_like(t) for t in self.initial_lora.buffers))
        return replace(
            self,
            lora=zero,
            initial_lora=zero,
            prompt_nll_BK=self.prompt_nll_BK[:, :0],
            rates_BKM=self.rates_BKM[:, :0],
            left=(None,) * len(self.prompts),
            remarks=(None,) * len(self.prompts),
            seconds=0.0,
        )

    def after_reading(self, left_B: Sequence[float] | None) -> Adaptation:
        """With remarks where the steps did not lower a prompt's loss. `left_B`: the losses that the last steps left.

        None where those are not to be compared: with reach `answer` no adapter acts on the prompt. Then what the first and
        the last step saw is.
        """
        remarks = []
        for row, (left, remark) in enumerate(zip(self.left, self.remarks, strict=True)):
            seen_K = self.prompt_nll_BK[row].tolist()
            nll_K = seen_K if left_B is None or not seen_K else [*seen_K, left_B[row]]
            remarks.append(told(remark, None if left is not None else risen(nll_K)))
        return replace(self, remarks=tuple(remarks), after_B=None if left_B is None else torch.tensor(left_B))

    def export_peft(self, folder: str | Path, row: int = 0) -> Path:
        """Write one row's adapter in PEFT's format; PEFT opens it with the same logits.

        With reach `answer` those are PEFT's activated LoRA's (the folder's README.md).
        """
        last = None
        if self.reach == "answer":
            found = [(rows.index(row), reading) for rows, reading in self.cached.items() if row in rows]
            last = next((int(reading.ids_BT[place, -1]) for place, reading in found), None)
        return export_peft(self.lora, row, Path(folder), base_model=self.base_model, last_token=last)

    def export_all(self, output: str | Path, *, base_model: str, dtype: str = "float32") -> Path:
        """Write every row's adapter for vLLM or SGLang, with a manifest: a folder, or one .zip (engine_export.py).

        Those engines apply an adapter to every token; the manifest says by `reach` whether it was made for that.
        """
        rows = [
            {"prompt": prompt, "reach": self.reach, "note": note}
            for prompt, note in zip(self.prompts, self.notes, strict=True)
        ]
        return export_all(self.lora, Path(output), rows, base_model=base_model, dtype=dtype)


def _of_all(parts: Sequence[Tensor | None], back: Tensor) -> Tensor | None:
    """What every part has, joined on the host; None unless all have it."""
    known = [part for part in parts if part is not None]
    return torch.cat(known).cpu()[back] if len(known) == len(parts) else None
