"""A result from its recipe: the stages it takes, and the page they make."""

from __future__ import annotations

from pathlib import Path

from ephemera.config import LdttaRecipe, TaskWeaverRecipe
from ephemera.cost import Device
from ephemera.reproduce import ldtta, taskweaver
from ephemera.reproduce.run import run_stages
from ephemera.reproduce.stages import Planner, Stage


def stages_of(recipe: LdttaRecipe | TaskWeaverRecipe, planner: Planner) -> list[Stage]:
    """In the order in which they run: a stage stands after those whose networks it reads."""
    if isinstance(recipe, LdttaRecipe):
        return ldtta.stages(recipe, planner)
    return taskweaver.stages(recipe, planner)


def reproduce(recipe: LdttaRecipe | TaskWeaverRecipe, planner: Planner, folder: Path, device: Device) -> Path:
    """Runs what is not done, then writes table.md, results.json and figures into `folder`; returns the table's path.

    `device` gives the first estimate of the time left. A stopped run goes on where it was.
    """
    from ephemera.reproduce.report import write_ldtta, write_taskweaver

    stages = stages_of(recipe, planner)
    run_stages(stages, device.flops[recipe.dtype])
    if isinstance(recipe, LdttaRecipe):
        return write_ldtta(recipe, planner.model, stages, folder)
    return write_taskweaver(recipe, planner.model, stages, folder)
