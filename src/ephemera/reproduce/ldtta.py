"""LDTTA's results: networks by data set, format and seed, then methods x K on test rows."""

from __future__ import annotations

from typing import Any

from ephemera.config import CONTROLS, LdttaRecipe
from ephemera.made_for import Format
from ephemera.reproduce.stages import Planner, Stage

# What each granularity's network is needed for
NETWORKS = {"layer": ("layerwise", "averaged", *CONTROLS), "step": ("stepwise",), "constant": ("constants",)}
LEARNED = tuple(method for methods in NETWORKS.values() for method in methods)


def stages(recipe: LdttaRecipe, planner: Planner) -> list[Stage]:
    """For each format, data set and seed: the networks that the methods need, then the grid on each task's rows."""
    found: list[Stage] = []
    for format in recipe.formats:
        for dataset, tasks in recipe.datasets.items():
            for place, seed in enumerate(recipe.seeds):
                networks = {
                    granularity: _network(recipe, planner, format, dataset, tasks, granularity, seed)
                    for granularity, wanted in NETWORKS.items()
                    if set(wanted) & set(recipe.methods)
                }
                found += networks.values()
                # What is not learned is the same for every seed of training
                methods = [m for m in recipe.methods if place == 0 or m in LEARNED]
                if methods:
                    found += [_grid(recipe, planner, format, dataset, task, networks, methods, seed) for task in tasks]
    return found


def _rows(recipe: LdttaRecipe, task: str, format: Format, split: str, **other: Any) -> dict[str, Any]:
    place = {"task": task, "source": recipe.source, "split": split, "format": format}
    return {**place, "max_tokens": recipe.max_tokens, **other}


def _network(
    recipe: LdttaRecipe, planner: Planner, format: Format, dataset: str, tasks: list[str], granularity: str, seed: int
) -> Stage:
    lengths, joined, base = planner.lengths(tasks), "+".join(tasks), recipe.base_rates
    values = {
        "model": planner.model_settings,
        "train": _rows(recipe, joined, format, "train", sources=recipe.sources),
        "validation": _rows(recipe, joined, format, "validation", limit=recipe.validation_rows),
        "scalenet": {
            "granularity": granularity,
            "base_rates": base * recipe.max_steps if base is not None and len(base) == 1 else base,
            "max_steps": recipe.max_steps,
            "mlp_size": recipe.mlp_size,
        },
        "optimizer": {
            "samples": recipe.samples,
            "batch_size": recipe.batch_size,
            "learning_rate": recipe.learning_rate,
            "seed": seed,
        },
        "validation_steps": sorted({1, min(3, recipe.max_steps), recipe.max_steps}),
    }
    mean_K = (1 + recipe.max_steps) / 2
    each = mean_K * planner.shape.step_flops(lengths.prompt)
    each += planner.shape.step_flops(lengths.prompt + lengths.answer)
    return planner.stage(
        f"train {granularity}-wise {dataset} {format} seed {seed}",
        "scalenet",
        values,
        tasks=tasks,
        samples=recipe.samples,
        flops=recipe.samples * each,
        batch=recipe.batch_size,
    )


def _grid(
    recipe: LdttaRecipe,
    planner: Planner,
    format: Format,
    dataset: str,
    task: str,
    networks: dict[str, Stage],
    methods: list[Any],
    seed: int,
) -> Stage:
    lengths, shape = planner.lengths([task]), planner.shape
    values: dict[str, Any] = {
        "model": planner.model_settings,
        "data": _rows(recipe, task, format, "test", limit=recipe.rows),
        "validation": _rows(recipe, task, format, "validation", limit=recipe.validation_rows),
        "methods": methods,
        "steps": recipe.steps,
        "fixed_rate": recipe.fixed_rate,
        "generate": recipe.generate,
        "generate_methods": methods if recipe.generate else [],
    }
    named = {"layer": "layerwise", "step": "stepwise", "constant": "constants"}
    values |= {named[granularity]: network.made for granularity, network in networks.items()}
    whole, each = lengths.prompt + lengths.answer, 0.0
    for method in methods:
        for K in recipe.steps:
            if (method == "none") == (K == 0):
                each += K * shape.step_flops(lengths.prompt) + shape.forward_flops(whole)
                each += shape.decode_flops(whole, 2 * lengths.answer) if K in recipe.generate else 0.0
    return planner.stage(
        f"evaluate {task} {format} seed {seed}",
        "evaluate",
        values,
        tasks=[task],
        needs=list(networks.values()),
        samples=recipe.rows,
        flops=recipe.rows * each,
        batch=16,
        dataset=dataset,
        task=task,
        format=format,
        seed=seed,
    )
