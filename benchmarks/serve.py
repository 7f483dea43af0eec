"""Requests per second and time to the first token under load: adapted, not, and beside `transformers serve`.

    python -m benchmarks.serve [--concurrency 1,2,4,8,16,32] [--seconds 20] [--output docs/results/serving]
    python -m benchmarks.serve --soak 600

Each server is a process of its own on a free port; clients are threads of this one, each with one streamed chat
request under way at a time, greedy, `--tokens` tokens at most. The three take turns at each concurrency. With `--soak` a
server answers mixed lengths and methods, with clients that hang up, and every completed answer is compared with the
same request's answer when it was alone (float32); exits with 1 if one differs, is lost, or memory grows.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import psutil

from ephemera.bench.timing import machine
from ephemera.store import DEFAULT_MODEL, fetch_default_model

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
WHO = ("ephemera", "adapted", "transformers")


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


def ours(dtype: str) -> Any:
    port = free_port()
    command = [sys.executable, "-m", "ephemera", "serve", "--port", str(port), "--dtype", dtype]
    return server(command, "/ready", port)


def theirs(dtype: str) -> Any:
    port = free_port()
    program = Path(sys.executable).parent / "transformers"
    command = [program if program.exists() else shutil.which("transformers") or "transformers", "serve"]
    options = ["--port", str(port), "--dtype", dtype, "--device", "cpu"]
    return server([*command, str(fetch_default_model()), *options], "/health", port)


def load(url: str, body_of: Any, clients: int, seconds: float) -> dict[str, Any]:
    """`clients` threads that each ask again as soon as they are answered; requests begun in time are counted whole."""
    first: list[float] = []
    whole: list[float] = []
    pieces, errors = [0], [0]
    lock = threading.Lock()
    begun = time.perf_counter()

    def client(number: int) -> None:
        dice = random.Random(number)
        with httpx.Client(base_url=url, timeout=300) as http:
            while time.perf_counter() - begun < seconds:
                start, seen, count = time.perf_counter(), None, 0
                with http.stream("POST", "/v1/chat/completions", json=body_of(dice)) as response:
                    for line in response.iter_lines():
                        if line.startswith("data: {") and text_of(line):
                            seen = seen or time.perf_counter() - start
                            count += 1
                with lock:
                    if seen is None:
                        errors[0] += 1
                        continue
                    first.append(seen)
                    whole.append(time.perf_counter() - start)
                    pieces[0] += count

    threads = [threading.Thread(target=client, args=(i,)) for i in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    took = time.perf_counter() - begun
    return {
        "requests": len(whole),
        "requests_per_second": len(whole) / took,
        "pieces_per_second": pieces[0] / took,
        "ttft_p50": quantile(first, 0.5),
        "ttft_p99": quantile(first, 0.99),
        "errors": errors[0],
    }


def text_of(line: str) -> str:
    choices = json.loads(line.removeprefix("data: ")).get("choices") or [{}]
    return (choices[0].get("delta") or {}).get("content") or ""


def quantile(values: Sequence[float], q: float) -> float:
    ordered = sorted(values)
    return ordered[min(int(q * len(ordered)), len(ordered) - 1)] if ordered else float("nan")


def measure(args: argparse.Namespace) -> dict[str, Any]:
    facts = machine()
    cells: list[dict[str, Any]] = []
    missing = None

    def round_of(who: str, url: str, clients: int) -> None:
        model = f"{DEFAULT_MODEL}:layerwise" if who == "adapted" else DEFAULT_MODEL
        model = str(fetch_default_model()) if who == "transformers" else model
        steps = 1 if who == "adapted" else None

        def body_of(dice: random.Random) -> dict[str, Any]:
            return ask(model, dice.choice(QUESTIONS), args.tokens, steps=steps)

        load(url, body_of, 1, 0.1)  # one request to warm up
        found = load(url, body_of, clients, args.seconds)
        print(f"{who:12} {clients:3} clients: {found}", file=sys.stderr, flush=True)
        cells.append({"who": who, "concurrency": clients, **found})

    with ours(args.dtype) as (url, _):
        for clients in args.concurrency:
            for who in ("ephemera", "adapted"):
                round_of(who, url, clients)
    if not args.no_transformers:
        try:
            with theirs(args.dtype) as (url, _):
                for clients in args.concurrency:
                    round_of("transformers", url, clients)
        except (ValueError, OSError, httpx.HTTPError) as error:
            missing = str(error)
    settings = {"model": DEFAULT_MODEL, "dtype": args.dtype, "seconds": args.seconds, "tokens": args.tokens}
    return {"machine": facts, "settings": settings, "cells": cells, "transformers_missing": missing}


def table(found: dict[str, Any]) -> str:
    facts, settings = found["machine"], found["settings"]
    lines = [
        f"{settings['model']} in {settings['dtype']}, streamed greedy chat, at most {settings['tokens']} tokens, "
        f"{settings['seconds']:g} s each.",
        f"Machine: {facts['cpu']}, {facts['cores']} cores, load average {facts['load_average']:.2f} before the run; "
        f"commit {facts['commit']}.",
        "",
        "| concurrency | server | requests/s | TTFT p50 (s) | TTFT p99 (s) | requests |",
        "|--:|---|--:|--:|--:|--:|",
    ]
    names = {"ephemera": "ephemera", "adapted": "ephemera, layerwise K=1", "transformers": "transformers serve"}
    for c in sorted(found["cells"], key=lambda c: (c["concurrency"], WHO.index(c["who"]))):
        lines.append(
            f"| {c['concurrency']} | {names[c['who']]} | {c['requests_per_second']:.3f} | {c['ttft_p50']:.3f} | "
            f"{c['ttft_p99']:.3f} | {c['requests']} |"
        )
    if found["transformers_missing"]:
        lines += ["", f"`transformers serve` did not run: {found['transformers_missing']}"]
    return "\n".join(lines)


def soak(args: argparse.Namespace) -> dict[str, Any]:
    """Mixed clients for `--soak` seconds; every completed greedy answer against its solo answer."""
    counts = {"right": 0, "wrong": 0, "hung up": 0, "busy": 0, "lost": 0}
    lock, memory = threading.Lock(), []
    with ours("float32") as (url, pid), httpx.Client(base_url=url, timeout=300) as http:
        ids = [m["id"] for m in http.get("/v1/models").json()["data"]]
        cases = []
        for i, question in enumerate(QUESTIONS):
            for model in ids[i % 2 :: 2]:
                most = http.get(f"/v1/models/{model}").json()["max_steps"]
                body = ask(model, question, 4 + 3 * i, steps=min(i % 3, most), stream=False)
                answer = http.post("/v1/chat/completions", json=body).json()
                cases.append((body, answer["choices"][0]["message"]["content"]))
        end = time.monotonic() + args.soak

        def client(number: int) -> None:
            dice = random.Random(number)
            with httpx.Client(base_url=url, timeout=300) as mine:
                while time.monotonic() < end:
                    body, want = dice.choice(cases)
                    hasty = dice.random() < 0.1
                    try:
                        made = mine.post("/v1/chat/completions", json=body, timeout=0.5 if hasty else 300)
                    except httpx.HTTPError:
                        what = "hung up" if hasty else "lost"
                    else:
                        if made.status_code == 429:
                            what = "busy"
                        elif made.status_code != 200:
                            what = "lost"
                        else:
                            same = made.json()["choices"][0]["message"]["content"] == want
                            what = "right" if same else "wrong"
                    with lock:
                        counts[what] += 1

        threads = [threading.Thread(target=client, args=(i,)) for i in range(32)]
        for thread in threads:
            thread.start()
        while time.monotonic() < end:
            memory.append(psutil.Process(pid).memory_info().rss >> 20)
            time.sleep(2)
        for thread in threads:
            thread.join()
    third = max(len(memory) // 3, 1)
    growth = max(memory[-third:]) - max(memory[third : 2 * third] or memory[:1])
    return {"seconds": args.soak, "counts": counts, "memory_mb": memory, "growth_mb": growth, "machine": machine()}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serve", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--concurrency", default="1,2,4,8,16,32", help="(default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=20, help="of each measurement (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=32, help="longest answer (default: %(default)s)")
    parser.add_argument("--dtype", default="float32", help="(default: %(default)s)")
    parser.add_argument("--no-transformers", action="store_true", help="leave out `transformers serve`")
    parser.add_argument("--soak", type=float, default=0, help="seconds of the soak test instead")
    parser.add_argument("--output", type=Path, help="a folder for serve.json and serve.md, or soak.json")
    args = parser.parse_args(argv)
    try:
        args.concurrency = [int(c) for c in args.concurrency.split(",")]
    except ValueError:
        print(f"error: --concurrency is {args.concurrency!r}; give numbers, as 1,4,16.", file=sys.stderr)
        return 2
    if args.soak:
        found = soak(args)
        print(json.dumps({k: found[k] for k in ("seconds", "counts", "growth_mb")}))
        name, text = "soak", None
    else:
        found = measure(args)
        name, text = "serve", table(found)
        print(text)
    if args.output:
        args.output.mkdir(parents=True, exist_ok=True)
        (args.output / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
        if text is not None:
            (args.output / f"{name}.md").write_text(text + "\n")
    bad = args.soak and (found["counts"]["wrong"] or found["counts"]["lost"] or found["growth_mb"] > 200)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
