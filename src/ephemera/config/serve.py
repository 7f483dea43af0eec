"""Settings of a server, in one process or as replicas on Ray Serve."""

from __future__ import annotations

from pydantic import Field, model_validator

from ephemera.config.base import ModelSettings
from ephemera.config.settings import Settings
from ephemera.made_for import Reach


class ReplicaSettings(Settings):
    """How many models Ray Serve runs, and what each takes."""

    number: int = Field(default=1, ge=1, description="replicas, each with a model; with `most` those at the start")
    most: int | None = Field(default=None, ge=1, description="autoscaling: up to so many; default: always `number`")
    target: float = Field(default=8, gt=0, description="autoscaling: requests under way for each replica")
    cpus: float = Field(default=1, gt=0, description="cores of a replica; its threads too")
    gpus: float = Field(default=0, ge=0, description="of a replica; 0.5: two replicas share one")

    @model_validator(mode="after")
    def _grows(self) -> ReplicaSettings:
        if self.most is not None and self.most < self.number:
            raise ValueError(f"most={self.most} is less than number={self.number}; give more, or leave it out")
        return self


class Serve(Settings):
    """`ephemera serve`, and the application that Ray Serve runs"""

    model: ModelSettings = ModelSettings()
    rates: list[str] = Field(default=[], description="as --rate of `ephemera serve`")
    init: str = Field(default="zero", description="where adapters start: zero, a generator, or a plain PEFT LoRA")
    steps: int | None = Field(default=None, ge=0, description="of a request that names none; default: as validated")
    reach: Reach | None = Field(default=None, description="default: as each rate was trained for")
    max_kl: float | None = Field(
        default=None,
        gt=0,
        description="most nats of KL by which an adapter moves an answer's first token; default: no bound",
    )
    api_keys: list[str] = Field(default=[], repr=False, description="one of these must be sent; none: anyone may ask")
    cors: list[str] = Field(default=[], description="origins whose pages may call")
    max_batch: int = Field(default=32, ge=1, description="answers decoded together")
    max_queue: int = Field(default=256, ge=1, description="prompts that may wait; more get 429")
    max_steps: int = Field(default=8, ge=1, description="most steps a request may ask for")
    max_prompt_tokens: int = Field(default=4096, ge=2, description="longest prompt")
    max_tokens: int = Field(default=1024, ge=1, description="longest answer")
    max_body: int = Field(default=1 << 20, ge=1024, description="largest request body, in bytes")
    timeout: float = Field(default=300, ge=1, description="seconds until a request is given up")
    drain: int = Field(default=30, ge=0, description="seconds that a shutdown waits for answers under way")
    replicas: ReplicaSettings = ReplicaSettings()
