"""A stage of a result: one command with its settings, and what it takes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ephemera.config import (
    Analyse,
    Benchmark,
    Evaluate,
    Lengths,
    Recipe,
    TrainGenerator,
    TrainScaleNet,
    TrainTaskLora,
    fill,
)
from ephemera.config.settings import Settings, check_config
from ephemera.cost import ModelShape

Kind = Literal["scalenet", "evaluate", "lora", "generator", "benchmark", "analyse"]
SETTINGS: dict[Kind, type[Settings]] = {
    "scalenet": TrainScaleNet,
    "evaluate": Evaluate,
    "lora": TrainTaskLora,
    "generator": TrainGenerator,
    "benchmark": Benchmark,
    "analyse": Analyse,
}


@dataclass(frozen=True)
class Stage:
    """`samples`: rows that it trains or tests on; `flops`, `bytes`: what it takes, to first order.

    `tags` say what it holds of the result: data set, task, format, seed.
    """

    name: str
    kind: Kind
    folder: Path
    settings: Settings
    samples: int
    flops: float
    bytes: float
    tags: dict[str, Any] = field(default_factory=dict)

    @property
    def made(self) -> str:
        """Where a training stage leaves its network."""
        return str(self.folder / ("adapter" if self.kind == "lora" else "network"))


@dataclass(frozen=True)
class Planner:
    """Makes stages. A stage's folder is named by what goes into it: results share what they have in common."""

    recipe: Recipe
    root: Path
    model: str  # hub id, folder or shipped name
    shape: ModelShape
    device: str | None = None

    def stage(
        self,
        name: str,
        kind: Kind,
        values: dict[str, Any],
        *,
        tasks: Sequence[str],
        samples: int,
        flops: float,
        batch: int,
        needs: Sequence[Stage] = (),
        **tags: Any,
    ) -> Stage:
        """`values`: the command's settings. `batch`: rows at once. `needs`: the stages whose networks it reads."""
        content = [kind, values, [need.folder.name for need in needs], self._rows(tasks)]
        text = json.dumps(content, sort_keys=True).replace(str(self.root), "")
        key = hashlib.sha256(text.encode()).hexdigest()[:10]
        folder = self.root / "stages" / f"{name.replace(' ', '-').replace('/', '-')}-{key}"
        settings = check_config(SETTINGS[kind], {**values, "output": str(folder)})
        return Stage(name, kind, folder, settings, samples, flops, self._bytes(batch, tasks), tags)

    @property
    def model_settings(self) -> dict[str, Any]:
        lora = self.recipe.lora.model_dump(mode="json")
        return {"name": self.model, "dtype": self.recipe.dtype, "device": self.device, "lora": lora}

    def lengths(self, tasks: Sequence[str]) -> Lengths:
        """Means over tasks."""
        of = [self.recipe.lengths.get(task, Lengths()) for task in tasks]
        prompt, answer = (sum(x) / len(of) for x in zip(*((x.prompt, x.answer) for x in of), strict=True))
        return Lengths(prompt=max(1, round(prompt)), answer=max(1, round(answer)))

    def _rows(self, tasks: Sequence[str]) -> str:
        """A digest of the local files that rows come from: other rows make another stage."""
        digest = hashlib.sha256()
        for task in tasks:
            for place in (fill(self.recipe.source, task) or "hub", self.recipe.sources.get(task, "")):
                digest.update(place.encode())
                for path in map(Path, place.split("+") if place else []):
                    files = sorted(path.iterdir()) if path.is_dir() else [path] if path.is_file() else []
                    for file in files:
                        digest.update(file.name.encode() + hashlib.sha256(file.read_bytes()).digest())
        return digest.hexdigest()

    def _bytes(self, batch: int, tasks: Sequence[str]) -> float:
        lora, lengths = self.recipe.lora, self.lengths(tasks)
        kinds = ("q", "v") if lora.target_modules == "qv" else ("q", "k", "v", "o", "up", "down")
        if isinstance(lora.target_modules, list):
            kinds = tuple(kind.removesuffix("_proj") for kind in lora.target_modules)
        adapter = self.shape.adapter(kinds, lora.r)
        return self.shape.step_bytes(batch, lengths.prompt + lengths.answer, adapter=adapter, dtype=self.recipe.dtype)
