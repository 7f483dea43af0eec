"""Commands about the installation: models, doctor, bench, demo."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from ephemera.cli.options import Device, Model, app, quiet
from ephemera.downloads import DEFAULT_MODEL


@app.command(
    epilog="""Examples:

    ephemera models"""
)
def models() -> None:
    """List the networks that come with the package, and how to name models."""
    from ephemera.artifact import NETWORKS, shipped
    from ephemera.inits import DEFAULT_STARTS
    from ephemera.made_for import read_made_for
    from ephemera.rates import DEFAULT_RATES, PRESETS

    starts = DEFAULT_STARTS[DEFAULT_MODEL]
    defaults = {name: f", default for {format} prompts" for format, name in starts.items()}
    for format, name in DEFAULT_RATES[DEFAULT_MODEL].items():
        asked = " where steps are asked for" if format in starts else ""
        defaults[name] = f", default for {format} prompts{asked}"
    presets = {name: preset for preset, name in PRESETS.items()}
    print(f"model  {DEFAULT_MODEL}  (default; fetched from the package index on first use)")
    print("model  any hub id, local folder or .gguf file")
    for name in shipped("rate"):
        config = json.loads((NETWORKS / name / "rate.json").read_text())
        short = f", preset {presets[name]}" if name in presets else ""
        made = read_made_for(config.get("made_for"), NETWORKS / name)
        kind = config.get("granularity", "projection")
        told = f"{kind}-wise, for {made.format} prompts of {config['trained_for']['name']}, reach {made.reach}"
        print(f"rate   {name}  ({told}{short}{defaults.get(name, '')})")
    print("rate   a number, or a folder that `ephemera train scalenet` wrote")
    for name in shipped("generator"):
        config = json.loads((NETWORKS / name / "generator.json").read_text())
        made = read_made_for(config.get("made_for"), NETWORKS / name)
        print(
            f"init   {name}  (generator, for {made.format} prompts of {config['trained_for']['name']}, "
            f"reach {config.get('reach', 'all')}{defaults.get(name, '')})"
        )
    print("init   zero (the default), a folder that `ephemera train generator` wrote, or a PEFT adapter's folder")


@app.command(
    epilog="""Examples:

    ephemera doctor

    ephemera doctor --vllm http://localhost:8000 --adapter adapters/row-00000-0123456789ab"""
)
def doctor(
    vllm: Annotated[
        str | None, typer.Option(help="Address of a vLLM server: checks only whether it loads adapters and uses them.")
    ] = None,
    adapter: Annotated[
        Path | None, typer.Option(help="With --vllm: a folder of `export --all` that the server can read.")
    ] = None,
) -> None:
    """Print versions, and check what usually goes wrong, each with its fix."""
    if (vllm is None) != (adapter is None):
        raise ValueError(
            "--vllm and --adapter go together: give the server's address and an adapter's folder, or neither."
        )
    from ephemera.doctor import examine, report

    quiet()
    if vllm is None or adapter is None:
        raise typer.Exit(examine())
    from ephemera.doctor_vllm import examine_vllm

    raise typer.Exit(report(examine_vllm(vllm, adapter)))


@app.command(
    epilog="""Examples:

    ephemera bench

    ephemera bench --steps 3 --json"""
)
def bench(
    model: Model = DEFAULT_MODEL,
    steps: Annotated[int, typer.Option("--steps", "-k", min=1, help="Gradient steps on each prompt.")] = 1,
    minutes: Annotated[float, typer.Option(min=0, help="About how long; two rounds are always made.")] = 2.0,
    device: Device = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object with every number.")] = False,
) -> None:
    """Measure what adapting costs on this machine, and say it in words."""
    from rich.console import Console
    from rich.table import Table

    from ephemera.bench.quick import bench, table, verdict
    from ephemera.saving import json_text

    quiet()
    results = bench(model, steps=steps, minutes=minutes, device=device)
    results["verdict"] = verdict(results)
    if as_json:
        print(json_text(results))
        return
    head, *rows = table(results)
    shown = Table(*head)
    for row in rows:
        shown.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 110).print(shown)
    print("\n".join(f"- {line}" for line in results["verdict"]))


@app.command(
    epilog="""Examples:

    ephemera demo --output demo"""
)
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for records, figures and report.html.")] = Path(
        "demo"
    ),
    rows: Annotated[int, typer.Option(min=2, help="Prompts of each kind.")] = 6,
) -> None:
    """Answer real questions and this project's own examples with and without adapting, side by side."""
    from ephemera.demo import run

    quiet()
    run(output, rows)
