"""The recipes of the papers' results: configs/reproduce/NAME.yaml, each value with the paper's sentence beside it."""

from __future__ import annotations

from pathlib import Path

from ephemera.config import LdttaRecipe, TaskWeaverRecipe, load_config
from ephemera.messages import unknown

HERE = Path(__file__).parent
RECIPES: dict[str, type[LdttaRecipe | TaskWeaverRecipe]] = {
    **dict.fromkeys(("fig3", "table1", "table2", "fig4", "fig5"), LdttaRecipe),
    **dict.fromkeys(("taskweaver-table2", "taskweaver-analysis"), TaskWeaverRecipe),
}


def recipe_file(name: str) -> Path:
    """configs/reproduce/NAME.yaml of the checkout, or of the installed package."""
    checkout = HERE.parent.parent.parent / "configs" / "reproduce" / f"{name}.yaml"
    return checkout if checkout.exists() else HERE / "recipes" / f"{name}.yaml"


def load_recipe(name: str, overrides: list[str] | None = None) -> LdttaRecipe | TaskWeaverRecipe:
    """ValueError names the results that there are, and any mistake in the settings."""
    if name not in RECIPES:
        raise unknown("result", name, RECIPES)
    recipe = load_config(RECIPES[name], str(recipe_file(name)), overrides)
    if isinstance(recipe, LdttaRecipe) and not all(recipe.datasets.values()):
        raise ValueError("each of datasets needs at least one task, as nq-open: [nq-open].")
    if isinstance(recipe, LdttaRecipe) and max(recipe.steps) > recipe.max_steps:
        raise ValueError(f"steps holds {max(recipe.steps)}, more than max_steps={recipe.max_steps} (Kmax).")
    return recipe
