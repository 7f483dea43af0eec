"""A replica behind its front, in one process: the same answers as the server's own, and its losses in OpenAI's envelope."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from ephemera.config import Serve, check_config

pytest.importorskip("fastapi", reason="FastAPI is not installed")

from fastapi.testclient import TestClient
from starlette.applications import Starlette

from ephemera.serving.http.errors import ApiError
from ephemera.serving.http.front import Ask, Front
from ephemera.serving.ray_app import options_of
from ephemera.serving.replica import Replica


class Lost(Exception):
    pass


def told(error: Exception) -> ApiError:
    assert isinstance(error, Lost)
    return ApiError(503, "it was lost.", code="replica_lost", headers={"Retry-After": "1"})


def door(ask: Ask) -> TestClient:
    app = Starlette()
    app.add_middleware(Front, ask=ask, told=told)
    return TestClient(app)


@pytest.fixture(scope="module")
def replica(llama_folder: Path):
    model = {"name": str(llama_folder), "dtype": "float32", "device": "cpu"}
    made = Replica({"model": model, "rates": ["0.2"], "max_steps": 5000, "max_body": 2048})
    yield made
    asyncio.run(made.close())
    with pytest.raises(RuntimeError, match="engine is not running"):
        made.check_health()


@pytest.fixture
def body(llama_folder: Path) -> dict[str, Any]:
    return {"model": f"{llama_folder.name}:fixed", "prompt": "The river", "temperature": 0, "max_tokens": 9}


def words(text: str) -> list[str]:
    """The texts of a stream's chunks."""
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: {")]
    return [choice["text"] for line in lines for choice in json.loads(line)["choices"]]


def test_a_front_gives_what_the_server_gives(replica: Replica, body: dict[str, Any]):
    direct = TestClient(replica.app)  # not entered: its end would end the engine
    behind = door(replica.ask)
    want, have = (client.post("/v1/completions", json=body).json() for client in (direct, behind))
    assert have["choices"] == want["choices"]
    assert have["usage"] == want["usage"]
    streamed = behind.post("/v1/completions", json={**body, "stream": True})
    assert streamed.headers["content-type"].startswith("text/event-stream")
    assert "".join(words(streamed.text)) == want["choices"][0]["text"]
    assert streamed.text.endswith("data: [DONE]\n\n")
    for path in ("/", "/health", "/v1/models", "/v1/models/nothing", "/playground/app.js"):
        here, there = direct.get(path), behind.get(path)
        assert (there.status_code, there.content) == (here.status_code, here.content), path
    large = {**body, "prompt": "x" * 3000}
    assert behind.post("/v1/completions", json=large).json()["error"]["code"] == "body_too_large"
    replica.check_health()


def adapted(client: TestClient) -> float:
    """Prompts whose adaptation came to its end."""
    page = client.get("/metrics").text
    return sum(float(line.split()[-1]) for line in page.splitlines() if line.startswith("ephemera_prompts_total{"))


def test_a_client_that_is_gone_ends_its_request(replica: Replica, body: dict[str, Any]):
    """The generator of a client that hangs up is closed; the engine then forgets the job."""

    async def hang_up() -> None:
        text = json.dumps({**body, "stream": True, "adapt": {"steps": 5000}}).encode()
        headers = [(b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": headers, "query_string": b""}
        messages = replica.ask({**scope, "http_version": "1.1", "scheme": "http", "root_path": ""}, text)
        async for message in messages:
            if b"adapting" in message.get("body", b""):
                break
        await messages.aclose()

    behind = door(replica.ask)
    before = adapted(behind)
    asyncio.run(hang_up())
    assert behind.post("/v1/completions", json=body).status_code == 200  # long before 5,000 steps
    assert adapted(behind) == before + 1


START = {"type": "http.response.start", "status": 200}
STREAM = [(b"content-type", b"text/event-stream; charset=utf-8")]


def lost_after(*messages: dict[str, Any]) -> Ask:
    async def ask(_scope: dict[str, Any], _body: bytes) -> AsyncGenerator[dict[str, Any]]:
        for message in messages:
            yield message
        raise Lost

    return ask


def test_a_replica_that_is_lost_before_it_answers():
    response = door(lost_after()).post("/v1/completions", json={})
    assert response.status_code == 503
    assert response.headers["retry-after"] == "1"
    assert response.json() == {
        "error": {"message": "it was lost.", "type": "service_unavailable", "param": None, "code": "replica_lost"}
    }


def test_a_replica_that_is_lost_within_a_stream():
    part = {"type": "http.response.body", "body": b'data: {"choices": []}\n\n', "more_body": True}
    response = door(lost_after({**START, "headers": STREAM}, part)).post("/v1/completions", json={})
    first, last = response.text.strip().split("\n\n")
    assert first == 'data: {"choices": []}'
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "replica_lost"


def test_a_replica_that_is_lost_within_a_body_breaks_the_connection():
    part = {"type": "http.response.body", "body": b"half", "more_body": True}
    with pytest.raises(Lost):
        door(lost_after({**START, "headers": []}, part)).post("/v1/adapt", json={})


def test_a_replica_that_is_lost_after_its_answer_harms_nobody():
    part = {"type": "http.response.body", "body": b"all", "more_body": False}
    assert door(lost_after({**START, "headers": []}, part)).get("/health").text == "all"


def test_options_of_ray_serve():
    fixed = options_of(
        check_config(Serve, {"replicas": {"number": 3, "cpus": 2}, "max_batch": 4, "max_queue": 6, "drain": 7})
    )
    assert fixed["num_replicas"] == 3
    assert fixed["ray_actor_options"] == {"num_cpus": 2, "num_gpus": 0}
    assert (fixed["max_ongoing_requests"], fixed["graceful_shutdown_timeout_s"]) == (10, 7)
    grows = options_of(check_config(Serve, {"replicas": {"number": 1, "most": 4, "target": 2}}))
    assert grows["autoscaling_config"] == {"min_replicas": 1, "max_replicas": 4, "target_ongoing_requests": 2}
    assert "num_replicas" not in grows


def test_a_request_whose_client_is_gone_before_its_body():
    asked = []

    async def ask(scope: dict[str, Any], body: bytes) -> AsyncGenerator[dict[str, Any]]:
        asked.append(scope)
        yield {}

    async def gone() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    async def send(_message: Any) -> None:
        raise AssertionError("nobody listens")

    front = Front(Starlette(), ask=ask, told=told)
    with suppress(AssertionError):
        asyncio.run(front({"type": "http", "path": "/", "headers": []}, gone, send))  # pyright: ignore[reportArgumentType]
    assert not asked
