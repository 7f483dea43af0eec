"""`ephemera run`: every prompt of a file."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from ephemera.cli.options import (
    ConfigFile,
    PrintConfig,
    SetOption,
    app,
    check_steps,
    quiet,
    unshipped,
)

Flag = dict[str, Any]


@app.command(
    epilog="""Examples:

    ephemera run --input prompts.jsonl --output answers.jsonl

    ephemera run --input rows.jsonl --output scores.jsonl --task score --chat

    ephemera run --input prompts.txt --output adapters.jsonl --task adapt --adapters adapters

    ephemera run --input prompts.jsonl --output answers.jsonl --engine ray --workers 8 --set ray.gpus=1"""
)
def run(
    input_: Annotated[
        str | None,
        typer.Option(
            "--input", "-f", help='Rows with "prompt" or "messages" (.jsonl), or a prompt a line (.txt); also .gz.'
        ),
    ] = None,
    output: Annotated[str | None, typer.Option("--output", "-o", help="One JSON line per row, in order.")] = None,
    task: Annotated[str | None, typer.Option(help="answer (default), score, or adapt.")] = None,
    model: Annotated[str | None, typer.Option("--model", "-m", help="As for `ephemera answer`.")] = None,
    steps: Annotated[int | None, typer.Option("--steps", "-k", help="As for `ephemera answer`.")] = None,
    rate: Annotated[str | None, typer.Option("--rate", "-r", help="As for `ephemera answer`.")] = None,
    init: Annotated[str | None, typer.Option("--init", "-i", help="As for `ephemera answer`.")] = None,
    reach: Annotated[str | None, typer.Option(help="As for `ephemera answer`.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Put prompts in the model's chat template.")] = False,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Longest answer; default 64.")] = None,
    truncate: Annotated[str | None, typer.Option(help='"left": cut prompts that are too long.')] = None,
    adapters: Annotated[str | None, typer.Option(help="Folder for task adapt; default: beside the output.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the adapters' start; default 0.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32 or bfloat16.")] = None,
    quantization: Annotated[str | None, typer.Option(help="As for `ephemera answer`.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...")] = None,
    engine: Annotated[str | None, typer.Option(help="local (default), or ray.")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Ray's actors, each with a model.")] = None,
    config: ConfigFile = None,
    set_: SetOption = None,
    print_config: PrintConfig = False,
) -> None:
    """Adapt to every prompt of a file, then answer, score, or keep the adapter. A stopped run goes on where it was."""
    from ephemera.config import Run, check_config, dump_yaml, load_config

    values = load_config(Run, None if config is None else str(config), set_).model_dump()
    flags: Flag = {"input": input_, "output": output, "task": task, "steps": steps, "rate": rate, "init": init}
    flags |= {"reach": reach, "max_new_tokens": max_new_tokens, "truncate": truncate, "adapters": adapters}
    flags |= {"seed": seed, "engine": engine, "chat": chat or None}
    _lay_over(values, flags)
    _lay_over(values["model"], {"name": model, "dtype": dtype, "quantization": quantization, "device": device})
    _lay_over(values["ray"], {"workers": workers})
    settings = check_config(Run, values)
    if print_config:
        print(dump_yaml(settings), end="")
        return
    quiet()
    check_steps(settings.steps, settings.rate, settings.init)
    _say_unshipped(settings)
    from ephemera.many.run import run as run_all

    print(run_all(settings))


def _lay_over(values: Flag, given: Flag) -> None:
    values |= {key: value for key, value in given.items() if value is not None}


def _say_unshipped(settings: Any) -> None:
    from ephemera.rates import default_rate

    if settings.rate is not None or settings.init != "zero" or settings.steps == 0:
        return
    format = "chat" if settings.chat else "plain"
    if default_rate(settings.model.name, format) is not None:
        return
    if settings.steps:
        raise ValueError(unshipped(settings.model.name, format, f"--steps {settings.steps} cannot be taken"))
    print(unshipped(settings.model.name, format, "the prompts are not adapted to"), file=sys.stderr)
