"""The forward after the last step: one pass over the prompt that serves diagnosis, scoring and decoding."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from ephemera.batch import ScoredTokens, TokenBatch, pad
from ephemera.llm.cached_layers import CACHE, CachedLayers
from ephemera.llm.frozen_lm import FrozenLM
from ephemera.lora import LoraBatch
from ephemera.made_for import Reach

LOGITS = 512  # tokens whose whole logits are held at once: 512 x 49,152 float32 are 100 MB


@dataclass(frozen=True, eq=False)
class Prefill:
    """A left-padded batch of prompts, read once with its adapters: keys and values, last hidden states.

    `fallback_B` marks rows that the adapted model could not read (non-finite states): for those the
    pass was made again with `initial_lora`, and `lora` holds what was used. With reach `answer` the cache is the base
    model's but for the last prompt token, and `hidden_BTD` [B,1,D] is that token's state; `base_BD` is what it was
    without adapters.
    """

    backbone: FrozenLM
    batch: TokenBatch
    lora: LoraBatch | None
    hidden_BTD: Tensor
    cache: DynamicCache
    fallback_B: Tensor
    base_BD: Tensor | None = None

    @torch.no_grad()
    def prompt_nll(self) -> Tensor:
        """Prompt NLL [B] under the adapters; a training loss, not a result. Not with reach `answer`, which leaves the prompt."""
        assert self.base_BD is None, "no adapter acts on the prompt"
        return self.backbone.mean_nll(self.hidden_BTD, self.batch)

    @torch.no_grad()
    def answer_nll(self, answers: Sequence[Sequence[int]]) -> Tensor:
        """Mean NLL [B] over each row's answer tokens, given as ids. The cache stays as it was."""
        states_ND, targets_N, of_N = self._answer_states(answers)
        nll_N = self.backbone.token_nll(states_ND, targets_N)
        sums_B = nll_N.new_zeros(len(answers)).index_add(0, of_N, nll_N)
        return sums_B / of_N.bincount(minlength=len(answers))

    @torch.no_grad()
    def score(self, answers: Sequence[Sequence[int]], rows: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
        """Log-probability in nats of each whole answer [N], and whether greedy decoding would give it: bool [N].

        `answers[n]` continues prompt `rows[n]`; by default there is one answer per prompt, in their order. The
        cache stays as it was, and answers of one token do not touch it.
        """
        states_ND, targets_N, of_N = self._answer_states(answers, rows)
        logp, missed = [], []
        for h_CD, targets_C in zip(states_ND.split(LOGITS), targets_N.split(LOGITS), strict=True):
            logits_CV = self.backbone.logits(h_CD)
            wide_CV = logits_CV.to(torch.promote_types(logits_CV.dtype, torch.float32))
            logp.append(-F.cross_entropy(wide_CV, targets_C, reduction="none"))
            missed.append(logits_CV.argmax(-1) != targets_C)
        logp_N, missed_N = torch.cat(logp), torch.cat(missed)
        sums = logp_N.new_zeros(len(answers)).index_add(0, of_N, logp_N)
        misses = torch.zeros_like(sums).index_add(0, of_N, missed_N.to(sums.dtype))
        return sums, misses == 0

    def _answer_states(
        self, answers: Sequence[Sequence[int]], rows: Sequence[int] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states before each answer token [N,D], those tokens [N], and the answer that each belongs to [N]."""
        answer = pad(answers, side="right", pad_id=self.backbone.pad_id).to(self.backbone.device)
        if rows is not None and list(rows) == list(range(len(self.fallback_B))):
            rows = None
        last_B1D, past_mask_BT, lora = self.hidden_BTD[:, -1:], self.batch.mask_BT, self.lora
        if rows is not None:
            last_B1D, past_mask_BT = last_B1D[list(rows)], past_mask_BT[list(rows)]
        hidden_BSD = last_B1D
        if self.backbone.anywhere(answer.ids_BT.shape[1] > 1):
            fed = TokenBatch(answer.ids_BT[:, :-1], answer.mask_BT[:, :-1])
            if fed.ids_BT.shape[1] == 0:  # another process's answers are longer: it is not left to pass alone
                fed = TokenBatch(answer.ids_BT, torch.zeros_like(answer.mask_BT))
            lora = lora.rows(rows) if lora is not None and rows is not None else lora
            out = self.backbone.forward(fed, lora, cache=fork(self.cache, rows), past_mask_BT=past_mask_BT)
            hidden_BSD = torch.cat([last_B1D, out.hidden_BTD], 1)
        of_N, places_N = answer.mask_BT.nonzero(as_tuple=True)
        return hidden_BSD[of_N, places_N], answer.ids_BT[of_N, places_N], of_N

    @torch.no_grad()
    def generate(self, **kwargs: Any) -> list[list[int]]:
        """New token ids of each row by transformers' `generate`, which continues from this prefill.

        Consumes the cache: score first. Keywords go to `generate`. Where it repeats rows (`num_return_sequences`,
        `num_beams`) each repeat has its row's adapter and cache.
        """
        lora, inputs = self.lora, dict(kwargs)
        repeats = max(kwargs.get("num_return_sequences") or 1, kwargs.get("num_beams") or 1)
        if repeats > 1 and lora is not None:
            lora = lora.rows(torch.arange(lora.batch_size).repeat_interleave(repeats))
        if self.batch.ids_BT.shape[1] > 1:
            self.cache.crop(-1)  # generate reads the last prompt token itself, to get the first logits
            if repeats > 1:
                self.cache.batch_repeat_interleave(repeats)
            self.backbone.make_room(self.cache, kwargs.get("max_new_tokens"))
            inputs[CACHE] = self.cache
        inputs.setdefault("do_sample", False)
        if not inputs["do_sample"]:  # the model's own sampling defaults do not apply to greedy decoding
            inputs = {"temperature": None, "top_p": None, "top_k": None, **inputs}
        with self.backbone.decoding(lora)():
            inputs = {**self.backbone.generation(sampled=bool(inputs["do_sample"])), **inputs}
            ids = self.backbone.model.generate(  # pyright: ignore[reportCallIssue]
                input_ids=self.batch.ids_BT,
                attention_mask=self.batch.mask_BT.long(),
                pad_token_id=self.backbone.pad_id,
                **inputs,
            )
        return ids[:, self.batch.ids_BT.shape[1] :].tolist()


@torch.no_grad()
def prefill(
    backbone: FrozenLM,
    batch: TokenBatch,
    lora: LoraBatch | None,
    initial_lora: LoraBatch | None = None,
    *,
    cached: CachedLayers | None = None,
    reach: Reach = "all",
) -> Prefill:
    """Read a left-padded batch of prompts with its adapters; rows that come out non-finite start over.

    `reach`: "all", the papers': the adapters act on every token. "answer": they act from the last prompt token on, over the
    base model's keys and values. `cached`: what the base model made of the prompts, kept from the steps: the layers below the
    lowest adapted one, or with reach "answer" as many as there are.
    """
    assert bool(batch.mask_BT[:, -1].all()), "decoding needs left padding"
    if reach == "answer" and lora is not None:
        return _prefill_answer(backbone, batch, lora, initial_lora, cached)
    hidden_BTD, cache = _read(backbone, batch, lora, cached)
    fallback_B = ~hidden_BTD[:, -1].isfinite().all(1)
    if initial_lora is not None and lora is not None and backbone.anywhere(bool(fallback_B.any())):
        lora = lora.where(~fallback_B, initial_lora)
        hidden_BTD, cache = _read(backbone, batch, lora, cached)
    return Prefill(backbone, batch, lora, hidden_BTD, cache, fallback_B)


def _prefill_answer(
    backbone: FrozenLM, batch: TokenBatch, lora: LoraBatch, initial_lora: LoraBatch | None, reading: CachedLayers | None
) -> Prefill:
    """The base model's reading of the prompts, made or finished where need be, and the last token with adapters."""
    reading = whole_reading(backbone, batch, reading)
    last = TokenBatch(batch.ids_BT[:, -1:], batch.mask_BT[:, -1:])
    before_BT = batch.mask_BT[:, :-1]

    def read_last(lora: LoraBatch) -> tuple[Tensor, DynamicCache]:
        if before_BT.shape[1] == 0:
            return _read(backbone, last, lora, None)
        cache = before_last(reading.cache)
        return backbone.forward(last, lora, cache=cache, past_mask_BT=before_BT).hidden_BTD, cache

    hidden_B1D, cache = read_last(lora)
    fallback_B = ~hidden_B1D[:, -1].isfinite().all(1)
    if initial_lora is not None and backbone.anywhere(bool(fallback_B.any())):
        lora = lora.where(~fallback_B, initial_lora)
        hidden_B1D, cache = read_last(lora)
    return Prefill(backbone, batch, lora, hidden_B1D, cache, fallback_B, reading.hidden_BTD[:, -1])


@torch.no_grad()
def whole_reading(backbone: FrozenLM, batch: TokenBatch, reading: CachedLayers | None) -> CachedLayers:
    """The base model's pass through all layers: as it was kept, finished from its lower part, or made anew."""
    if reading is not None and reading.layers == backbone.layers:
        return reading
    hidden_BTD, cache = _read(backbone, batch, None, reading)
    return CachedLayers(batch.ids_BT, backbone.layers, hidden_BTD, cache)


def nll_after(
    backbone: FrozenLM,
    batch: TokenBatch,
    reading: CachedLayers,
    answers: Sequence[Sequence[int]],
    lora: LoraBatch | None,
) -> Tensor:
    """Mean NLL [B] over answer tokens after the base model's whole reading of the prompts.

    Adapters act from the last prompt token on (reach `answer`); autograd may pass through them.
    """
    fed = pad(
        [[last, *answer[:-1]] for last, answer in zip(batch.ids_BT[:, -1].tolist(), answers, strict=True)],
        side="right",
        pad_id=backbone.pad_id,
    ).to(backbone.device)
    cache, before_BT = before_last(reading.cache), batch.mask_BT[:, :-1]
    hidden_BSD = backbone.forward(fed, lora, cache=cache, past_mask_BT=before_BT).hidden_BTD
    rows_N, places_N = fed.mask_BT.nonzero(as_tuple=True)
    targets_N = torch.tensor([token for answer in answers for token in answer], device=backbone.device)
    return backbone.mean_nll(hidden_BSD, fed, tokens=ScoredTokens(rows_N, places_N, targets_N, fed.lengths_B))


def before_last(cache: DynamicCache) -> DynamicCache:
    """A cache of its own without the last token."""
    cache = fork(cache)
    cache.crop(-1)
    return cache


def _read(
    backbone: FrozenLM, batch: TokenBatch, lora: LoraBatch | None, lower: CachedLayers | None
) -> tuple[Tensor, DynamicCache]:
    cache = backbone.new_cache()
    return backbone.forward(batch, lora, cache=cache, lower=lower).hidden_BTD, cache


def fork(cache: DynamicCache, rows: Sequence[int] | None = None) -> DynamicCache:
    """A cache of some rows (None: of all) that grows on its own, and shares what it can with the one it came from."""
    fork = copy.copy(cache)
    # Attention layers append by torch.cat, which leaves the old tensors alone; recurrent ones write in place
    appending = (DynamicLayer, DynamicSlidingWindowLayer)
    fork.layers = [copy.copy(x) if type(x) in appending else copy.deepcopy(x) for x in cache.layers]
    if rows is not None:
        fork.reorder_cache(torch.LongTensor(list(rows)))
    return fork
