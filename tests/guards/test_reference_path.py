"""Everything runs without fast/, with the same results up to rounding: it changes cost only."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ephemera
from ephemera import AdaptiveLM
from ephemera.fast.fast_lm import FastLM
from ephemera.llm.frozen_lm import FrozenLM
from ephemera.llm.load import load_backbone
from reference import close
from tiny_models import ARCHITECTURES, random_scalenet, tiny_model, tiny_tokenizer

PROMPTS = (
    "The river runs past the old mill.",
    "who wrote it?",
    "Give a short answer of the following question. The sea",
)
ANSWERS = (" and down to the sea", " a miller", " in the winter")
SRC = Path(ephemera.__file__).parent


@pytest.mark.parametrize("reach", ["all", "answer"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_both_paths_give_the_same(architecture: str, reach: str):
    found = []
    for make in (FrozenLM, FastLM):
        backbone = make(tiny_model(architecture), tiny_tokenizer(), name="tiny", path=Path("tiny"))
        lm = AdaptiveLM(backbone, rate=random_scalenet(backbone), reach="all" if reach == "all" else "answer")
        adaptation = lm.adapt(PROMPTS, steps=2)
        nll_B = lm.answer_nll(PROMPTS, ANSWERS, adaptation=adaptation)
        texts = lm.generate(PROMPTS, adaptation=adaptation, max_new_tokens=6)
        found.append((adaptation, nll_B, texts))
    (plain, plain_nll_B, plain_texts), (fast, fast_nll_B, fast_texts) = found
    assert (plain.initial_lora.B_BN == 0).all()
    assert (plain.lora.B_BN != 0).any()
    close(fast.rates_BKM, plain.rates_BKM, 1e-5)  # h(x) is float32
    close(fast.prompt_nll_BK, plain.prompt_nll_BK, 1e-5)
    close(fast.lora.tensors, plain.lora.tensors, 1e-5)
    close(fast_nll_B, plain_nll_B, 1e-5)
    assert fast_texts == plain_texts


CODE = """
import json, sys
from ephemera import AdaptiveLM
lm = AdaptiveLM.from_pretrained(sys.argv[1], rate=0.1)
adaptation = lm.adapt(["The river runs.", "Who wrote it?"], steps=2)
lm.generate(["The river runs.", "Who wrote it?"], adaptation=adaptation, max_new_tokens=3)
loaded = [name for name in sys.modules if name.startswith("ephemera.fast.")]
print(json.dumps({"class": type(lm.backbone).__name__, "fast": loaded, "nll": adaptation.prompt_nll_BK.tolist()}))
"""


def test_the_environment_turns_it_off(llama_folder: Path):
    found = {}
    for value in ("0", "1"):
        env = {**os.environ, "EPHEMERA_FAST": value, "PYTHONPATH": str(SRC.parent)}
        command = [sys.executable, "-c", CODE, str(llama_folder)]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
        found[value] = json.loads(done.stdout)
    assert found["0"]["class"] == "FrozenLM"
    assert found["0"]["fast"] == []
    assert found["1"]["class"] == "FastLM"
    torch.testing.assert_close(torch.tensor(found["0"]["nll"]), torch.tensor(found["1"]["nll"]), rtol=1e-4, atol=1e-4)


def test_asking_for_what_only_the_fast_path_has(llama_folder: Path):
    assert type(load_backbone(str(llama_folder), fast=False)) is FrozenLM
    with pytest.raises(ValueError, match="checkpoint is part of the fast path"):
        load_backbone(str(llama_folder), fast=False, checkpoint=True)


@pytest.mark.parametrize("value", ["yes", ""])
def test_the_environment_says_0_or_1(value: str, llama_folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("EPHEMERA_FAST", value)
    with pytest.raises(ValueError, match=f"EPHEMERA_FAST is '{value}'; set it to 1"):
        load_backbone(str(llama_folder))


def test_norms_that_somebody_changed_stay_changed():
    """A norm with a hook, and one that another module has replaced since the model was loaded."""
    found = []
    for make in (FrozenLM, FastLM):
        backbone = make(tiny_model("llama"), tiny_tokenizer(), name="tiny", path=Path("tiny"))
        unchanged = AdaptiveLM(backbone).answer_nll(PROMPTS, ANSWERS)
        first, last = backbone.decoder.layers[0], backbone.decoder.layers[-1]
        first.input_layernorm.register_forward_pre_hook(lambda module, args: (args[0] + 0.5,))
        last.post_attention_layernorm = torch.nn.Identity()
        nll_B = AdaptiveLM(backbone).answer_nll(PROMPTS, ANSWERS)
        assert (nll_B - unchanged).abs().min() > 1e-4
        found.append(nll_B)
    close(found[1], found[0], 1e-5)


RUNS_MODELS = ("llm", "fast", "early_exit", "inits", "rates", "serving", "evaluation")
FILES = [*SRC.glob("*.py"), *(path for part in RUNS_MODELS for path in sorted((SRC / part).rglob("*.py")))]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SRC)))
def test_only_one_place_changes_modules_that_are_not_ours(path: Path):
    """`replaced` gives attributes back."""
    if path.name == "replaced.py":
        return
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
            settings = name == "setattr" and ast.unparse(node.args[0]).startswith(("settings", "config"))
            changes = name in {"setattr", "register_module", "add_module", "set_submodule"}
            assert settings or not changes, ast.unparse(node)
            if name in {"register_forward_hook", "register_forward_pre_hook"}:
                raise AssertionError(ast.unparse(node))
        if isinstance(node, ast.Assign):
            for target in node.targets:
                ours = isinstance(target, ast.Attribute) and target.attr in {
                    "forward",
                    "weight",
                    "_attn_implementation",
                }
                assert not ours, ast.unparse(node)
