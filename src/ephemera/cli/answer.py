"""Commands on prompts: answer, export."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ephemera.cli.options import (
    DEFAULT_RATE,
    Chat,
    Device,
    Dtype,
    InitOption,
    Model,
    RateOption,
    Seed,
    Steps,
    StopBelow,
    Truncate,
    app,
    quiet,
)
from ephemera.errors import unknown
from ephemera.store import DEFAULT_MODEL


@app.command(
    epilog="""Examples:

    ephemera answer "Question: what is the capital of France? Answer:"

    ephemera answer --compare --steps 3 --rate scalenet-nq-open "Question: who wrote Hamlet? Answer:"

    ephemera answer --file prompts.jsonl --json

    ephemera answer --compare --init taskweaver "Question: what turns a mill? Answer:"

    cat article.txt | ephemera answer --rate 0.05 --max-new-tokens 100"""
)
def answer(
    prompt: Annotated[str | None, typer.Argument(help="The prompt; without one, --file or standard input.")] = None,
    file: Annotated[
        Path | None, typer.Option("--file", "-f", help='Text (one prompt) or JSONL with a "prompt" on each line.')
    ] = None,
    model: Model = DEFAULT_MODEL,
    steps: Steps = None,
    rate: RateOption = None,
    init: InitOption = "zero",
    compare: Annotated[bool, typer.Option("--compare", help="Show the base model's answer beside it.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object per prompt, with losses and rates.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 64,
    seed: Seed = 0,
    stop_below: StopBelow = None,
    chat: Chat = False,
    truncate: Truncate = None,
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """Adapt to each prompt, answer it, forget."""
    prompts = _prompts(prompt, file)
    steps, rate = _moves(steps, rate, init)
    lm = _load(model, init=init, rate=rate, dtype=dtype, device=device, chat=chat, truncate=truncate)
    adaptation = lm.adapt(prompts, steps=steps, seed=seed, stop_below=stop_below)
    answers = lm.generate(prompts, adaptation=adaptation, max_new_tokens=max_new_tokens)
    bases: list[str | None] = [None] * len(prompts)
    if compare:
        plain = lm.adapt(prompts, steps=0, init="zero")  # --init may be a generator: that is no base model
        bases = list(lm.generate(prompts, adaptation=plain, max_new_tokens=max_new_tokens))
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
        nll = adaptation.prompt_nll_BK.nanmean(0)[: int(adaptation.steps_B.max())].tolist()
        taken = f"{steps}" if stop_below is None else f"{adaptation.steps_B.float().mean().item():.3g} of {steps}"
        print(
            f"{taken} steps on {len(prompts)} prompt(s) in {adaptation.seconds:.1f} s; prompt NLL by step: "
            + ", ".join(f"{x:.3f}" for x in nll),
            file=sys.stderr,
        )


def _print_json(adaptation: Any, row: int, text: str, base: str | None) -> None:
    record: dict[str, Any] = {"prompt": adaptation.prompts[row], "answer": text}
    if base is not None:
        record["base_answer"] = base
    taken = int(adaptation.steps_B[row])
    rates_KM = adaptation.rates_BKM[row, :taken]
    record |= {
        "steps": taken,
        "prompt_nll": [round(x, 5) for x in adaptation.prompt_nll_BK[row, :taken].tolist()],
        "mean_rates": [float(f"{x:.4g}") for x in (rates_KM.mean(1).tolist() if len(rates_KM) else [])],
        "note": adaptation.notes[row],
        "seconds": round(adaptation.seconds, 3),
    }
    print(json.dumps(record, ensure_ascii=False))


@app.command(
    epilog="""Examples:

    ephemera export "Question: who wrote Hamlet? Answer:" --output adapter --steps 3"""
)
def export(
    prompt: Annotated[str, typer.Argument(help="The prompt to adapt to.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for PEFT's two files.")],
    model: Model = DEFAULT_MODEL,
    steps: Steps = None,
    rate: RateOption = None,
    init: InitOption = "zero",
    seed: Seed = 0,
    chat: Chat = False,
    truncate: Truncate = None,
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """Adapt to a prompt and keep the adapter, in PEFT's format."""
    steps, rate = _moves(steps, rate, init)
    lm = _load(model, init=init, rate=rate, dtype=dtype, device=device, chat=chat, truncate=truncate)
    adaptation = lm.adapt([prompt], steps=steps, seed=seed)
    if adaptation.notes[0]:
        print(adaptation.notes[0], file=sys.stderr)
    print(adaptation.export_peft(output, row=0))


def _moves(steps: int | None, rate: str | None, init: str) -> tuple[int, str | None]:
    """Steps and their rate; the shipped default rate was trained from the zero start, so it is not another's."""
    if steps is None:
        steps = 3 if init == "zero" or rate is not None else 0
    if steps and rate is None and init != "zero":
        raise ValueError(
            f"--steps {steps} from --init {init} needs a --rate: the default, {DEFAULT_RATE}, was trained from the zero start. "
            "Give a number, or a folder that `ephemera train scalenet` wrote with this init."
        )
    return steps, (rate or DEFAULT_RATE) if steps else None


def _load(
    model: str,
    *,
    init: str,
    rate: str | None,
    dtype: str | None,
    device: str | None,
    chat: bool,
    truncate: str | None,
) -> Any:
    if truncate not in (None, "left"):
        raise unknown("--truncate", truncate, ["left"])
    from ephemera.model import AdaptiveLM

    quiet()
    side: Literal["left"] | None = "left" if truncate else None
    return AdaptiveLM.from_pretrained(model, init=init, rate=rate, dtype=dtype, device=device, chat=chat, truncate=side)


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
