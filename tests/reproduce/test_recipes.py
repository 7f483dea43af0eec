"""Each result's YAML: it loads, it plans every model that the papers name, and its values are the papers'."""

from __future__ import annotations

from pathlib import Path

import pytest

from ephemera.config import LdttaRecipe, TaskWeaverRecipe
from ephemera.cost import device_of, shape_of, shipped_shapes
from ephemera.reproduce.recipe import RECIPES, load_recipe, recipe_file
from ephemera.reproduce.result import stages_of
from ephemera.reproduce.run import duration, plan_table
from ephemera.reproduce.stages import Planner

LDTTA = [name for name, kind in RECIPES.items() if kind is LdttaRecipe]


def planned(name: str, model: str, *overrides: str, root: Path = Path("runs")):
    recipe = load_recipe(name, list(overrides))
    return recipe, stages_of(recipe, Planner(recipe, root, model, shape_of(model)))


@pytest.mark.parametrize("name", RECIPES)
def test_every_file_plans_every_model_that_it_names(name):
    recipe = load_recipe(name)
    assert recipe.result == name
    assert set(recipe.models) <= set(shipped_shapes())
    for model in [*recipe.models, "smollm2-135m-instruct"]:
        _, stages = planned(name, model)
        assert len({stage.folder for stage in stages}) == len(stages)
        assert all(stage.flops > 0 and stage.bytes > 0 and stage.samples > 0 for stage in stages)
        page = plan_table(recipe.title, stages, device_of("h200"), recipe.dtype).markdown()
        assert all(stage.name in page for stage in stages)


def test_the_papers_models_are_all_named():
    named = {model for name in RECIPES for model in load_recipe(name).models}
    assert named == set(shipped_shapes()) - {"smollm2-135m-instruct"}


@pytest.mark.parametrize("name", RECIPES)
def test_each_value_has_its_sentence(name):
    """A setting with a value carries a comment on its own line, a quotation or a word on why there is none."""
    lines = recipe_file(name).read_text().splitlines()
    bare = [
        line
        for line in lines
        if line[:1].isalpha() and not line.startswith(("title:", "result:", "source:")) and "#" not in line
    ]
    free = ("rows:", "max_tokens:", "seeds:", "lora:", "datasets:", "published:", "lengths:")
    assert [line for line in bare if not line.startswith(free)] == []
    assert sum('# "' in line for line in lines) >= 5


@pytest.mark.parametrize("name", LDTTA)
def test_published_rows_have_a_figure_for_each_k(name):
    recipe = load_recipe(name)
    assert isinstance(recipe, LdttaRecipe)
    columns = len(recipe.generate or recipe.steps)
    assert all(len(row) == columns for table in recipe.published.values() for row in table.values())


def test_the_papers_settings_of_ldtta():
    recipe = load_recipe("table1")
    assert isinstance(recipe, LdttaRecipe)
    assert (recipe.lora.r, recipe.lora.lora_alpha, recipe.lora.init_std) == (4, 16, 0.01)
    assert (recipe.samples, recipe.rows, recipe.max_steps, recipe.mlp_size) == (30_000, 300, 5, 128)
    assert (recipe.learning_rate, recipe.base_rates, recipe.fixed_rate) == (1e-4, [1e-2], 5e-2)


def test_the_papers_settings_of_taskweaver():
    recipe = load_recipe("taskweaver-table2")
    assert isinstance(recipe, TaskWeaverRecipe)
    assert (recipe.lora.r, recipe.lora.lora_alpha) == (2, 8)
    assert (recipe.lora_steps, recipe.lora_batch_size, recipe.lora_learning_rate) == (500, 4, 5e-5)


def test_a_training_stage_by_hand():
    """30,000 prompts of 33 tokens and 5 of an answer: on average three steps, then one pass with its backward pass."""
    _, stages = planned("fig3", "smollm2-135m-instruct", "datasets={nq-open: [nq-open]}")
    (stage,) = [s for s in stages if s.name == "train layer-wise nq-open plain seed 0"]
    D, L, F, V, C = 576, 30, 1536, 49152, 64
    matrices = D * (2 * 9 * C + 2 * 3 * C + 3 * F)

    def step(tokens: int) -> int:
        return 2 * (L * (2 * tokens * matrices + 2 * tokens**2 * 9 * C) + 2 * tokens * D * V)

    assert stage.flops == pytest.approx(30_000 * (3 * step(33) + step(38)))


def test_results_share_the_stages_that_they_have_in_common():
    one = ["datasets={nq-open: [nq-open]}", "source=rows/{task}"]
    _, figure3 = planned("fig3", "smollm2-135m-instruct", *one)
    _, figure5 = planned("fig5", "smollm2-135m-instruct", *one)
    layerwise = {s.folder for s in figure3 if "layer-wise" in s.name}
    assert layerwise == {s.folder for s in figure5 if "layer-wise" in s.name}
    _, elsewhere = planned("fig5", "smollm2-135m-instruct", *one, root=Path("other"))
    assert {f.name for f in layerwise} == {s.folder.name for s in elsewhere if "layer-wise" in s.name}
    for other in ("samples=100", "seeds=[1]", "lora.r=8", "formats=[chat]"):
        _, changed = planned("fig5", "smollm2-135m-instruct", *one, other)
        assert not layerwise & {s.folder for s in changed}


def test_other_rows_make_another_stage(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"question": "who", "answer": ["me"]}\n')
    settings = ["datasets={nq-open: [nq-open]}", f"source={rows}"]
    before = {s.folder for s in planned("fig5", "smollm2-135m-instruct", *settings)[1]}
    rows.write_text('{"question": "who", "answer": ["you"]}\n')
    assert not before & {s.folder for s in planned("fig5", "smollm2-135m-instruct", *settings)[1]}


def test_learned_methods_alone_are_run_for_further_seeds():
    _, stages = planned("fig3", "smollm2-135m-instruct", "datasets={nq-open: [nq-open]}", "seeds=[0, 1]")
    first, second = (s.settings for s in stages if s.kind == "evaluate")
    assert first.model_dump()["methods"] == ["none", "fixed", "stepwise", "layerwise", "averaged"]
    assert second.model_dump()["methods"] == ["stepwise", "layerwise", "averaged"]


def test_what_does_not_fit_is_said():
    recipe, stages = planned("table1", "Llama-3.3-70B-Instruct")
    assert "more than it has" in plan_table("", stages, device_of("h100"), recipe.dtype).markdown()
    recipe, stages = planned("table1", "smollm2-135m-instruct")
    assert "more than it has" not in plan_table("", stages, device_of("h100"), recipe.dtype).markdown()


@pytest.mark.parametrize(
    ("name", "override", "message"),
    [
        ("fig6", "rows=3", "unknown result 'fig6'"),
        ("fig3", "steps=[0, 7]", "steps holds 7, more than max_steps=5"),
        ("fig3", "datasets={nq-open: []}", "each of datasets needs at least one task"),
        ("fig3", "samples=0", "samples"),
        ("fig3", "smaples=4", "smaples"),
    ],
)
def test_mistakes_are_told_at_once(name, override, message):
    with pytest.raises(ValueError, match=message):
        load_recipe(name, [override])


def test_durations():
    assert [duration(s) for s in (20, 700, 7_000, 100_000)] == ["20 s", "12 min", "1 h 57 min", "27 h 47 min"]
