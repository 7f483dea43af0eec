"""What an init is: it gives each row of a batch its first adapter."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

from ephemera.batch import TokenBatch
from ephemera.gate import Gate
from ephemera.llm.cached_layers import CachedLayers
from ephemera.llm.frozen_lm import FrozenLM
from ephemera.lora import LoraBatch
from ephemera.made_for import Format, MadeFor, Reach


class Init(ABC):
    """Where adapters start. What a kind does not say of itself is as here: it fits any model, and comes from no file."""

    label: ClassVar[str | None] = None  # what a server calls it: `MODEL:label`; None for the zero start
    zero: ClassVar[bool] = False  # every B is zero: without a step the adapters change nothing
    reach: Reach = "all"  # where adapters act if no rate says
    gate: Gate | None = None  # when its adapters are left out, if no step follows; None: never
    made_for: MadeFor | None = None  # the prompts that it was trained on; None: not trained

    @abstractmethod
    def __call__(self, backbone: FrozenLM, batch: TokenBatch, seeds: Sequence[int]) -> LoraBatch:
        """The first adapters of a batch; a seed for each row."""

    @classmethod
    def open(cls, spec: str | Path, **settings: Any) -> Self | None:
        """What `--init SPEC` means; None if that is another kind. `settings` are those of the zero start."""
        return None

    def after(self, backbone: FrozenLM, batch: TokenBatch, reading: CachedLayers) -> LoraBatch:
        """The same from the base model's reading of the prompts."""
        raise NotImplementedError  # only asked of kinds that begin there (`reads_prompts`)

    @property
    def format(self) -> Format | None:
        """The format of the prompts that it was trained on; None: not trained."""
        return None if self.made_for is None else self.made_for.format

    @property
    def reads_prompts(self) -> bool:
        """Whether it begins with the base model's reading of the prompts (`after`)."""
        return False

    @property
    def lora_settings(self) -> dict[str, Any]:
        """The LoRA settings that it brings with it; none if it takes any."""
        return {}

    def check(self, backbone: FrozenLM) -> None:
        """ValueError if it was made for another model."""
        return

    def placed(self, backbone: FrozenLM) -> Init:
        """Checked, on the model's device."""
        self.check(backbone)
        return self
