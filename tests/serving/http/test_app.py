"""The server, asked by the clients that people use."""

from __future__ import annotations

import base64
import io
import json
import zipfile
from contextlib import suppress

import httpx
import pytest
import torch
from safetensors.torch import load

from ephemera.serving.http.requests import Limits
from ephemera.serving.http.schema import ChatRequest
from serving_fixtures import PROMPTS, live, solo, tiny_methods
from tiny_models import tiny_backbone

openai = pytest.importorskip("openai")
KEY = "a-key"


@pytest.fixture(scope="module")
def served():
    backbone = tiny_backbone("llama")
    known = tiny_methods(backbone)
    with live(backbone, known, keys=("another", KEY)) as (url, engine):
        yield url, engine, backbone, {m.name: m for m in known}


@pytest.fixture(scope="module")
def client(served):
    with openai.OpenAI(base_url=f"{served[0]}/v1", api_key=KEY, max_retries=0) as made:
        yield made


@pytest.fixture(scope="module")
def raw(served):
    with httpx.Client(base_url=served[0], headers={"Authorization": f"Bearer {KEY}"}, timeout=60) as made:
        yield made


CHAT = [{"role": "user", "content": PROMPTS[0]}]


@pytest.mark.parametrize("name", ["none", "fixed", "layerwise", "generated", "generated+layerwise"])
def test_chat_equals_the_library(served, client, name):
    _, _, backbone, known = served
    model = "tiny-llama" if name == "none" else f"tiny-llama:{name}"
    made = client.chat.completions.create(model=model, messages=CHAT, temperature=0, max_tokens=12)
    steps = min(2, known[name].max_steps)
    assert made.choices[0].message.content == solo(backbone, known[name], PROMPTS[0], steps=steps, chat=True)
    assert made.ephemera["method"] == name
    assert made.ephemera["steps"] == steps
    assert len(made.ephemera["prompt_nll"]) == (steps + 1 if steps else 0)  # and what the last step left
    assert made.usage.total_tokens == made.usage.prompt_tokens + made.usage.completion_tokens
    assert made.object == "chat.completion"


def test_a_conversation_goes_through_the_template(served, client):
    _, _, backbone, known = served
    talk = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "The "}, {"type": "text", "text": "mill"}]},
        {"role": "assistant", "content": "runs"},
        {"role": "user", "content": "And the river?"},
    ]
    plain = [{**m, "content": "The mill" if isinstance(m["content"], list) else m["content"]} for m in talk]
    text = backbone.tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=True)
    made = client.chat.completions.create(model="tiny-llama:fixed", messages=talk, temperature=0, max_tokens=9)
    # as a plain prompt the tokenizer adds the BOS that the template has already written
    want = solo(backbone, known["fixed"], text.removeprefix("<s>"), steps=2, tokens=9)
    assert made.choices[0].message.content == want


def test_streaming_gives_the_same(client, raw):
    ask = {"model": "tiny-llama:layerwise", "messages": CHAT, "temperature": 0, "max_tokens": 12}
    whole = client.chat.completions.create(**ask, extra_body={"adapt": {"trace": True}})
    chunks = list(
        client.chat.completions.create(
            **ask, stream=True, stream_options={"include_usage": True}, extra_body={"adapt": {"trace": True}}
        )
    )
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    last = [c for c in chunks if c.choices][-1]
    assert last.choices[0].finish_reason == whole.choices[0].finish_reason
    for key in ("prompt_nll", "trace", "steps", "method", "reach", "note"):
        assert last.ephemera[key] == whole.ephemera[key]
    assert len(last.ephemera["trace"]["rates"]) == 2
    lines = raw.post("/v1/chat/completions", json={**ask, "stream": True}).text.split("\n\n")
    assert lines[:2] == [": adapting 1/2", ": adapting 2/2"]
    assert lines[-2] == "data: [DONE]"


