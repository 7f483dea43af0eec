"""Timings as given: contenders run, and say the seconds they are told to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import pytest


def give(monkeypatch: pytest.MonkeyPatch, module: ModuleType, seconds: Mapping[str, float]) -> None:
    """`module.turns` runs each contender once and returns two rounds of these seconds; a name that is missing is an error."""

    def turns(contenders: Mapping[str, Callable[[], float]], rounds: int, **_: Any) -> dict[str, list[float]]:
        for contender in contenders.values():
            contender()
        return {name: [seconds[name], seconds[name]] for name in contenders}

    monkeypatch.setattr(module, "turns", turns)
