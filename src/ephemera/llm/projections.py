"""The projections that adapters sit on: found by kind in any architecture, in all layers or in some."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ephemera.llm.architectures import architecture_of
from ephemera.lora import Projection

# The names that a projection's module goes by, by kind. GPT-NeoX and Phi-3 fuse query, key and value.
MODULE_NAMES = {
    "q": ("q_proj",),
    "k": ("k_proj",),
    "v": ("v_proj",),
    "o": ("o_proj", "dense"),
}
FUSED_NAMES = ("query_key_value", "qkv_proj")
ALL_LINEAR = "all-linear"  # as PEFT calls it
ALL_LAYERS = "all"
TARGETS = {"qv": ("q", "v"), "attention": ("q", "k", "v", "o")}


def find_projections(
    model: nn.Module,
    targets: str | Sequence[str] = "qv",
    layers: str | Sequence[int] = ALL_LAYERS,
    only: Sequence[str] | None = None,
) -> tuple[Projection, ...]:
    """The projections that adapters sit on, top layer last, in the order of `targets` within a layer.

    `targets` is "qv" (the papers' default), "attention", "all-linear" (every linear module of a layer), kinds ("q",
    ["q", "v"], ...), or module names ("q_proj", "up_proj", "query_key_value", ...). A fused module is adapted whole by
    "all-linear" and by its name. `layers`: see `chosen_layers`. `only` keeps those of these names, if there
    are any: a network that names none of them is another model's, and its own check says so. Shapes are read from the modules.
    """
    wanted = [targets] if isinstance(targets, str) else list(targets)
    kinds = TARGETS.get(targets) if isinstance(targets, str) else None
    if kinds is None and set(wanted) <= set(MODULE_NAMES):
        kinds = tuple(wanted)
    by_layer = _linear_modules(model)
    if targets == ALL_LINEAR:
        wanted = list(dict.fromkeys(path.rpartition(".")[2] for modules in by_layer.values() for path, _ in modules))
    found: list[list[Projection]] = []
    for modules in by_layer.values():
        here: list[Projection] = []
        if kinds is None:
            for target in wanted:
                here += [
                    _whole(path, m, target, len(found)) for path, m in modules if f".{path}".endswith(f".{target}")
                ]
        else:
            for kind in kinds:
                here += _of_kind(model, modules, kind, len(found))
        if here:
            found.append(here)
    if not found:
        leaves = sorted({path.rpartition(".")[2] for modules in by_layer.values() for path, _ in modules})
        raise ValueError(
            f"found no modules for target_modules={targets!r} in {type(model).__name__}. Its layers have the linear modules "
            f"{', '.join(leaves) or '(none)'}; name those to adapt, e.g. target_modules={leaves[:2]!r}."
        )
    chosen = [p for layer in chosen_layers(layers, len(found)) for p in found[layer]]
    kept = [p for p in chosen if only is not None and p.name in set(only)]
    return tuple(kept or chosen)


def chosen_layers(layers: str | Sequence[int], count: int) -> list[int]:
    """Which of `count` layers are adapted: "all", "first-4", "last-4", "4-9" (both of them too), or a list; from 0."""
    numbers: list[int] = []
    if layers == ALL_LAYERS:
        return list(range(count))
    if isinstance(layers, str):
        match = re.fullmatch(r"(first|last|\d+)-(\d+)", layers)
        if match:
            n = int(match.group(2))
            if match.group(1) == "first":
                numbers = list(range(n))
            elif match.group(1) == "last":
                numbers = list(range(count - n, count))
            else:
                numbers = list(range(int(match.group(1)), n + 1))
    else:
        numbers = sorted(set(layers))
    if not numbers or numbers[0] < 0 or numbers[-1] >= count:
        raise ValueError(
            f'layers={layers!r} does not fit: the model has {count} layers that can be adapted. Give "all", "first-4", '
            f'"last-4", "4-9", or a list of numbers from 0 to {count - 1}.'
        )
    return numbers


def count_layers(model: nn.Module) -> int:
    """How many layers the model has, adapted or not."""
    return len(_linear_modules(model))


def _linear_modules(model: nn.Module) -> dict[str, list[tuple[str, nn.Module]]]:
    """Paths and linear modules of each layer, bottom layer first."""
    layers: dict[str, list[tuple[str, nn.Module]]] = {}
    for path, module in model.named_modules():
        match = re.search(r"(.*?\.\d+)\.", path + ".")
        if match and _features(module) is not None:
            layers.setdefault(match.group(1), []).append((path, module))
    return layers


def _features(module: nn.Module) -> tuple[int, int] | None:
    """(in, out) features of a linear module, quantised ones included."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    return None


def _whole(path: str, module: nn.Module, kind: str, layer: int) -> Projection:
    features = _features(module)
    assert features is not None
    return Projection(path, kind, layer, *features)


def _of_kind(model: nn.Module, modules: Sequence[tuple[str, nn.Module]], kind: str, layer: int) -> list[Projection]:
    for path, module in modules:
        leaf = path.rpartition(".")[2]
        in_attention = "attn" in path or "attention" in path
        if leaf in MODULE_NAMES[kind] and in_attention:
            return [_whole(path, module, kind, layer)]
        if leaf in FUSED_NAMES and kind in "qkv":
            in_features, out_features = _features(module) or (0, 0)
            rows, device = _fused_rows(model, leaf, kind, out_features), next(module.parameters()).device
            rows = rows if device.type == "meta" else rows.to(device)  # an offloaded weight has no place of its own
            return [Projection(path, kind, layer, in_features, out_features, rows)]
    return []


def _fused_rows(model: nn.Module, leaf: str, kind: str, out_features: int) -> Tensor:
    """Which output rows of a fused projection are the queries, keys or values.

    GPT-NeoX interleaves them per head ([q, k, v] of head 0, then of head 1, ...); Phi-3 puts all
    queries first, then all keys, then all values.
    """
    assert isinstance(model, PreTrainedModel)
    config = model.config.get_text_config()
    heads: int = config.num_attention_heads
    place = "qkv".index(kind)
    architecture = architecture_of(config)
    fused = None if architecture is None else architecture.fused
    if fused == "by head":
        return torch.arange(out_features).view(heads, 3, -1)[:, place].flatten()
    if fused == "by kind" or leaf == "qkv_proj":
        kv_heads: int = config.num_key_value_heads
        head_dim = out_features // (heads + 2 * kv_heads)
        sizes = [heads * head_dim, kv_heads * head_dim, kv_heads * head_dim]
        return torch.arange(out_features).split(sizes)[place]
    raise ValueError(
        f"{config.model_type} fuses query, key and value in {leaf} in an order ephemera does not know; "
        f"adapt it whole with target_modules=[{leaf!r}]."
    )
