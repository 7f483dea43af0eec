"""What a model costs, from its configuration alone: weights, FLOPs, memory. Pure arithmetic; nothing is loaded.

B prompts, T tokens, L layers, H query heads and G key-value heads of size C, D hidden size, F MLP size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ephemera.messages import unknown

SHAPES = Path(__file__).parent / "shapes.yaml"
BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class ModelShape:
    """A decoder's sizes. `mlp_matrices`: 3 with a gate, else 2. `tied`: the head is the embedding."""

    name: str
    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_size: int
    vocabulary: int
    tied: bool
    mlp_matrices: int = 3

    @property
    def layer_weights(self) -> int:
        """Entries of a layer's matrices: query, key, value, output, MLP."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return self.hidden_size * (2 * queries + 2 * keys + self.mlp_matrices * self.mlp_size)

    @property
    def weights(self) -> int:
        """Entries of all matrices; norms and biases are less than a thousandth of them."""
        return self.layers * self.layer_weights + self.vocabulary * self.hidden_size * (1 if self.tied else 2)

    def features(self, kind: str) -> tuple[int, int]:
        """In and out features of one of a layer's matrices; ValueError for a kind that is not known."""
        queries, keys, D, F = self.heads * self.head_dim, self.kv_heads * self.head_dim, self.hidden_size, self.mlp_size
        known = {"q": (D, queries), "k": (D, keys), "v": (D, keys), "o": (queries, D), "up": (D, F), "down": (F, D)}
        if self.mlp_matrices == 3:
            known["gate"] = (D, F)
        if kind not in known:
            raise unknown("kind of projection", kind, known)
        return known[kind]

    def adapter(self, kinds: tuple[str, ...], r: int) -> int:
        """Entries of one prompt's adapter, A and B."""
        return self.layers * r * sum(sum(self.features(kind)) for kind in kinds)

    def forward_flops(self, tokens: float, *, scored: float | None = None) -> float:
        """Of one prompt of so many tokens: two for each weight and token, attention, and the head for `scored` tokens."""
        attention = 2 * tokens**2 * self.heads * self.head_dim  # q k and p v, of which causal masking leaves a half
        head = 2 * (tokens if scored is None else scored) * self.hidden_size * self.vocabulary
        return self.layers * (2 * tokens * self.layer_weights + attention) + head

    def step_flops(self, tokens: float) -> float:
        """Of a gradient step: a forward pass, and a backward pass by activations only, as the weights are frozen."""
        return 2 * self.forward_flops(tokens)

    def decode_flops(self, context: float, new: float) -> float:
        """Of `new` generated tokens after a context."""
        attention = 4 * (context + new / 2) * self.heads * self.head_dim * self.layers
        return new * (2 * (self.layers * self.layer_weights + self.hidden_size * self.vocabulary) + attention)

    def cache_values(self, tokens: float) -> float:
        return 2 * self.layers * self.kv_heads * self.head_dim * tokens

    def activations(self, tokens: float, *, checkpoint: bool = False) -> float:
        """Values that a step's forward pass keeps for its backward pass; with `checkpoint` each layer's input only."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        own = 4 * self.hidden_size + 2 * queries + 2 * keys + (self.mlp_matrices + 1) * self.mlp_size
        return tokens * (self.layers * self.hidden_size + own if checkpoint else self.layers * own)

    def step_bytes(self, batch: int, tokens: float, *, adapter: int, dtype: str, checkpoint: bool = False) -> float:
        """Peak of a step: weights, activations, logits in float32, and adapters with their gradients."""
        values = self.weights + batch * self.activations(tokens, checkpoint=checkpoint)
        return BYTES[dtype] * values + 4 * batch * (tokens * self.vocabulary + 3 * adapter)


@dataclass(frozen=True)
class Device:
    """`flops`: what a float32 or bfloat16 pass reaches per second, not the data sheet's peak; `bytes` of memory."""

    name: str
    flops: Mapping[str, float]
    bytes: float


# A third to a half of the data sheets' dense peaks, as passes over short prompts reach
DEVICES = {
    device.name: device
    for device in (
        Device("h200", {"float32": 200e12, "bfloat16": 400e12}, 141e9),
        Device("h100", {"float32": 200e12, "bfloat16": 400e12}, 80e9),
        Device("a100", {"float32": 60e12, "bfloat16": 130e12}, 80e9),
        Device("rtx-4090", {"float32": 35e12, "bfloat16": 70e12}, 24e9),
        Device("cpu-2-cores", {"float32": 0.15e12, "bfloat16": 0.15e12}, 16e9),
    )
}


def device_of(name: str) -> Device:
    if name not in DEVICES:
        raise unknown("device", name, DEVICES)
    return DEVICES[name]


def shipped_shapes() -> dict[str, dict[str, Any]]:
    return yaml.safe_load(SHAPES.read_text())


def shape_of(model: str) -> ModelShape:
    """By a name in shapes.yaml, a config.json or its folder, or a hub id; ValueError names what is known."""
    known = shipped_shapes()
    if model in known:
        return ModelShape(name=model, **{key: value for key, value in known[model].items() if key != "hub"})
    path = Path(model).expanduser()
    path = path if path.is_file() else path / "config.json"
    if path.is_file():
        return from_config(model, yaml.safe_load(path.read_text()))
    if (config := _of_hub(model)) is None:
        raise unknown("model", model, [*known, "the folder of a model", "a hub id that can be reached"])
    return from_config(model, config)


def _of_hub(model: str) -> dict[str, Any] | None:
    """A hub id's configuration; None if there is none, or no hub."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(model).to_dict() if model.count("/") == 1 else None
    except (OSError, ValueError):
        return None


def from_config(name: str, config: Mapping[str, Any]) -> ModelShape:
    """From the keys of a transformers configuration; ValueError if it lacks one."""
    config = config.get("text_config") or config
    try:
        heads, D = config["num_attention_heads"], config["hidden_size"]
        return ModelShape(
            name=name,
            hidden_size=D,
            layers=config["num_hidden_layers"],
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or D // heads,
            mlp_size=config["intermediate_size"],
            vocabulary=config["vocab_size"],
            tied=config.get("tie_word_embeddings", True),
            mlp_matrices=2 if config.get("model_type") in ("gpt_neox", "phi") else 3,
        )
    except KeyError as error:
        raise ValueError(
            f"the configuration of {name} has no {error.args[0]}: a decoder's config.json is expected."
        ) from None
