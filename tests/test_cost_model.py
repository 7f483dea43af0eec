"""Costs from a configuration, against models built from it: their weights, their products counted by torch, their cache."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from ephemera.cost import DEVICES, from_config, shape_of, shipped_shapes
from ephemera.llm.cached_layers import cache_of
from tiny_models import CONFIGS, random_lora, tiny_backbone

SHIPPED = {
    "smollm2-135m-instruct": "llama",
    **dict.fromkeys(("Llama-3.2-3B", "Llama-3.3-70B-Instruct"), "llama"),
    **dict.fromkeys(("Qwen3-4B", "Qwen3-32B", "Qwen3-0.6B"), "qwen3"),
    "Pythia-70M": "gpt_neox",
    "Gemma-3-270M-it": "gemma3_text",
}


def built(name: str, kind: str) -> torch.nn.Module:
    """On the meta device: shapes without memory."""
    shape = shape_of(name)
    config = AutoConfig.for_model(
        kind,
        hidden_size=shape.hidden_size,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        intermediate_size=shape.mlp_size,
        vocab_size=shape.vocabulary,
        tie_word_embeddings=shape.tied,
    )
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize(("name", "kind"), SHIPPED.items())
def test_weights_are_those_of_the_built_model(name, kind):
    matrices = sum(p.numel() for p in built(name, kind).parameters() if p.ndim > 1)
    assert shape_of(name).weights == matrices
    whole = sum(p.numel() for p in built(name, kind).parameters())
    assert whole == pytest.approx(matrices, rel=2e-3)


def test_published_sizes():
    """As the models are called."""
    billions = {name: shape_of(name).weights / 1e9 for name in shipped_shapes()}
    assert billions["Llama-3.3-70B-Instruct"] == pytest.approx(70.6, abs=0.1)
    assert billions["Qwen3-32B"] == pytest.approx(32.8, abs=0.1)
    assert billions["Qwen3-0.6B"] == pytest.approx(0.596, abs=0.01)
    assert billions["smollm2-135m-instruct"] == pytest.approx(0.1345, abs=0.001)


def test_a_70b_by_hand():
    shape = shape_of("Llama-3.3-70B-Instruct")
    assert 4 * shape.adapter(("q", "v"), 4) == pytest.approx(32.8e6, rel=0.01)
    assert 2 * shape.weights == pytest.approx(141e9, rel=0.01)
    assert 2 * shape.cache_values(1) == pytest.approx(0.33e6, rel=0.01)
    assert 2 * shape.activations(1) == pytest.approx(26e6, rel=0.03)
    assert 2 * shape.activations(1, checkpoint=True) == pytest.approx(1.3e6, rel=0.3)
    three = (shape.step_flops(512) + shape.forward_flops(512, scored=1)) / shape.forward_flops(512, scored=1)
    assert three == pytest.approx(3.04, abs=0.05)


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma3"])
def test_a_tiny_model(architecture):
    backbone = tiny_backbone(architecture, attention="eager")
    shape = from_config("tiny", backbone.model.config.to_dict())
    matrices = sum(p.numel() for p in backbone.model.parameters() if p.ndim > 1)
    assert shape.weights == matrices
    lora = random_lora(backbone, 1)
    assert shape.adapter(("q", "v"), lora.r) == sum(t.numel() for t in lora.buffers)
    ids = torch.randint(0, shape.vocabulary, (1, 24))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        backbone.model(ids)
    masked = 2 * 24**2 * shape.heads * shape.head_dim * shape.layers  # what eager attention computes above the diagonal
    assert shape.forward_flops(24) + masked == counter.get_total_flops()
    with torch.no_grad():
        cache = cache_of(backbone.model(ids[:, :5], use_cache=True))  # within every sliding window
    assert shape.cache_values(5) == sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)


def test_what_is_not_known():
    with pytest.raises(ValueError, match=r"unknown model 'Qwen3-33B'. Did you mean 'Qwen3-32B'"):
        shape_of("Qwen3-33B")
    with pytest.raises(ValueError, match="the configuration of x has no num_attention_heads"):
        from_config("x", {"hidden_size": 4})
    with pytest.raises(ValueError, match="unknown kind of projection 'qq'"):
        shape_of("Pythia-70M").adapter(("qq",), 4)
    assert set(DEVICES) >= {"h100", "cpu-2-cores"}
    assert set(CONFIGS) >= {"llama", "qwen3", "gemma3"}
