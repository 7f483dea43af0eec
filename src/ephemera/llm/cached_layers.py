"""A pass through some of a decoder's layers: what lies below is kept from an earlier pass, what lies above is left out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast

from ephemera.llm.replaced import Place, replaced

# What transformers calls a model's cache: since 5.24 it warns of the older name
CACHE = "cache" if any(f.name == "cache" for f in fields(BaseModelOutputWithPast)) else "past_key_values"


def cache_of(output: Any) -> Cache | None:
    """What a model's output holds in its cache."""
    return getattr(output, CACHE)


@dataclass(frozen=True, eq=False)
class CachedLayers:
    """What the model without adapters made of a batch in its first `layers` layers.

    `hidden_BTD` is what layer `layers - 1` gives, after the final norm if that is the last layer. `cache` holds the keys
    and values of those layers only.
    """

    ids_BT: Tensor
    layers: int
    hidden_BTD: Tensor
    cache: DynamicCache


class _Kept(nn.Module):
    """Stands where a layer stood and gives what that layer gave before, whatever it is called with."""

    def __init__(self, hidden_BTD: Tensor):
        super().__init__()
        self.hidden_BTD = hidden_BTD

    def forward(self, *_args: Any, **_kwargs: Any) -> Tensor:
        return self.hidden_BTD


@contextmanager
def some_layers(
    decoder: nn.Module, norm: str, *, lower: CachedLayers | None = None, stop: int | None = None
) -> Iterator[None]:
    """Run `decoder` without the layers that `lower` has, and up to layer `stop` (then also without its final norm).

    The decoder's own forward makes masks and positions; only what it walks over is replaced. Layers keep their
    places, which index layer types and the cache. Whatever happens inside, the decoder is restored after.
    """
    if lower is None and stop is None:
        yield
        return
    layers = decoder.get_submodule("layers")
    assert isinstance(layers, nn.ModuleList)
    chosen: Sequence[nn.Module] = list(layers)[:stop]
    if lower is not None:
        chosen = [_Kept(lower.hidden_BTD)] * lower.layers + list(chosen)[lower.layers :]
    places: list[Place] = [(decoder, "layers", nn.ModuleList(chosen))]
    if stop is not None:
        places.append((decoder, norm, nn.Identity()))
    with replaced(places):
        yield
