"""The command line: answers on stdout, everything else on stderr, one clear line for a mistake."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from ephemera import __version__
from ephemera.cli import about, answer, chat, evaluate, plan, reproduce, run, serve, train
from ephemera.cli.options import app
from ephemera.messages import missing_extra

__all__ = ["about", "answer", "app", "chat", "evaluate", "main", "plan", "reproduce", "run", "serve", "train"]


def _version(show: bool) -> None:
    if show:
        print(f"ephemera {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def main() -> NoReturn:
    """One line on stderr and exit code 2 for a mistake of the user's or a full disk; never a traceback for these.

    Of the processes that torchrun started the first speaks for all.
    """
    rank = os.environ.get("RANK", "0") if os.environ.get("WORLD_SIZE", "1") != "1" else "0"
    try:
        with nullcontext() if rank == "0" else _silent():
            app()
    except Exception as error:
        if (line := _line(error)) is None:
            raise
        if rank != "0":
            time.sleep(2)  # if the first process says the same, torchrun has ended this one by then
        print(f"ephemera{'' if rank == '0' else f', process {rank}'}: {line}", file=sys.stderr)
        raise SystemExit(2) from None
    raise SystemExit(0)


def _line(error: Exception) -> str | None:
    """What is said of a mistake of the user's, a full disk or a lost process; None for an error of ours."""
    if isinstance(error, ValueError):
        return str(error)
    if isinstance(error, ModuleNotFoundError):
        return missing_extra(error)
    if isinstance(error, OSError):
        place = f" {error.filename}" if error.filename else ""
        return f"{error.strerror or error}{place}; nothing finished was lost."
    if isinstance(error, RuntimeError):  # torch's collectives raise no narrower one
        from ephemera.llm.processes import lost_process

        return lost_process(error)
    return None


@contextmanager
def _silent() -> Iterator[None]:
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield
