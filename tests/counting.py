"""Counts what a pass runs: layers, and walks over the vocabulary."""

from __future__ import annotations

from collections import Counter

import pytest

from ephemera.fast import llama_layer as llama
from ephemera.fast import vocab_loss as head
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


def count_head(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of each walk over the vocabulary from now on."""
    seen: list[int] = []
    walk = head._walk
    monkeypatch.setattr(head, "_walk", lambda h_ND, *rest: seen.append(len(h_ND)) or walk(h_ND, *rest))
    return seen
