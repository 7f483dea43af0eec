"""Commands on prompts: answer, try, export, adapt."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ephemera.cli.compare import compared
from ephemera.cli.options import (
    Chat,
    Device,
    Dtype,
    InitOption,
    Model,
    Parallel,
    Quantization,
    RateOption,
    ReachOption,
    Seed,
    SpecialTokens,
    Steps,
    Truncate,
    app,
    check_steps,
    quiet,
    say_quantised,
    standard_input,
    unshipped,
)
from ephemera.downloads import DEFAULT_MODEL
from ephemera.files import kind_of, read_rows, read_text, without_end
from ephemera.messages import check_unicode, unknown
from ephemera.saving import json_text

MaxNewTokens = Annotated[int, typer.Option(min=1, help="Longest answer.")]


@app.command(
    epilog="""Examples:

    ephemera answer --chat "What is the capital of France?"

    ephemera answer --compare --steps 3 --rate scalenet-nq-open "Question: who wrote Hamlet? Answer:"

    ephemera answer --file prompts.jsonl --json

    ephemera answer --compare --init taskweaver "Question: what turns a mill? Answer:"

    cat article.txt | ephemera answer --rate 0.05 --max-new-tokens 100

    torchrun --nproc-per-node 2 -m ephemera answer --parallel tensor --model MODEL --rate 0.05 "Who wrote Hamlet?\""""
)
def answer(
    prompt: Annotated[str | None, typer.Argument(help="The prompt; without one, --file or standard input.")] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            "--file",
            "-f",
            help='One prompt (.txt, .md) or rows with a "prompt" each (.jsonl, .ndjson, .json); also .gz.',
        ),
    ] = None,
    model: Model = DEFAULT_MODEL,
    steps: Steps = None,
    rate: RateOption = None,
    init: InitOption = "zero",
    reach: ReachOption = None,
    compare: Annotated[bool, typer.Option("--compare", help="Show the base model's answer beside it.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object per prompt, with losses and rates.")] = False,
    max_new_tokens: MaxNewTokens = 64,
    seed: Seed = 0,
    chat: Chat = False,
    special_tokens: SpecialTokens = False,
    truncate: Truncate = None,
    dtype: Dtype = None,
    quantization: Quantization = "none",
    device: Device = None,
    parallel: Parallel = "none",
) -> None:
    """Adapt to each prompt, answer it, forget."""
    prompts = prompts_of(prompt, file)
    check_steps(steps, rate, init)
    options = {"init": init, "rate": rate, "reach": reach, "chat": chat, "device": device}
    options |= {"quantization": quantization, "parallel": parallel}
    lm = _load(model, truncate=truncate, special_tokens=special_tokens, dtype=dtype, **options)
    _say_unshipped(lm, model, steps, rate, init)
    _answer(lm, prompts, steps=steps, seed=seed, compare=compare, as_json=as_json, max_new_tokens=max_new_tokens)


@app.command(
    name="try",
    epilog="""Examples:

    ephemera try "Who wrote Hamlet?"

    ephemera try --rate 0.05 "Explain in one sentence why the sea is salty.\"""",
)
def try_(
    prompt: Annotated[str | None, typer.Argument(help="What to ask; without it, standard input.")] = None,
    model: Model = DEFAULT_MODEL,
    steps: Steps = None,
    rate: RateOption = None,
    reach: ReachOption = None,
    max_new_tokens: MaxNewTokens = 64,
    quantization: Quantization = "none",
    device: Device = None,
    parallel: Parallel = "none",
) -> None:
    """Ask the model as in a chat, and see what adapting to the question changes: `answer --chat --compare`."""
    prompts = prompts_of(prompt, None)
    options = {"quantization": quantization, "device": device, "parallel": parallel}
    lm = _load(model, init="zero", rate=rate, reach=reach, chat=True, **options)
    _say_unshipped(lm, model, steps, rate, "zero")
    _answer(lm, prompts, steps=steps, seed=0, compare=True, as_json=False, max_new_tokens=max_new_tokens)


