"""The generator that ships for a model's prompts: it adapts where nobody names a start, a rate or steps; in library, server, CLI."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ephemera import AdaptiveLM, inits, rates
from ephemera.inits import ZeroInit, load_generator
from ephemera.llm.frozen_lm import describe
from ephemera.llm.load import load_backbone
from ephemera.made_for import MadeFor
from ephemera.rates import PerProjectionRate
from ephemera.serving.engine import methods
from ephemera.serving.http.errors import ApiError
from ephemera.serving.http.requests import Limits, Reader
from ephemera.serving.http.schema import ChatRequest
from tiny_models import generator_of

ASKED = ["The mill runs", "Who wrote it?"]


@pytest.fixture
def ships(llama_folder, tmp_path, monkeypatch) -> Path:
    """Networks for the tiny model's chats: a generator, and a rate for who asks for steps. Their folder."""
    backbone = load_backbone(str(llama_folder), device="cpu")
    generator = load_generator(generator_of(tmp_path / "generator", backbone))
    generator.made_for = MadeFor(("squad",), "chat", "answer", 0)
    generator.save_pretrained(tmp_path / "generator", dtype=torch.float32)
    for format in ("chat", "plain"):
        made_for = MadeFor(("squad",), format, "answer", 1)
        rate = PerProjectionRate(projections=4, base_rates=[30.0], trained_for=describe(backbone), made_for=made_for)
        rate.save_pretrained(tmp_path / format)
    names = {format: str(tmp_path / format) for format in ("chat", "plain")}
    monkeypatch.setattr(rates, "DEFAULT_RATES", {str(llama_folder): names})
    monkeypatch.setattr(inits, "DEFAULT_STARTS", {str(llama_folder): {"chat": str(tmp_path / "generator")}})
    return tmp_path


def test_what_adapts_if_nothing_is_named(llama_folder, ships):
    load, model = AdaptiveLM.from_pretrained, str(llama_folder)
    lm = load(model, chat=True, device="cpu")
    generated = load(model, init=ships / "generator", chat=True, device="cpu").generate(ASKED, max_new_tokens=8)
    stepped = load(model, rate=ships / "chat", chat=True, device="cpu").generate(ASKED, max_new_tokens=8)
    plain = load(model, rate="none", chat=True, device="cpu").generate(ASKED, max_new_tokens=8)
    assert len({*generated, *stepped, *plain}) == 6
    assert lm.generate(ASKED, max_new_tokens=8) == generated
    texts, adaptation = lm.reply(ASKED, max_new_tokens=8)
    assert (texts, adaptation.steps, adaptation.reach) == (generated, 0, "answer")
    assert adaptation.notes == (None, None)
    for named in ({"steps": 1}, {"rate": ships / "chat"}):
        assert lm.generate(ASKED, max_new_tokens=8, **named) == stepped
    assert lm.generate(ASKED, steps=0, max_new_tokens=8) == plain
    assert lm.generate(ASKED, adaptation=lm.adapt(ASKED, init="zero"), max_new_tokens=8) == stepped
    assert load(model, device="cpu").unasked is None, "none ships for plain prompts"
    assert load(model, chat=True, reach="all", device="cpu").unasked is None, "it was made for answers"
    assert load(model, chat=True, lora={"r": 2}, device="cpu").unasked is None


def chat(reader: Reader, model: str, steps: int | None):
    asked = {"model": model, "messages": [{"role": "user", "content": ASKED[0]}]}
    body = ChatRequest.model_validate(asked if steps is None else {**asked, "adapt": {"steps": steps}})
    (job,) = reader.jobs(body, [reader.chat(body.messages)])
    return job.method, job.steps


def test_a_server_takes_it_where_no_steps_are_asked_for(llama_folder, ships):
    backbone = load_backbone(str(llama_folder), device="cpu")
    found = methods.offer(str(llama_folder), [])
    assert list(found.unasked) == ["chat"]
    known = methods.build(backbone, "zero", found.rates, defaults=found.defaults, unasked=found.unasked)
    model = known[1].model_id
    reader = Reader(backbone, known, limits=Limits())
    method, steps = chat(reader, model, None)
    assert (method.init, method.rate, steps, method.name) == (found.unasked["chat"], None, 0, "universal")
    assert method.adapts(0)
    method, steps = chat(reader, model, 1)
    assert (type(method.init), method.rate, steps) == (ZeroInit, found.defaults["chat"], 1)
    assert chat(reader, model, 0)[0].adapts(0) is False
    with pytest.raises(ApiError, match=r"more than .* takes \(1\)"):
        chat(reader, model, 2)
    method, steps = chat(Reader(backbone, known, limits=Limits(), steps=1), model, None)
    assert (method.rate, steps) == (found.defaults["chat"], 1), "the server's own default is asked for"
    told = reader.describe(model, 0)
    assert (told["steps"], told["max_steps"], told["format"]) == (0, 1, ["chat", "plain"])
    assert [reader.describe(m.model_id, 0)["generates"] for m in known] == [False, True, True, False]
    everywhere = methods.build(
        backbone, "zero", found.rates, defaults=found.defaults, unasked=found.unasked, reach="all"
    )
    assert all(method.unasked is None for method in everywhere)
    assert methods.offer(str(llama_folder), [], "taskweaver").unasked == {}
