"""Adapters for vLLM and SGLang: PEFT opens each with our logits, and nothing in them belongs to this machine."""

from __future__ import annotations

import json
import zipfile

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from ephemera.cli import main
from ephemera.model import AdaptiveLM
from reference import close
from tiny_models import save_tiny

PROMPTS = ["Question: who wrote the first book?\n\nAnswer:", "The mill", "The mill"]
ANSWERS = ["a miller's daughter", "runs", "runs"]


@pytest.fixture(params=["llama", "gpt_neox"])
def lm(request, tmp_path) -> AdaptiveLM:
    folder = save_tiny(tmp_path / "model", request.param)
    return AdaptiveLM.from_pretrained(str(folder), rate=60.0, reach="all", device="cpu")


def nll(model, prompt: list[int], answer: list[int]) -> torch.Tensor:
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1]
    return torch.nn.functional.cross_entropy(logits, torch.tensor(answer))


def test_peft_opens_each_with_our_logits(lm, tmp_path):
    made = lm.adapt(PROMPTS, steps=1)
    ours, base = lm.answer_nll(PROMPTS, ANSWERS, made), lm.answer_nll(PROMPTS, ANSWERS)
    folder = made.export_all(tmp_path / "all", base_model="someone/tiny")
    manifest = json.loads((folder / "manifest.json").read_text())
    assert [entry["prompt"] for entry in manifest["adapters"]] == PROMPTS
    assert len({entry["name"] for entry in manifest["adapters"]}) == len(PROMPTS)
    for row, entry in enumerate(manifest["adapters"]):
        config = json.loads((folder / entry["name"] / "adapter_config.json").read_text())
        assert config["lora_alpha"] == config["r"]
        assert config["base_model_name_or_path"] == "someone/tiny"
        peft = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(lm.path), str(folder / entry["name"])
        ).eval()
        ids, answer = lm.encode(PROMPTS[row]), lm.encode_answer(PROMPTS[row], ANSWERS[row])
        close(nll(peft, ids, answer), ours[row], 1e-4)
        assert (ours[row] - base[row]).abs() > 1e-3
    for path in folder.rglob("*.json"):
        assert str(tmp_path) not in path.read_text()


def test_one_zip_in_another_dtype(lm, tmp_path):
    made = lm.adapt(PROMPTS[:2], steps=1)
    output = made.export_all(tmp_path / "all.zip", base_model="tiny", dtype="bfloat16")
    with zipfile.ZipFile(output) as archive:
        archive.extractall(tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["dtype"] == "bfloat16"
    state = load_file(tmp_path / "out" / manifest["adapters"][1]["name"] / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in state.values()} == {torch.bfloat16}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["all.zip", "model", "out"]


def test_refusals(lm, tmp_path):
    made = lm.adapt("The mill", steps=1)
    made.export_all(tmp_path / "all", base_model="tiny")
    for words, output, more in [
        ("exists already", "all", {}),
        ("base_model is the path", "new", {"base_model": str(lm.path)}),
        ("unknown dtype of adapters 'int8'", "new", {"dtype": "int8"}),
    ]:
        with pytest.raises(ValueError, match=words):
            made.export_all(tmp_path / output, **{"base_model": "tiny", **more})
    assert not (tmp_path / "new").exists()


def test_the_command(tmp_path, monkeypatch, capsys):
    folder = save_tiny(tmp_path / "model", "llama")
    rows = tmp_path / "prompts.jsonl"
    rows.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    common = [
        "ephemera",
        "export",
        "--model",
        str(folder),
        "--rate",
        "60",
        "--device",
        "cpu",
        "--output",
        str(tmp_path / "all"),
    ]
    monkeypatch.setattr("sys.argv", [*common, "--file", str(rows)])
    with pytest.raises(SystemExit):
        main()
    assert "need --all" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", [*common, "--file", str(rows), "--all"])
    with pytest.raises(SystemExit) as done:
        main()
    assert not done.value.code
    manifest = json.loads((tmp_path / "all" / "manifest.json").read_text())
    assert manifest["base_model"] == "model"
    assert len(manifest["adapters"]) == 3
