"""The server's benchmark: how requests are counted, what it says of them, and what its soak takes for a fault."""

from __future__ import annotations

import random

import pytest

pytest.importorskip("fastapi", reason="needs the extra: pip install 'ephemera[serve]'")

import httpx
from benchmarks.serve import Request, aims_of, inside, load, questions_of, summary, table
from benchmarks.servers import QUESTIONS, ask
from benchmarks.soak import one_request, passed, report

from serving_fixtures import live, tiny_methods
from tiny_models import tiny_backbone


def test_a_request_counts_by_its_share_of_the_window():
    """Two in a row and half of a third in 5 seconds: 0.5 a second, whether the window ends a moment sooner or later."""
    requests = [Request(0, 0, 0.5, 2, 8), Request(1, 2, 2.5, 4, 8), Request(2, 4, 4.5, 6, 8)]
    assert [inside(r, 5) for r in requests] == [1, 1, 0.5]
    for seconds in (3.9, 4.1, 5.0, 6.0):
        begun = [r for r in requests if r.begun < seconds]
        assert summary(begun, 0, seconds, 1, 3.0)["requests_per_second"] == pytest.approx(0.5)
    found = summary(requests, 1, 5, 1, 3.0)
    assert (found["cpu_seconds_per_request"], found["ttft_p50"], found["errors"]) == (1, 0.5, 1)
    assert found["request_by_question"] == {0: 2, 1: 2, 2: 2}


def test_every_contender_is_asked_the_same():
    walks = [questions_of(1), questions_of(1), questions_of(2)]
    one, again, other = [[next(w) for _ in range(2 * len(QUESTIONS))] for w in walks]
    assert one == again != other
    assert sorted(one[: len(QUESTIONS)]) == list(range(len(QUESTIONS)))


def cell(who: str, clients: int, rate: float, ttft: float, whole: float) -> dict:
    requests = [Request(q, 0, ttft, whole * (1 + q), 8) for q in range(2)]
    return {"who": who, "concurrency": clients, **summary(requests, 0, 100, 1, 2.0), "requests_per_second": rate}


def test_the_aims_are_ratios_of_the_run():
    cells = [
        cell("ephemera", 1, 1.0, 0.1, 1.0),
        cell("transformers", 1, 1.1, 0.1, 0.9),
        cell("fast", 1, 0.8, 0.18, 1.2),
    ]
    cells += [cell("ephemera", 16, 4.5, 0.5, 3.0), cell("fast", 16, 3.2, 1.25, 4.0)]
    one, fast, plain_grown, fast_grown = aims_of(cells)
    assert "0.90 times the speed of `transformers serve` (0.90 to 0.90" in one
    assert "1.8 at 1, 2.5 at 16" in fast
    assert "4.5 times" in plain_grown
    assert "4.0 times" in fast_grown
    machine = {"cpu": "c", "cores": 2, "load_average": 0.0, "commit": "abc"}
    settings = {"model": "m", "dtype": "float32", "tokens": 32, "turns": 2, "seconds": 8}
    told = table({"machine": machine, "settings": settings, "cells": cells, "transformers_missing": None})
    assert told.count("\n| ") == 1 + len(cells)
    assert one in told


@pytest.fixture(scope="module")
def url():
    backbone = tiny_backbone("llama")
    with live(backbone, tiny_methods(backbone)) as (address, _):
        yield address


def test_clients_against_a_server(url: str):
    bodies = [ask("tiny-llama:fixed", q[:20], 6, steps=1) for q in QUESTIONS]
    # A random model's answer may be empty, which counts as a failure: take questions that it says something to
    with httpx.Client(base_url=url, timeout=60) as http:
        texts = [http.post("/v1/chat/completions", json={**body, "stream": False}).json() for body in bodies]
    spoken = [body for body, text in zip(bodies, texts, strict=True) if text["choices"][0]["message"]["content"]]
    assert spoken

    def body_of(question: int) -> dict:
        return {**spoken[question % len(spoken)], "temperature": 0}

    requests, failed = load(url, body_of, 3, 1.0)
    assert failed == 0
    assert len(requests) >= 3
    for r in requests:
        assert 0 <= r.begun < 1.0
        assert r.begun < r.first <= r.ended
        assert 1 <= r.pieces <= 6
    assert len(load(url, body_of, 8, 0.05)[0]) >= 8  # everyone asks, however short the window
    assert load(url, lambda _: ask("no-such", "Hi", 4), 2, 1.0) == ([], 2)


def test_the_soak_tells_right_from_wrong_and_lost(url: str):
    class Luck(random.Random):
        def __init__(self, luck: float):
            self.luck = luck

        def random(self) -> float:
            return self.luck

    whole, leaves, streamed = Luck(0.9), Luck(0.15), Luck(0.4)
    body = ask("tiny-llama:fixed", "The mill", 8, steps=1, stream=False)
    with httpx.Client(base_url=url, timeout=60) as http:
        want = http.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"]
        assert one_request(http, body, want, whole) == ("right", want)
        assert one_request(http, body, want, streamed) == ("right", want)
        assert one_request(http, body, "another", streamed) == ("wrong", want)
        assert one_request(http, body, want, leaves)[0] == "hung up"
        for dice in (whole, streamed):
            assert one_request(http, {**body, "model": "no-such"}, want, dice)[0] == "lost"


def test_a_soak_passes_only_without_a_fault():
    counts = {"right": 5, "wrong": 0, "hung up": 2, "busy": 1, "lost": 0}
    found = {"counts": counts, "left_behind": {"waiting": 0.0}, "growth_mb": 3, "memory_mb": [90, 95], "seconds": 60}
    found |= {"clients": 32, "machine": {"cpu": "c", "cores": 2, "commit": "abc"}}
    assert passed(found)
    assert "8 requests: 5 right, 0 wrong, 2 hung up, 1 busy, 0 lost" in report(found)
    for fault in (
        {"counts": {**counts, "wrong": 1}},
        {"counts": {**counts, "lost": 1}},
        {"counts": {**counts, "right": 0}},
        {"left_behind": {"waiting": 1.0}},
        {"growth_mb": 500},
    ):
        assert not passed({**found, **fault})
