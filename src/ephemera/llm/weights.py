"""Whether weights fit the model that is to have them: none missing, left over or of another shape, all of them finite."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from ephemera.llm.quantization import is_quantised

SHOWN = 3  # names of a list; the rest is counted


def check_fit(name: str, info: Mapping[str, Any]) -> None:
    """ValueError where weights do not fit the model's configuration, by transformers' loading report.

    transformers fills what is missing with random numbers, and drops what is left over. `info` is what it returns for
    `output_loading_info=True`, and with `ignore_mismatched_sizes=True` the tensors of other shapes too.
    """
    missing, extra = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    other = sorted((key, tuple(file), tuple(model)) for key, file, model in info["mismatched_keys"])
    if not (missing or extra or other):
        return
    shapes = [f"{key} (file {list(file)}, configuration {list(model)})" for key, file, model in other]
    parts = {"missing": missing, "left over": extra, "of another shape": shapes}
    found = "; ".join(f"{what}: {listed(keys)}" for what, keys in parts.items() if keys)
    raise ValueError(
        f"the weights of {name!r} do not fit its configuration. {found}. {_likely(missing, extra, bool(other))}"
    )


def _likely(missing: Collection[str], extra: Collection[str], other: bool) -> str:
    if other:
        return (
            "Likely the configuration is that of another model or size. Take config.json and weights from one source."
        )
    if list(missing) == ["lm_head.weight"] and not extra:
        return "Likely the model ties its head to the embedding: set tie_word_embeddings to true in config.json."
    if missing and extra:
        return (
            "Likely the tensors' names are those of a wrapper (PEFT, torch.compile) or of another architecture. "
            "Save the model again with transformers' save_pretrained, without the wrapper."
        )
    if missing:
        return (
            "Likely a file of the weights is incomplete or was not copied, or the configuration is a larger model's. "
            "Copy all files of the model again."
        )
    return (
        "Likely the configuration is a smaller model's, or the file also holds another head (v_head, mtp). Take config.json "
        "and weights from one source, or save the model again without the other head."
    )


def check_finite(what: str, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """ValueError that names the tensors with NaN or infinity."""
    broken = [key for key, tensor in tensors if not _finite(tensor)]
    if broken:
        raise ValueError(
            f"{what} holds NaN or infinity in {listed(broken)}. Likely its training diverged, the file is damaged, or "
            "its numbers are too large for the dtype. Take the files again, or those of an earlier step."
        )


@torch.no_grad()
def _finite(tensor: Tensor) -> bool:
    if tensor.is_meta or is_quantised(tensor) or not tensor.numel():
        return True  # what a quantised weight holds is its own affair
    if isinstance(tensor, DTensor):  # each process looks at its own part
        return _finite(tensor.to_local())
    least, most = tensor.aminmax()  # one pass without a copy; NaN passes through
    return bool(least.isfinite() & most.isfinite())


def check_logits(model: str, logits_BTV: Tensor) -> None:
    """ValueError for NaN or infinity; minus infinity may mean a token that the model never writes."""
    if not bool((logits_BTV < torch.inf).all()):  # NaN is not below it either
        raise ValueError(
            f"{model} gives logits that are NaN or infinite in {logits_BTV.dtype}. Its weights are damaged, or too large "
            "for that dtype: take its files again, or try another dtype."
        )


@torch.no_grad()
def first_rows(weight: Tensor, rows: int | None) -> Tensor:
    """A weight's first rows (None: all), as a plain tensor. If it is sharded, every process calls this, and gets them."""
    if not isinstance(weight, DTensor):
        return weight[:rows]
    mesh, (placement, *more) = weight.device_mesh, weight.placements
    if rows is None or more or not placement.is_shard(0):
        return weight.full_tensor()[:rows]
    own = weight.to_local()
    start = mesh.get_local_rank() * -(-weight.shape[0] // mesh.size())
    first = own.new_zeros(min(rows, weight.shape[0]), *weight.shape[1:])
    mine = own[: max(0, len(first) - start)]
    first[start : start + len(mine)] = mine
    dist.all_reduce(first, group=mesh.get_group())  # all others hold zero there
    return first


def listed(names: Collection[str]) -> str:
    """The first of some names, and how many more there are."""
    shown, more = list(names)[:SHOWN], len(names) - SHOWN
    return ", ".join(shown) + (f" and {more} more" if more > 0 else "")
