"""A trained rate from a folder, a shipped name or the hub, as its own class; and to the hub."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Self

from ephemera.hub import OnHub


class RateOnHub(OnHub):
    """What ScaleNet, constants and averaged rates share."""

    hub_kind: ClassVar[str] = "rate"

    @classmethod
    def from_pretrained(cls, spec: str | Path) -> Self:
        """From a folder, a shipped name, or `user/repo[@revision]`. ValueError if it holds another kind of rate."""
        from ephemera.rates import load_rate  # here, because it knows this class

        rate = load_rate(spec)
        if not isinstance(rate, cls):
            raise ValueError(
                f"{str(spec)!r} holds a {type(rate).__name__}, not a {cls.__name__}. "
                f"Use {type(rate).__name__}.from_pretrained, or load_rate for any kind."
            )
        return rate
