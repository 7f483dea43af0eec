"""Prompts after everything that does not depend on the rates of a single step: gradient, base reading, h(x).

With one step from B = 0 and reach `answer`, neither a prompt's gradient nor its keys and values depend on the rates. Who tries
many rates on one prompt (training, a search, a comparison) makes these once and then pays for the answer's tokens only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from ephemera.adapt import adapt
from ephemera.adaptation import Adaptation
from ephemera.batch import TokenBatch, pad
from ephemera.inits import ZeroInit
from ephemera.llm.cached_layers import CachedLayers
from ephemera.llm.frozen_lm import FrozenLM
from ephemera.llm.prefill import Prefill, fork, nll_after, prefill, whole_reading
from ephemera.lora import LoraBatch
from ephemera.prompt_loss import PromptLoss
from ephemera.rates import FixedRate, Rate


@dataclass(frozen=True, eq=False)
class Prepared:
    """A left-padded batch of prompts; `step` takes its one step at given rates.

    `made` is that of a step of length zero: its `grads` are by A (zero, as B = 0) and B, its `reading` the base model's
    own pass. `h_BH` is h(x).
    """

    backbone: FrozenLM
    batch: TokenBatch
    made: Adaptation
    h_BH: Tensor

    def rates_BM(self, rate: Rate) -> Tensor:
        """The rates [B,M] that a rule gives these prompts for one step of one."""
        lora = self.made.lora
        return rate.rates_BM(self.h_BH, 1, 1, like=lora.A[0], projections=len(lora.projections))

    def step(self, rates_BM: Tensor) -> LoraBatch:
        """LDTTA Eq. 14 from B = 0."""
        return self.made.initial_lora.step(self.made.grads[0], rates_BM)

    def adapted(self, rate: Rate) -> Adaptation:
        """What `adapt` gives for one step of this rate."""
        rates_BM = self.rates_BM(rate)
        return replace(self.made, lora=self.step(rates_BM), rates_BKM=rates_BM[:, None], h_BH=self.h_BH)

    def unstepped(self, lora: LoraBatch) -> Adaptation:
        """What `adapt` gives for no step from these adapters, over the base model's reading."""
        made = self.made
        return replace(
            made,
            lora=lora,
            initial_lora=lora,
            prompt_nll_BK=made.prompt_nll_BK[:, :0],
            rates_BKM=made.rates_BKM[:, :0],
            fallback_B=torch.zeros_like(made.fallback_B),
            grads=[],
        )

    def read(self, lora: LoraBatch | None) -> Prefill:
        """The prompts read by the base model; with adapters, which act from the last token on."""
        reading = self.made.reading
        assert reading is not None
        if lora is None:
            return Prefill(
                self.backbone,
                self.batch,
                None,
                reading.hidden_BTD,
                fork(reading.cache),
                torch.zeros_like(self.made.fallback_B),
            )
        return prefill(self.backbone, self.batch, lora, self.made.initial_lora, reach="answer", cached=reading)

    def answer_nll(self, answers: Sequence[Sequence[int]], lora: LoraBatch | None) -> Tensor:
        """Mean NLL [B] over each row's answer tokens; autograd may pass through the adapters."""
        reading = self.made.reading
        assert reading is not None
        return nll_after(self.backbone, self.batch, reading, answers, lora)


class _Still(FixedRate):
    """A rate of zero that looks at h(x)."""

    @property
    def uses_representation(self) -> Literal["step"]:
        return "step"


def prepare(
    backbone: FrozenLM,
    init: ZeroInit,
    parts: Sequence[Sequence[Sequence[int]]],
    seeds: Sequence[int],
    *,
    objective: PromptLoss,
    gradient: bool = True,
) -> Prepared:
    """One forward and one backward pass over prompts, given as token ids, part after part; joined to one batch.

    Without `gradient` the forward pass alone: no step can be taken, and `h_BH` has no columns. `parts` bound what passes through the model at once; `seeds`: one for each prompt, in their order.
    """
    done: list[tuple[TokenBatch, Adaptation]] = []
    still = _Still(0.0, objective, "answer")
    start = 0
    for ids in parts:
        batch = pad(ids, pad_id=backbone.pad_id).to(backbone.device)
        lora = init(backbone, batch, seeds[start : start + len(ids)])
        start += len(ids)
        rule, steps = (still, 1) if gradient else (None, 0)
        trace = adapt(backbone, batch, lora, rule, steps, keep_grads=True, keep_reading=True)
        done.append((batch, _whole(backbone, batch, trace)))
    none_BH = torch.zeros(sum(map(len, parts)), 0, device=backbone.device)
    known = [made.h_BH for _, made in done if made.h_BH is not None]
    return Prepared(backbone, *_joined(backbone, done), torch.cat(known) if known else none_BH)


