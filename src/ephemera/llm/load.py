"""Loading: a hub id, a folder, a GGUF file or the default model, on a device, in a dtype."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from ephemera.downloads import DEFAULT_MODEL, fetch_default_model
from ephemera.llm import processes
from ephemera.llm.frozen_lm import FrozenLM
from ephemera.llm.gguf_header import read_header
from ephemera.llm.model_files import (
    adapter_not_model,
    check_files,
    reason,
    unreadable_config,
    unreadable_tokenizer,
    unreadable_weights,
)
from ephemera.llm.parallel.choose import (
    check_cut,
    check_device,
    laid_out,
    layout_of,
    line_of,
    settled,
    tensor_options,
)
from ephemera.llm.parallel.fsdp import shard
from ephemera.llm.parallel.tensor import check_divides
from ephemera.llm.precision import DTYPES, multiplies_bfloat16
from ephemera.llm.quantization import BITSANDBYTES, Quantization, checked_quantization, loading, of_files
from ephemera.llm.share import Parallel
from ephemera.llm.weights import check_finite, check_fit
from ephemera.messages import nearest, unknown
from ephemera.saving import unreadable

SLOW_BFLOAT16 = "this CPU has no instructions for bfloat16 products: they will take tens of times as long as float32's."


def find_device(given: torch.device | str | None) -> torch.device:
    """The device asked for, else CUDA where there is one; ValueError where torch has no such device here."""
    try:
        device = torch.device(given or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=device).item()  # meta has no numbers
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"device {str(given)!r} cannot be used here: {str(error).splitlines()[0]}. Give cpu, or cuda on a machine that has it."
        ) from error
    return device


def load_backbone(
    name: str,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    target_modules: str | Sequence[str] = "qv",
    layers: str | Sequence[int] = "all",
    only: Sequence[str] | None = None,
    checkpoint: bool = False,
    fast: bool | None = None,
    quantization: str = "none",
    parallel: str | None = None,
    **kwargs: Any,
) -> FrozenLM:
    """A hub id, a local folder, a GGUF file, or `smollm2-135m-instruct` from the package index.

    `dtype` defaults to float32 on a CPU and bfloat16 on an accelerator; `device` to CUDA where there
    is one. `fast=False` runs the reference path: the same results up to rounding. Adapters sit on `target_modules` of
    `layers` (of these on `only`, by name). `quantization`: "int8" or "nf4" (bitsandbytes), "torchao-int8", or "none": as the
    files are. `parallel`: how the model is laid over devices: "none", "tensor" or "fsdp" (over the processes that torchrun
    started), "offload" (accelerate's device_map). Further arguments go to transformers (`quantization_config`,
    `attn_implementation`, ...). ModuleNotFoundError where a package for quantised weights is missing. ValueError where no
    gradient passes through such weights, where a file cannot be read, or weights are missing, left over, of another shape or
    not finite: transformers would fill or drop them.
    """
    device, form = find_device(device), checked_quantization(quantization)
    layout = settled(parallel, kwargs)
    if isinstance(dtype, str) and dtype not in DTYPES:
        raise unknown("dtype", dtype, DTYPES)
    dtype = DTYPES[dtype] if isinstance(dtype, str) else dtype
    dtype = dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)
    if dtype == torch.bfloat16 and device.type == "cpu" and not multiplies_bfloat16():
        warnings.warn(SLOW_BFLOAT16, stacklevel=2)
    path, kwargs = _resolve(name), dict(kwargs)
    packs = kwargs.get("attn_implementation") is None  # who asks for an attention gets it in every pass
    if packs:
        kwargs.pop("attn_implementation", None)
        if device.type == "cpu" and dtype == torch.bfloat16:
            kwargs["attn_implementation"] = "eager"  # the fused kernel's bfloat16 backward is slow there
    source = str(path) if path.exists() else name
    if path.exists() and (file := check_files(path)) is not None:
        source, kwargs["gguf_file"] = str(path.parent), file
    settled(layout, kwargs)  # a GGUF file shows only now
    kwargs.setdefault("trust_remote_code", False)  # else transformers asks on the terminal
    which = {key: kwargs[key] for key in ("gguf_file", "revision", "trust_remote_code") if key in kwargs}
    if "gguf_file" not in kwargs:  # a GGUF file's takes seconds
        brought = of_files(_config(name, path, source, which))
        check_cut(layout, form if brought is None else brought)
        kwargs |= _placed(name, brought, form, kwargs, device)
    elif form != "none":
        raise ValueError(
            f"quantization={form!r} does not go with the GGUF file {name!r}: give the unquantised model's folder."
        )
    kwargs |= loading(form, dtype, device)
    tokenizer = _read(name, path, unreadable_tokenizer, lambda: AutoTokenizer.from_pretrained(source, **which))
    if layout in ("tensor", "fsdp"):
        device = processes.join(layout, device)
    model = _laid_out(name, path, source, dtype, kwargs, layout, device)
    sits: dict[str, Any] = {"target_modules": target_modules, "layers": layers, "only": only}
    return frozen_lm(model, tokenizer, name=name, path=path, packs=packs, checkpoint=checkpoint, fast=fast, **sits)


def _config(name: str, path: Path, source: str, which: dict[str, Any]) -> Any:
    """A folder's configuration, or a hub id's; None where a hub id has none: an adapter's, of which the weights tell."""
    if path.is_dir():
        return _read(name, path, unreadable_config, lambda: AutoConfig.from_pretrained(source, **which))
    try:
        return AutoConfig.from_pretrained(source, **which)
    except (OSError, ValueError):
        return None


