"""Requests per second and time to the first token under load: adapted, not, and beside `transformers serve`.

    python -m benchmarks.serve [--concurrency 1,4,16,32] [--seconds 8] [--output docs/results/serving]
    python -m benchmarks.serve --soak 600 [--output docs/results/serving]

Three servers run side by side, each a process of its own on a free port: ephemera as it comes (asked for the plain model and
for its default network), ephemera with the preset `fast`, and `transformers serve`. They take turns, two windows
each at a concurrency (twice as long for one client), and only one is asked at a time. Clients are threads of this process, each with one streamed greedy
chat request under way, and walk through the same questions. A request that the end of its window cuts counts by the
share of its time that lies inside, so that no window ends on a lucky or an unlucky request; it is waited for.

With `--soak` a server answers mixed lengths and methods, with clients that hang up, and every completed answer is compared
with the same request's answer when it was alone (float32); exits with 1 if one differs, is lost, or memory grows.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import psutil

from benchmarks.servers import QUESTIONS, ask, ours, text_of, theirs
from benchmarks.soak import passed, report, soak
from ephemera.bench.timing import machine
from ephemera.downloads import DEFAULT_MODEL, fetch_default_model

NAMES = {  # of the contenders, in the tables' order
    "ephemera": "ephemera",
    "adapted": "ephemera, universal",
    "fast": "ephemera, preset fast K=1",
    "transformers": "transformers serve",
}
TURNS = 2


@dataclass(frozen=True)
class Request:
    """One answered request: seconds since its window began, and what came of it."""

    question: int
    begun: float
    first: float
    ended: float
    pieces: int


def load(url: str, body_of: Callable[[int], dict[str, Any]], clients: int, seconds: float) -> tuple[list[Request], int]:
    """`clients` threads that each ask again as soon as they are answered, until the time is over; (answered, failed).

    Everyone asks at least once; a client whose request failed asks no more in this window.
    """
    found: list[Request] = []
    failed = [0]
    lock = threading.Lock()
    with ExitStack() as open_clients:  # all there before the window begins: making one takes a tenth of a second
        https = [open_clients.enter_context(httpx.Client(base_url=url, timeout=300)) for _ in range(clients)]
        begun = time.perf_counter()

        def client(number: int) -> None:
            for nth, question in enumerate(questions_of(number)):
                start, seen, count = time.perf_counter() - begun, None, 0
                if nth and start >= seconds:
                    return
                with https[number].stream("POST", "/v1/chat/completions", json=body_of(question)) as response:
                    for line in response.iter_lines():
                        if line.startswith("data: {") and text_of(line):
                            seen = seen or time.perf_counter() - begun
                            count += 1
                with lock:
                    if seen is None:
                        failed[0] += 1
                        return  # a server that refuses at once would be asked thousands of times
                    found.append(Request(question, start, seen, time.perf_counter() - begun, count))

        threads = [threading.Thread(target=client, args=(i,)) for i in range(clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return found, failed[0]


def questions_of(client: int) -> Iterator[int]:
    """Without end, all questions in an order of the client's own, again and again: the same for every contender."""
    order = list(range(len(QUESTIONS)))
    random.Random(client).shuffle(order)
    return cycle(order)


def inside(request: Request, seconds: float) -> float:
    """The share of a request that lies in its window."""
    return min(1.0, max(0.0, seconds - request.begun) / (request.ended - request.begun))


def summary(requests: Sequence[Request], failed: int, seconds: float, turns: int, cpu_seconds: float) -> dict[str, Any]:
    first = [r.first - r.begun for r in requests]
    whole = [r.ended - r.begun for r in requests]
    by_question = {
        q: median(r.ended - r.begun for r in requests if r.question == q) for q in {r.question for r in requests}
    }
    return {
        "requests": len(requests),
        "requests_per_second": sum(inside(r, seconds) for r in requests) / (seconds * turns),
        "pieces_per_request": sum(r.pieces for r in requests) / max(len(requests), 1),
        "cpu_seconds_per_request": cpu_seconds / max(len(requests), 1),
        "ttft_p50": quantile(first, 0.5),
        "ttft_p99": quantile(first, 0.99),
        "request_p25_p50_p75": [quantile(whole, q) for q in (0.25, 0.5, 0.75)],
        "request_by_question": by_question,
        "errors": failed,
    }


