"""Commands about the installation: models, doctor, demo."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ephemera.cli.options import app, quiet
from ephemera.store import DEFAULT_MODEL


@app.command(
    epilog="""Examples:

    ephemera models"""
)
def models() -> None:
    """List the networks that come with the package, and how to name models."""
    from ephemera.artifact import NETWORKS, shipped

    print(f"model  {DEFAULT_MODEL}  (default; fetched from the package index on first use)")
    print("model  any hub id, local folder or .gguf file")
    for name in shipped("rate"):
        config = json.loads((NETWORKS / name / "rate.json").read_text())
        print(f"rate   {name}  ({config['granularity']}-wise, for {config['trained_for']['name']})")
    print("rate   a number, or a folder that `ephemera train scalenet` wrote")
    for name in shipped("generator"):
        config = json.loads((NETWORKS / name / "generator.json").read_text())
        print(f"init   {name}  (generator, for {config['trained_for']['name']})")
    print("init   zero (the default), a folder that `ephemera train generator` wrote, or a PEFT adapter's folder")


@app.command(
    epilog="""Examples:

    ephemera doctor"""
)
def doctor() -> None:
    """Print versions, and check what usually goes wrong, each with its fix."""
    from ephemera.doctor import examine

    quiet()
    raise typer.Exit(examine())


@app.command(
    epilog="""Examples:

    ephemera demo --output demo"""
)
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for records, figures and report.html.")] = Path(
        "demo"
    ),
    rows: Annotated[int, typer.Option(min=2, help="NQ-Open test questions to answer.")] = 40,
) -> None:
    """Adapt the default model to real questions and to this project's own examples, and compare."""
    from ephemera.demo import run

    quiet()
    run(output, rows)
