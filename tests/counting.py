"""Counts what a pass runs: layers, and walks over the vocabulary."""

from __future__ import annotations

from collections import Counter

import pytest
import torch.nn.functional as F
from torch import Tensor

from ephemera.fast import llama_layer as llama
from ephemera.llm.frozen_lm import FrozenLM


def count_layers(backbone: FrozenLM, monkeypatch: pytest.MonkeyPatch) -> Counter[int]:
    """How often each layer runs from now on, as transformers has it or written out."""
    counts: Counter[int] = Counter()
    layers = list(backbone.decoder.get_submodule("layers").children())
    for i, layer in enumerate(layers):
        layer.register_forward_hook(lambda *_, i=i: counts.update([i]))
    run = llama.FusedLayer.forward

    def counted(self, *args, **kwargs):
        counts.update([layers.index(self.layer)])
        return run(self, *args, **kwargs)

    monkeypatch.setattr(llama.FusedLayer, "forward", counted)
    return counts


def count_head(backbone: FrozenLM, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of each walk over the vocabulary from now on: it begins with a product with the first rows of the head.

    The head itself, which decoding calls, gives its whole weight.
    """
    seen: list[int] = []
    weight, linear = backbone.head.get_parameter("weight"), F.linear

    def counted(x: Tensor, rows: Tensor, *bias: Tensor | None) -> Tensor:
        if rows is not weight and rows.data_ptr() == weight.data_ptr():
            seen.append(len(x))
        return linear(x, rows, *bias)

    monkeypatch.setattr(F, "linear", counted)
    return seen