def test_completions(served, client):
    _, _, backbone, known = served
    made = client.completions.create(model="tiny-llama:fixed", prompt=list(PROMPTS[:3]), temperature=0, max_tokens=10)
    want = [solo(backbone, known["fixed"], p, steps=2, tokens=10) for p in PROMPTS[:3]]
    assert [c.text for c in made.choices] == want
    assert len(made.ephemera) == 3
    chunks = client.completions.create(
        model="tiny-llama:fixed", prompt=PROMPTS[1], temperature=0, max_tokens=10, stream=True
    )
    assert "".join(c.choices[0].text for c in chunks) == want[1]


def test_n_seed_and_stop(client):
    ask = {"model": "tiny-llama", "messages": CHAT, "n": 3, "seed": 5, "max_tokens": 8}
    one, two = (client.chat.completions.create(**ask) for _ in range(2))
    texts = [c.message.content for c in one.choices]
    assert [c.index for c in one.choices] == [0, 1, 2]
    assert texts == [c.message.content for c in two.choices]
    assert len(set(texts)) == 3
    greedy = client.completions.create(model="tiny-llama", prompt=PROMPTS[1], temperature=0, max_tokens=24)
    text = greedy.choices[0].text
    stop = text[5:8]
    cut = client.completions.create(model="tiny-llama", prompt=PROMPTS[1], temperature=0, max_tokens=24, stop=[stop])
    assert cut.choices[0].text == text[: text.find(stop)]
    assert cut.choices[0].finish_reason == "stop"


def test_logprobs(client, served):
    backbone = served[2]
    made = client.chat.completions.create(
        model="tiny-llama", messages=CHAT, temperature=0, max_tokens=3, logprobs=True, top_logprobs=2
    )
    entries = made.choices[0].logprobs.content
    text = backbone.tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    ids = backbone.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logp_V = backbone.model(input_ids=ids).logits[0, -1].log_softmax(-1)
    assert entries[0].logprob == pytest.approx(float(logp_V.max()), abs=1e-5)
    assert [t.logprob for t in entries[0].top_logprobs] == pytest.approx(logp_V.topk(2).values.tolist(), abs=1e-5)
    assert len(entries) == made.usage.completion_tokens
    old = client.completions.create(model="tiny-llama", prompt=PROMPTS[0], temperature=0, max_tokens=3, logprobs=2)
    assert len(old.choices[0].logprobs.token_logprobs) == len(old.choices[0].logprobs.tokens) == 3


def test_adapt(raw, served):
    _, _, backbone, known = served
    ask = {"model": "tiny-llama:fixed", "prompt": PROMPTS[0], "adapt": {"steps": 2}}
    made = raw.post("/v1/adapt", json={**ask, "adapter": True}).json()
    assert made["object"] == "adaptation"
    assert len(made["ephemera"]["trace"]["rates"]) == 2
    zipped = raw.post("/v1/adapt", json=ask, headers={"Accept": "application/zip"})
    assert zipped.headers["content-type"] == "application/zip"
    from ephemera.model import AdaptiveLM

    want = AdaptiveLM(backbone, init=known["fixed"].init, rate=known["fixed"].rate).adapt(PROMPTS[0], steps=2)
    for packed in (base64.b64decode(made["adapter"]), zipped.content):
        with zipfile.ZipFile(io.BytesIO(packed)) as archive:
            assert json.loads(archive.read("adapter_config.json"))["peft_type"] == "LORA"
            state = load(archive.read("adapter_model.safetensors"))
        for key, tensor in want.lora.peft_state_dict(0).items():
            torch.testing.assert_close(state[key], tensor)
    refused = raw.post("/v1/adapt", json={"model": "tiny-llama", "prompt": "x y", "adapter": True})
    assert refused.status_code == 400
    assert raw.post("/v1/adapt", json={**ask, "messages": CHAT}).status_code == 400


def test_models(client):
    listed = {m.id: m for m in client.models.list()}
    assert listed["tiny-llama"].method == "none"
    assert listed["tiny-llama"].format == ["chat", "plain"]
    assert listed["tiny-llama"].reach is None
    assert listed["tiny-llama:layerwise"].max_steps == 5
    assert listed["tiny-llama:layerwise"].steps == 2
    assert listed["tiny-llama:layerwise"].reach == "all"
    assert listed["tiny-llama:generated"].format == ["plain"]
    assert listed["tiny-llama:generated"].max_steps == 0
    assert set(listed) >= {"tiny-llama:fixed", "tiny-llama:generated+fixed", "tiny-llama:generated+layerwise"}
    assert client.models.retrieve("tiny-llama:fixed").id == "tiny-llama:fixed"
    with pytest.raises(openai.NotFoundError, match="nope"):
        client.models.retrieve("nope")


