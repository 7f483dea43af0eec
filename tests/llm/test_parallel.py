"""Models larger than one device: two processes, or weights that lie elsewhere, give what one process gives."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.distributed.configuration_utils import DistributedConfig

from ephemera import AdaptiveLM
from ephemera.llm.load import frozen_lm, load_backbone
from ephemera.llm.parallel.offload import OffloadLM
from ephemera.llm.parallel.tensor import check_divides
from parallel_worker import PROMPTS, ended, found, launch, uneven
from reference import close
from tiny_models import save_tiny, tiny_tokenizer

MODELS = ("llama", "qwen3")
CASES = [f"{mode} {model} {reach}" for mode in ("tensor", "fsdp") for model in MODELS for reach in ("all", "answer")]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for model in MODELS:
        save_tiny(folder / model, model)
    return folder


@pytest.fixture(scope="module")
def of_two(models: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes found."""
    out = tmp_path_factory.mktemp("two")
    for code, _, errors in ended(launch(*[["all", str(models), str(out)]] * 2)):
        assert code == 0, errors
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(2)]


def check(have: dict[str, Any], want: dict[str, Any]) -> None:
    """Numbers to 1e-6, texts and the fingerprint exactly."""
    assert have["fingerprint"] == want["fingerprint"]
    assert have["texts"] == want["texts"]
    assert len(have["A"]) == len(have["texts"])
    for key in ("nll", "rates", "A", "B", "answer nll", "base nll", "left"):
        if want[key] is not None:
            close(torch.tensor(have[key]).double(), torch.tensor(want[key]).double(), 1e-6)
    if want["gated"] is not None:
        assert len(set(want["gated"][0])) > 2, "the gate keeps different shares"
        for mine, theirs in zip(have["gated"], want["gated"], strict=True):
            close(torch.tensor(mine).double(), torch.tensor(theirs).double(), 1e-6)
    for mine, theirs in zip(have["common words"], want["common words"], strict=True):
        close(torch.tensor(mine).double(), torch.tensor(theirs).double(), 1e-6)


@pytest.mark.parametrize("case", CASES)
def test_two_processes_give_what_one_gives(case: str, models: Path, of_two: list[dict[str, Any]]):
    mode, model, reach = case.split()
    want = found(models / model, parallel="none", reach=reach, fast=False)
    assert torch.tensor(want["B"]).abs().amax(1).min() > 1e-3, "every adapter moved"
    assert len({len(text) for text in want["texts"]}) > 1, "answers end at different tokens"
    for have in of_two:
        assert have[case]["class"] == {"tensor": "TensorLM", "fsdp": "FsdpLM"}[mode]
        check(have[case], want)


def test_fewer_rows_than_processes(models: Path, of_two: list[dict[str, Any]]):
    want = found(models / "llama", parallel="none", prompts=1, fast=False)
    for have in of_two:
        check(have["fsdp llama one row"], want)


def test_processes_whose_answers_need_unequal_numbers_of_passes(models: Path, of_two: list[dict[str, Any]]):
    want = uneven(AdaptiveLM.from_pretrained(str(models / "llama"), rate=0.1, fast=False))
    for have in of_two:
        assert have["uneven answers"] == pytest.approx(want, abs=1e-4)  # float32


def test_different_prompts_are_refused_on_every_process(of_two: list[dict[str, Any]]):
    for have in of_two:
        assert "the processes were given different prompts" in have["different prompts"]


def test_who_loses_another_process_says_so_in_one_line(models: Path):
    (code, said, errors), (other, _, _) = ended(launch(*[["dies", str(models)]] * 2))
    assert other == 3
    assert code == 0, errors
    assert said.startswith("another process ended before its work was done")


