"""Commands that measure: evaluate, benchmark, analyse, report."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from ephemera.cli.options import ConfigFile, PrintConfig, SetOption, app, settled


@app.command(
    epilog="""Examples:

    ephemera evaluate --config configs/evaluate-nq-open.yaml

    ephemera evaluate --set data.task=own --set data.source=mine.jsonl --set "methods=[none,layerwise]" --set "steps=[0,1]"

    ephemera evaluate --print-config"""
)
def evaluate(config: ConfigFile = None, set_: SetOption = None, print_config: PrintConfig = False) -> None:
    """Answer NLL and ROUGE-Lsum of every method at every K, with intervals; a stopped run goes on where it was."""
    from ephemera.config import Evaluate

    settings = settled(Evaluate, config, set_, print_config=print_config)
    from ephemera.evaluation.nll.grid import evaluate as run
    from ephemera.evaluation.nll.report import write_report
    from ephemera.llm.processes import is_first

    folder = run(settings)
    if not is_first():
        return
    page = write_report(folder)
    print((folder / "table.md").read_text())
    print(f"report: {page}", file=sys.stderr)


@app.command(
    epilog="""Examples:

    ephemera benchmark --config configs/benchmark.yaml

    ephemera benchmark --set "data.tasks=[{task: snli}, {task: boolq}]" --set data.limit=50 --print-config"""
)
def benchmark(
    config: ConfigFile = None,
    set_: SetOption = None,
    print_config: PrintConfig = False,
    allow_code_execution: Annotated[
        bool, typer.Option("--allow-code-execution", help="Run generated code (humaneval, mbpp), with limits.")
    ] = False,
) -> None:
    """Accuracy of models and variants (base, task LoRA, generator, with steps) on tasks; a stopped run goes on."""
    from ephemera.config import Benchmark

    allowed = ["allow_code_execution=true"] if allow_code_execution else []
    settings = settled(Benchmark, config, [*(set_ or []), *allowed], print_config=print_config)
    from ephemera.evaluation.accuracy.run import benchmark as run
    from ephemera.evaluation.accuracy.tables import write_tables

    print(write_tables(run(settings)).read_text())


@app.command(
    epilog="""Examples:

    ephemera analyse --set generator=runs/generator/network

    ephemera analyse --set "data.tasks=[{task: snli}, {task: boolq}]" --set data.limit=20 --set output=runs/two-tasks

    ephemera analyse --print-config"""
)
def analyse(config: ConfigFile = None, set_: SetOption = None, print_config: PrintConfig = False) -> None:
    """What a generator's adapters depend on: norms, likeness within and between tasks, answers with others' adapters.

    A stopped run goes on where it was."""
    from ephemera.config import Analyse

    settings = settled(Analyse, config, set_, print_config=print_config)
    from ephemera.evaluation.adapters.analysis import analyse as run
    from ephemera.evaluation.adapters.figures import write_figures
    from ephemera.evaluation.adapters.tables import write_tables

    analysis = run(settings)
    print(write_tables(analysis).read_text())
    for path in write_figures(analysis).values():
        print(f"figure: {path}", file=sys.stderr)


@app.command(
    epilog="""Examples:

    ephemera report runs/evaluate"""
)
def report(folder: Annotated[Path, typer.Argument(help="A folder that `ephemera evaluate` wrote.")]) -> None:
    """Make tables, figures and the HTML page of an evaluation again from its records."""
    from ephemera.evaluation.nll.report import write_report

    print(write_report(folder))


@app.command(
    epilog="""Examples:

    ephemera survey --config configs/survey-universal.yaml --set "data.source=data/{task}"

    ephemera survey --set data.task=own --set data.source=mine.jsonl"""
)
def survey(config: ConfigFile = None, set_: SetOption = None, print_config: PrintConfig = False) -> None:
    """What a network does to the answers of many tasks: NLL, harm, generated text, beside the base model and controls."""
    from ephemera.config import Survey

    settings = settled(Survey, config, set_, print_config=print_config)
    from ephemera.evaluation.survey.run import survey as run

    folder = run(settings)
    print((folder / "table.md").read_text())
