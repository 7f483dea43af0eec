"""Parts that settings of several commands are made of. A part holds what its commands read, and nothing else."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar

from pydantic import Field, field_validator

from ephemera.config.settings import Settings

if TYPE_CHECKING:
    from ephemera.inits import Init
    from ephemera.llm.frozen_lm import FrozenLM


class ModelSettings(Settings):
    name: str = Field(default="smollm2-135m-instruct", description="hub id, folder, GGUF file or smollm2-135m-instruct")
    dtype: Literal["float32", "bfloat16"] | None = Field(
        default=None, description="default: float32 on CPU, bfloat16 on CUDA"
    )
    device: str | None = Field(default=None, description='"cpu", "cuda", ...; default: CUDA where there is one')
    quantization: Literal["none", "int8", "nf4", "torchao-int8"] = Field(
        default="none", description="int8 or nf4 (bitsandbytes), torchao-int8; none: weights as the files have them"
    )
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2"] | None = Field(
        default=None,
        description="default: eager for bfloat16 on CPU (faster there on short prompts), else the model's own",
    )

    parallel: Literal["none", "tensor", "fsdp", "offload"] = Field(
        default="none",
        description="for models larger than a device: cut each layer (tensor) or spread the layers' weights (fsdp) over the "
        "processes that torchrun started; or keep weights in host memory or on disk (offload)",
    )
    max_memory: dict[int | str, str] | None = Field(
        default=None,
        description="offload: most that weights take on each device, {0: 20GB, cpu: 100GB}; default: what is free",
    )
    offload_folder: str | None = Field(default=None, description="offload: folder for weights that fit nowhere else")

    @property
    def loading(self) -> dict[str, Any]:
        asked = {"max_memory": self.max_memory, "offload_folder": self.offload_folder}
        asked = {key: value for key, value in asked.items() if value is not None}
        if asked and self.parallel != "offload":
            raise ValueError(f"model.{next(iter(asked))} is for model.parallel=offload; leave it out, or set that.")
        same = ("dtype", "device", "quantization", "attn_implementation", "parallel")
        return {name: getattr(self, name) for name in same} | asked

    @property
    def cut(self) -> bool:
        """Whether processes hold parts of the model: all of them then run the same rows."""
        return self.parallel in ("tensor", "fsdp")

    def load(self, *, spread: bool = False, **instead: Any) -> FrozenLM:
        """The model as set here; `instead` stands in for some of `load_backbone`'s arguments.

        `spread`: the command knows what to do in each of several processes; ValueError for one that does not.
        """
        from ephemera.llm import processes
        from ephemera.llm.load import find_device, load_backbone

        if (processes.started() > 1 or self.cut) and not spread:
            raise ValueError(
                f"this command runs in one process, on a whole model; {processes.started()} were started, with "
                f"model.parallel={self.parallel}. Start it without torchrun, or see docs/guides/larger-models.md."
            )
        if processes.started() > 1 and not self.cut:
            device = processes.join(self.parallel, find_device(instead.get("device", self.device)))
            instead["device"] = device
        return load_backbone(self.name, **{**self.loading, **instead})


class GradientModelSettings(ModelSettings):
    """A model that gradients pass through."""

    checkpoint: bool = Field(
        default=False, description="steps keep each layer's input alone and run it again: less memory, more time"
    )

    @property
    def loading(self) -> dict[str, Any]:
        return {**super().loading, "checkpoint": self.checkpoint}


class TaskLoraSettings(Settings):
    r: int = Field(default=4, ge=1, description="rank of each adapter (LDTTA 4.1)")
    lora_alpha: float = Field(default=16.0, gt=0, description="scaling is lora_alpha / r (LDTTA 4.1)")
    target_modules: str | list[str] = Field(
        default="qv", description='"qv", "attention", "all-linear", kinds ("q", [v], ...), or module names'
    )


class GeneratedLoraSettings(TaskLoraSettings):
    init_std: float = Field(default=1e-2, ge=0, description="deviation of A at the start; B starts at zero")


class LoraSettings(GeneratedLoraSettings):
    layers: str | list[int] = Field(
        default="all", description='layers that are adapted: "all", "first-8", "last-8", "4-9", or numbers from 0'
    )

    @property
    def start(self) -> dict[str, Any]:
        """What the zero start takes."""
        return {"r": self.r, "lora_alpha": self.lora_alpha, "init_std": self.init_std}


class AdaptedModelSettings(GradientModelSettings):
    """A model with adapters that start as `lora` says, unless an init brings its own."""

    lora: LoraSettings = LoraSettings()

    @property
    def loading(self) -> dict[str, Any]:
        return {**super().loading, "target_modules": self.lora.target_modules, "layers": self.lora.layers}

    def started(self, init: str) -> tuple[Self, Init]:
        """These settings with what the init brings, and the init."""
        from ephemera.inits import load_init

        found = load_init(init, **self.lora.start)
        lora = brought(self.lora, found.lora_settings, default=LoraSettings(), by=f"init={init}")
        return self.model_copy(update={"lora": lora}), found


class RowSettings(Settings):
    """Which rows, and as what they are read."""

    source: str | None = Field(
        default=None,
        description='file, folder, "a+b", hub id or "wheel"; {task} stands for the task\'s name; default: hub, else wheel',
    )
    split: str = Field(default="test", description="train, validation or test")
    limit: int | None = Field(default=None, ge=1, description="rows of each task, drawn at random")
    seed: int = Field(default=0, description="seed of that draw")
    format: Literal["plain", "chat"] = Field(
        default="plain", description="the prompt as it is, or in the chat template"
    )
    cut: int | None = Field(
        default=None, ge=1, description="cut longer articles to so many characters (tasks that bear it: xsum)"
    )
    max_tokens: int = Field(
        default=1024, ge=2, description="rows whose prompt and answer are longer are left out, and counted"
    )
    max_answer_tokens: int | None = Field(
        default=None, ge=1, description="only so many of an answer's first tokens count; default: all"
    )
    end_token: bool = Field(
        default=False, description="answers go on to the token that ends a turn, so that adapters learn to stop there"
    )


class DataSettings(RowSettings):
    task: str = Field(
        default="nq-open", description='nq-open, squad, snli, own, ...; all but evaluate take several: "snli+boolq"'
    )
    sources: dict[str, str] = Field(default={}, description="source of a task that lies elsewhere than `source` says")


class TaskSource(Settings):
    task: str = Field(description="name of a task")
    source: str | None = Field(default=None, description="overrides `source` for this task")


class MixtureTask(TaskSource):
    weight: float = Field(default=1.0, gt=0, description="its share of the mixture, against the other weights")


MIXTURE = ("gsm8k", "snli", "arc-easy", "arc-challenge", "boolq", "openbookqa", "hellaswag", "winogrande")


class TasksSettings(RowSettings):
    """Rows of several tasks, each of which counts alike."""

    tasks: list[TaskSource] = Field(default=[TaskSource(task=name) for name in MIXTURE], min_length=1)
    max_tokens: int = Field(default=512, ge=2, description="longer rows are left out, and counted")

    @field_validator("tasks")
    @classmethod
    def _each_once(cls, tasks: list[TaskSource]) -> list[TaskSource]:
        return each_once(tasks)


class MixtureSettings(RowSettings):
    """Rows of several tasks, in proportions."""

    tasks: list[MixtureTask] = Field(
        default=[MixtureTask(task=name) for name in MIXTURE],
        min_length=1,
        description="what is trained on, in what proportions",
    )
    split: str = Field(default="train", description="train, validation or test")
    seed: int = Field(default=0, description="seed of that draw, and of the mixing")
    stop: Literal["samples", "first_exhausted", "all_exhausted"] = Field(
        default="samples",
        description="train on optimizer.samples rows; or until the first, or every, task has been used up once",
    )
    max_tokens: int = Field(default=512, ge=2, description="longer rows are left out, and counted")

    @field_validator("tasks")
    @classmethod
    def _each_once(cls, tasks: list[MixtureTask]) -> list[MixtureTask]:
        return each_once(tasks)


Entry = TypeVar("Entry", bound=TaskSource)
Part = TypeVar("Part", bound=Settings)


def each_once(tasks: list[Entry]) -> list[Entry]:
    for name, count in Counter(entry.task for entry in tasks).items():
        if count > 1:
            raise ValueError(f'task {name!r} is listed twice; join its sources instead ("source: a.jsonl+b.jsonl")')
    return tasks


def brought(settings: Part, own: Mapping[str, Any], *, default: Part, by: str) -> Part:
    """Settings with what a trained network brings. ValueError if another value was given, which would have no effect."""
    own = {key: value for key, value in own.items() if key in type(settings).model_fields}
    for key, value in own.items():
        given = getattr(settings, key)
        if given not in (value, getattr(default, key)):
            raise ValueError(f"{key}={given} has no effect: {by} was made with {key}={value}. Leave it out.")
    return settings.model_copy(update=own)


def source_of(entry: TaskSource, pattern: str | None) -> str | None:
    """A task's own source, else the common one with {task} filled in."""
    return entry.source or fill(pattern, entry.task)


def fill(pattern: str | None, task: str) -> str | None:
    """`data/{task}` and arc-easy -> data/arc_easy; asked/dolly reads the rows of adapteval/dolly."""
    if pattern is None:
        return None
    return pattern.replace("{task}", task.replace("-", "_").replace("asked/", "adapteval/"))
