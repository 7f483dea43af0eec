"""Every architecture that ephemera knows more of than its modules' names. A new one is a row here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Architecture:
    """A causal decoder whose forward walks over `layers` and ends in one norm.

    `final_norm`: that norm's name. `fused`: the order of the rows of a fused query, key and value: "by head" ([q, k, v] of
    head 0, then of head 1, ...) or "by kind" (all queries, all keys, all values). `packs`: attention takes keyword
    arguments and no other bias than the causal mask, so padding can be left out. `layer`, `rms_norm`: the classes whose
    forward is the one that `fast` has written out (norm, attention, sum, norm, gated MLP, sum; weight times x / rms(x)).
    """

    final_norm: str = "norm"
    fused: Literal["by head", "by kind"] | None = None
    packs: bool = True
    layer: str | None = None
    rms_norm: str | None = None


# By config.model_type
ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(layer="LlamaDecoderLayer", rms_norm="LlamaRMSNorm"),
    "mistral": Architecture(layer="MistralDecoderLayer", rms_norm="MistralRMSNorm"),
    "qwen2": Architecture(layer="Qwen2DecoderLayer", rms_norm="Qwen2RMSNorm"),
    "qwen3": Architecture(layer="Qwen3DecoderLayer", rms_norm="Qwen3RMSNorm"),
    "gemma3_text": Architecture(),
    "olmo": Architecture(),
    "olmo2": Architecture(),
    "phi": Architecture(final_norm="final_layernorm"),
    "phi3": Architecture(fused="by kind", rms_norm="Phi3RMSNorm"),
    "gpt_neox": Architecture(final_norm="final_layer_norm", fused="by head"),
}


def architecture_of(config: Any) -> Architecture | None:
    """The architecture of a model's configuration; None for one that is not in the table."""
    return ARCHITECTURES.get(config.model_type)
