"""Slow, independent versions of what ephemera does: merged weights, one token at a time, plain transformers."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, nn

from ephemera.llm.frozen_lm import FrozenLM
from ephemera.lora import LoraBatch


def merged_weights(backbone: FrozenLM, lora: LoraBatch, row: int) -> dict[str, Tensor]:
    """{parameter name: W + (alpha / r) B A} of every adapted module, built as plain tensors (differentiable)."""
    weights: dict[str, Tensor] = {}
    for projection, A_BRI, B_BOR in zip(lora.projections, lora.A, lora.B, strict=True):
        name = f"{projection.module}.weight"
        W_OI = weights.get(name, backbone.model.get_parameter(name))
        delta_OI = lora.lora_alpha / lora.r * (B_BOR[row] @ A_BRI[row])
        if projection.rows is not None:
            chosen_OP = torch.zeros(W_OI.shape[0], len(projection.rows), dtype=W_OI.dtype)
            chosen_OP[projection.rows, torch.arange(len(projection.rows))] = 1
            delta_OI = chosen_OP @ delta_OI
        weights[name] = W_OI + delta_OI
    return weights


def merged_model(backbone: FrozenLM, lora: LoraBatch | None, row: int = 0) -> hf.PreTrainedModel:
    """A plain transformers model with one row's adapter in its weights."""
    model = copy.deepcopy(backbone.model)
    if lora is not None:
        with torch.no_grad():
            for name, weight in merged_weights(backbone, lora, row).items():
                model.get_parameter(name).copy_(weight)
    return model


def slow_nll(
    model: nn.Module, ids: Sequence[int], *, first: int = 1, weights: dict[str, Tensor] | None = None
) -> Tensor:
    """Mean NLL of tokens `first`.. of one unpadded sequence, one token at a time."""
    inputs = {"input_ids": torch.tensor([list(ids)])}
    output = model(**inputs) if weights is None else torch.func.functional_call(model, weights, (), inputs)
    losses = [F.cross_entropy(output.logits[0, t - 1], torch.tensor(ids[t])) for t in range(first, len(ids))]
    return torch.stack(losses).mean()


def slow_representation(model: nn.Module, ids: Sequence[int], weights: dict[str, Tensor] | None = None) -> Tensor:
    """h(x): the mean embedding beside the mean last hidden state, summed token by token."""
    inputs = {"input_ids": torch.tensor([list(ids)]), "output_hidden_states": True}
    states = torch.func.functional_call(model, weights or {}, (), inputs).hidden_states
    halves = [sum(state[0, t] for t in range(len(ids))) / len(ids) for state in (states[0], states[-1])]
    return torch.cat(halves)


def close(have: Tensor | Sequence[Tensor], want: Tensor | Sequence[Tensor], tolerance: float = 1e-9) -> None:
    """Equal up to rounding; the default suits float64."""
    pairs = [(have, want)] if isinstance(have, Tensor) and isinstance(want, Tensor) else zip(have, want, strict=True)
    for a, b in pairs:
        torch.testing.assert_close(a.double(), b.double(), atol=tolerance, rtol=tolerance)
