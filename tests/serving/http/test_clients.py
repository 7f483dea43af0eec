"""What OpenAI's clients and lm-evaluation-harness send: taken, or refused by the field's name, and never a 500."""

from __future__ import annotations

import json
from typing import get_type_hints

import httpx
import openai
import pytest
from openai.types import chat
from openai.types import completion_create_params as completions
from openai.types.chat import completion_create_params as chats
from tokenizers import normalizers

from serving_fixtures import PROMPTS, live, solo, tiny_methods
from tiny_models import tiny_backbone

CHAT = [{"role": "user", "content": PROMPTS[0]}]
HALF = "Good \ud83d"


@pytest.fixture(scope="module")
def client(served):
    with openai.OpenAI(base_url=f"{served[0]}/v1", api_key="-", max_retries=0) as made:
        yield made


@pytest.fixture(scope="module")
def raw(served):
    with httpx.Client(base_url=served[0], timeout=60) as made:
        yield made


def ask(raw, path: str, **fields):
    """The response to a body that json.dumps may write but httpx would not: half a character, NaN."""
    body = {"model": "tiny-llama", "max_tokens": 1, **fields}
    content = json.dumps(body)
    return raw.post(f"/v1/{path}", content=content, headers={"Content-Type": "application/json"})


def refused(response, param: str | None, *words: str) -> None:
    error = response.json()["error"]
    assert response.status_code == 400, error
    assert error["param"] == param
    for word in words:
        assert word in error["message"]
    assert "\n" not in error["message"]


def test_a_conversation_goes_on_with_the_clients_own_message(client, raw):
    ask = {"model": "tiny-llama", "temperature": 0, "max_tokens": 4}
    first = client.chat.completions.create(messages=CHAT, **ask).choices[0].message
    more = {"role": "user", "content": "And the mill?"}
    went_on = client.chat.completions.create(messages=[*CHAT, first, more], **ask)
    bare = {"role": "assistant", "content": first.content}
    assert (
        went_on.choices[0].message
        == client.chat.completions.create(messages=[*CHAT, bare, more], **ask).choices[0].message
    )
    full = first.model_dump() | {"annotations": [], "tool_calls": [], "name": "ephemera", "parsed": None}
    assert set(chat.ParsedChatCompletionMessage.model_fields) <= set(full)  # whatever a client may send back
    again = client.chat.completions.create(messages=[*CHAT, full, more], **ask)
    assert again.choices[0].message == went_on.choices[0].message
    # an answer without content, and content in parts
    parts = [{"type": "text", "text": "And the "}, {"type": "text", "text": "mill?", "prompt_cache_breakpoint": None}]
    for content, same in ((None, ""), ([], "")):
        both = [
            client.chat.completions.create(
                messages=[*CHAT, {"role": "assistant", "content": c}, {"role": "user", "content": p}], **ask
            )
            for c, p in ((content, parts), (same, "And the mill?"))
        ]
        assert both[0].choices[0].message == both[1].choices[0].message


CHAT_FIELDS = sorted(get_type_hints(chats.CompletionCreateParamsNonStreaming).keys() - {"model", "messages"})
PLAIN_FIELDS = sorted(get_type_hints(completions.CompletionCreateParamsNonStreaming).keys() - {"model", "prompt"})
MESSAGE_FIELDS = sorted(get_type_hints(chat.ChatCompletionAssistantMessageParam).keys() - {"role"})


def test_every_field_that_openai_knows_may_be_null(raw):
    everything = dict.fromkeys(CHAT_FIELDS)
    message = {"role": "assistant", **dict.fromkeys(MESSAGE_FIELDS)}
    assert {"tools", "store", "service_tier", "moderation"} <= set(CHAT_FIELDS)
    response = ask(raw, "chat/completions", messages=[*CHAT, message, *CHAT], **everything | {"max_tokens": 1})
    assert response.status_code == 200, response.text
    response = ask(raw, "completions", prompt="the river", **dict.fromkeys(PLAIN_FIELDS) | {"max_tokens": 1})
    assert response.status_code == 200, response.text


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [], "tool_choice": "none", "functions": [], "function_call": "none", "parallel_tool_calls": True},
        {"tool_choice": "auto", "function_call": "auto"},
        {"max_tokens": 2.0, "n": 1.0, "seed": 5.0, "top_logprobs": 2.0, "logprobs": True, "adapt": {"steps": 0.0}},
        {"max_tokens": 2, "max_completion_tokens": 2},
        {"top_logprobs": 0},
        {"logit_bias": {"5": 0}, "presence_penalty": -0.0, "frequency_penalty": 0},
        {"stop": [], "response_format": {"type": "text"}, "modalities": ["text"], "verbosity": "medium"},
        {"stream": True, "stream_options": {"include_usage": None, "include_obfuscation": False}},
        {"service_tier": "auto", "store": False, "metadata": {"a": "b"}, "reasoning_effort": "none"},
        {"prompt_cache_key": "a", "prompt_cache_retention": "in_memory", "safety_identifier": "b", "user": "c"},
        {"prediction": {"type": "content", "content": "x"}, "prompt_cache_options": {"mode": "implicit"}},
        {"stop": [str(i) for i in range(9)]},
    ],
)
def test_neutral_values_pass(raw, fields):
    response = ask(raw, "chat/completions", messages=[{**CHAT[0], "name": "Ann"}], **fields)
    assert response.status_code == 200, response.text


