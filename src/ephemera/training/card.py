"""The model card that lies beside a trained network: what it is for, how it was made, what it reached."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers

from ephemera.cards import front_matter, harm_table
from ephemera.config import TrainGenerator, TrainLens, TrainScaleNet, dump_yaml
from ephemera.run_info import commit

_REACH = {"all": "every token", "answer": "the answer only"}
Config = TypeVar("Config", TrainScaleNet, TrainLens, TrainGenerator)


def write_card(
    folder: Path, run: Path, config: TrainScaleNet, trained_for: dict[str, Any], *, rows: int, validated: int
) -> None:
    """README.md in `folder`, from the run's configuration and its metrics.jsonl."""
    validations = [m for m in read_metrics(run) if any(key.startswith("validation_nll") for key in m)]
    steps = [int(key.removeprefix("validation_nll_")) for key in validations[-1] if key.startswith("validation_nll_")]
    head = "| optimiser step | " + " | ".join(f"NLL, K={K}" for K in steps) + " |"
    lines = [head, "|" + "---|" * (len(steps) + 1)]
    for metrics in validations:
        lines.append(
            f"| {metrics['step']} | " + " | ".join(f"{metrics[f'validation_nll_{K}']:.3f}" for K in steps) + " |"
        )
    portable = _portable(config, run, trained_for, source=f"<folder of {config.train.task}>")
    if portable.objective.lens is not None and Path(portable.objective.lens).exists():
        portable.objective.lens = "<folder of the lens>"
    exits = ""
    if config.objective.exit_layer is not None:
        exits = (
            f"\n\nThe prompt's loss is read off after layer {config.objective.exit_layer}, where the forward of a step stops; "
            f"adapted are layers\n{config.model.lora.layers}."
            + (" Its tuned lens lies beside it." if config.objective.lens else "")
            + (" The lens was trained on with the network, through the step." if config.objective.tune_lens else "")
        )
    granularity = {"layer": "layer-wise", "step": "step-wise", "constant": "constants in place of a"}[
        config.scalenet.granularity
    ]
    averaged = " `averaged/` holds its rates averaged over\ntraining prompts." if (folder / "averaged").exists() else ""
    (folder / "README.md").write_text(
        front_matter(trained_for["name"], config.train.task.split("+"), kind="scalenet")
        + f"# {folder.name}: {granularity} ScaleNet for {trained_for['name']} on {config.train.task}\n\n"
        f"Predicts learning rates for per-prompt test-time adaptation (LDTTA Eq. 13-16): eta_k * s(h(x), k, K), one per\n"
        f"{'adapted projection' if granularity == 'layer-wise' else 'step'}. It fits that model alone "
        f"(weights {trained_for['fingerprint']}, {len(trained_for['projections'])} projections).{exits}\n\n"
        f"Trained on {config.optimizer.samples} prompts (with repeats; a gradient was taken of each) from {rows} rows of\n"
        f"{config.train.task}, {config.train.format} format, adapters acting on {_REACH[config.scalenet.reach]}, by the\n"
        f"first-order meta-gradient of the answers' NLL.{averaged} Commit {commit()}.\n\n"
        f"Validation answer NLL (mean over {validated} prompts, nats per token):\n\n"
        + "\n".join(lines)
        + f"\n\nMade with torch {torch.__version__} and transformers {transformers.__version__}, from this configuration:\n\n"
        f"```yaml\n{dump_yaml(portable)}```\n\n"
        "Intended for prompts in the form it was trained on (docs/concepts/limits.md); on others it may do harm, which\n"
        "`ephemera evaluate` shows. Test results with intervals: docs/results.\n" + harm_table(None, validations[-1])
    )