def quantile(values: Sequence[float], q: float) -> float:
    ordered = sorted(values)
    return ordered[min(int(q * len(ordered)), len(ordered) - 1)] if ordered else float("nan")


def measure(args: argparse.Namespace) -> dict[str, Any]:
    facts = machine()
    cells: list[dict[str, Any]] = []
    missing = None
    with ExitStack() as servers:
        shipped = servers.enter_context(ours(args.dtype))
        fast = servers.enter_context(ours(args.dtype, "--rate", "fast"))
        contenders = [
            Contender("ephemera", *shipped, DEFAULT_MODEL, None),
            Contender("adapted", *shipped, f"{DEFAULT_MODEL}:universal", None),
            Contender("fast", *fast, f"{DEFAULT_MODEL}:layerwise", 1),
        ]
        if not args.no_transformers:
            try:
                running = servers.enter_context(theirs(args.dtype))
                contenders.append(Contender("transformers", *running, str(fetch_default_model()), None))
                contenders[-1].window(1, 0.1, args.tokens)
            except (ValueError, OSError, httpx.HTTPError) as error:
                missing = str(error)
                contenders = [c for c in contenders if c.who != "transformers"]
        for contender in contenders:  # so that no window pays for what a first time costs
            contender.window(4, 0.1, args.tokens)
        for clients in args.concurrency:
            seconds = args.seconds * (2 if clients == 1 else 1)
            found: dict[str, list[tuple[list[Request], int, float]]] = {c.who: [] for c in contenders}
            for turn in range(TURNS):
                for contender in contenders if turn % 2 == 0 else contenders[::-1]:
                    found[contender.who].append(contender.window(clients, seconds, args.tokens))
            for who, windows in found.items():
                requests = [r for window, _, _ in windows for r in window]
                failed, cpu = sum(w[1] for w in windows), sum(w[2] for w in windows)
                cell = summary(requests, failed, seconds, TURNS, cpu)
                print(f"{who:12} {clients:3} clients: {cell}", file=sys.stderr, flush=True)
                cells.append({"who": who, "concurrency": clients, **cell})
    settings = {"model": DEFAULT_MODEL, "dtype": args.dtype, "seconds": args.seconds, "turns": TURNS}
    settings["tokens"] = args.tokens
    return {"machine": facts, "settings": settings, "cells": cells, "transformers_missing": missing}


@dataclass(frozen=True)
class Contender:
    who: str
    url: str
    pid: int
    model: str
    steps: int | None

    def window(self, clients: int, seconds: float, tokens: int) -> tuple[list[Request], int, float]:
        """(answered, failed, the server's CPU seconds)"""
        before = cpu_seconds(self.pid)
        body_of = [ask(self.model, question, tokens, steps=self.steps) for question in QUESTIONS].__getitem__
        requests, failed = load(self.url, body_of, clients, seconds)
        return requests, failed, cpu_seconds(self.pid) - before


def cpu_seconds(pid: int) -> float:
    process = psutil.Process(pid)
    return sum(t.user + t.system for t in (p.cpu_times() for p in (process, *process.children(recursive=True))))