@pytest.mark.parametrize("fields", [{"echo": False, "best_of": 1, "suffix": ""}, {"best_of": 2.0, "n": 2}])
def test_neutral_values_of_completions_pass(raw, fields):
    response = ask(raw, "completions", prompt="the river", **fields)
    assert response.status_code == 200, response.text


TOOL = {"type": "function", "function": {"name": "f"}}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tools", [TOOL]),
        ("tool_choice", "required"),
        ("functions", [{"name": "f"}]),
        ("function_call", {"name": "f"}),
        ("modalities", ["text", "audio"]),
        ("audio", {"voice": "alloy", "format": "wav"}),
        ("moderation", {"model": "omni"}),
        ("web_search_options", {}),
        ("reasoning_effort", "low"),
        ("verbosity", "high"),
        ("service_tier", "priority"),
        ("store", True),
        ("presence_penalty", 0.5),
        ("frequency_penalty", False),
        ("logit_bias", {"5": 1}),
        ("max_tokens", 2.5),
        ("temperature", float("nan")),
        ("top_p", float("inf")),
        ("seed", 10**30),
        ("n", "2"),
        ("top_k", 5),
    ],
)
def test_what_would_change_the_answer_is_named(raw, field, value):
    refused(ask(raw, "chat/completions", messages=CHAT, **{field: value}), field, field)


@pytest.mark.parametrize(
    ("message", "param", "words"),
    [
        ({"role": "assistant", "content": None, "tool_calls": [CALL]}, "messages.0.tool_calls", "no tools"),
        ({"role": "assistant", "content": "a", "refusal": "No."}, "messages.0.refusal", "refuse"),
        ({"role": "assistant", "content": "a", "audio": {"id": "x"}}, "messages.0.audio", "text only"),
        ({"role": "assistant", "content": "a", "reasoning_content": "b"}, "messages.0.reasoning_content", "content"),
        ({"role": "user", "content": None}, "messages.0", "needs content"),
        ({"role": "user"}, "messages.0", "needs content"),
        ({"role": "user", "content": 5}, "messages.0.content", "text parts"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, "messages.0.content", "'image_url'"),
        ({"role": "assistant", "content": [{"type": "refusal", "refusal": "x"}]}, "messages.0.content", "'refusal'"),
        ({"role": "tool", "content": "a", "tool_call_id": "1"}, "messages.0.role", '"tool"'),
        ({"role": "user", "content": "a", "nmae": "b"}, "messages.0.nmae", "nmae"),
    ],
)
def test_messages_that_cannot_be_honoured(raw, message, param, words):
    refused(ask(raw, "chat/completions", messages=[message]), param, words)


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"prompt": None}, "prompt", "null"),
        ({}, "prompt", "missing"),
        ({"prompt": ""}, "prompt", "empty"),
        ({"prompt": []}, "prompt", "empty"),
        ({"prompt": ["a b", ""]}, "prompt", "empty"),
        ({"prompt": [[5], []]}, "prompt", "empty"),
        ({"prompt": [5, "a"]}, "prompt", "token ids"),
        ({"prompt": [[5], "a"]}, "prompt", "token ids"),
        ({"prompt": [5, True]}, "prompt", "token ids"),
        ({"prompt": [5, -1]}, "prompt", "from 0 on"),
        ({"prompt": [5, 320]}, "prompt", "0 to 319"),
        ({"prompt": {"a": 1}}, "prompt", "a list of texts"),
        ({"prompt": ["a"] * 129}, "prompt", "128"),
        ({"prompt": "a b", "suffix": "x"}, "suffix", "suffix"),
        ({"prompt": "a b", "best_of": 3}, None, "best_of"),
        ({"prompt": "a b", "logprobs": 6}, "logprobs", "5"),
        ({"prompt": "a b", "echo": True, "logprobs": 1, "model": "tiny-llama:generated"}, "echo", "'tiny-llama'"),
    ],
)
def test_prompts_that_are_none(raw, fields, param, words):
    refused(ask(raw, "completions", **fields), param, words)


