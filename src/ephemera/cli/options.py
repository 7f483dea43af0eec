"""The command group, and the options that several commands share."""

from __future__ import annotations

import io
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TextIO, TypeVar

import typer

from ephemera.downloads import DEFAULT_MODEL

if TYPE_CHECKING:
    from ephemera.config import Settings
    from ephemera.llm.frozen_lm import FrozenLM

Config = TypeVar("Config", bound="Settings")

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="""An adapter for every prompt, gone after the answer.

Per-prompt test-time adaptation: before it answers, the model takes a few gradient steps on the prompt itself, at
rates that a trained network predicts for each layer and step. Then the adapter is thrown away.""",
)
train_app = typer.Typer(
    no_args_is_help=True, help="Train a network that predicts rates, or one that generates adapters."
)
app.add_typer(train_app, name="train")

Model = Annotated[
    str, typer.Option("--model", "-m", help=f"Hub id, folder, GGUF file or {DEFAULT_MODEL}.", show_default=True)
]
Steps = Annotated[
    int | None,
    typer.Option(
        "--steps",
        "-k",
        help="Gradient steps on each prompt; 0 leaves the adapter at its start. Default: what the rate was validated at (1 for a "
        "number), and 0 without a rate.",
        show_default=False,
    ),
]
RateOption = Annotated[
    str | None,
    typer.Option(
        "--rate",
        "-r",
        help="Preset (full, fast), shipped name, folder, hub id (user/repo[@revision]), a number, or none (see `ephemera models`). Default: the network that "
        "ships for the model and the prompts' format, from the zero start alone; for chats a generator, unless --steps is given.",
        show_default=False,
    ),
]
ReachOption = Annotated[
    str | None,
    typer.Option(
        "--reach",
        help="Where adapters act: all (every token) or answer (from the last prompt token on). Default: as the rate was "
        "trained; all for a number.",
        show_default=False,
    ),
]
SpecialTokens = Annotated[
    bool, typer.Option("--special-tokens", help="A special token that a prompt spells is one; else it stays text.")
]
InitOption = Annotated[
    str,
    typer.Option(
        "--init",
        "-i",
        help="Where adapters start: zero, a generator (name or folder), the folder of a plain PEFT LoRA, or a hub id of either.",
    ),
]
Seed = Annotated[int, typer.Option(help="Seed of the adapters' start.")]
Dtype = Annotated[str | None, typer.Option(help="float32 (default on CPU) or bfloat16 (default on CUDA).")]
Quantization = Annotated[
    str,
    typer.Option(
        "--quantization",
        help="int8 or nf4 (bitsandbytes, extra bnb), torchao-int8 (extra torchao). Default: weights as the files have them.",
        show_default=False,
    ),
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, ...")]
Parallel = Annotated[
    str,
    typer.Option(
        help="For models larger than a device: tensor or fsdp (over the processes that torchrun started), or offload "
        "(weights in host memory or on disk)."
    ),
]
Chat = Annotated[bool, typer.Option("--chat", help="Put prompts in the model's chat template.")]
Truncate = Annotated[
    str | None,
    typer.Option(
        help='"left": cut prompts longer than the model\'s window, at the beginning of their own text; BOS and the '
        "chat template's words stay."
    ),
]
ConfigFile = Annotated[Path | None, typer.Option("--config", "-c", help="YAML file of settings.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        "-s",
        help="One setting, as key.key=value; value is YAML, and quotes within it make a text. Repeatable.",
    ),
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the output folder's last checkpoint.")]
PrintConfig = Annotated[bool, typer.Option("--print-config", help="Print the settings as YAML, and stop.")]


def standard_input() -> TextIO:
    """Standard input as UTF-8. Bytes that are not become lone surrogates, which `check_unicode` and encoding refuse."""
    if isinstance(sys.stdin, io.TextIOWrapper) and sys.stdin.errors != "surrogateescape":
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")
    return sys.stdin


def quiet() -> None:
    """Libraries' notices off; their progress bars only on a terminal."""
    from logging import ERROR, getLogger

    from transformers.utils import logging

    logging.set_verbosity_error()
    for library in ("bitsandbytes", "torchao"):
        getLogger(library).setLevel(ERROR)
    warnings.formatwarning = lambda message, *_args, **_more: f"{message}\n"  # without a line of our source
    if not sys.stderr.isatty():
        logging.disable_progress_bar()


def say_quantised(backbone: FrozenLM) -> None:
    """A line on stderr that names the form of quantised weights, and the code that computes with them."""
    if backbone.quantization != "none":
        print(f"weights are quantised ({backbone.quantization}); passes take {backbone.route}", file=sys.stderr)


def settled(kind: type[Config], config: Path | None, overrides: list[str] | None, *, print_config: bool) -> Config:
    """A command's settings, from its defaults, the file and `--set`. With `--print-config` prints them, and stops."""
    from ephemera.config import dump_yaml, load_config

    settings = load_config(kind, None if config is None else str(config), overrides)
    if print_config:
        print(dump_yaml(settings), end="")
        raise typer.Exit
    quiet()
    return settings


def unshipped(model: str, format: str, told: str) -> str:
    """A line where no network ships and none was named: what is done, and what to do."""
    return (
        f"no network ships for {model} and {format} prompts: {told}. Give --rate: a number such as 0.05, or a network "
        "(`ephemera models` lists them, `ephemera train scalenet` makes one)."
    )


def check_steps(steps: int | None, rate: str | float | None, init: str) -> None:
    """The networks that ship were trained from the zero start, so they are no other start's default."""
    if steps and rate is None and init != "zero":
        raise ValueError(
            f"--steps {steps} from --init {init} needs a --rate: those that ship were trained from the zero start. "
            "Give a number, or a folder that `ephemera train scalenet` wrote with this init."
        )
    if steps and rate == "none":
        raise ValueError(f"--steps {steps} with --rate none: give a number or a network, or leave out --steps.")