def _answer(
    lm: Any,
    prompts: list[str],
    *,
    steps: int | None,
    seed: int,
    compare: bool,
    as_json: bool,
    max_new_tokens: int,
) -> None:
    """Answers on stdout, beside the base model's if asked for; notes and costs on stderr."""
    begun = time.perf_counter()
    answers, adaptation = lm.reply(prompts, steps=steps, seed=seed, max_new_tokens=max_new_tokens)
    answering = time.perf_counter() - begun - adaptation.seconds
    bases: list[str | None] = [None] * len(prompts)
    if compare:  # with reach answer over the reading that the adapted answer had
        bases = list(lm.generate(prompts, adaptation=adaptation.unadapted(), max_new_tokens=max_new_tokens))
    for row, (text, base) in enumerate(zip(answers, bases, strict=True)):
        if as_json:
            _print_json(adaptation, row, text, base)
            continue
        if compare and len(prompts) > 1:
            print(f"prompt {row + 1}: {' '.join(prompts[row].split())[:72]}")
        print("\n".join(compared(base, text)) if base is not None else text.strip(), flush=True)
        if adaptation.notes[row]:
            print(f"prompt {row + 1}: {adaptation.notes[row]}", file=sys.stderr)
    if as_json:
        return
    if not adaptation.steps:
        if adaptation.lora.B_BN.any():
            print(
                f"adapters made for {len(prompts)} prompt(s) in {adaptation.seconds:.2f} s, then answered in {answering:.2f} s",
                file=sys.stderr,
            )
        return
    nll = adaptation.prompt_nll_BK.nanmean(0).tolist()
    print(
        f"{adaptation.steps} steps on {len(prompts)} prompt(s) in {adaptation.seconds:.2f} s, "
        f"then answered in {answering:.2f} s; prompt NLL by step: " + ", ".join(f"{x:.3f}" for x in nll),
        file=sys.stderr,
    )


def _print_json(adaptation: Any, row: int, text: str, base: str | None) -> None:
    record: dict[str, Any] = {"prompt": adaptation.prompts[row], "answer": text}
    if base is not None:
        record["base_answer"] = base
    rates_KM = adaptation.rates_BKM[row].double()  # sums of large rates overflow float32
    record |= {
        "steps": adaptation.steps,
        "reach": adaptation.reach,
        "prompt_nll": [round(x, 5) for x in adaptation.prompt_nll_BK[row].tolist()],
        "mean_rates": [float(f"{x:.4g}") for x in (rates_KM.mean(1).tolist() if len(rates_KM) else [])],
        "note": adaptation.notes[row],
        "seconds": round(adaptation.seconds, 3),
    }
    print(json_text(record, ensure_ascii=False))


@app.command(
    epilog="""Examples:

    ephemera export "Question: who wrote Hamlet? Answer:" --output adapter --steps 3

    ephemera export --all --file prompts.jsonl --reach all --output adapters --base-model HuggingFaceTB/SmolLM2-135M-Instruct"""
)
def export(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for PEFT's two files; with --all, a new folder or .zip.")
    ],
    prompt: Annotated[str | None, typer.Argument(help="The prompt to adapt to; with --all, or --file.")] = None,
    file: Annotated[Path | None, typer.Option("--file", "-f", help="With --all: prompts, as of `answer`.")] = None,
    every: Annotated[
        bool, typer.Option("--all", help="Every prompt's adapter, for vLLM and SGLang: a folder each, and a manifest.")
    ] = False,
    base_model: Annotated[
        str | None, typer.Option(help="With --all: the model's name in the adapters. Default: what --model is called.")
    ] = None,
    adapter_dtype: Annotated[str, typer.Option(help="With --all: float32, bfloat16 or float16.")] = "float32",
    model: Model = DEFAULT_MODEL,
    steps: Steps = None,
    rate: RateOption = None,
    init: InitOption = "zero",
    reach: ReachOption = None,
    seed: Seed = 0,
    chat: Chat = False,
    special_tokens: SpecialTokens = False,
    truncate: Truncate = None,
    dtype: Dtype = None,
    quantization: Quantization = "none",
    device: Device = None,
) -> None:
    """Adapt to a prompt, or to each, and keep the adapter, in PEFT's format."""
    if not every and (prompt is None or file is not None or base_model is not None or adapter_dtype != "float32"):
        raise ValueError(
            "export takes one prompt; --file, --base-model and --adapter-dtype need --all. Give a prompt or --all."
        )
    prompts = prompts_of(prompt, file)
    check_steps(steps, rate, init)
    options = {"init": init, "rate": rate, "reach": reach, "chat": chat, "device": device, "quantization": quantization}
    lm = _load(model, truncate=truncate, special_tokens=special_tokens, dtype=dtype, **options)
    _say_unshipped(lm, model, steps, rate, init)
    adaptation = lm.adapt(prompts, steps=steps, seed=seed)
    for note in dict.fromkeys(note for note in adaptation.notes if note):
        print(note, file=sys.stderr)
    if not every:
        print(adaptation.export_peft(output, row=0))
        return
    from ephemera.llm.model_files import called

    if adaptation.reach == "answer":
        print(
            "these adapters act on the answer only; vLLM and SGLang apply them to the prompt too and answer otherwise. "
            "Give --reach all with a rate that was made for it.",
            file=sys.stderr,
        )
    print(adaptation.export_all(output, base_model=base_model or called(lm.backbone.name), dtype=adapter_dtype))


