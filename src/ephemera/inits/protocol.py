"""What an init is: it gives each row of a batch its first adapter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from ephemera.batch import TokenBatch
from ephemera.llm.frozen_lm import FrozenLM
from ephemera.lora import LoraBatch


class Init(Protocol):
    """Gives each row of a batch its first adapter."""

    def __call__(self, backbone: FrozenLM, batch: TokenBatch, seeds: Sequence[int]) -> LoraBatch: ...
