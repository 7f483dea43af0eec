"""Settings of the training commands."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from ephemera.config.base import (
    AdaptedModelSettings,
    DataSettings,
    GeneratedLoraSettings,
    GradientModelSettings,
    MixtureSettings,
    ModelSettings,
    TaskLoraSettings,
    TasksSettings,
)
from ephemera.config.settings import Settings
from ephemera.rates import MAX_STEPS


class ObjectiveSettings(Settings):
    """What a step's gradient is of"""

    exit_layer: int | None = Field(
        default=None, ge=1, description="read the prompt's loss after so many layers; default: at the top"
    )
    lens: str | None = Field(
        default=None, description="folder or shipped name of the lens to read it through; default: the untrained one"
    )
    tune_lens: float = Field(
        default=0.0, ge=0, description="train the lens too, at this share of the learning rate, exactly (second order)"
    )
    vocabulary: int | None = Field(
        default=None, ge=1, description="softmax over the first so many ids and the target; default: over all"
    )


class ScaleNetSettings(Settings):
    base_rates: list[Annotated[float, Field(ge=0)]] | None = Field(
        default=None, description="eta of each step, where s = 1; default: searched on validation rows"
    )
    max_steps: int = Field(default=MAX_STEPS, ge=1, description="Kmax (LDTTA 4.1)")
    mlp_size: int = Field(default=128, ge=1, description="hidden size of the network (LDTTA 4.1)")
    max_log_scale: float = Field(
        default=4.0, gt=0, description="clamp of the network's output a (Eq. 16); s is at most 1+a+a^2/2"
    )
    trains: Literal["both", "B"] = Field(default="both", description="a step moves A and B, or B only")


class AloneSettings(ScaleNetSettings):
    granularity: Literal["layer", "step", "constant"] = Field(
        default="layer",
        description="a rate per projection, or one per step; or constants per projection, which see no prompt",
    )
    reach: Literal["all", "answer"] = Field(
        default="all", description="adapters act on every token, or from the last prompt token on"
    )
    start: str | None = Field(
        default=None, description="folder of per-projection constants to start from; default: base_rates"
    )
    constants: float | None = Field(
        default=None,
        gt=0,
        description="train per-projection constants first, on the same prepared prompts, at this learning rate; ScaleNet "
        "starts from them (reach answer with one step)",
    )
    harm_weight: float = Field(
        default=0.0, ge=0, description="further weight of an answer that adaptation made less likely"
    )


class OptimizerSettings(Settings):
    samples: int = Field(
        default=30_000,
        ge=1,
        description="training prompts that a gradient is taken of, with repeats where the data is smaller (LDTTA 4.1)",
    )
    batch_size: int = Field(default=16, ge=1, description="prompts per optimiser step, over all processes")
    learning_rate: float = Field(default=1e-3, gt=0, description="AdamW; the paper has 1e-4")
    weight_decay: float = Field(default=0.01, ge=0)
    warmup: int = Field(default=50, ge=0, description="optimiser steps of linear warm-up; cosine decay follows")
    clip_norm: float = Field(default=1.0, gt=0, description="the batch's gradient is clipped to this norm")
    seed: int = 0


class RateOptimizerSettings(OptimizerSettings):
    passes: int = Field(
        default=1, ge=1, description="passes over each chunk of prompts (reach answer with one step); 1: none is kept"
    )
    memory_gb: float = Field(default=4.0, gt=0, description="of a chunk of prompts that is kept for its passes")
    clip_prompt: float = Field(
        default=1.0, gt=0, description="one prompt's meta-gradient by log-rates is clipped to this norm"
    )


class TrainSettings(Settings):
    """Every training that `loop.train` runs"""

    output: str = Field(default="runs/train", description="folder of checkpoints, metrics and what is trained")
    checkpoint_every: int = Field(default=50, ge=1, description="optimiser steps")
    validate_every: int = Field(default=250, ge=1, description="optimiser steps")
    trackers: list[Literal["tensorboard", "wandb"]] = Field(default=[], description="besides metrics.jsonl")


class TrainScaleNet(TrainSettings):
    """`ephemera train scalenet`"""

    output: str = Field(default="runs/scalenet", description="folder of checkpoints, metrics and the trained network")
    model: AdaptedModelSettings = AdaptedModelSettings()
    init: str = Field(default="zero", description="where adapters start: zero, a generator, or a plain PEFT LoRA")
    train: DataSettings = DataSettings(split="train")
    validation: DataSettings = DataSettings(split="validation", limit=200)
    objective: ObjectiveSettings = ObjectiveSettings()
    scalenet: AloneSettings = AloneSettings()
    optimizer: RateOptimizerSettings = RateOptimizerSettings()
    validation_steps: list[int] = Field(default=[1, 3, 5], description="K at which validation NLL is taken")