def test_token_ids_are_a_prompt(served, client):
    _, backbone, known, _ = served
    rows = [backbone.tokenizer(text)["input_ids"] for text in PROMPTS[:2]]
    made = client.completions.create(model="tiny-llama:fixed", prompt=rows, temperature=0, max_tokens=8)
    assert [c.text for c in made.choices] == [
        solo(backbone, known["fixed"], text, steps=2, tokens=8) for text in PROMPTS[:2]
    ]
    alone = client.completions.create(model="tiny-llama:fixed", prompt=rows[0], temperature=0, max_tokens=8)
    assert alone.choices[0].text == made.choices[0].text
    assert alone.usage.prompt_tokens == len(rows[0])  # no BOS is added to token ids


@pytest.mark.parametrize("path", ["chat/completions", "completions", "adapt"])
def test_bodies_that_are_no_json_object(raw, path):
    url, as_json = f"/v1/{path}", {"Content-Type": "application/json"}
    body = json.dumps({"model": "tiny-llama", "prompt": "a b"})
    for headers in ({}, {"Content-Type": "text/plain"}, {"Content-Type": "application/x-www-form-urlencoded"}):
        refused(raw.post(url, content=body, headers=headers), None, "Content-Type", "application/json")
    refused(raw.post(url, content=b"", headers=as_json), None, "empty")
    refused(raw.post(url, content=b"[1]", headers=as_json), None, "no object")
    refused(raw.post(url, content=b'"a"', headers=as_json), None, "no object")
    refused(raw.post(url, content=b"{nope", headers=as_json), None, "JSON")
    for broken in (b'{"model": "\xff\xfe"}', b"[" * 100_000, b'{"seed": ' + b"9" * 5000 + b"}"):
        refused(raw.post(url, content=broken, headers=as_json), None, "JSON")


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        ("completions", {"prompt": HALF}, "prompt"),
        ("completions", {"prompt": ["a b", HALF]}, "prompt.1"),
        ("completions", {"prompt": "a b", "stop": HALF}, "stop"),
        ("completions", {"prompt": "a b", "stop": ["x", HALF]}, "stop.1"),
        ("completions", {"prompt": "a b", "user": HALF}, "user"),
        ("completions", {"prompt": "a b", "model": HALF}, "model"),
        ("completions", {"prompt": "a b", HALF: 1}, None),
        ("completions", {"prompt": "a b", "logit_bias": {HALF: 1}}, "logit_bias"),
        ("chat/completions", {"messages": [{"role": "user", "content": HALF}]}, "messages.0.content"),
        ("chat/completions", {"messages": [{"role": "user", "content": [{"type": "text", "text": HALF}]}]}, None),
        ("chat/completions", {"messages": [{"role": HALF, "content": "a"}]}, "messages.0.role"),
        ("chat/completions", {"messages": [{"role": "user", "content": "a", "name": HALF}]}, "messages.0.name"),
        ("chat/completions", {"messages": CHAT, "metadata": {"a": HALF}}, "metadata.a"),
        ("adapt", {"prompt": HALF, "max_tokens": None}, "prompt"),
        ("adapt", {"messages": [{"role": "user", "content": HALF}], "max_tokens": None}, "messages.0.content"),
    ],
)
def test_half_a_character_is_refused_wherever_it_stands(raw, path, fields, param):
    response = ask(raw, path, **fields)
    error = response.json()["error"]
    refused(response, param or error["param"], "\\ud83d", "lone surrogate")
    whole = json.loads(json.dumps(fields).replace("\\ud83d", "\\ud83e\\udd9c"))  # the parrot passes as text
    assert "surrogate" not in ask(raw, path, **whole).text


@pytest.mark.parametrize("bos", [True, False])
def test_a_prompt_of_no_tokens_is_refused(bos):
    backbone = tiny_backbone("llama")
    backbone.tokenizer.backend_tokenizer.normalizer = normalizers.Replace("\u200b", "")
    if not bos:
        backbone.tokenizer.backend_tokenizer.post_processor = None
    with live(backbone, tiny_methods(backbone)) as (url, _), httpx.Client(base_url=url) as raw:
        for prompt in ("\u200b", ["a b", "\u200b\u200b"]):
            refused(ask(raw, "completions", prompt=prompt), "prompt", "no tokens", "give some text")
        refused(ask(raw, "adapt", prompt="\u200b", max_tokens=None), "max_tokens")
        body = {"model": "tiny-llama", "prompt": "\u200b"}
        refused(raw.post("/v1/adapt", json=body), "prompt", "no tokens")
        backbone.tokenizer.chat_template = "{{ messages[0]['content'] }}"
        refused(ask(raw, "chat/completions", messages=[{"role": "user", "content": "\u200b"}]), "messages", "no tokens")
