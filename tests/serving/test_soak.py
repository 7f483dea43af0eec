"""Half a minute of 32 clients at once: every answer is the solo answer, none is lost, memory stays flat."""

from __future__ import annotations

import asyncio
import random
import time

import httpx
import psutil
import pytest

from ephemera.serving.http.requests import Limits
from serving_fixtures import PROMPTS, live, solo, tiny_methods
from tiny_models import tiny_backbone

SECONDS, CLIENTS = 30, 32
MB = 1 << 20


async def soak(url: str, cases: list[tuple[dict, str]], memory: list[int]) -> dict[str, int]:
    """Clients that ask, stream or hang up until the time is over."""
    counts = {"right": 0, "hung up": 0, "busy": 0}
    wrong: list[tuple[dict, str, str]] = []
    end = time.monotonic() + SECONDS
    limits = httpx.Limits(max_connections=None)

    async def client(number: int, http: httpx.AsyncClient) -> None:
        dice = random.Random(number)
        while time.monotonic() < end:
            ask, want = dice.choice(cases)
            if dice.random() < 0.15:
                try:
                    await http.post("/v1/completions", json={**ask, "stream": dice.random() < 0.5}, timeout=0.03)
                except httpx.HTTPError:
                    counts["hung up"] += 1
                continue
            response = await http.post("/v1/completions", json=ask, timeout=60)
            if response.status_code == 429:
                counts["busy"] += 1
                await asyncio.sleep(0.05)
                continue
            text = response.json()["choices"][0]["text"]
            if text == want:
                counts["right"] += 1
            else:
                wrong.append((ask, text, want))

    async def watch() -> None:
        process = psutil.Process()
        while time.monotonic() < end:
            memory.append(process.memory_info().rss)
            await asyncio.sleep(0.5)

    async with httpx.AsyncClient(base_url=url, limits=limits) as http:
        await asyncio.gather(watch(), *(client(i, http) for i in range(CLIENTS)))
    assert not wrong, wrong[0]
    return counts


@pytest.mark.timeout(180)
def test_soak():
    backbone = tiny_backbone("llama")
    known, dice = tiny_methods(backbone), random.Random(0)
    cases = []
    for method in known:
        for prompt in PROMPTS:
            steps, tokens = dice.randrange(min(method.max_steps, 2) + 1), dice.randrange(1, 24)
            ask = {"model": method.model_id, "prompt": prompt, "temperature": 0, "max_tokens": tokens}
            want = solo(backbone, method, prompt, steps=steps, tokens=tokens)
            cases.append(({**ask, "adapt": {"steps": steps}}, want))
    memory: list[int] = []
    limits = Limits(prompt_tokens=64, answer_tokens=32, rows=16, seconds=60)
    with live(backbone, known, limits=limits, max_rows=16, max_queue=24) as (url, engine):
        counts = asyncio.run(soak(url, cases, memory))
        for _ in range(250):
            if not engine.waiting and not engine.batch.answers:
                break
            time.sleep(0.02)
        assert not engine.waiting
        assert not engine.batch.answers
        assert engine.alive
    assert counts["right"] > 100, counts
    assert counts["hung up"] > 5, counts
    third = len(memory) // 3
    assert max(memory[-third:]) < max(memory[third:-third]) + 50 * MB, [m // MB for m in memory]
