"""Which modules an adapter_config.json means: PEFT's own answer, over many configurations."""

import itertools

import pytest
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists

from ephemera.inits.peft_targets import PeftTargets

PATHS = [
    *(f"model.layers.{i}.self_attn.{name}_proj" for i in (0, 1, 11) for name in "qkvo"),
    *(f"model.layers.{i}.mlp.experts.{j}.up_proj" for i in (0, 1) for j in (0, 1)),
    *("lm_head", "q_proj", "transformer.h.1.attn.q_proj", "model.layers.1.self_attn.big_q_proj", "layers.1.q_proj"),
    "model.visual.blocks.0.layers.1.attn.q_proj",
]
TARGETS = [
    ["q_proj"],
    ["q_proj", "v_proj", "up_proj"],
    ["model.layers.1.self_attn.q_proj", "v_proj"],
    ["self_attn.q_proj"],
    r".*\.self_attn\.(q|v)_proj",
    r".*layers\.(0|11)\..*",
    "q_proj",
]
EXCLUDED = [None, ["v_proj"], ["model.layers.1.self_attn.q_proj"], r".*experts.*", []]
LAYERS = [None, 1, [0, 11], [], [1]]
PATTERNS = [None, "layers", ["h", "layers"], ["blocks"], []]


@pytest.mark.parametrize("targets", TARGETS, ids=str)
def test_as_peft_selects(targets):
    for excluded, layers, pattern in itertools.product(EXCLUDED, LAYERS, PATTERNS):
        given = {
            "target_modules": targets,
            "exclude_modules": excluded,
            "layers_to_transform": layers,
            "layers_pattern": pattern,
        }
        try:
            config = LoraConfig(**given)
        except ValueError:
            with pytest.raises(ValueError, match="layers_"):
                PeftTargets.of(given)
            continue
        ours = PeftTargets.of(given)
        assert ours is not None
        for path in PATHS:
            assert ours.selects(path) == (
                check_target_module_exists(config, path) in (True,) or _matched(config, path)
            ), (
                given,
                path,
            )


def _matched(config: LoraConfig, path: str) -> bool:
    found = check_target_module_exists(config, path)
    return type(found).__name__ == "Match"


def test_no_targets():
    assert PeftTargets.of({"target_modules": None}) is None
    assert PeftTargets.of({}) is None
