"""Many mixed clients for minutes: every completed answer is the solo answer, none is lost, memory stays flat."""

from __future__ import annotations

import random
import threading
import time
from typing import Any

import httpx
import psutil

from benchmarks.servers import QUESTIONS, ask, ours, text_of
from ephemera.bench.timing import machine
from ephemera.downloads import DEFAULT_MODEL

CLIENTS = 32
GROWTH_MB = 200  # more between the run's second and last third is a leak


def soak(seconds: float) -> dict[str, Any]:
    """Mixed clients for some time; every completed greedy answer against its solo answer."""
    counts = {"right": 0, "wrong": 0, "hung up": 0, "busy": 0, "lost": 0}
    lock, memory, wrong = threading.Lock(), [], []
    methods = ("--rate", "scalenet-nq-open", "--rate", "stepwise-nq-open", "--init", "taskweaver")
    with ours("float32", *methods) as (url, pid), httpx.Client(base_url=url, timeout=300) as http:
        cases = solo_answers(http)
        begun = time.monotonic()
        end = begun + seconds

        def client(number: int) -> None:
            dice = random.Random(number)
            with httpx.Client(base_url=url, timeout=300) as mine:
                while time.monotonic() < end:
                    body, want = dice.choice(cases)
                    what, got = one_request(mine, body, want, dice)
                    with lock:
                        counts[what] += 1
                        if what in ("wrong", "lost"):
                            wrong.append({"what": what, "asked": body, "want": want, "got": got})

        threads = [threading.Thread(target=client, args=(i,)) for i in range(CLIENTS)]
        for thread in threads:
            thread.start()
        while time.monotonic() < end:
            memory.append(psutil.Process(pid).memory_info().rss >> 20)
            time.sleep(2)
        for thread in threads:
            thread.join()
        state = dict.fromkeys(("ephemera_waiting", "ephemera_decoding"), -1.0)
        for _ in range(50):  # whoever hung up last is forgotten between two tokens
            lines = (line.split() for line in http.get("/metrics").text.splitlines())
            state = {name: float(value) for name, value, *_ in lines if name in state}
            if not any(state.values()):
                break
            time.sleep(0.2)
    third = max(len(memory) // 3, 1)
    growth = max(memory[-third:]) - max(memory[third : 2 * third] or memory[:1])
    return {
        "seconds": seconds,
        "clients": CLIENTS,
        "cases": len(cases),
        "counts": counts,
        "not_right": wrong[:20],
        "left_behind": state,
        "memory_mb": memory,
        "growth_mb": growth,
        "machine": machine(),
    }


def solo_answers(http: httpx.Client) -> list[tuple[dict[str, Any], str]]:
    """Requests of every method, 0 to 2 steps and 4 to 25 tokens, with the answer that each gets alone."""
    ids = [m["id"] for m in http.get("/v1/models").json()["data"]]
    cases = []
    for i, question in enumerate(QUESTIONS):
        for model in ids[i % 2 :: 2]:
            most = http.get(f"/v1/models/{model}").json()["max_steps"]
            body = ask(model, question, 4 + 3 * i, steps=min(i % 3, most), stream=False)
            answer = http.post("/v1/chat/completions", json=body).raise_for_status().json()
            cases.append((body, answer["choices"][0]["message"]["content"]))
    return cases


def one_request(http: httpx.Client, body: dict[str, Any], want: str, dice: random.Random) -> tuple[str, str]:
    """(what came of it, the answer). A tenth hang up after half a second, a tenth in the midst of a stream, a third
    of the others are streamed to the end."""
    luck = dice.random()
    hasty, leaves, streams = luck < 0.1, 0.1 <= luck < 0.2, 0.1 <= luck < 0.5
    try:
        if not streams:
            made = http.post("/v1/chat/completions", json=body, timeout=0.5 if hasty else 300)
            status, text = made.status_code, "" if made.is_error else made.json()["choices"][0]["message"]["content"]
        else:
            text, pieces, whole = "", 0, False
            with http.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as response:
                status = response.status_code
                for line in response.iter_lines():
                    whole = whole or line == "data: [DONE]"
                    if line.startswith("data: {"):
                        text, pieces = text + text_of(line), pieces + 1
                    if leaves and pieces == 2:
                        return "hung up", text
            status = 500 if status == 200 and not whole else status  # an error in the midst of a stream, or no end
    except httpx.HTTPError as error:
        return ("hung up", "") if hasty else ("lost", repr(error))
    if status != 200:
        return ("busy" if status == 429 else "lost"), f"status {status}: {text}"
    return ("right" if text == want else "wrong"), text


def report(found: dict[str, Any]) -> str:
    counts, facts, memory = found["counts"], found["machine"], found["memory_mb"]
    told = ", ".join(f"{n} {what}" for what, n in counts.items())
    return "\n".join(
        [
            f"{found['clients']} clients for {found['seconds']:g} s, {DEFAULT_MODEL} in float32, every method of the server, 0 to 2 "
            "steps, 4 to 25 tokens, a third streamed; a fifth of the requests hang up, before the answer or in its midst.",
            f"Machine: {facts['cpu']}, {facts['cores']} cores; commit {facts['commit']}.",
            "",
            f"- {sum(counts.values())} requests: {told}. Right is: the text of the same request when it was alone.",
            f"- The server's memory: {memory[0]} MB at the beginning, at most {max(memory)} MB; its largest in the last third "
            f"less that in the second: {found['growth_mb']} MB.",
            f"- Left waiting or decoding when all clients were gone: {sum(found['left_behind'].values()):g}.",
        ]
    )


def passed(found: dict[str, Any]) -> bool:
    counts = found["counts"]
    sound = not (counts["wrong"] or counts["lost"] or any(found["left_behind"].values()))
    return sound and counts["right"] > 0 and found["growth_mb"] <= GROWTH_MB
