"""The command line: answers on stdout, everything else on stderr, one clear line for a mistake."""

from __future__ import annotations

import sys
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
    """One line on stderr and exit code 2 for a mistake of the user's or a full disk; never a traceback for these."""
    try:
        app()
    except ValueError as error:
        print(f"ephemera: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except ModuleNotFoundError as error:
        if (line := missing_extra(error)) is None:
            raise
        print(f"ephemera: {line}", file=sys.stderr)
        raise SystemExit(2) from None
    except OSError as error:
        place = f" {error.filename}" if error.filename else ""
        print(f"ephemera: {error.strerror or error}{place}; nothing finished was lost.", file=sys.stderr)
        raise SystemExit(2) from None
    raise SystemExit(0)