def bytes_of(backbone: FrozenLM, tokens: int, r: int) -> int:
    """What a prepared prompt of so many tokens keeps: keys and values, gradient and start."""
    config: Any = backbone.model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    floats = sum(r * (p.in_features + p.out_features) for p in backbone.projections)
    element = backbone.vocabulary_VD.element_size()
    return 2 * backbone.layers * heads * size * tokens * element + 4 * floats


def _whole(backbone: FrozenLM, batch: TokenBatch, trace: Adaptation) -> Adaptation:
    """With the base model's whole reading of the batch, of which only the last token's state is kept."""
    reading = whole_reading(backbone, batch, trace.reading)
    reading = replace(reading, hidden_BTD=reading.hidden_BTD[:, -1:].clone())
    lora = _no_B(trace.initial_lora)  # after a step of length zero
    zero_BN = lora.A_BN.new_zeros(1, 1).expand_as(lora.A_BN)  # B = 0: A has no gradient
    grads = [lora.with_buffers(zero_BN, step.B_BN) for step in trace.grads]
    return replace(trace, lora=lora, initial_lora=lora, grads=grads).with_reading(reading)


def _no_B(lora: LoraBatch) -> LoraBatch:
    """The same with one zero in place of every B, which takes no memory."""
    return lora.with_buffers(lora.A_BN, lora.B_BN.new_zeros(1, 1).expand_as(lora.B_BN))


def _joined(backbone: FrozenLM, done: Sequence[tuple[TokenBatch, Adaptation]]) -> tuple[TokenBatch, Adaptation]:
    """Several parts as one batch, padded on the left to the longest."""
    if len(done) == 1:
        return done[0]
    T = max(batch.ids_BT.shape[1] for batch, _ in done)
    ids_BT = torch.cat([_left(batch.ids_BT, T, backbone.pad_id) for batch, _ in done])
    mask_BT = torch.cat([_left(batch.mask_BT, T, False) for batch, _ in done])
    traces = [trace for _, trace in done]
    readings = [trace.reading for trace in traces if trace.reading is not None]
    cache = backbone.new_cache()
    for layer in range(backbone.layers):
        keys, values = [], []
        for reading in readings:
            k_BGTC, v_BGTC = _keys_values(reading.cache, layer)
            keys.append(torch.nn.functional.pad(k_BGTC, (0, 0, T - k_BGTC.shape[2], 0)))
            values.append(torch.nn.functional.pad(v_BGTC, (0, 0, T - v_BGTC.shape[2], 0)))
        cache.update(torch.cat(keys), torch.cat(values), layer)
    hidden_B1D = torch.cat([reading.hidden_BTD for reading in readings])
    lora = _no_B(LoraBatch.cat([trace.initial_lora for trace in traces]))
    zero_BN = lora.A_BN.new_zeros(1, 1).expand_as(lora.A_BN)
    steps = zip(*(trace.grads for trace in traces), strict=True)
    joined = Adaptation(
        lora=lora,
        initial_lora=lora,
        prompt_nll_BK=torch.cat([trace.prompt_nll_BK for trace in traces]),
        rates_BKM=torch.cat([trace.rates_BKM for trace in traces]),
        fallback_B=torch.cat([trace.fallback_B for trace in traces]),
        grads=[lora.with_buffers(zero_BN, torch.cat([g.B_BN for g in grads])) for grads in steps],
    ).with_reading(CachedLayers(ids_BT, backbone.layers, hidden_B1D, cache))
    return TokenBatch(ids_BT, mask_BT), joined


def _left(x_BT: Tensor, T: int, fill: int | bool) -> Tensor:
    return torch.nn.functional.pad(x_BT, (T - x_BT.shape[1], 0), value=fill)


def _keys_values(cache: DynamicCache, layer: int) -> tuple[Tensor, Tensor]:
    keys, values = getattr(cache.layers[layer], "keys", None), getattr(cache.layers[layer], "values", None)
    assert keys is not None
    assert values is not None
    return keys, values
