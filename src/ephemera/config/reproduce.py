"""Settings of `ephemera reproduce`: what a result of the papers takes."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ephemera.config.base import LoraSettings
from ephemera.config.evaluate import Method
from ephemera.config.settings import Settings
from ephemera.made_for import Format


class Lengths(Settings):
    """Mean tokens of a row, for the plan's arithmetic."""

    prompt: int = Field(default=100, ge=1)
    answer: int = Field(default=20, ge=1)


class Recipe(Settings):
    """What both papers' results share."""

    title: str = Field(default="", description="of the table or figure")
    models: list[str] = Field(default=[], description="that the paper has; --model takes any")
    formats: list[Format] = Field(
        default=["plain"], min_length=1, description="prompts as they are, in a chat, or both"
    )
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    lora: LoraSettings = LoraSettings()
    rows: int = Field(default=300, ge=2, description="test rows of each task")
    validation_rows: int = Field(
        default=40, ge=2, description="of each task, while training and to search uniform rates"
    )
    seeds: list[int] = Field(default=[0], min_length=1, description="of training")
    max_tokens: int = Field(default=1024, ge=2, description="longer rows are left out, and counted")
    source: str | None = Field(default=None, description="where rows lie, {task} filled in; default: the hub")
    sources: dict[str, str] = Field(default={}, description="of a task's training rows that lie elsewhere")
    lengths: dict[str, Lengths] = Field(default={}, description="of each task's rows, for the plan")
    published: dict[str, dict[str, list[float]]] = Field(
        default={}, description="the paper's own figures: {model: {row: values}}"
    )


class LdttaRecipe(Recipe):
    """`ephemera reproduce fig3`, table1, table2, fig4 or fig5 of LDTTA: methods x K on data sets"""

    paper: Literal["ldtta"] = "ldtta"
    result: Literal["fig3", "table1", "table2", "fig4", "fig5"] = "table1"
    datasets: dict[str, list[str]] = Field(
        default={}, description="{data set: its tasks}; one network for each data set"
    )
    methods: list[Method] = Field(default=["none", "fixed", "stepwise", "layerwise"], min_length=1)
    steps: list[int] = Field(default=[0, 1, 2, 3, 4, 5], min_length=1, description="K")
    generate: list[int] = Field(default=[], description="K at which answers are generated")
    samples: int = Field(default=30_000, ge=1, description="training prompts of a network")
    batch_size: int = Field(default=16, ge=1, description="prompts of an optimiser step")
    learning_rate: float = Field(default=1e-4, gt=0, description="AdamW")
    base_rates: list[float] | None = Field(
        default=[1e-2], description="one for all steps, or each step's; null: searched"
    )
    max_steps: int = Field(default=5, ge=1, description="Kmax")
    mlp_size: int = Field(default=128, ge=1)
    fixed_rate: float = Field(default=5e-2, gt=0)


class TaskWeaverRecipe(Recipe):
    """`ephemera reproduce taskweaver-table2` or taskweaver-analysis: task LoRAs beside a generator"""

    paper: Literal["taskweaver"] = "taskweaver"
    result: Literal["taskweaver-table2", "taskweaver-analysis"] = "taskweaver-table2"
    lora: LoraSettings = LoraSettings(r=2, lora_alpha=8.0)
    tasks: list[str] = Field(default=["gsm8k", "snli", "arc-easy", "boolq"], min_length=1)
    lora_steps: int = Field(default=500, ge=1, description="optimiser steps of a task LoRA")
    lora_batch_size: int = Field(default=4, ge=1)
    lora_learning_rate: float = Field(default=5e-5, gt=0)
    mixed: bool = Field(default=True, description="also one LoRA for all tasks, on as many steps for each")
    samples: int = Field(default=20_000, ge=1, description="training prompts of the generator")
    batch_size: int = Field(default=8, ge=1)
    learning_rate: float = Field(default=3e-5, gt=0)
    hidden_size: int = Field(default=1024, ge=1)
    repeats: int = Field(default=3, ge=1, description="whole evaluations")
