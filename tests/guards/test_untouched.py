"""After any call, also one that raised, the caller's model is the object it was, attribute by attribute."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ephemera import AdaptiveLM
from ephemera.adapt import adapt
from ephemera.fast.fast_lm import FastLM
from ephemera.inits import ZeroInit
from ephemera.llm.frozen_lm import FrozenLM
from ephemera.llm.prefill import prefill
from ephemera.prompt_loss import PromptLoss
from ephemera.rates import FixedRate
from ephemera.second_order import adapt_exactly
from tiny_models import ARCHITECTURES, left, random_ids, random_lora, tiny_model, tiny_tokenizer

Snapshot = dict[str, Any]


def snapshot(model: nn.Module) -> Snapshot:
    """Every attribute of every module, by identity; the configuration by value."""
    found: Snapshot = {}
    for path, module in model.named_modules():
        found[path] = id(module), type(module)
        for name, value in vars(module).items():
            inner = {key: id(x) for key, x in value.items()} if isinstance(value, dict) else id(value)
            found[f"{path}.{name}"] = inner
    for path, config in (("config", model.config), ("decoder's config", model.base_model.config)):
        found[path] = {key: repr(value) for key, value in vars(config).items()}
    return found


def steps(backbone: FrozenLM) -> None:
    batch = left(random_ids([9, 4]))
    adapt(backbone, batch, ZeroInit(r=2)(backbone, batch, [0, 0]), FixedRate(0.1), 2, keep_reading=True)


def exact_steps(backbone: FrozenLM) -> None:
    batch = left(random_ids([9, 4]))
    adapt_exactly(backbone, batch, ZeroInit(r=2)(backbone, batch, [0, 0]), FixedRate(0.1), 2)


def early_exit(backbone: FrozenLM) -> None:
    backbone = backbone.with_adapters_on("qv", [0])
    batch = left(random_ids([9, 4]))
    rate = FixedRate(0.1, PromptLoss(exit_layer=1))
    adapt(backbone, batch, ZeroInit(r=2)(backbone, batch, [0, 0]), rate, 1)


def answers(backbone: FrozenLM) -> None:
    for rows in (1, 2):
        batch = left(random_ids([9, 4][:rows]))
        read = prefill(backbone, batch, random_lora(backbone, rows))
        read.answer_nll(random_ids([3, 2][:rows]))
        read.generate(max_new_tokens=3)


def facade(backbone: FrozenLM) -> None:
    AdaptiveLM(backbone, rate=FixedRate(0.1), reach="answer").generate(["The river runs.", "Who?"], max_new_tokens=3)


def hidden_states(backbone: FrozenLM) -> None:
    backbone.states(left(random_ids([9, 4])), [1])


CALLS = (steps, exact_steps, early_exit, answers, facade, hidden_states)


class Stop(Exception):
    pass


@pytest.mark.parametrize("kind", ["reference", "fast", "recomputed"])
@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_model_is_as_it_was(architecture: str, call: Callable[[FrozenLM], None], kind: str):
    model = tiny_model(architecture).eval().requires_grad_(False)
    before = snapshot(model)
    settings: dict[str, Any] = {"name": "tiny", "path": Path("tiny")}
    if kind == "reference":
        backbone = FrozenLM(model, tiny_tokenizer(), **settings)
    else:
        backbone = FastLM(model, tiny_tokenizer(), recompute=kind == "recomputed", **settings)
    call(backbone)
    assert snapshot(model) == before

    def stop(*_args: object) -> None:
        raise Stop

    last = backbone.decoder.get_submodule("layers")[-1 if call is not early_exit else 0]
    handle = last.get_submodule("mlp").register_forward_hook(stop)  # above attention: adapters are in place
    hooked = snapshot(model)
    with pytest.raises(Stop):
        call(backbone)
    assert snapshot(model) == hooked
    handle.remove()
    assert torch.is_grad_enabled()
