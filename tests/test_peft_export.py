"""An adapter that acts on the answer alone, in PEFT: its activated LoRA gives the same logits, a plain one others."""

from __future__ import annotations

import io
import json
import re
import zipfile

import pytest
import torch
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM

from ephemera.inits import ZeroInit
from ephemera.model import AdaptiveLM
from ephemera.rates import FixedRate
from ephemera.serving.engine.messages import Report
from ephemera.serving.engine.methods import Method
from ephemera.serving.engine.scheduler import Engine
from reference import close
from serving_fixtures import collect, job_for, running
from tiny_models import save_tiny

PROMPTS = ["Question: who wrote the first book about the river?\n\nAnswer:", "The mill", "down to the old sea of 1820."]
ANSWERS = ["a miller's daughter", "runs, and the mill", "in the winter it"]


@pytest.fixture(params=["llama", "gpt_neox", "phi3"])
def lm(request, tmp_path) -> AdaptiveLM:
    folder = save_tiny(tmp_path / "model", request.param)
    return AdaptiveLM.from_pretrained(str(folder), rate=60.0, reach="answer", device="cpu")


def opened(lm: AdaptiveLM, folder, config: str | None = None) -> PeftModel:
    base = AutoModelForCausalLM.from_pretrained(lm.path)
    read = LoraConfig(**json.loads((folder / config).read_text())) if config else None
    return PeftModel.from_pretrained(base, str(folder), config=read).eval()


def peft_nll(model: PeftModel, prompt: list[int], answer: list[int], **more) -> torch.Tensor:
    ids = torch.tensor([[*prompt, *answer]])
    with torch.no_grad():
        logits = model(input_ids=ids, **more).logits[0, len(prompt) - 1 : -1]
    return torch.nn.functional.cross_entropy(logits, torch.tensor(answer))


def test_activated_lora_is_ours(lm, tmp_path):
    adaptation = lm.adapt(PROMPTS, steps=1)
    ours = lm.answer_nll(PROMPTS, ANSWERS, adaptation)
    base = lm.answer_nll(PROMPTS, ANSWERS)
    for row, (prompt, answer) in enumerate(zip(PROMPTS, ANSWERS, strict=True)):
        folder = adaptation.export_peft(tmp_path / f"adapter-{row}", row)
        ids, answer_ids = lm.encode(prompt), lm.encode_answer(prompt, answer)
        activated = opened(lm, folder, "adapter_config.alora.json")
        assert activated.peft_config["default"].alora_invocation_tokens == [ids[-1]]
        where = {"alora_offsets": [1 + len(answer_ids)]}
        close(peft_nll(activated, ids, answer_ids, **where), ours[row], 1e-4)
        if ids[-1] not in answer_ids:
            close(peft_nll(activated, ids, answer_ids), ours[row], 1e-4)
        new = activated.generate(input_ids=torch.tensor([ids]), max_new_tokens=8, do_sample=False, pad_token_id=0)[
            0, len(ids) :
        ]
        text = lm.backbone.tokenizer.decode(new, skip_special_tokens=True)
        assert text == lm.generate(PROMPTS, adaptation=adaptation, max_new_tokens=8)[row]
        everywhere = peft_nll(opened(lm, folder), ids, answer_ids)  # a plain LoRA, as the card says
        assert (everywhere - ours[row]).abs() > 1e-3
        assert (ours[row] - base[row]).abs() > 1e-3


def test_the_card_s_code_runs(lm, tmp_path, monkeypatch):
    adaptation = lm.adapt(PROMPTS[0], steps=1)
    folder = adaptation.export_peft(tmp_path / "adapter")
    card = (folder / "README.md").read_text()
    assert f"last token, {lm.encode(PROMPTS[0])[-1]}," in card
    (code,) = re.findall(r"```python\n(.*?)```", card, flags=re.S)
    names = {
        "model": AutoModelForCausalLM.from_pretrained(lm.path),
        "prompt": {"input_ids": torch.tensor([lm.encode(PROMPTS[0])]), "max_new_tokens": 2, "pad_token_id": 0},
    }
    monkeypatch.chdir(tmp_path)
    exec(code, names)
    assert isinstance(names["model"], PeftModel)


def test_an_adapter_of_every_token_has_neither(lm, tmp_path):
    lm.reach = "all"
    folder = lm.adapt(PROMPTS[0], steps=1).export_peft(tmp_path / "adapter")
    assert {path.name for path in folder.iterdir()} <= {"adapter_config.json", "adapter_model.safetensors"}


def test_the_server_s_zip(llama, tmp_path):
    for reach in ("all", "answer"):
        method = Method("m", "fixed", ZeroInit(), FixedRate(3.0), 3, reach)
        job = job_for(llama, method, PROMPTS[0], steps=1, n=0, adapter=True)
        with running(Engine(llama)) as engine:
            (events,) = collect([job], engine)
        (report,) = [e for e in events if isinstance(e, Report)]
        assert report.adapter is not None
        with zipfile.ZipFile(io.BytesIO(report.adapter)) as archive:
            names = set(archive.namelist())
            assert {"adapter_config.json", "adapter_model.safetensors"} <= names
            assert ("adapter_config.alora.json" in names) == ("README.md" in names) == (reach == "answer")
            if reach == "answer":
                config = json.loads(archive.read("adapter_config.alora.json"))
                assert config["alora_invocation_tokens"] == [job.ids[-1]]
