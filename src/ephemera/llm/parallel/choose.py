"""Which layout a model gets, or has: the closed set of `parallel`, and what does not go with it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.distributed.configuration_utils import DistributedConfig

from ephemera.llm import processes
from ephemera.llm.frozen_lm import FrozenLM
from ephemera.llm.parallel.fsdp import FsdpLM
from ephemera.llm.parallel.tensor import TensorLM
from ephemera.llm.share import Parallel
from ephemera.messages import unknown

WHOLE_WEIGHTS = "the fast path reads whole weights"


def settled(parallel: str | None, kwargs: Mapping[str, Any]) -> Parallel:
    """The layout asked for, by name or by transformers' own keywords. ValueError for what is unknown or does not work."""
    asked = parallel or "none"
    known: tuple[Parallel, ...] = get_args(Parallel)
    if asked not in known:
        raise unknown("parallel", asked, known)
    by_keywords = _of_keywords(kwargs)
    if asked != "none" and by_keywords not in ("none", asked):
        raise ValueError(
            f"parallel={asked!r} and keywords that ask for {by_keywords!r} do not go together. Give one of them."
        )
    chosen = by_keywords if asked == "none" else known[known.index(asked)]
    for key in ("gguf_file", "quantization_config"):
        if kwargs.get(key) is not None:
            check_cut(chosen, key.partition("_")[0])
    return chosen


def check_cut(layout: Parallel, form: str) -> None:
    """ValueError where weights of another form than "none" (gguf, int8, ...) were to be cut."""
    if form != "none" and layout in ("tensor", "fsdp"):
        raise ValueError(
            f"parallel={layout!r} does not cut {form} weights. Give a model in float32 or bfloat16, or leave out parallel."
        )


def _of_keywords(kwargs: Mapping[str, Any]) -> Parallel:
    for key in ("tp_plan", "tp_size"):
        if kwargs.get(key) is not None:
            raise ValueError(f"{key} is retired in transformers. Give parallel='tensor' instead.")
    config = kwargs.get("distributed_config")
    if isinstance(config, Mapping):
        config = DistributedConfig.from_dict(dict(config))
    if config is not None and config.dp_size > 1:
        raise ValueError(
            f"fsdp_size={config.fsdp_size}: transformers' own FSDP fails in the backward pass that adapting needs. Give "
            "parallel='fsdp' instead, without distributed_config."
        )
    if config is not None and (config.pp_size or 1) > 1:
        raise ValueError(f"pp_size={config.pp_size}: a pipeline is not supported. Give parallel='tensor' or 'fsdp'.")
    if config is not None and (config.tp_size or 1) > 1:
        return "tensor"
    return "none" if kwargs.get("device_map") is None else "offload"


def tensor_options(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """What transformers is told for tensor parallelism: as given, else over all processes."""
    return {"distributed_config": kwargs.get("distributed_config") or DistributedConfig(tp_size=processes.size())}


def check_device(device: torch.device) -> None:
    """ValueError where transformers would cut the model on another device than the one asked for."""
    if device.type == "cpu" and torch.accelerator.is_available():
        raise ValueError(
            "parallel='tensor' on device 'cpu': transformers takes this machine's accelerator. Leave out device, or hide the "
            "accelerator (CUDA_VISIBLE_DEVICES=)."
        )


def layout_of(model: PreTrainedModel) -> Parallel:
    """How a model that is loaded already is laid out."""
    if any(isinstance(module, FSDPModule) for module in model.modules()):
        return "fsdp"
    if any(isinstance(weight, DTensor) for weight in model.parameters()):
        return "tensor"
    hooked = any(getattr(module, "_hf_hook", None) is not None for module in model.modules())
    return "offload" if hooked else "none"


def laid_out(parallel: Parallel) -> type[FrozenLM]:
    """The class that runs a model so: on the reference path, as `WHOLE_WEIGHTS` says."""
    if parallel == "offload":
        from ephemera.llm.parallel.offload import OffloadLM  # here: accelerate is an extra's

        return OffloadLM
    return {"tensor": TensorLM, "fsdp": FsdpLM, "none": FrozenLM}[parallel]


def line_of(parallel: Parallel) -> str:
    """What the loader says of it."""
    over = f" over {processes.size()} processes" if parallel in ("tensor", "fsdp") else ""
    return f"parallel: {parallel}{over}, on the reference path: {WHOLE_WEIGHTS}."
