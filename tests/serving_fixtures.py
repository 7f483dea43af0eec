"""A running engine on a tiny model, its solo counterpart, and a live server on loopback."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from ephemera.inits import LoraGenerator
from ephemera.llm.frozen_lm import FrozenLM
from ephemera.made_for import MadeFor
from ephemera.model import AdaptiveLM
from ephemera.rates import FixedRate
from ephemera.serving.engine import methods
from ephemera.serving.engine.messages import Event, Failed, Finished, Job, Report, Text
from ephemera.serving.engine.methods import Method
from ephemera.serving.engine.sampling import Sampling
from ephemera.serving.engine.scheduler import Engine
from ephemera.serving.http.requests import Limits, Reader
from tiny_models import random_scalenet

PROMPTS = (
    "The river runs past the old mill",
    "Question: who wrote the first book about the river? Answer:",
    "a",
    "Give a short answer of the following question. Who wrote it in the winter?",
    "The sea",
)


def tiny_generator(backbone: FrozenLM) -> LoraGenerator:
    """Adapters of rank 2 that are no no-ops."""
    torch.manual_seed(5)
    made = LoraGenerator(
        projections=backbone.projections,
        state_size=backbone.hidden_size,
        hidden_size=16,
        made_for=MadeFor(("boolq", "snli"), steps=0),
    )
    with torch.no_grad():
        for weight in made.parameters():
            weight.normal_(0, 0.3)
    return made.to(backbone.dtype).eval().requires_grad_(False)


def tiny_methods(backbone: FrozenLM) -> list[Method]:
    scalenet = random_scalenet(backbone).to(backbone.dtype)
    return methods.build(backbone, tiny_generator(backbone), [FixedRate(0.3), scalenet])


def collect(jobs: Sequence[Job], engine: Engine, timeout: float = 60) -> list[list[Event]]:
    """Submit jobs together; every event of each until all have ended."""
    events: queue.Queue[tuple[int, Event]] = queue.Queue()
    for i, job in enumerate(jobs):
        job.emit = lambda event, i=i: events.put((i, event))
    engine.submit(jobs)
    found: list[list[Event]] = [[] for _ in jobs]
    open_answers = [job.rows for job in jobs]
    end = time.monotonic() + timeout
    while any(n > 0 for n in open_answers):
        i, event = events.get(timeout=max(end - time.monotonic(), 0.01))
        found[i].append(event)
        if isinstance(event, Failed):
            open_answers[i] = 0
        elif isinstance(event, Finished) or (isinstance(event, Report) and jobs[i].n == 0):
            open_answers[i] -= 1
    return found


def text_of(events: Sequence[Event], choice: int = 0) -> str:
    return "".join(e.text for e in events if isinstance(e, Text) and e.choice == choice)


def job_for(backbone: FrozenLM, method: Method, prompt: str, *, steps: int = 0, tokens: int = 12, **more) -> Job:
    ids = AdaptiveLM(backbone).encode(prompt)
    sampling = more.pop("sampling", None) or Sampling(max_tokens=tokens)
    return Job(ids, method, steps, lambda event: None, sampling=sampling, **more)


def solo(backbone: FrozenLM, method: Method, prompt: str, *, steps: int, tokens: int = 12, chat: bool = False) -> str:
    """The same answer by the library, alone."""
    lm = AdaptiveLM(backbone, init=method.init, rate=method.rate, chat=chat)
    return lm.generate(prompt, steps=steps, max_new_tokens=tokens)[0]


@contextmanager
def running(engine: Engine) -> Iterator[Engine]:
    engine.start()
    try:
        yield engine
    finally:
        engine.close(30)


@contextmanager
def live(backbone: FrozenLM, known: Sequence[Method], *, limits: Limits | None = None, steps: int = 2, **options):
    """(address, engine) of a real uvicorn on a free port, in a thread."""
    import uvicorn

    from ephemera.serving.http.app import Settings, create_app
    from ephemera.serving.metrics import Metrics

    metrics = Metrics()
    rows, waiting = options.pop("max_rows", 8), options.pop("max_queue", 64)
    engine = Engine(backbone, max_rows=rows, max_queue=waiting, observer=metrics).start()
    limits = limits or Limits(prompt_tokens=80, answer_tokens=32, rows=8, seconds=60)
    reader = Reader(backbone, known, steps=steps, limits=limits)
    app = create_app(engine, reader, metrics, Settings(**options))
    config = uvicorn.Config(app, port=0, log_level="error", timeout_graceful_shutdown=5)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}", engine
    finally:
        server.should_exit = True
        thread.join(30)
