"""Adapting inside transformers: `model.generate(**inputs, custom_generate=ephemera.as_generate(rate=...))`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.utils import GENERATION_MODES_MAPPING

from ephemera.adaptation import steps_of
from ephemera.batch import TokenBatch
from ephemera.begin import adapt_from, reach_of
from ephemera.inits import Init, load_init
from ephemera.llm.cached_layers import CACHE
from ephemera.llm.frozen_lm import FrozenLM
from ephemera.llm.load import frozen_lm
from ephemera.llm.prefill import Prefill, prefill, whole_reading
from ephemera.llm.quantization import exact_places
from ephemera.llm.replaced import replaced
from ephemera.made_for import Reach, checked_reach
from ephemera.rates import Rate, adapted_by, load_rate, place_rate

Decode = Callable[..., Any]


def as_generate(
    rate: Rate | str | float,
    *,
    init: Init | str | None = None,
    steps: int | None = None,
    reach: Reach | None = None,
    seed: int = 0,
) -> Decode:
    """What `model.generate` takes as `custom_generate`: adapt to each prompt, decode with its adapter, forget.

    Every other keyword of `generate` keeps its meaning: sampling, beams, processors, streamers, stopping criteria. Prompts are
    padded on the left, as transformers wants them. `rate`, `init`, `steps`, `reach`, `seed`: as for `AdaptiveLM`, but a rate
    has to be named. The model is left as it was, whatever happens. ValueError if the rate or the init does not fit the model.
    """
    rule = load_rate(rate) if isinstance(rate, str | float | int) else rate
    known: WeakKeyDictionary[PreTrainedModel, FrozenLM] = WeakKeyDictionary()
    start = load_init(init)

    def decode(
        model: PreTrainedModel,
        input_ids: Tensor,
        *,
        generation_config: GenerationConfig,
        **given: Any,  # a name here would be taken for a keyword of ours
    ) -> Any:
        attention_mask = given.get("attention_mask")
        repeats = max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
        mask_BT = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        batch = TokenBatch(input_ids[::repeats], mask_BT[::repeats].bool())
        with frozen(model):
            if model not in known:
                known[model] = _frozen_lm(model, rule, generation_config)
            backbone = known[model]
            read = _read(backbone, batch, start, place_rate(rule, backbone), steps, reach, seed)
            method = getattr(type(model), GENERATION_MODES_MAPPING[generation_config.get_generation_mode()])
            lora = read.lora
            if lora is not None and repeats > 1:
                lora = lora.rows(torch.arange(lora.batch_size).repeat_interleave(repeats))
            if input_ids.shape[1] > 1:
                read.cache.crop(-1)  # the decoding loop reads the last prompt token itself
                if repeats > 1:
                    read.cache.batch_repeat_interleave(repeats)
                backbone.make_room(read.cache, generation_config.max_new_tokens)
                given[CACHE] = read.cache
            with backbone.decoding(lora)():
                return method(model, input_ids, generation_config=generation_config, **given)

    return decode


def _read(
    backbone: FrozenLM,
    batch: TokenBatch,
    init: Init,
    rule: Rate,
    steps: int | None,
    reach: Reach | None,
    seed: int,
) -> Prefill:
    """The prompts after their steps, read with their adapters."""
    init, where = init.placed(backbone), reach_of(init, rule) if reach is None else checked_reach(reach)
    with backbone.lock:
        made, read = adapt_from(backbone, batch, init, [seed] * len(batch.ids_BT), rule, steps_of(rule, steps), where)
        if read is not None:
            return read
        cached = whole_reading(backbone, batch, made.reading) if where == "answer" else None
        return prefill(backbone, batch, made.lora, made.initial_lora, reach=where, cached=cached)


def _frozen_lm(model: PreTrainedModel, rule: Rate, config: GenerationConfig) -> FrozenLM:
    """The caller's model, with adapters where the rate has them. No tokenizer is needed, but for what pads and what ends."""
    special: Any = SimpleNamespace(pad_token_id=config.pad_token_id, eos_token_id=config.eos_token_id)
    name = model.name_or_path or type(model).__name__
    return frozen_lm(model, special, name=name, path=Path(name), **adapted_by(rule))


@contextmanager
def frozen(model: torch.nn.Module) -> Iterator[None]:
    """Weights without gradients and no dropout, for as long as a block runs; then each module and weight as it was."""
    training = [(module, module.training) for module in model.modules()]
    wanted = [(weight, weight.requires_grad) for weight in model.parameters()]
    try:
        model.eval().requires_grad_(False)
        with replaced(exact_places(model)):
            yield
    finally:
        for module, was in training:
            module.training = was
        for weight, was in wanted:
            weight.requires_grad_(was)