class TrainLens(TrainSettings):
    """`ephemera train lens`: what the last layer would say, read off earlier ones"""

    output: str = Field(default="runs/lens", description="folder of checkpoints, metrics and the trained lens")
    model: ModelSettings = ModelSettings()
    exit_layers: list[Annotated[int, Field(ge=1)]] = Field(
        default=[8], min_length=1, description="read after so many layers; several are trained from one pass"
    )
    train: DataSettings = DataSettings(split="train")
    validation: DataSettings = DataSettings(split="validation", limit=100)
    token_share: float = Field(default=0.5, gt=0, le=1, description="of a batch's tokens, drawn at random")
    optimizer: OptimizerSettings = OptimizerSettings(samples=4000, batch_size=8, learning_rate=1e-3)
    validate_every: int = Field(default=100, ge=1, description="optimiser steps")


class GeneratorSettings(Settings):
    hidden_size: int = Field(default=1024, ge=1, description="of the shared MLP")
    reach: Literal["all", "answer"] = Field(
        default="all", description="adapters act on every token, or from the last prompt token on"
    )
    save_dtype: Literal["float32", "bfloat16"] = Field(default="bfloat16", description="of the saved weights")


class JointSettings(ScaleNetSettings):
    granularity: Literal["layer", "step"] = Field(default="layer", description="a rate per projection, or one per step")
    learning_rate_factor: float = Field(default=1.0, gt=0, description="ScaleNet's learning rate, times the other's")
    clip_prompt: float = Field(default=1.0, gt=0, description="as in ScaleNet's own training")


class GeneratorModelSettings(GradientModelSettings):
    lora: GeneratedLoraSettings = GeneratedLoraSettings(r=2, lora_alpha=8.0)


class TrainGenerator(TrainSettings):
    """`ephemera train generator`"""

    output: str = Field(default="runs/generator", description="folder of checkpoints, metrics and the trained network")
    model: GeneratorModelSettings = GeneratorModelSettings()
    train: MixtureSettings = MixtureSettings()
    validation: TasksSettings = TasksSettings(split="validation", limit=32)
    generator: GeneratorSettings = GeneratorSettings()
    start: str | None = Field(default=None, description="a trained generator to go on from; default: a fresh one")
    scalenet: JointSettings | None = Field(
        default=None, description="settings of a ScaleNet to train jointly; default: the generator alone"
    )
    optimizer: OptimizerSettings = OptimizerSettings(samples=30_000, batch_size=8, learning_rate=3e-5)


class TaskLoraModelSettings(GradientModelSettings):
    lora: TaskLoraSettings = TaskLoraSettings(r=2, lora_alpha=8.0)


class TrainTaskLora(TrainSettings):
    """`ephemera train lora`: the baseline, one adapter for a task or a mixture, through PEFT (TaskWeaver 4.1)"""

    output: str = Field(default="runs/task-lora", description="folder of checkpoints, metrics and the adapter")
    model: TaskLoraModelSettings = TaskLoraModelSettings()
    train: MixtureSettings = MixtureSettings()
    validation: TasksSettings = TasksSettings(split="validation", limit=32)
    optimizer: OptimizerSettings = OptimizerSettings(samples=2000, batch_size=4, learning_rate=5e-5, warmup=0)
    checkpoint_every: int = Field(default=100, ge=1, description="optimiser steps")


class TrainGate(Settings):
    """`ephemera train gate`: when a network should leave a prompt alone, calibrated on labelled rows"""

    output: str = Field(default="runs/gate", description="folder of the calibration's records and tables")
    network: str = Field(
        default="universal",
        description="folder or shipped name of the rate or generator (reach answer); the gate is put beside it",
    )
    model: GradientModelSettings = GradientModelSettings()
    data: DataSettings = DataSettings(split="validation", limit=40, format="chat")
    unseen: DataSettings | None = Field(
        default=None, description="tasks that are only reported, never fitted or calibrated on"
    )
    alpha: float = Field(
        default=0.05, gt=0, lt=1, description="most of the prompts that may be harmed, over all rows and in each task"
    )
    confidence: float = Field(
        default=0.8, gt=0, lt=1, description="that each task's own harmed share is under alpha (Bates et al., 2021)"
    )
    harm: float = Field(default=0.05, gt=0, description="nats per answer token that count as harm")
    most: float = Field(
        default=1.0, gt=0, le=1, description="share of an adapter that is kept at most: 1, 0.5, 0.25, ..."
    )
    tau: float = Field(default=0.5, gt=0, description="trust region: most nats of KL of the first answer token")
    penalty: float = Field(default=1.0, ge=0, description="L2 penalty of the risk's weights")
    batch_size: int = Field(default=8, ge=1, description="prompts at once")
    seed: int = Field(
        default=0, description="of the split into fitting and calibration rows, and of the adapters' start"
    )
