"""Where an adapter starts: zero (LoRA's own), a PEFT adapter, or one that a generator makes from the prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ephemera.hub import fetch, is_id
from ephemera.inits.generator import LoraGenerator, load_generator
from ephemera.inits.peft import PeftInit
from ephemera.inits.protocol import Init
from ephemera.inits.zero import ZeroInit

__all__ = ["INITS", "Init", "LoraGenerator", "PeftInit", "ZeroInit", "load_generator", "load_init"]


# The kinds of inits, asked in this order whether a name is theirs. A new one is a file in this folder and an entry here.
INITS: tuple[type[Init], ...] = (ZeroInit, PeftInit, LoraGenerator)


def load_init(init: Init | str | Path | None, **settings: Any) -> Init:
    """An init as it is given, or from "zero" (also None), a shipped name, a folder, or a hub id of a generator or adapter."""
    if isinstance(init, Init):
        return init
    if init is not None and not isinstance(init, str | Path):
        raise ValueError(
            f"init is a {type(init).__name__}; give an Init (ephemera.inits), "
            '"zero", the name or folder of a generator, or the folder of a PEFT adapter.'
        )
    spec = init or "zero"
    if is_id(spec):
        spec = fetch(str(spec), "generator", "adapter")
    return next(found for kind in INITS if (found := kind.open(spec, **settings)) is not None)
