"""The command line: answers on stdout, everything else on stderr, one clear line for a mistake."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import typer

from ephemera import __version__
from ephemera.errors import unknown
from ephemera.store import DEFAULT_MODEL

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="""An adapter for every prompt, gone after the answer.

Per-prompt test-time adaptation: before it answers, the model takes a few gradient steps on the prompt itself, at
rates that a trained network predicts for each layer and step. Then the adapter is thrown away.""",
)
train_app = typer.Typer(no_args_is_help=True, help="Train a network that predicts rates, or one that generates adapters.")
app.add_typer(train_app, name="train")

DEFAULT_RATE = "scalenet-nq-open"

Model = Annotated[
    str, typer.Option("--model", "-m", help=f"Hub id, folder, GGUF file or {DEFAULT_MODEL}.", show_default=True)
]
Steps = Annotated[int, typer.Option("--steps", "-k", help="Gradient steps on each prompt; 0 is the base model.")]
RateOption = Annotated[
    str, typer.Option("--rate", "-r", help="Shipped name, folder, or a number (see `ephemera models`).")
]
Seed = Annotated[int, typer.Option(help="Seed of the adapters' start.")]
Dtype = Annotated[str | None, typer.Option(help="float32 (default on CPU) or bfloat16 (default on CUDA).")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, ...")]
Chat = Annotated[bool, typer.Option("--chat", help="Put prompts in the model's chat template.")]
Truncate = Annotated[
    str | None, typer.Option(help='"left": cut the beginning of prompts longer than the model\'s window.')
]
ConfigFile = Annotated[Path | None, typer.Option("--config", "-c", help="YAML file of settings.")]
SetOption = Annotated[list[str] | None, typer.Option("--set", "-s", help="One setting, as key.key=value. Repeatable.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the output folder's last checkpoint.")]
PrintConfig = Annotated[bool, typer.Option("--print-config", help="Print the settings as YAML, and stop.")]


@app.command(
    epilog="""Examples:

    ephemera answer "Question: what is the capital of France? Answer:"

    ephemera answer --compare --steps 3 --rate scalenet-nq-open "Question: who wrote Hamlet? Answer:"

    ephemera answer --file prompts.jsonl --json

    cat article.txt | ephemera answer --rate 0.05 --max-new-tokens 100"""
)
def answer(
    prompt: Annotated[str | None, typer.Argument(help="The prompt; without one, --file or standard input.")] = None,
    file: Annotated[
        Path | None, typer.Option("--file", "-f", help='Text (one prompt) or JSONL with a "prompt" on each line.')
    ] = None,
    model: Model = DEFAULT_MODEL,
    steps: Steps = 3,
    rate: RateOption = DEFAULT_RATE,
    compare: Annotated[bool, typer.Option("--compare", help="Show the base model's answer beside it.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object per prompt, with losses and rates.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 64,
    seed: Seed = 0,
    chat: Chat = False,
    truncate: Truncate = None,
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """Adapt to each prompt, answer it, forget."""
    prompts = _prompts(prompt, file)
    lm = _load(model, rate=rate if steps else None, dtype=dtype, device=device, chat=chat, truncate=truncate)
    adaptation = lm.adapt(prompts, steps=steps, seed=seed)
    answers = lm.generate(prompts, adaptation=adaptation, max_new_tokens=max_new_tokens)
    bases: list[str | None] = [None] * len(prompts)
    if compare:
        bases = list(lm.generate(prompts, steps=0, max_new_tokens=max_new_tokens))
    for row, (text, base) in enumerate(zip(answers, bases, strict=True)):
        note = adaptation.notes[row]
        if as_json:
            _print_json(adaptation, row, text, base)
            continue
        if note:
            print(f"prompt {row + 1}: {note}", file=sys.stderr)
        if base is not None:
            print(f"base:    {base.strip()}")
        print(f"adapted: {text.strip()}" if compare else text.strip())
    if not as_json and steps:
        nll = adaptation.prompt_nll_BK.mean(0).tolist()
        print(
            f"{steps} steps on {len(prompts)} prompt(s) in {adaptation.seconds:.1f} s; prompt NLL by step: "
            + ", ".join(f"{x:.3f}" for x in nll),
            file=sys.stderr,
        )


def _print_json(adaptation: Any, row: int, text: str, base: str | None) -> None:
    record: dict[str, Any] = {"prompt": adaptation.prompts[row], "answer": text}
    if base is not None:
        record["base_answer"] = base
    rates_KM = adaptation.rates_BKM[row]
    record |= {
        "prompt_nll": [round(x, 5) for x in adaptation.prompt_nll_BK[row].tolist()],
        "mean_rates": [float(f"{x:.4g}") for x in (rates_KM.mean(1).tolist() if len(rates_KM) else [])],
        "note": adaptation.notes[row],
        "seconds": round(adaptation.seconds, 3),
    }
    print(json.dumps(record, ensure_ascii=False))


@train_app.command(
    "scalenet",
    epilog="""Examples:

    ephemera train scalenet --config configs/scalenet-nq-open.yaml

    ephemera train scalenet --set train.task=squad --set train.source=data/squad --set optimizer.samples=2000

    ephemera train scalenet --config configs/smoke.yaml --resume

    accelerate launch -m ephemera train scalenet --config configs/scalenet-nq-open.yaml""",
)
def train_scalenet_command(
    config: ConfigFile = None,
    set_: SetOption = None,
    print_config: PrintConfig = False,
    resume: Resume = False,
) -> None:
    """Train ScaleNet, layer-wise or step-wise, by the first-order meta-gradient of the answers' NLL.

    Settings and their meaning: `--print-config`, and docs/method.md."""
    from ephemera.config import TrainScaleNet, dump_yaml, load_config

    settings = load_config(TrainScaleNet, str(config) if config else None, set_)
    if print_config:
        print(dump_yaml(settings), end="")
        return
    from ephemera.training.scalenet import train_scalenet

    _quiet()
    folder = train_scalenet(settings, resume=resume)
    print(folder)


@train_app.command(
    "generator",
    epilog="""Examples:

    ephemera train generator --config configs/taskweaver.yaml

    ephemera train generator --set "train.tasks=[{task: snli, weight: 2}, {task: boolq}]" --set optimizer.samples=2000

    ephemera train generator --config configs/taskweaver.yaml --resume""",
)
def train_generator_command(
    config: ConfigFile = None,
    set_: SetOption = None,
    print_config: PrintConfig = False,
    resume: Resume = False,
) -> None:
    """Train a generator of adapters end to end through the frozen model; with `scalenet` settings, both together."""
    from ephemera.config import TrainGenerator, dump_yaml, load_config

    settings = load_config(TrainGenerator, str(config) if config else None, set_)
    if print_config:
        print(dump_yaml(settings), end="")
        return
    from ephemera.training.generator import train_generator

    _quiet()
    print(train_generator(settings, resume=resume))


@app.command(
    epilog="""Examples:

    ephemera evaluate --config configs/evaluate-nq-open.yaml

    ephemera evaluate --set data.task=own --set data.source=mine.jsonl --set "methods=[none,layerwise]" --set "steps=[0,1]"

    ephemera evaluate --print-config"""
)
def evaluate(
    config: ConfigFile = None,
    set_: SetOption = None,
    print_config: PrintConfig = False,
) -> None:
    """Answer NLL and ROUGE-Lsum of every method at every K, with intervals; a stopped run goes on where it was."""
    from ephemera.config import Evaluate, dump_yaml, load_config

    settings = load_config(Evaluate, str(config) if config else None, set_)
    if print_config:
        print(dump_yaml(settings), end="")
        return
    from ephemera.evaluation.grid import evaluate as run
    from ephemera.evaluation.report import write_report

    _quiet()
    folder = run(settings)
    page = write_report(folder)
    print((folder / "table.md").read_text())
    print(f"report: {page}", file=sys.stderr)


@app.command(
    epilog="""Examples:

    ephemera report runs/evaluate"""
)
def report(folder: Annotated[Path, typer.Argument(help="A folder that `ephemera evaluate` wrote.")]) -> None:
    """Make tables, figures and the HTML page of an evaluation again from its records."""
    from ephemera.evaluation.report import write_report

    print(write_report(folder))


@app.command(
    epilog="""Examples:

    ephemera export "Question: who wrote Hamlet? Answer:" --output adapter --steps 3"""
)
def export(
    prompt: Annotated[str, typer.Argument(help="The prompt to adapt to.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for PEFT's two files.")],
    model: Model = DEFAULT_MODEL,
    steps: Steps = 3,
    rate: RateOption = DEFAULT_RATE,
    seed: Seed = 0,
    chat: Chat = False,
    truncate: Truncate = None,
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """Adapt to a prompt and keep the adapter, in PEFT's format."""
    lm = _load(model, rate=rate if steps else None, dtype=dtype, device=device, chat=chat, truncate=truncate)
    adaptation = lm.adapt([prompt], steps=steps, seed=seed)
    if adaptation.notes[0]:
        print(adaptation.notes[0], file=sys.stderr)
    print(adaptation.export_peft(output, row=0))


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

    _quiet()
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

    _quiet()
    run(output, rows)


