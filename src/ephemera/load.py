"""Loading: a hub id, a folder, a GGUF file or the default model, on a device, in a dtype."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer

from ephemera.backbone import Backbone
from ephemera.errors import nearest, unknown
from ephemera.precision import DTYPES, multiplies_bfloat16
from ephemera.saving import unreadable
from ephemera.store import DEFAULT_MODEL, fetch_default_model

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
    **kwargs: Any,
) -> Backbone:
    """A hub id, a local folder, a GGUF file, or `smollm2-135m-instruct` from the package index.

    `dtype` defaults to float32 on a CPU and bfloat16 on an accelerator; `device` to CUDA where there
    is one. Adapters sit on `target_modules` of `layers` (of these on `only`, by name). Further arguments go to
    transformers (`quantization_config`, `attn_implementation`, ...).
    """
    device = find_device(device)
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
    if path.suffix == ".gguf":
        source, kwargs["gguf_file"] = str(path.parent), path.name
    tokenizer_kwargs = {key: kwargs[key] for key in ("gguf_file", "revision") if key in kwargs}
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **tokenizer_kwargs)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, **kwargs)
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(
            f"cannot load model {name!r}: {str(error).splitlines()[0]} Give a hub id, a folder with config.json and "
            f"safetensors, a .gguf file, or {DEFAULT_MODEL!r} (fetched from the package index). "
            f"{nearest(name, [DEFAULT_MODEL])}".rstrip()
        ) from error
    if "quantization_config" not in kwargs or "gguf_file" in kwargs:
        model = model.to(device)  # pyright: ignore[reportArgumentType]
    return Backbone(
        model,
        tokenizer,
        name=name,
        path=path,
        target_modules=target_modules,
        layers=layers,
        only=only,
        packs=packs,
        checkpoint=checkpoint,
    )


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
