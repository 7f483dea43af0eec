"""A server, from its settings to the application: what `ephemera serve` runs, and each replica of Ray Serve."""

from __future__ import annotations

from collections.abc import Callable

from fastapi import FastAPI

from ephemera.config import Serve
from ephemera.model import AdaptiveLM
from ephemera.serving.engine import methods
from ephemera.serving.engine.methods import Method
from ephemera.serving.engine.scheduler import Engine
from ephemera.serving.engine.threads import in_passing_thread
from ephemera.serving.http.app import Settings, create_app
from ephemera.serving.http.requests import Limits, Reader
from ephemera.serving.metrics import Metrics

Loaded = Callable[[AdaptiveLM, list[Method]], None]


def build(settings: Serve, loaded: Loaded | None = None) -> FastAPI:
    """The application around a model, which it loads, and a running engine, which ends with the application.

    `loaded`: told of the model and the methods that are served. `replicas` is of Ray Serve only. ValueError where a model,
    a rate or an init cannot be loaded or does not fit.
    """
    lm, known = in_passing_thread(lambda: _load(settings))
    if loaded is not None:
        loaded(lm, known)
    limits = Limits(
        prompt_tokens=settings.max_prompt_tokens,
        answer_tokens=settings.max_tokens,
        rows=settings.max_batch,
        seconds=settings.timeout,
    )
    metrics = Metrics()
    engine = Engine(lm.backbone, max_rows=settings.max_batch, max_queue=settings.max_queue, observer=metrics).start()
    reader = Reader(lm.backbone, known, limits=limits, steps=settings.steps)
    operator = Settings(
        keys=tuple(settings.api_keys), cors=tuple(settings.cors), max_body=settings.max_body, drain=settings.drain
    )
    return create_app(engine, reader, metrics, operator)


def _load(settings: Serve) -> tuple[AdaptiveLM, list[Method]]:
    name, found = settings.model.name, methods.offer(settings.model.name, settings.rates, settings.init)
    lm = AdaptiveLM.from_pretrained(name, init=found.init, rate=found.trained or "none", **settings.model.loading)
    known = methods.build(
        lm.backbone,
        lm.init,
        found.rates,
        defaults=found.defaults,
        unasked=found.unasked,
        most_steps=settings.max_steps,
        reach=settings.reach,
        max_kl=settings.max_kl,
    )
    return lm, known