def test_the_command_answers_once(models: Path):
    asked = ["answer", "--parallel", "tensor", "--model", str(models / "llama"), "--rate", "0.1", "--device", "cpu"]
    asked += ["--max-new-tokens", "3", "Who wrote it?"]
    first, second = ended(launch(asked, asked, script="ephemera"))
    assert (first[0], second[0]) == (0, 0), first[2] + second[2]
    assert first[1].strip()
    assert "parallel: tensor over 2 processes, on the reference path" in first[2]
    assert second[1:] == ("", "")


def disk(embedding: str = "cpu") -> dict[str, str]:
    """A device map that keeps some weights on disk."""
    own = {"model.embed_tokens": embedding, "model.norm": "disk", "lm_head": "disk", "model.rotary_emb": "cpu"}
    return {**own, "model.layers.0": "cpu", "model.layers.1": "disk"}


@pytest.mark.parametrize("reach", ["all", "answer"])
@pytest.mark.parametrize("model", MODELS)
def test_offloaded_weights_give_what_whole_ones_give(model: str, reach: str, models: Path, tmp_path: Path):
    want = found(models / model, parallel="none", reach=reach, fast=False)
    where = {"device_map": disk("disk" if model == "qwen3" else "cpu"), "offload_folder": str(tmp_path)}
    for parallel in ("offload", "none"):  # a device map says the same
        have = found(models / model, parallel=parallel, reach=reach, **where)
        assert have["class"] == "OffloadLM"
        check(have, want)


def test_a_model_that_was_offloaded_already(models: Path, tmp_path: Path):
    where: dict[str, Any] = {"device_map": disk(), "offload_folder": str(tmp_path), "dtype": torch.float64}
    model = AutoModelForCausalLM.from_pretrained(models / "llama", **where)
    backbone = frozen_lm(model, tiny_tokenizer(), name="tiny", path=Path("tiny"))
    assert isinstance(backbone, OffloadLM)
    have = AdaptiveLM(backbone, rate=0.1).adapt(PROMPTS, steps=2)
    whole = load_backbone(str(models / "llama"), dtype="float64", fast=False)
    want = AdaptiveLM(whole, rate=0.1).adapt(PROMPTS, steps=2)
    close(have.lora.tensors, want.lora.tensors, 1e-6)


def test_offloaded_steps_keep_no_weight(models: Path, tmp_path: Path):
    """Each layer runs again in the backward pass: autograd holds its input, not what came in for it."""
    backbone = load_backbone(str(models / "llama"), device_map=disk(), offload_folder=str(tmp_path))
    runs: list[int] = []
    backbone.decoder.get_submodule("layers.1.mlp").register_forward_pre_hook(lambda *_: runs.append(1))
    AdaptiveLM(backbone, rate=0.1).adapt(PROMPTS[:1], steps=1)
    assert len(runs) == 2
    assert backbone.model.get_parameter("model.layers.1.mlp.up_proj.weight").is_meta


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"parallel": "tensr"}, "unknown parallel 'tensr'. Did you mean 'tensor'?"),
        ({"parallel": "tensor"}, "needs at least 2 processes"),
        ({"parallel": "fsdp"}, "torchrun --nproc-per-node 2"),
        ({"distributed_config": DistributedConfig(fsdp_size=2)}, "parallel='fsdp' instead"),
        ({"tp_size": 2}, "parallel='tensor' instead"),
        ({"parallel": "fsdp", "device_map": "auto"}, "do not go together"),
        ({"parallel": "tensor", "quantization_config": {}}, "does not cut quantization weights"),
    ],
)
def test_what_does_not_work_is_refused(given: dict[str, Any], words: str, models: Path):
    with pytest.raises(ValueError, match="parallel") as caught:
        load_backbone(str(models / "llama"), **given)
    assert words in str(caught.value)


def test_heads_that_do_not_divide():
    config = SimpleNamespace(num_attention_heads=12, num_key_value_heads=4)
    config.get_text_config = lambda: config
    check_divides("a model", config, 4)
    with pytest.raises(ValueError, match="--nproc-per-node 2 or 4"):
        check_divides("a model", config, 3)
