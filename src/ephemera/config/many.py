"""Settings of `ephemera run`: every prompt of a file."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from ephemera.config.base import GradientModelSettings
from ephemera.config.settings import Settings
from ephemera.made_for import Reach


class RaySettings(Settings):
    """What each actor of `engine: ray` takes."""

    workers: int = Field(default=1, ge=1, description="actors, each with a model")
    cpus: float = Field(default=1, gt=0, description="cores of an actor; its threads too")
    gpus: float = Field(default=0, ge=0, description="of an actor; 0.5: two actors share one")


class Run(Settings):
    """`ephemera run`: adapts to every prompt of a file, and answers, scores or keeps the adapter"""

    input: str = Field(default="", description="rows (.jsonl, .ndjson) or a prompt a line (.txt, .md); also .gz")
    output: str = Field(default="", description="file of one JSON line per row, in the input's order")
    task: Literal["answer", "score", "adapt"] = Field(
        default="answer", description="text, NLL of each row's `answer`, or a PEFT folder"
    )
    model: GradientModelSettings = GradientModelSettings()
    rate: str | float | None = Field(default=None, description="as --rate of `ephemera answer`")
    init: str = Field(default="zero", description="as --init of `ephemera answer`")
    steps: int | None = Field(default=None, ge=0, description="default: what the rate was validated at")
    reach: Reach | None = Field(default=None, description="default: as the rate was trained for")
    seed: int = Field(default=0, description="an adapter's start follows from this seed and the prompt only")
    chat: bool = Field(default=False, description="prompts in the model's chat template; rows of messages need it")
    special_tokens: bool = Field(default=False, description="a special token that a prompt spells is one")
    truncate: Literal["left"] | None = Field(default=None, description="cut prompts longer than the model's window")
    max_new_tokens: int = Field(default=64, ge=1, description="longest answer")
    adapters: str | None = Field(
        default=None, description="folder of task adapt's PEFT folders; default: beside the output"
    )
    window: int = Field(default=256, ge=1, description="rows that are read, sorted by length and written together")
    engine: Literal["local", "ray"] = Field(default="local", description="this process, or Ray's actors")
    ray: RaySettings = RaySettings()

    @property
    def adapters_folder(self) -> Path:
        if self.adapters is not None:
            return Path(self.adapters)
        output = Path(self.output)
        return output.with_name(f"{output.stem}-adapters")
