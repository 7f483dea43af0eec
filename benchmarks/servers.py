"""Servers to measure, each a process of its own, and what they are asked."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx

from ephemera.downloads import fetch_default_model

QUESTIONS = (
    "Who wrote the origin of species?",
    "Name three rivers of Europe and the seas they flow into.",
    "Explain in two sentences why the sky is blue.",
    "A train leaves at nine and arrives at noon. How long does it take?",
    "Write a short poem about a mill.",
    "What is the difference between a comet and an asteroid? Answer for a child of eight who likes dinosaurs.",
    "Give me a recipe for a simple soup with potatoes, leeks and cream, and say how long each step takes.",
    "Translate into French: the winter was long, and the river froze from one bank to the other.",
)


def ask(model: str, question: str, tokens: int, *, steps: int | None = None, stream: bool = True) -> dict[str, Any]:
    body: dict[str, Any] = {"model": model, "messages": [{"role": "user", "content": question}]}
    body |= {"temperature": 0, "max_tokens": tokens, "stream": stream}
    return body if steps is None else {**body, "adapt": {"steps": steps}}


@contextmanager
def server(command: Sequence[str | Path], ready: str, port: int) -> Iterator[tuple[str, int]]:
    """(address, process id) of a server, when `ready` answers."""
    process = subprocess.Popen([str(c) for c in command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(240):
            if process.poll() is not None:
                raise ValueError(f"`{' '.join(map(str, command[:4]))} ...` ended with code {process.returncode}.")
            with suppress(httpx.HTTPError):
                if httpx.get(url + ready, timeout=5).status_code == 200:
                    break
            time.sleep(0.5)
        else:
            raise ValueError(f"{command[0]} was not ready after two minutes.")
        yield url, process.pid
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(20)
        process.kill()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def ours(dtype: str, *options: str) -> AbstractContextManager[tuple[str, int]]:
    port = free_port()
    command = [sys.executable, "-m", "ephemera", "serve", "--port", str(port), "--dtype", dtype, *options]
    return server(command, "/ready", port)


def theirs(dtype: str) -> AbstractContextManager[tuple[str, int]]:
    port = free_port()
    program = Path(sys.executable).parent / "transformers"
    command = [program if program.exists() else shutil.which("transformers") or "transformers", "serve"]
    options = ["--port", str(port), "--dtype", dtype, "--device", "cpu"]
    return server([*command, str(fetch_default_model()), *options], "/health", port)


def text_of(line: str) -> str:
    choices = json.loads(line.removeprefix("data: ")).get("choices") or [{}]
    return (choices[0].get("delta") or {}).get("content") or ""
