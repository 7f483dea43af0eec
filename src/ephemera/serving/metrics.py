"""What the engine and the routes do, for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from ephemera.adaptation import LeftAlone
from ephemera.serving.engine.messages import Job, Observer

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics(Observer):
    def __init__(self):
        self.registry = CollectorRegistry()
        self.responses = Counter(
            "ephemera_http_responses", "Responses by path and status.", ["path", "status"], registry=self.registry
        )
        self.answers = Counter(
            "ephemera_answers", "Answers by method and how they ended.", ["method", "how"], registry=self.registry
        )
        self.tokens = Counter("ephemera_tokens_generated", "Tokens of answers.", ["method"], registry=self.registry)
        self.prompt_tokens = Counter(
            "ephemera_tokens_prompt", "Tokens of prompts read.", ["method"], registry=self.registry
        )
        self.fallbacks = Counter(
            "ephemera_fallbacks", "Prompts answered from their start.", ["method"], registry=self.registry
        )
        self.prompts = Counter("ephemera_prompts", "Prompts by method.", ["method"], registry=self.registry)
        self.abstained = Counter(
            "ephemera_abstained",
            "Prompts that a gate left alone; their share is this by ephemera_prompts.",
            ["method"],
            registry=self.registry,
        )
        self.memory = Counter("ephemera_out_of_memory", "Batches that had to be split.", registry=self.registry)
        self.first = Histogram(
            "ephemera_first_token_seconds",
            "From arrival to the first token.",
            ["method"],
            buckets=SECONDS,
            registry=self.registry,
        )
        self.adapt = Histogram(
            "ephemera_adapt_seconds", "Adapting to the prompt.", ["method"], buckets=SECONDS, registry=self.registry
        )
        self.waiting = Gauge("ephemera_waiting", "Prompts in the queue.", registry=self.registry)
        self.decoding = Gauge("ephemera_decoding", "Answers in the decode batch.", registry=self.registry)

    def first_token(self, job: Job, seconds: float) -> None:
        self.first.labels(job.method.name).observe(seconds)

    def adapted(self, job: Job, seconds: float, left: LeftAlone | None) -> None:
        self.prompts.labels(job.method.name).inc()
        self.abstained.labels(job.method.name).inc(int(left is LeftAlone.ABSTAINED))
        self.prompt_tokens.labels(job.method.name).inc(len(job.ids))
        if job.method.init is not None:
            self.adapt.labels(job.method.name).observe(seconds)
        if left not in (None, LeftAlone.ABSTAINED):
            self.fallbacks.labels(job.method.name).inc()

    def ended(self, job: Job, how: str, tokens: int) -> None:
        self.answers.labels(job.method.name, how).inc()
        self.tokens.labels(job.method.name).inc(tokens)

    def out_of_memory(self) -> None:
        self.memory.inc()

    def page(self) -> bytes:
        return generate_latest(self.registry)
