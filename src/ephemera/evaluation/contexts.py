"""Contexts of lm-eval's requests: each adapts once, in batches, and is read for every continuation."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from ephemera.batch import batch_tokens, length_batches, pad
from ephemera.begin import adapt_from, reach_of
from ephemera.llm.prefill import Prefill, prefill
from ephemera.lora import LoraBatch
from ephemera.made_for import Reach
from ephemera.model import BATCH_SIZE, AdaptiveLM

TRIAL = "Question: what is this?\nAnswer:"

Ids = tuple[int, ...]
Adapters = tuple[LoraBatch, LoraBatch] | None  # after and before the steps; None: the model as it is

logger = logging.getLogger(__name__)


class Contexts:
    """How a model adapts to contexts and reads them; `batch_size` None: as many at once as the device likes."""

    def __init__(self, lm: AdaptiveLM, *, steps: int, seed: int, batch_size: int | None, max_length: int):
        self.lm, self.backbone = lm, lm.backbone
        self.steps, self.seed, self.batch_size, self.max_length = steps, seed, batch_size, max_length
        self.reach: Reach = lm.reach or reach_of(lm.init, lm.rate)
        self.fell_back = 0  # contexts whose adapter was not finite, answered with their first one
        lm.adapt(TRIAL, steps=steps, seed=seed)  # a wrong rate shows now, not after the tasks' download

    def room(self, needed: int) -> int:
        """Positions of the window that a context may fill when `needed` more are read after it."""
        if needed >= self.max_length:
            raise ValueError(
                f"an answer of {needed} tokens leaves no room for a context in a window of {self.max_length}; ask for "
                "fewer (--gen_kwargs max_gen_toks=...) or use a model with a longer window."
            )
        return self.max_length - needed

    def batches(self, contexts: Sequence[Ids]) -> list[list[Ids]]:
        """Contexts that adapt together, the longest first: if memory is short, that shows at once."""
        lengths = [min(len(context), self.max_length) for context in contexts]
        most = None if self.batch_size is not None else batch_tokens(self.backbone.device)
        rows = length_batches(lengths, batch_size=self.batch_size or BATCH_SIZE, max_tokens=most)
        return [[contexts[i] for i in batch] for batch in reversed(rows)]

    def adapt(self, contexts: Sequence[Ids]) -> Adapters:
        """One adapter per context, from as much of its end as the window holds, whatever is to be answered."""
        if self.steps == 0 and self.lm.init.zero:
            return None
        ids = [context[-self.max_length :] for context in contexts]
        batch = pad(ids, pad_id=self.backbone.pad_id).to(self.backbone.device)
        seeds = [self.seed] * len(ids)
        trace, _ = adapt_from(self.backbone, batch, self.lm.init, seeds, self.lm.rate, self.steps, self.reach)
        self._count(int(trace.fallback_B.sum()))
        return trace.lora, trace.initial_lora

    def read(self, adapters: Adapters, rows: Sequence[int], ids: Sequence[Ids]) -> Prefill:
        """Read contexts `ids` with the adapters of `rows`."""
        batch = pad(ids, pad_id=self.backbone.pad_id).to(self.backbone.device)
        if adapters is None:
            return prefill(self.backbone, batch, None)
        lora, start = (both.rows(list(rows)) for both in adapters)
        read = prefill(self.backbone, batch, lora, start, reach=self.reach)
        self._count(int(read.fallback_B.sum()))
        return read

    def _count(self, fell_back: int) -> None:
        if fell_back:
            logger.warning("%d contexts: non-finite loss or update, answered unadapted", fell_back)
            self.fell_back += fell_back
