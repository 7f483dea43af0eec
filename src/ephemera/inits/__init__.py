"""Where an adapter starts: zero (LoRA's own), a PEFT adapter, or one that a generator makes from the prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ephemera.downloads import DEFAULT_MODEL
from ephemera.hub import fetch, is_id
from ephemera.inits.generator import LoraGenerator, load_generator
from ephemera.inits.peft import PeftInit
from ephemera.inits.protocol import Init
from ephemera.inits.zero import ZeroInit
from ephemera.made_for import Format

__all__ = ["INITS", "Init", "LoraGenerator", "PeftInit", "ZeroInit", "default_start", "load_generator", "load_init"]


# The kinds of inits, asked in this order whether a name is theirs. A new one is a file in this folder and an entry here.
INITS: tuple[type[Init], ...] = (ZeroInit, PeftInit, LoraGenerator)

# What makes a prompt's adapter if nobody names a start, a rate or steps: {model: {format: shipped generator}}
DEFAULT_STARTS: dict[str, dict[Format, str]] = {DEFAULT_MODEL: {"chat": "universal-generator"}}


def default_start(model: str, format: Format) -> LoraGenerator | None:
    """The generator that ships for a model and a prompt format; None if there is none."""
    name = DEFAULT_STARTS.get(model, {}).get(format)
    return None if name is None else load_generator(name)


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
