"""`ephemera reproduce`: a table or figure of the papers, from training to the table."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from ephemera.cli.options import PrintConfig, SetOption, app, quiet


@app.command(
    epilog="""Examples:

    ephemera reproduce table1 --dry-run --model Llama-3.3-70B-Instruct --on h100

    ephemera reproduce fig3 --source "data/{task}" --samples 800 --seeds 0,1,2

    ephemera reproduce taskweaver-table2 --source "data/{task}" --set "tasks=[snli,boolq]" --set rows=100"""
)
def reproduce(
    result: Annotated[
        str, typer.Argument(help="fig3, table1, table2, fig4, fig5, taskweaver-table2 or taskweaver-analysis.")
    ],
    model: Annotated[
        str, typer.Option("--model", "-m", help="A model that the papers name, a hub id or a folder.")
    ] = "smollm2-135m-instruct",
    samples: Annotated[int | None, typer.Option(min=1, help="Training prompts of each network.")] = None,
    seeds: Annotated[str | None, typer.Option(help="Of training, as 0,1,2.")] = None,
    source: Annotated[
        str | None, typer.Option(help="Where rows lie, {task} filled in. Default: the hub.", show_default=False)
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder of stages and results.")] = Path("runs/reproduce"),
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the stages and what they take, and stop. Nothing is loaded.")
    ] = False,
    on: Annotated[str, typer.Option(help="Device that the plan is for: h200, h100, a100, rtx-4090, cpu-2-cores.")] = (
        "cpu-2-cores"
    ),
    set_: SetOption = None,
    print_config: PrintConfig = False,
) -> None:
    """Run a result of the papers, stage by stage; finished stages are kept, and shared between results.

    Its settings, each with the paper's sentence: configs/reproduce/RESULT.yaml. `--set` changes one."""
    from ephemera.config import dump_yaml
    from ephemera.cost import device_of, shape_of, shipped_shapes
    from ephemera.reproduce.recipe import load_recipe
    from ephemera.reproduce.result import reproduce as run
    from ephemera.reproduce.result import stages_of
    from ephemera.reproduce.run import plan_table
    from ephemera.reproduce.stages import Planner

    given = {"samples": samples, "seeds": None if seeds is None else f"[{seeds}]", "source": source}
    overrides = [f"{key}={value}" for key, value in given.items() if value is not None]
    recipe = load_recipe(result, [*overrides, *(set_ or [])])
    if print_config:
        print(dump_yaml(recipe), end="")
        return
    hub = shipped_shapes().get(model, {}).get("hub", model)
    planner, where = Planner(recipe, output, hub, shape_of(model), device), device_of(on)
    if dry_run:
        print(plan_table(f"{recipe.title}: {model}", stages_of(recipe, planner), where, recipe.dtype).markdown())
        return
    quiet()
    page = run(recipe, planner, output / f"{result}-{model.rpartition('/')[2]}", where)
    print(page.read_text())
    print(f"results: {page.parent}", file=sys.stderr)