def _placed(
    name: str, brought: str | None, form: Quantization, kwargs: dict[str, Any], device: torch.device
) -> dict[str, Any]:
    """Where weights go that are quantised already; ValueError if another form is asked for too."""
    given = "quantization_config" in kwargs
    if form != "none" and (brought is not None or given):
        other = "quantization_config" if given else f"its own files, by {brought}"
        raise ValueError(
            f"quantization={form!r} for {name!r}, which is quantised by {other}: leave out one, or give the unquantised model."
        )
    return {"device_map": {"": device}} if brought == BITSANDBYTES and "device_map" not in kwargs else {}


def _laid_out(
    name: str,
    path: Path,
    source: str,
    dtype: torch.dtype,
    kwargs: dict[str, Any],
    layout: Parallel,
    device: torch.device,
) -> PreTrainedModel:
    """The model's weights where its layout has them."""
    if layout == "tensor":
        which = {key: kwargs[key] for key in ("revision", "trust_remote_code") if key in kwargs}
        config = _read(name, path, unreadable_config, lambda: AutoConfig.from_pretrained(source, **which))
        check_device(device)
        check_divides(name, config, processes.size())
        kwargs = {**kwargs, **tensor_options(kwargs)}
    elif layout == "offload":
        kwargs = {"device_map": "auto", **kwargs}
    model = _load_weights(name, path, source, dtype, kwargs)
    if layout == "fsdp":
        return shard(model, device)
    own = "quantization_config" not in kwargs or "gguf_file" in kwargs  # quantised weights are where they were made
    if layout == "none" and "device_map" not in kwargs and own:
        return model.to(device)  # pyright: ignore[reportArgumentType]
    return model


def frozen_lm(
    model: PreTrainedModel,
    tokenizer: Any,
    *,
    packs: bool = True,
    checkpoint: bool = False,
    fast: bool | None = None,
    **where: Any,
) -> FrozenLM:
    """A model that is loaded already, on the fast path or the reference path. `where`: as for `FrozenLM`."""
    layout = layout_of(model)
    if layout != "none":
        if checkpoint and layout != "offload":
            raise ValueError(f"checkpoint is not for parallel={layout!r}; leave it off.")
        if processes.is_first():
            print(line_of(layout), file=sys.stderr)
        return laid_out(layout)(model, tokenizer, **where)
    if not (uses_fast() if fast is None else fast):
        if checkpoint:
            raise ValueError("checkpoint is part of the fast path, which is off (EPHEMERA_FAST=0 or fast=False).")
        return FrozenLM(model, tokenizer, **where)
    from ephemera.fast.fast_lm import FastLM  # here, so that the reference path runs without fast/

    return FastLM(model, tokenizer, packs=packs, recompute=checkpoint, **where)


def uses_fast() -> bool:
    """Whether models compute by fast/ unless they are told: not with EPHEMERA_FAST=0."""
    asked = os.environ.get("EPHEMERA_FAST", "1")
    if asked not in ("0", "1"):
        raise ValueError(f"EPHEMERA_FAST is {asked!r}; set it to 1 (the default) or 0, the reference path.")
    return asked == "1"


def _load_weights(name: str, path: Path, source: str, dtype: torch.dtype, kwargs: dict[str, Any]) -> PreTrainedModel:
    """The model, once every one of its weights is known to come from its files."""
    reporting: dict[str, Any] = {"output_loading_info": True, "ignore_mismatched_sizes": True}
    options = {**kwargs, "dtype": dtype, **reporting}
    model, info = _read(name, path, unreadable_weights, lambda: AutoModelForCausalLM.from_pretrained(source, **options))
    if getattr(model, "_hf_peft_config_loaded", False):  # a hub id of an adapter
        raise ValueError(adapter_not_model(name, model.config.name_or_path))
    check_fit(name, info)
    if "gguf_file" in kwargs and path.exists() and (factors := read_header(path).rope_factors):
        frequencies_F = model.base_model.get_submodule("rotary_emb").get_buffer("inv_freq")
        frequencies_F.div_(torch.tensor(factors, device=frequencies_F.device))
    check_finite(f"model {name!r}", model.named_parameters())
    return model


def _read(name: str, path: Path, told: Callable[[Path, BaseException], str], read: Callable[[], Any]) -> Any:
    """What `read` returns; ValueError of one line where it fails. Damaged files make libraries raise anything."""
    try:
        return read()
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # tokenizers raises plain Exception
        if path.exists():
            again = f" Or remove {path}; the next use fetches it again." if name == DEFAULT_MODEL else ""
            raise ValueError(f"cannot load model {name!r}: {told(path, error)}{again}") from error
        raise ValueError(
            f"cannot load model {name!r}: {reason(error)}. Give a hub id, a folder with config.json and safetensors, a "
            f".gguf file, or {DEFAULT_MODEL!r} (fetched from the package index). {nearest(name, [DEFAULT_MODEL])}".rstrip()
        ) from error


def _resolve(name: str) -> Path:
    if name == DEFAULT_MODEL:
        return fetch_default_model()
    path = Path(name).expanduser()
    looks_local = path.suffix == ".gguf" or name.startswith((".", "/", "~"))
    if looks_local and not path.exists():
        raise ValueError(f"cannot load model {name!r}: there is no such file or folder.")
    for file in [path] if path.is_file() else sorted(p for p in path.glob("*") if p.is_file()):
        if found := unreadable(file):  # safetensors would say that there is no such file
            raise ValueError(f"cannot load model {name!r}: cannot read {found}. Ask its owner to let you read it.")
    return path