@pytest.mark.parametrize(
    ("more", "status", "param"),
    [
        ({"model": "tiny-lama"}, 404, "model"),
        ({"frobnicate": 1}, 400, "frobnicate"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, 400, "tools"),
        ({"response_format": {"type": "json_object"}}, 400, "response_format.type"),
        ({"temperature": 3}, 400, "temperature"),
        ({"temperature": True}, 400, "temperature"),
        ({"top_p": 0}, 400, "top_p"),
        ({"n": 0}, 400, "n"),
        ({"n": 9}, 400, "n"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"max_tokens": 33}, 413, "max_tokens"),
        ({"presence_penalty": 0.5}, 400, "presence_penalty"),
        ({"logit_bias": {"5": 1}}, 400, "logit_bias"),
        ({"adapt": {"steps": 99}}, 400, "adapt.steps"),
        ({"adapt": {"steps": -1}}, 400, "adapt.steps"),
        ({"adapt": {"stepps": 1}}, 400, "adapt.stepps"),
        ({"stop": ["a"] * 17}, 400, "stop"),
        ({"stream_options": {}}, 400, None),
        ({"top_logprobs": 2}, 400, None),
        ({"messages": []}, 400, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, 400, "messages.0.role"),
        ({"messages": [{"role": "user", "content": "  "}]}, 400, "messages"),
        ({"messages": [{"role": "user", "content": "long " * 80}]}, 413, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, 400, None),
    ],
)
def test_refused(raw, more, status, param):
    ask = {"model": "tiny-llama:layerwise", "messages": CHAT, **more}
    response = raw.post("/v1/chat/completions", json=ask)
    error = response.json()["error"]
    assert response.status_code == status, error
    assert set(error) == {"message", "type", "param", "code"}
    if param is not None:
        assert error["param"] == param
        assert param.split(".")[-1] in error["message"] or status == 404
    if status == 404:
        assert "Did you mean 'tiny-llama'?" in error["message"]


def test_neutral_values_are_taken(raw):
    ask = {"model": "tiny-llama", "messages": CHAT, "max_tokens": 1, "presence_penalty": 0, "frequency_penalty": 0.0}
    ask |= {"user": "me", "response_format": {"type": "text"}, "logit_bias": {}, "n": None, "stop": None}
    assert raw.post("/v1/chat/completions", json=ask).status_code == 200


def test_errors_as_the_client_sees_them(client, served):
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model="tiny-llama", messages=CHAT, temperature=9)
    assert bad.value.param == "temperature"
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="gpt", messages=CHAT)
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{served[0]}/v1", api_key="wrong").models.list()


def test_who_may_ask_what(served):
    with httpx.Client(base_url=served[0]) as nobody:
        assert nobody.get("/health").status_code == 200
        assert nobody.get("/").status_code == 200
        assert "default-src 'none'" in nobody.get("/").headers["content-security-policy"]
        assert nobody.get("/playground/app.js").headers["content-type"].startswith("text/javascript")
        assert nobody.get("/playground/..%2fapp.py").status_code == 404
        for path in ("/v1/models", "/metrics", "/ready", "/openapi.json", "/nowhere"):
            assert nobody.get(path).status_code == 401
        assert nobody.get("/ready", headers={"Authorization": "Bearer another"}).status_code == 200
        assert nobody.get("/ready", headers={"Authorization": f"Basic {KEY}"}).status_code == 401
        assert nobody.post("/", json={}).status_code == 401
        assert "access-control-allow-origin" not in nobody.get("/health", headers={"Origin": "http://x.org"}).headers


def test_bodies_that_are_too_large(raw, served):
    big = b'{"model": "' + b"x" * (1 << 20) + b'"}'
    assert raw.post("/v1/completions", content=big).status_code == 413
    chunked = raw.post("/v1/completions", content=iter([big[:600_000], big[600_000:]]))  # no Content-Length
    assert chunked.status_code == 413
    assert chunked.json()["error"]["code"] == "body_too_large"
    assert raw.post("/v1/completions", content=b"{nope").json()["error"]["type"] == "invalid_request_error"


