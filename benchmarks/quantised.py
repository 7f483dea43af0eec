"""What quantised weights cost: memory, time, and how far a prompt's gradient turns.

    python -m benchmarks.quantised [--forms none,int8,nf4,torchao-int8] [--output docs/results/quantised]

Each form runs in a process of its own on the same chat prompts. `weights` are the model's parameters and buffers; `cosine` is that
of the prompts' gradients by B with those of the first form; `seconds` is `AdaptiveLM.adapt` with the default network (the
median of `--rounds`); `peak` is the process's own. Packages: pip install 'ephemera[bnb]' 'ephemera[torchao]'.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any, get_args

import torch
import transformers
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ephemera import AdaptiveLM
from ephemera.adapt import adapt
from ephemera.batch import pad
from ephemera.bench.timing import machine, machine_lines
from ephemera.downloads import DEFAULT_MODEL
from ephemera.inits import ZeroInit
from ephemera.llm.quantization import Quantization
from ephemera.rates import FixedRate

FORMS: tuple[Quantization, ...] = get_args(Quantization)
PROMPTS = (
    "Who wrote Hamlet?",
    "Name the capital of Norway.",
    "Explain in one sentence why the sea is salty.",
    "What is photosynthesis? Give a short answer.",
)


def measure(form: Quantization, rounds: int, gradients: Path) -> dict[str, Any]:
    """One form, in this process; its gradients [B,N] go to a file."""
    warnings.simplefilter("ignore")  # that the network was trained on unquantised weights
    lm = AdaptiveLM.from_pretrained(DEFAULT_MODEL, chat=True, dtype="float32", device="cpu", quantization=form)
    backbone, made = lm.backbone, lm.adapt(PROMPTS)  # warm
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        lm.adapt(PROMPTS)
        seconds.append(time.perf_counter() - start)
    status = Path("/proc/self/status").read_text().splitlines()
    peak = 1024 * int(next(line for line in status if line.startswith("VmHWM")).split()[1])
    ids = [lm.encode(prompt) for prompt in PROMPTS]
    batch = pad(ids, pad_id=backbone.pad_id)
    lora = ZeroInit()(backbone, batch, [0] * len(ids))
    torch.save(adapt(backbone, batch, lora, FixedRate(1.0), 1, keep_grads=True).grads[0].B_BN, gradients)
    return {
        "form": form,
        "weights": sum(map(bytes_of, (*backbone.model.parameters(), *backbone.model.buffers()))),
        "prompt_nll": made.prompt_nll_BK[:, 0].mean().item(),
        "seconds": seconds,
        "peak": peak,
    }


def bytes_of(tensor: torch.Tensor) -> int:
    """What a weight lies in; one of torchao's is made of several tensors, and says the size that it stands for."""
    if is_traceable_wrapper_subclass(tensor):
        return sum(bytes_of(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return tensor.numel() * tensor.element_size()


def table(results: dict[str, Any]) -> str:
    rows = results["forms"]
    lines = [
        f"Model {DEFAULT_MODEL}, float32 where it is not quantised; {len(PROMPTS)} chat prompts, one step of `universal`.",
        *machine_lines(results["machine"]),
        "",
        "| form | weights, MB | prompt NLL | cosine of the gradient, least to most | adapt, s | peak of the process, MB |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        low, high = min(row["cosine"]), max(row["cosine"])
        lines.append(
            f"| {row['form']} | {row['weights'] / 1e6:.0f} | {row['prompt_nll']:.2f} | {low:.2f} to {high:.2f} | "
            f"{median(row['seconds']):.2f} | {row['peak'] / 1e6:,.0f} |"
        )
    return "\n".join(
        [*lines, "", f"Made by `python -m benchmarks.quantised --forms {','.join(r['form'] for r in rows)}`."]
    )


def main(argv: Sequence[str] | None = None) -> int:
    transformers.logging.disable_progress_bar()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quantised", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--forms", default=",".join(FORMS), help="the first is compared with (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="(default: %(default)s)")
    parser.add_argument("--output", type=Path, help="a folder for results.json and table.md")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # a form, measured in this process
    parser.add_argument("--gradients", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    asked: list[Quantization] = [form for name in args.forms.split(",") for form in FORMS if form == name]
    if len(asked) != len(args.forms.split(",")):
        print(f"error: --forms {args.forms!r}; give some of {', '.join(FORMS)}.", file=sys.stderr)
        return 2
    if args.one:
        print(json.dumps(measure(asked[0], args.rounds, args.gradients)))
        return 0
    forms, first = [], None
    with tempfile.TemporaryDirectory() as scratch:
        for form in asked:
            file = Path(scratch) / "gradients.pt"
            command = [sys.executable, "-m", "benchmarks.quantised", "--one", form, "--forms", form]
            command += ["--rounds", str(args.rounds), "--gradients", str(file)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            gradients_BN = torch.load(file)
            first = gradients_BN if first is None else first
            cosine = torch.nn.functional.cosine_similarity(gradients_BN, first, dim=1).tolist()
            forms.append({**json.loads(done.stdout.splitlines()[-1]), "cosine": cosine})
    results = {"machine": machine(), "forms": forms}
    text = table(results)
    print(text)
    if args.output:
        args.output.mkdir(parents=True, exist_ok=True)
        (args.output / "results.json").write_text(json.dumps(results, indent=1) + "\n")
        (args.output / "table.md").write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
