"""Where an adapter starts: zero (LoRA's own), a PEFT adapter, or one that a generator makes from the prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from ephemera.inits.generator import LoraGenerator, load_generator
from ephemera.inits.peft import PeftInit
from ephemera.inits.protocol import Init
from ephemera.inits.zero import ZeroInit
from ephemera.llm.frozen_lm import FrozenLM

__all__ = [
    "Init",
    "LoraGenerator",
    "PeftInit",
    "ZeroInit",
    "check_init",
    "load_generator",
    "load_init",
    "lora_of",
    "place_init",
    "targets_of",
]


def load_init(spec: str | Path, **zero: Any) -> Init:
    """An init from "zero", a generator's folder or shipped name, or the folder of a PEFT adapter."""
    if spec == "zero":
        return ZeroInit(**zero)
    folder = Path(spec).expanduser()
    if (folder / "adapter_config.json").exists():
        return PeftInit.load(folder)
    return load_generator(spec)


def check_init(init: Init, backbone: FrozenLM) -> None:
    """ValueError where an init was made for another model; others' own inits are taken as they are."""
    if isinstance(init, LoraGenerator | PeftInit):
        init.check(backbone)


def place_init(init: Init, backbone: FrozenLM) -> Init:
    """The init, checked, on the model's device; beside a bfloat16 model, a generator not in training computes in that."""
    check_init(init, backbone)
    if isinstance(init, nn.Module):
        init.to(backbone.device)
    trained = isinstance(init, LoraGenerator) and any(p.requires_grad for p in init.parameters())
    if isinstance(init, LoraGenerator) and backbone.dtype == torch.bfloat16 and not trained:
        return init.in_dtype(backbone.dtype)
    return init


def lora_of(init: Init) -> dict[str, Any]:
    """The LoRA settings that an init brings with it, for the records of a run; none where it takes any."""
    if isinstance(init, LoraGenerator | PeftInit):
        return {"r": init.r, "lora_alpha": init.lora_alpha, "target_modules": init.target_modules}
    return {}


def targets_of(init: Init) -> str | list[str] | None:
    """The modules that an init has adapters for; None where it takes any."""
    return init.target_modules if isinstance(init, LoraGenerator | PeftInit) else None
