"""Which modules PEFT puts an adapter on, as its adapter_config.json says: the rules of PEFT 0.21, without PEFT."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

KEYS = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")


@dataclass(frozen=True)
class PeftTargets:
    """`target_modules` and `exclude_modules`: a pattern that a whole path matches, or the last parts of paths.

    `layers_to_transform`: only modules of these layers; a layer's number follows one of `layers_pattern` in the path (none:
    any name).
    """

    target_modules: str | Sequence[str]
    exclude_modules: str | Sequence[str] | None = None
    layers_to_transform: int | Sequence[int] | None = None
    layers_pattern: str | Sequence[str] | None = None

    @staticmethod
    def of(config: Mapping[str, Any]) -> PeftTargets | None:
        """None if the configuration names no modules. ValueError for settings that PEFT refuses together."""
        values = {key: config.get(key) for key in KEYS}
        if not values["target_modules"]:
            return None
        by_layer = values["layers_to_transform"] is not None
        if isinstance(values["target_modules"], str) and (by_layer or values["layers_pattern"] is not None):
            raise ValueError("layers_to_transform and layers_pattern need target_modules as a list, not a pattern")
        if values["layers_pattern"] and not by_layer:
            raise ValueError("layers_pattern needs layers_to_transform")
        return PeftTargets(**values)  # pyright: ignore[reportArgumentType]

    def selects(self, path: str) -> bool:
        """Whether the module at `path` gets an adapter ("all-linear" is the caller's)."""
        if self.exclude_modules and _named(self.exclude_modules, path):
            return False
        if not _named(self.target_modules, path):
            return False
        layers = self.layers_to_transform
        if layers is None or layers == [] or isinstance(self.target_modules, str) or path in self.target_modules:
            return True
        patterns = [self.layers_pattern] if isinstance(self.layers_pattern, str) else self.layers_pattern
        # The first number in the path is the layer's: an expert's comes later
        found = [re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", path) for pattern in patterns or ()]
        if not patterns:
            found = [re.match(r".*?\.[^.]*\.(\d+)\.", path)]
        match = next((m for m in found if m is not None), None)
        wanted = [layers] if isinstance(layers, int) else layers
        return match is not None and int(match[1]) in wanted


def _named(names: str | Sequence[str], path: str) -> bool:
    if isinstance(names, str):
        return re.fullmatch(names, path) is not None
    return path in names or any(path.endswith(f".{name}") for name in names)