def _load(
    model: str, *, rate: str | None, dtype: str | None, device: str | None, chat: bool, truncate: str | None
) -> Any:
    if truncate not in (None, "left"):
        raise unknown("--truncate", truncate, ["left"])
    from ephemera.model import AdaptiveLM

    _quiet()
    side: Literal["left"] | None = "left" if truncate else None
    return AdaptiveLM.from_pretrained(model, rate=rate, dtype=dtype, device=device, chat=chat, truncate=side)


def _prompts(prompt: str | None, file: Path | None) -> list[str]:
    if prompt is not None and file is not None:
        raise ValueError("give a prompt or --file, not both.")
    if prompt is not None and prompt != "-":
        return [prompt]
    if file is None:
        if sys.stdin.isatty():
            raise ValueError(
                'no prompt: give one in quotes, --file, or standard input (e.g. echo "..." | ephemera answer).'
            )
        return [sys.stdin.read()]
    if not file.is_file():
        raise ValueError(f"{file} does not exist or is not a file.")
    if not file.name.endswith((".jsonl", ".jsonl.gz")):
        return [file.read_text()]
    from ephemera.tasks import read_jsonl

    prompts = []
    for place, row in read_jsonl(file):
        if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
            raise ValueError(f'{place}: expected an object with a "prompt" text.')
        prompts.append(row["prompt"])
    if not prompts:
        raise ValueError(f"{file} holds no prompts.")
    return prompts


def _quiet() -> None:
    """Libraries' notices off; their progress bars only on a terminal."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()


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
    except OSError as error:
        place = f" {error.filename}" if error.filename else ""
        print(f"ephemera: {error.strerror or error}{place}; nothing finished was lost.", file=sys.stderr)
        raise SystemExit(2) from None
    raise SystemExit(0)
