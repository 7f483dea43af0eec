"""Ephemera: an adapter for every prompt, gone after the answer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ephemera.adaptation import Adaptation
    from ephemera.as_generate import as_generate
    from ephemera.inits import ZeroInit
    from ephemera.lora import LoraBatch
    from ephemera.model import AdaptiveLM
    from ephemera.rates import AveragedRate, FixedRate, ScaleNet, load_rate
    from ephemera.together import SharedAdapter

__version__ = "0.1.0"
__all__ = [
    "Adaptation",
    "AdaptiveLM",
    "AveragedRate",
    "FixedRate",
    "LoraBatch",
    "ScaleNet",
    "SharedAdapter",
    "ZeroInit",
    "as_generate",
    "load_rate",
]


def __getattr__(name: str) -> Any:
    """Names load when they are first used (PEP 562): torch and transformers take seconds."""
    if name == "AdaptiveLM":
        from ephemera.model import AdaptiveLM as found
    elif name == "Adaptation":
        from ephemera.adaptation import Adaptation as found
    elif name == "as_generate":
        from ephemera.as_generate import as_generate as found
    elif name == "LoraBatch":
        from ephemera.lora import LoraBatch as found
    elif name == "SharedAdapter":
        from ephemera.together import SharedAdapter as found
    elif name == "ZeroInit":
        from ephemera.inits import ZeroInit as found
    elif name in __all__:
        from ephemera import rates

        found = vars(rates)[name]
    else:
        raise AttributeError(f"module 'ephemera' has no attribute {name!r}. It has {', '.join(__all__)}.")
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
