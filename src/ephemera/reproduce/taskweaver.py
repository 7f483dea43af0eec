"""TaskWeaver's results: task LoRAs, the mixed one and the generator, then accuracy on test rows; and the analysis."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ephemera.config import TaskWeaverRecipe
from ephemera.made_for import Format
from ephemera.reproduce.stages import Planner, Stage


def stages(recipe: TaskWeaverRecipe, planner: Planner) -> list[Stage]:
    """Task LoRAs, the mixed one and the generator, then the table on each task's test rows, or the analysis."""
    found: list[Stage] = []
    for format in recipe.formats:
        for seed in recipe.seeds:
            generator = _generator(recipe, planner, format, seed)
            if recipe.result == "taskweaver-analysis":
                found += [generator, _analysis(recipe, planner, format, seed, generator)]
                continue
            loras = {task: _lora(recipe, planner, format, [task], seed) for task in recipe.tasks}
            mixed = _lora(recipe, planner, format, recipe.tasks, seed) if recipe.mixed else None
            found += [*loras.values(), *([mixed] if mixed else []), generator]
            for task in recipe.tasks:
                found.append(_accuracy(recipe, planner, format, seed, task, loras[task], mixed, generator))
    return found


def _model(planner: Planner) -> dict[str, Any]:
    lora = {key: planner.model_settings["lora"][key] for key in ("r", "lora_alpha", "target_modules")}
    return {**planner.model_settings, "lora": lora}


def _mixture(recipe: TaskWeaverRecipe, format: Format, tasks: Sequence[str], **other: Any) -> dict[str, Any]:
    entries = [{"task": task} for task in tasks]
    return {"tasks": entries, "source": recipe.source, "format": format, "max_tokens": recipe.max_tokens, **other}


def _training(recipe: TaskWeaverRecipe, format: Format, tasks: Sequence[str]) -> dict[str, Any]:
    return {
        "train": _mixture(recipe, format, tasks, split="train"),
        "validation": _mixture(recipe, format, tasks, split="validation", limit=recipe.validation_rows),
    }


def _lora(recipe: TaskWeaverRecipe, planner: Planner, format: Format, tasks: list[str], seed: int) -> Stage:
    lengths, samples = planner.lengths(tasks), recipe.lora_steps * recipe.lora_batch_size * len(tasks)
    name = tasks[0] if len(tasks) == 1 else "mixed"
    optimizer = {
        "samples": samples,
        "batch_size": recipe.lora_batch_size,
        "learning_rate": recipe.lora_learning_rate,
        "seed": seed,
    }
    return planner.stage(
        f"train lora {name} {format} seed {seed}",
        "lora",
        {"model": _model(planner), **_training(recipe, format, tasks), "optimizer": optimizer},
        tasks=tasks,
        samples=samples,
        flops=samples * planner.shape.step_flops(lengths.prompt + lengths.answer),
        batch=recipe.lora_batch_size,
        format=format,
        seed=seed,
    )


def _generator(recipe: TaskWeaverRecipe, planner: Planner, format: Format, seed: int) -> Stage:
    lengths = planner.lengths(recipe.tasks)
    optimizer = {
        "samples": recipe.samples,
        "batch_size": recipe.batch_size,
        "learning_rate": recipe.learning_rate,
        "seed": seed,
    }
    values = {
        "model": _model(planner),
        **_training(recipe, format, recipe.tasks),
        "generator": {"hidden_size": recipe.hidden_size},
        "optimizer": optimizer,
    }
    each = planner.shape.forward_flops(lengths.prompt, scored=0)
    each += planner.shape.step_flops(lengths.prompt + lengths.answer)
    return planner.stage(
        f"train generator {format} seed {seed}",
        "generator",
        values,
        tasks=recipe.tasks,
        samples=recipe.samples,
        flops=recipe.samples * each,
        batch=recipe.batch_size,
        format=format,
        seed=seed,
    )


def _accuracy(
    recipe: TaskWeaverRecipe,
    planner: Planner,
    format: Format,
    seed: int,
    task: str,
    lora: Stage,
    mixed: Stage | None,
    generator: Stage,
) -> Stage:
    shape, lengths = planner.shape, planner.lengths([task])
    variants = [{"name": "Base"}, {"name": "Task LoRA", "init": str(lora.made)}]
    variants += [{"name": "Mixed LoRA", "init": str(mixed.made)}] if mixed else []
    variants += [{"name": "TaskWeaver", "init": str(generator.made)}]
    values = {
        "models": [_model(planner)],
        "variants": variants,
        "data": _mixture(recipe, format, [task], split="test", limit=recipe.rows),
        "repeats": recipe.repeats,
        "seed": seed,
    }
    whole = lengths.prompt + 4 * lengths.answer  # choices, or a generated answer
    each = shape.forward_flops(whole) + shape.decode_flops(whole, 4 * lengths.answer)
    return planner.stage(
        f"benchmark {task} {format} seed {seed}",
        "benchmark",
        values,
        tasks=[task],
        needs=[lora, *([mixed] if mixed else []), generator],
        samples=recipe.rows,
        flops=recipe.repeats * recipe.rows * len(variants) * each,
        batch=8,
        task=task,
        format=format,
        seed=seed,
    )


def _analysis(recipe: TaskWeaverRecipe, planner: Planner, format: Format, seed: int, generator: Stage) -> Stage:
    lengths = planner.lengths(recipe.tasks)
    values = {
        "model": {key: value for key, value in planner.model_settings.items() if key != "lora"},
        "generator": str(generator.made),
        "data": _mixture(recipe, format, recipe.tasks, split="test", limit=min(recipe.rows, 100)),
    }
    samples = min(recipe.rows, 100) * len(recipe.tasks)
    return planner.stage(
        f"analyse {format} seed {seed}",
        "analyse",
        values,
        tasks=recipe.tasks,
        needs=[generator],
        samples=samples,
        flops=samples * 6 * planner.shape.forward_flops(lengths.prompt + lengths.answer),
        batch=8,
        format=format,
        seed=seed,
    )