def test_metrics(raw, client):
    client.chat.completions.create(model="tiny-llama:fixed", messages=CHAT, max_tokens=2)
    page = raw.get("/metrics").text
    assert 'ephemera_first_token_seconds_count{method="fixed"}' in page
    assert 'ephemera_answers_total{how="complete",method="fixed"}' in page
    assert 'path="/v1/chat/completions",status="200"' in page


def test_a_client_that_hangs_up_is_forgotten(served, raw):
    url, engine, *_ = served
    import time

    ask = {"model": "tiny-llama:fixed", "messages": CHAT, "max_tokens": 32, "stream": True, "adapt": {"steps": 8}}
    for stream in (True, False):
        with httpx.Client(base_url=url, headers=raw.headers, timeout=0.02) as hasty:
            for _ in range(5):
                with suppress(httpx.TimeoutException):
                    hasty.post("/v1/chat/completions", json={**ask, "stream": stream})
    for _ in range(200):
        if not engine.waiting and not engine.batch.answers:
            break
        time.sleep(0.02)
    assert not engine.waiting
    assert not engine.batch.answers
    assert raw.post("/v1/chat/completions", json={**ask, "stream": False}).status_code == 200


def test_a_full_queue():
    backbone = tiny_backbone("llama")
    with live(backbone, tiny_methods(backbone), max_queue=1) as (url, _), httpx.Client(base_url=url) as raw:
        refused = raw.post("/v1/completions", json={"model": "tiny-llama", "prompt": ["a b", "c d"], "max_tokens": 2})
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["code"] == "queue_full"


def test_cors_where_it_is_asked_for_and_no_template():
    backbone = tiny_backbone("llama")
    backbone.tokenizer.chat_template = None
    with live(backbone, tiny_methods(backbone), cors=("http://x.org",)) as (url, _), httpx.Client(base_url=url) as raw:
        assert raw.get("/health", headers={"Origin": "http://x.org"}).headers["access-control-allow-origin"]
        assert "access-control-allow-origin" not in raw.get("/health", headers={"Origin": "http://y.org"}).headers
        refused = raw.post("/v1/chat/completions", json={"model": "tiny-llama", "messages": CHAT})
        assert refused.status_code == 422


def test_past_the_deadline():
    backbone = tiny_backbone("llama")
    limits = Limits(prompt_tokens=64, answer_tokens=32, rows=8, seconds=0.0)
    with live(backbone, tiny_methods(backbone), limits=limits) as (url, _), httpx.Client(base_url=url) as raw:
        late = raw.post("/v1/completions", json={"model": "tiny-llama", "prompt": "a b"})
        assert (late.status_code, late.json()["error"]["code"]) == (503, "deadline")
        with openai.OpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0) as client, pytest.raises(openai.APIError):
            list(client.chat.completions.create(model="tiny-llama", messages=CHAT, stream=True))


def test_the_document_is_kept(served):
    """Whatever the OpenAPI document allows or forbids, the answer has a documented status and shape."""
    schemathesis = pytest.importorskip("schemathesis")
    from hypothesis import HealthCheck, Phase, given, settings

    headers = {"Authorization": f"Bearer {KEY}"}
    schema = schemathesis.openapi.from_url(f"{served[0]}/openapi.json", headers=headers)
    # a request may keep the document and still be refused: an empty text, more tokens than fit, an unknown model
    excluded = schemathesis.checks.CHECKS.get_by_names(["unsupported_method", "positive_data_acceptance"])
    seen: set[str] = set()
    for result in schema.get_all_operations():
        operation = result.ok()

        @given(case=operation.as_strategy())
        @settings(
            max_examples=25,
            deadline=None,
            derandomize=True,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        def conforms(case):
            response = case.call(headers=headers)
            case.validate_response(response, excluded_checks=excluded)
            seen.add(case.operation.label)

        conforms()
    assert "POST /v1/chat/completions" in seen
    assert ChatRequest.__name__ in json.dumps(schema.raw_schema)
