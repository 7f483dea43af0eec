"""Where an adapter starts: zero (LoRA's own), a PEFT adapter, or one that a generator makes from the prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ephemera.inits.generator import LoraGenerator, load_generator
from ephemera.inits.peft import PeftInit
from ephemera.inits.protocol import Init
from ephemera.inits.zero import ZeroInit

__all__ = ["INITS", "Init", "LoraGenerator", "PeftInit", "ZeroInit", "load_generator", "load_init"]


# The kinds of inits, asked in this order whether a name is theirs. A new one is a file in this folder and an entry here.
INITS: tuple[type[Init], ...] = (ZeroInit, PeftInit, LoraGenerator)


def load_init(spec: str | Path, **settings: Any) -> Init:
    """An init from "zero", a generator's folder or shipped name, or the folder of a PEFT adapter."""
    return next(init for kind in INITS if (init := kind.open(spec, **settings)) is not None)