def write_lens_card(
    folder: Path, run: Path, config: TrainLens, trained_for: dict[str, Any], *, rows: int, validated: int
) -> None:
    """README.md beside a trained lens, from the run's configuration and its metrics.jsonl."""
    validations = [m for m in read_metrics(run) if any(key.startswith("validation_kl") for key in m)]
    layers = sorted(set(config.exit_layers))
    lines = ["| optimiser step | " + " | ".join(f"KL after layer {E}" for E in layers) + " |"]
    lines.append("|" + "---|" * (len(layers) + 1))
    lines.append(
        "| untrained | " + " | ".join(f"{validations[0][f'validation_kl_untrained_{E}']:.3f}" for E in layers) + " |"
    )
    for m in validations:
        lines.append(f"| {m['step']} | " + " | ".join(f"{m[f'validation_kl_{E}']:.3f}" for E in layers) + " |")
    portable = _portable(config, run, trained_for, source=f"<folder of {config.train.task}>")
    (folder / "README.md").write_text(
        front_matter(trained_for["name"], config.train.task.split("+"), metrics=("kl",), kind="lens")
        + f"# {folder.name}: tuned lens for {trained_for['name']}\n\n"
        "One affine map per exit layer; after it the model's own final norm and head (Belrose et al., 2023). It fits that\n"
        f"model alone (weights {trained_for['fingerprint']}).\n\n"
        f"Trained on {config.optimizer.samples} prompts (with repeats, {config.token_share:g} of their tokens) from {rows} rows of "
        f"{config.train.task},\nwithout their answers, to match the last layer's next-token distribution.\n\n"
        f"Validation KL(final || lens), nats per token, over {validated} prompts:\n\n"
        + "\n".join(lines)
        + f"\n\nMade with torch {torch.__version__} and transformers {transformers.__version__}, from this configuration:\n\n"
        f"```yaml\n{dump_yaml(portable)}```\n"
    )


def write_generator_card(
    folder: Path,
    run: Path,
    config: TrainGenerator,
    trained_for: dict[str, Any],
    *,
    parameters: int,
    counts: dict[str, int],
    validated: int,
) -> None:
    """README.md beside a trained generator, from the run's configuration and its metrics.jsonl."""
    validations = [m for m in read_metrics(run) if "validation_nll" in m]
    keys = [key for key in validations[-1] if key.startswith("validation_nll")]
    names = [key.removeprefix("validation_nll").removeprefix("_") or "all" for key in keys]
    lines = ["| optimiser step | " + " | ".join(names) + " |", "|" + "---|" * (len(keys) + 1)]
    lines += [f"| {m['step']} | " + " | ".join(f"{m[key]:.3f}" for key in keys) + " |" for m in validations]
    portable = _portable(config, run, trained_for, source="<folder of {task}>")
    (folder / "README.md").write_text(
        front_matter(trained_for["name"], counts, kind="generator")
        + f"# {folder.name}: adapter generator for {trained_for['name']}\n\n"
        "Makes a LoRA adapter for each prompt from the model's own last hidden state, in one pass (TaskWeaver 4.2). It\n"
        f"fits that model alone (weights {trained_for['fingerprint']}). {parameters:,} parameters. Its adapters act on\n"
        f"{_REACH[config.generator.reach]}.\n\n"
        f"Trained on {config.optimizer.samples} {config.train.format} prompts drawn from "
        + ", ".join(f"{task} ({n} rows)" for task, n in counts.items())
        + f".\n\nValidation answer NLL (mean over {validated} prompts, nats per token; `swapped`: with a neighbour's adapter):\n\n"
        + "\n".join(lines)
        + f"\n\nMade with torch {torch.__version__} and transformers {transformers.__version__}, from this configuration:\n\n"
        f"```yaml\n{dump_yaml(portable)}```\n\n"
        "Intended for prompts in the form of its tasks (src/ephemera/tasks); on others it may do harm. Test results with\n"
        "intervals: docs/results.\n"
    )


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; a number that was not finite, null there, is NaN."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: math.nan if value is None else value for key, value in line.items()} for line in lines]


def _portable(config: Config, run: Path, trained_for: dict[str, Any], *, source: str) -> Config:
    """The configuration without one machine's paths, which help nobody."""
    portable = config.model_copy(deep=True, update={"output": f"runs/{run.name}"})
    for data in (portable.train, portable.validation):
        data.source = None if data.source is None else source
    if Path(portable.model.name).exists():
        portable.model.name = trained_for["name"]
    return portable