def table(found: dict[str, Any]) -> str:
    facts, settings, cells = found["machine"], found["settings"], found["cells"]
    lines = [
        f"{settings['model']} in {settings['dtype']}, streamed greedy chat, at most {settings['tokens']} tokens, "
        f"{settings['turns']} windows of {settings['seconds']:g} s each (one client: twice that).",
        f"Machine: {facts['cpu']}, {facts['cores']} cores, load average {facts['load_average']:.2f} before the run; "
        f"commit {facts['commit']}.",
        "",
        "| clients | server | requests/s | first token p50 (s) | p99 (s) | whole request p50 [quartiles] (s) | CPU s a request | requests |",
        "|--:|---|--:|--:|--:|--:|--:|--:|",
    ]
    for c in sorted(cells, key=lambda c: (c["concurrency"], list(NAMES).index(c["who"]))):
        low, middle, high = c["request_p25_p50_p75"]
        lines.append(
            f"| {c['concurrency']} | {NAMES[c['who']]} | {c['requests_per_second']:.3f} | {c['ttft_p50']:.3f} | "
            f"{c['ttft_p99']:.3f} | {middle:.2f} [{low:.2f}, {high:.2f}] | {c['cpu_seconds_per_request']:.2f} | {c['requests']} |"
        )
    if found["transformers_missing"]:
        lines += ["", f"`transformers serve` did not run: {found['transformers_missing']}"]
    aims = [aim for aim in aims_of(cells) if aim]
    return "\n".join([*lines, "", *aims]) if aims else "\n".join(lines)


def aims_of(cells: Sequence[dict[str, Any]]) -> list[str]:
    """The figures that were aimed at, from this run's cells; what was not measured is left out."""
    at = {(c["who"], c["concurrency"]): c for c in cells}
    lines = []
    ours_1, theirs_1 = at.get(("ephemera", 1)), at.get(("transformers", 1))
    if ours_1 and theirs_1:
        pairs = [(t, theirs_1["request_by_question"].get(q)) for q, t in ours_1["request_by_question"].items()]
        ratios = sorted(other / own for own, other in pairs if other)
        if ratios:
            lines.append(
                f"- One client, question by question: {median(ratios):.2f} times the speed of `transformers serve` "
                f"({ratios[0]:.2f} to {ratios[-1]:.2f}; aim: 1)."
            )
    for who in ("adapted", "fast"):
        both = [(n, at[who, n], at["ephemera", n]) for w, n in at if w == who and ("ephemera", n) in at]
        if both:
            told = ", ".join(f"{a['ttft_p50'] / e['ttft_p50']:.1f} at {n}" for n, a, e in both)
            lines.append(f"- {NAMES[who]}: first token, p50, over the unadapted one (clients): {told} (aim: 2.2).")
    for who, name in NAMES.items():
        one, many = at.get((who, 1)), at.get((who, 16))
        if one and many:
            grown = many["requests_per_second"] / one["requests_per_second"]
            lines.append(f"- {name}: requests/s from 1 client to 16: {grown:.1f} times (aim: 4).")
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serve", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--concurrency", default="1,4,16,32", help="(default: %(default)s)")
    parser.add_argument(
        "--seconds", type=float, default=8, help="of each window, twice that for one client (default: %(default)s)"
    )
    parser.add_argument("--tokens", type=int, default=32, help="longest answer (default: %(default)s)")
    parser.add_argument("--dtype", default="float32", help="(default: %(default)s)")
    parser.add_argument("--no-transformers", action="store_true", help="leave out `transformers serve`")
    parser.add_argument("--soak", type=float, default=0, help="seconds of the soak test instead")
    parser.add_argument("--output", type=Path, help="a folder for serve.json and serve.md, or soak.json and soak.md")
    args = parser.parse_args(argv)
    try:
        args.concurrency = [int(c) for c in args.concurrency.split(",")]
    except ValueError:
        print(f"error: --concurrency is {args.concurrency!r}; give numbers, as 1,4,16.", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the servers end too
    if args.soak:
        found = soak(args.soak)
        name, text = "soak", report(found)
    else:
        found = measure(args)
        name, text = "serve", table(found)
    print(text)
    if args.output:
        args.output.mkdir(parents=True, exist_ok=True)
        (args.output / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
        (args.output / f"{name}.md").write_text(text + "\n")
    return 1 if args.soak and not passed(found) else 0


if __name__ == "__main__":
    sys.exit(main())
