"""Two replicas on a local Ray Serve: answers, streams, a replica that is killed, and the end."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="FastAPI is not installed")

import httpx

from ephemera import AdaptiveLM
from ephemera.serving.ray_app import application, told

try:
    import ray  # pyright: ignore[reportMissingImports]
    from ray import serve  # pyright: ignore[reportMissingImports]
except ImportError:
    ray = serve = None

PORT, STEPS = 8127, 150  # so many steps take seconds
pytestmark = pytest.mark.timeout(600)  # three processes import torch


@pytest.fixture(scope="module")
def client(llama_folder: Path) -> Iterator[httpx.Client]:
    if ray is None or serve is None:
        pytest.skip("Ray Serve is not installed")
    ray.init(num_cpus=2, log_to_driver=False, logging_level="error", include_dashboard=False)
    serve.start(http_options={"host": "127.0.0.1", "port": PORT})
    model = {"name": str(llama_folder), "dtype": "float32", "device": "cpu"}
    values = {"model": model, "rates": ["0.001"], "max_steps": STEPS, "replicas.number": 2, "replicas.cpus": "0.5"}
    serve.run(application(values))
    with httpx.Client(base_url=f"http://127.0.0.1:{PORT}", timeout=120) as made:
        yield made
    ray.shutdown()


@pytest.fixture
def body(llama_folder: Path) -> dict[str, Any]:
    return {"model": f"{llama_folder.name}:fixed", "prompt": "The river", "temperature": 0, "max_tokens": 9}


@pytest.fixture(scope="module")
def want(llama_folder: Path) -> str:
    lm = AdaptiveLM.from_pretrained(str(llama_folder), rate=0.001, dtype="float32", device="cpu")
    return lm.generate("The river", steps=1, max_new_tokens=9)[0]


def replicas() -> list[int]:
    """The processes of the models, below this one."""
    parents, found = {}, []
    for process in [p for p in Path("/proc").iterdir() if p.name.isdigit()]:
        with contextlib.suppress(OSError):  # it has ended since
            parents[int(process.name)] = int((process / "stat").read_text().rpartition(")")[2].split()[1])
            if (process / "cmdline").read_bytes().startswith(b"ray::ServeReplica:default:model"):
                found.append(int(process.name))

    def above(pid: int) -> bool:
        return pid == os.getpid() or (pid in parents and above(parents[pid]))

    return [pid for pid in found if above(pid)]


class Stream(threading.Thread):
    """Asks for a long adaptation, and collects the stream."""

    def __init__(self, body: dict[str, Any]):
        super().__init__()
        self.body = {**body, "stream": True, "adapt": {"steps": STEPS}}
        self.adapting, self.lines = threading.Event(), list[str]()

    def run(self) -> None:
        url = f"http://127.0.0.1:{PORT}/v1/completions"
        with httpx.stream("POST", url, json=self.body, timeout=120) as response:
            for line in response.iter_lines():
                self.lines.append(line)
                self.adapting.set()

    @property
    def chunks(self) -> list[dict[str, Any]]:
        return [json.loads(line.removeprefix("data: ")) for line in self.lines if line.startswith("data: {")]


def test_replicas_answer_as_the_library_does(client: httpx.Client, body: dict[str, Any], want: str):
    assert len(replicas()) == 2
    made = client.post("/v1/completions", json=body).json()
    assert made["choices"][0]["text"] == want
    streamed = client.post("/v1/completions", json={**body, "stream": True}).text
    lines = [line.removeprefix("data: ") for line in streamed.splitlines() if line.startswith("data: {")]
    assert "".join(json.loads(line)["choices"][0]["text"] for line in lines) == want
    assert streamed.endswith("data: [DONE]\n\n")
    unknown = client.post("/v1/completions", json={**body, "model": "nothing"})
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "model_not_found")


def test_a_killed_replica_is_told_in_the_envelope_and_the_other_goes_on(client: httpx.Client, body, want: str):
    streams = [Stream(body) for _ in range(4)]
    for stream in streams:
        stream.start()
    assert all(stream.adapting.wait(60) for stream in streams)
    os.kill(replicas()[0], signal.SIGKILL)
    for stream in streams:
        stream.join(120)
    errors = [stream.chunks[-1]["error"] for stream in streams if "error" in stream.chunks[-1]]
    whole = [stream for stream in streams if stream.lines[-2:] == ["data: [DONE]", ""]]
    assert len(errors) + len(whole) == len(streams)
    assert errors
    assert all((e["code"], e["type"]) == ("replica_lost", "service_unavailable") for e in errors)
    assert client.post("/v1/completions", json=body).json()["choices"][0]["text"] == want


def test_the_end_waits_for_answers_under_way(client: httpx.Client, body: dict[str, Any]):
    assert serve is not None
    stream = Stream(body)
    stream.start()
    assert stream.adapting.wait(60)
    serve.delete("default")
    stream.join(120)
    assert stream.lines[-2:] == ["data: [DONE]", ""]
    assert "error" not in stream.chunks[-1]


def test_errors_of_ray_in_openais_words():
    if serve is None:
        pytest.skip("Ray Serve is not installed")
    from ray.exceptions import ActorDiedError, ActorUnavailableError  # pyright: ignore[reportMissingImports]
    from ray.serve.exceptions import BackPressureError  # pyright: ignore[reportMissingImports]

    assert told(ActorDiedError()).body["error"]["code"] == "replica_lost"
    assert told(ActorUnavailableError("gone", None)).status_code == 503
    assert told(BackPressureError(1, 1)).body["error"]["code"] == "queue_full"
    assert told(ValueError("a prompt")).body["error"]["message"] == "the server failed; its log says where."


def test_settings_are_checked_before_anything_starts():
    if serve is None:
        pytest.skip("Ray Serve is not installed")
    with pytest.raises(ValueError, match=r"unknown setting 'replicas.numbers'. Did you mean 'number'\?"):
        application({"replicas.numbers": "2"})
    with pytest.raises(ValueError, match="setting 'max_batch': input should be a valid integer"):
        application({"max_batch": "many"})
