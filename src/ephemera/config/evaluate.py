"""Settings of evaluations, benchmarks and analyses."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import Field, model_validator

from ephemera.config.base import AdaptedModelSettings, DataSettings, GradientModelSettings, ModelSettings, TasksSettings
from ephemera.config.settings import Settings
from ephemera.rates import MAX_STEPS, UNIFORM_GRID

Rates = Literal["none", "fixed", "uniform", "stepwise", "layerwise", "averaged"]
Decay = Literal["first", "linear", "cosine", "exponential"]  # of the best first rate
Control = Literal["swapped", "mean", "template", "other-task", "h-swapped", "shuffled", "redrawn"]
Method = Literal[Rates, Decay, "constants", Control]
CONTROLS: tuple[Control, ...] = get_args(Control)  # of the layer-wise network
METHODS: tuple[Method, ...] = (*get_args(Rates), *get_args(Decay), "constants", *CONTROLS)
GRID: tuple[Method, ...] = (*get_args(Rates), "swapped")  # what a run does if nobody says


class Evaluate(Settings):
    """`ephemera evaluate`"""

    output: str = Field(default="runs/evaluate", description="folder of records, tables and figures")
    model: AdaptedModelSettings = AdaptedModelSettings()
    init: str = Field(default="zero", description="where adapters start: zero, a generator, or a plain PEFT LoRA")
    data: DataSettings = DataSettings(limit=300)
    validation: DataSettings = DataSettings(split="validation", limit=100)
    methods: list[Method] = Field(default=list(GRID), min_length=1, description="rows of the grid, and its controls")
    steps: list[Annotated[int, Field(ge=0)]] = Field(
        default=list(range(MAX_STEPS + 1)), min_length=1, description="columns of the grid: K"
    )
    fixed_rate: float = Field(default=5e-2, ge=0, description="the paper's baseline (LDTTA 4.3)")
    reach: Literal["all", "answer"] = Field(
        default="all", description="where adapters of `fixed` and `uniform` act; a network's act as it was trained"
    )
    uniform_rates: dict[int, float] | None = Field(
        default=None, description="best uniform rate of each K; default: searched on validation rows"
    )
    uniform_grid: list[float] = Field(default=list(UNIFORM_GRID), min_length=1, description="rates of that search")
    stepwise: str = Field(default="stepwise-nq-open", description="folder or shipped name")
    layerwise: str = Field(default="scalenet-nq-open", description="folder or shipped name; also for the controls")
    averaged: str | None = Field(
        default=None, description="folder of averaged rates; default: the folder averaged/ in that of layerwise"
    )
    constants: str | None = Field(
        default=None, description="folder of constant rates by projection and step, for the method constants"
    )
    other: DataSettings | None = Field(default=None, description="rows of another task, for the control other-task")
    cross_gradient: bool = Field(
        default=False, description="also the inner product of prompt and answer gradient (LDTTA Eq. 5), and its figure"
    )
    generate: list[int] = Field(
        default=[0, 1, 5], description="K at which answers are generated and scored by ROUGE-Lsum"
    )
    generate_methods: list[Method] = Field(default=["none", "layerwise"], description="methods that generate")
    batch_size: int = Field(default=16, ge=2, description="prompts that adapt together")
    seed: int = Field(default=0, description="seed of the adapters' start, and of what controls draw")

    @model_validator(mode="after")
    def _complete(self) -> Evaluate:
        if ("constants" in self.methods) != (self.constants is not None):
            raise ValueError(
                f"constants={self.constants}: the method constants and the folder of its rates go together; give both or none"
            )
        if "other-task" in self.methods and self.other is None:
            raise ValueError(
                "methods has other-task, which needs rows of another task: give other.task and other.source"
            )
        if self.other is not None and "other-task" not in self.methods:
            raise ValueError(f"other.task={self.other.task} has no effect: add other-task to methods, or leave it out")
        if self.other is not None and self.data.task in self.other.task.split("+"):
            raise ValueError(f"other.task={self.other.task} is data.task too: other-task needs another task")
        if "redrawn" in self.methods and self.init != "zero":
            raise ValueError(
                f"redrawn draws A anew, and init={self.init} draws none: use init=zero, or leave redrawn out"
            )
        needed = {"none", "layerwise"} <= set(self.methods) and 0 in self.steps and max(self.steps) > 0
        if self.cross_gradient and not needed:
            raise ValueError(
                f"cross_gradient compares with the gain of layerwise; got methods {self.methods} and steps {self.steps}. "
                "Add none and layerwise to methods, and 0 and 1 to steps"
            )
        return self


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


class BenchmarkData(TasksSettings):
    limit: int | None = Field(default=100, ge=1, description="rows of each task, drawn at random")
    fraction: float | None = Field(default=None, gt=0, le=1, description="share of each task's rows, instead of limit")
    max_tokens: int = Field(default=1024, ge=2, description="longer rows are left out, and counted")


class Benchmark(Settings):
    """`ephemera benchmark`: accuracy of models x variants on tasks (TaskWeaver Table 2)"""

    output: str = Field(default="runs/benchmark", description="folder of records and tables")
    models: list[AdaptedModelSettings] = Field(
        default=[AdaptedModelSettings()], min_length=1, description="rows of the table"
    )
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
    model: ModelSettings = ModelSettings()
    generator: str = Field(default="taskweaver", description="folder or shipped name")
    data: TasksSettings = TasksSettings(limit=40)
    batch_size: int = Field(default=8, ge=1, description="prompts at once")
    seed: int = Field(default=0, description="of controls, shuffled labels and embeddings")


SurveyMethod = Literal[
    "none",
    "uniform",
    "constants",
    "network",
    "ungated",
    "swapped",
    "generated",
    "generated-ungated",
    "generated-swapped",
    "lora",
]


class Survey(Settings):
    """`ephemera survey`: what one step does to the answers of many tasks, beside the base model and the controls"""

    output: str = Field(default="runs/survey", description="folder of records and tables")
    model: GradientModelSettings = GradientModelSettings()
    network: str = Field(default="universal", description="folder or shipped name of the rate, with its gate")
    constants: str | None = Field(default=None, description="folder of per-projection constants, for `constants`")
    uniform_rate: float = Field(default=3.0, ge=0, description="one rate for all projections, for `uniform`")
    lora: str | None = Field(default=None, description="folder of a static PEFT LoRA, for `lora`")
    generator: str | None = Field(
        default=None, description="folder or shipped name of a generator with reach answer, for `generated`"
    )
    data: DataSettings = DataSettings(limit=200, format="chat")
    methods: list[SurveyMethod] = Field(default=["none", "network"], min_length=1, description="columns of the table")
    generate: list[SurveyMethod] = Field(default=["none", "network"], description="methods whose answers are generated")
    shown: SurveyMethod = Field(
        default="network",
        description="whose answers the report shows, whose price is measured, and who the verdict is on",
    )
    generate_limit: int | None = Field(default=None, ge=1, description="rows of each task that generate; default: all")
    max_new_tokens: int | None = Field(default=None, ge=1, description="most new tokens; default: each task's own")
    batch_size: int = Field(default=8, ge=2, description="prompts that adapt together")
    seed: int = Field(default=0, description="of the adapters' start")

    @model_validator(mode="after")
    def _complete(self) -> Survey:
        if "constants" in self.methods and self.constants is None:
            raise ValueError("methods has constants: give their folder (constants=FOLDER), or leave the method out")
        if "lora" in self.methods and self.lora is None:
            raise ValueError("methods has lora: give the adapter's folder (lora=FOLDER), or leave the method out")
        if self.generator is None and any(m.startswith("generated") for m in self.methods):
            raise ValueError("methods has generated: give a generator (generator=FOLDER), or leave the method out")
        if not {"none", self.shown} <= set(self.methods):
            raise ValueError(f"methods needs none, the base model, and {self.shown} (shown), which is compared with it")
        return self