@app.command(
    epilog="""Examples:

    ephemera adapt --prompts questions.jsonl --export adapter --rate scalenet-nq-open

    ephemera answer --init adapter --file others.jsonl"""
)
def adapt(
    prompts: Annotated[
        Path,
        typer.Option("--prompts", "-p", help='Rows with a "prompt" each (.jsonl, .ndjson, .json); also .gz.'),
    ],
    export: Annotated[Path, typer.Option("--export", "-o", help="Folder for PEFT's two files.")],
    model: Model = DEFAULT_MODEL,
    steps: Steps = None,
    rate: RateOption = None,
    init: InitOption = "zero",
    reach: ReachOption = None,
    seed: Seed = 0,
    chat: Chat = False,
    special_tokens: SpecialTokens = False,
    truncate: Truncate = None,
    dtype: Dtype = None,
    quantization: Quantization = "none",
    device: Device = None,
) -> None:
    """Adapt once to prompts of a kind, without labels, and keep the one adapter, in PEFT's format.

    Other prompts of the kind then start there: `--init FOLDER` in answer, evaluate and serve."""
    texts = prompts_of(None, prompts)
    check_steps(steps, rate, init)
    options = {"init": init, "rate": rate, "reach": reach, "chat": chat, "device": device, "quantization": quantization}
    lm = _load(model, truncate=truncate, special_tokens=special_tokens, dtype=dtype, **options)
    if lm.rate is None:
        raise ValueError(unshipped(model, lm.format, "there is no step to take"))
    begun = time.perf_counter()
    shared = lm.adapt_together(texts, steps=steps, seed=seed)
    folder = shared.export_peft(export)
    nll = ", ".join(f"{x:.3f}" for x in shared.prompt_nll_NK.mean(0).tolist())
    print(
        f"{len(shared.rates_KM)} steps on {len(texts)} prompt(s) together in {time.perf_counter() - begun:.2f} s; mean prompt "
        f"NLL before each step: {nll}; use it with --init {folder} --reach {shared.reach}",
        file=sys.stderr,
    )
    print(folder)


def _say_unshipped(lm: Any, model: str, steps: int | None, rate: str | None, init: str) -> None:
    """What happens where nobody named a rate and no network ships: no steps, and a line that says so."""
    if lm.rate is not None or rate is not None or init != "zero" or steps == 0:
        return
    if steps:
        raise ValueError(unshipped(model, lm.format, f"--steps {steps} cannot be taken"))
    print(unshipped(model, lm.format, "answered unadapted"), file=sys.stderr)


def _load(model: str, *, truncate: str | None = None, **options: Any) -> Any:
    if truncate not in (None, "left"):
        raise unknown("--truncate", truncate, ["left"])
    quiet()  # before what torchao says when it is imported
    from ephemera.model import AdaptiveLM

    side: Literal["left"] | None = "left" if truncate else None
    lm = AdaptiveLM.from_pretrained(model, truncate=side, **options)
    say_quantised(lm.backbone)
    return lm


def prompts_of(prompt: str | None, file: Path | None) -> list[str]:
    if prompt is not None and file is not None:
        raise ValueError("give a prompt or --file, not both.")
    if prompt is not None and prompt != "-":
        check_unicode(prompt, "the prompt")
        return [prompt]
    if file is None:
        if sys.stdin.isatty():
            raise ValueError(
                'no prompt: give one in quotes, --file, or standard input (e.g. echo "..." | ephemera answer).'
            )
        text = without_end(standard_input().read())
        check_unicode(text, "standard input")
        return [text]
    if not file.is_file():
        raise ValueError(f"{file} does not exist or is not a file.")
    if kind_of(file) == "text":
        return [read_text(file)]
    prompts = []
    for place, row in read_rows(file):
        if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
            raise ValueError(f'{place}: expected an object with a "prompt" text.')
        check_unicode(row["prompt"], f"{place}: the prompt")
        prompts.append(row["prompt"])
    if not prompts:
        raise ValueError(f"{file} holds no prompts.")
    return prompts
