"""Replicas on Ray Serve: `serve run ephemera.serving.ray_app:application replicas.number=2`.

Each replica is the whole server of `serving.build`. A front passes requests on, as Ray's own proxy answers for a lost replica
in words of its own.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette
from starlette.types import Message

from ephemera.config import Serve, load_config
from ephemera.serving.http.auth import Guard, Keys
from ephemera.serving.http.errors import ApiError
from ephemera.serving.http.front import Front
from ephemera.serving.replica import Replica

if TYPE_CHECKING:
    from ray.serve import Application  # pyright: ignore[reportMissingImports]

LOST = "the replica that took this request was lost; send it again."
AGAIN = {"Retry-After": "1"}
FRONT, MODEL = "front", "model"  # the deployments' names


class RayReplica(Replica):
    """A replica that Ray Serve ends."""

    async def __del__(self) -> None:
        """Awaited by Ray Serve once no request is under way, or `drain` seconds have passed."""
        if "app" in vars(self):  # it was loaded
            await self.close()


def application(args: dict[str, Any]) -> Application:
    """What Ray Serve runs. `args`: settings of `Serve`, nested as in YAML or as `model.name=...`.

    ValueError names an unknown or wrong setting; ModuleNotFoundError without Ray.
    """
    from ray import serve  # pyright: ignore[reportMissingImports]

    settings = load_config(Serve, None, [f"{key}={_yaml(value)}" for key, value in args.items()])
    model = serve.deployment(RayReplica, name=MODEL, **options_of(settings))  # pyright: ignore[reportCallIssue]
    front = serve.deployment(
        serve.ingress(lambda: front_app(settings.max_body))(),
        name=FRONT,
        ray_actor_options={"num_cpus": 0},  # it only passes bytes on
        max_ongoing_requests=_most(settings) * _requests(settings),
        graceful_shutdown_timeout_s=settings.drain,
    )
    return front.bind(model.bind(settings.model_dump(mode="json")))


def _yaml(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)  # JSON is YAML


def _requests(settings: Serve) -> int:
    """So many wait and answer in one replica; its own queue then says 429."""
    return settings.max_batch + settings.max_queue


def _most(settings: Serve) -> int:
    return settings.replicas.most or settings.replicas.number


def options_of(settings: Serve) -> dict[str, Any]:
    """Ray Serve's options for the replicas."""
    replicas = settings.replicas
    options: dict[str, Any] = {
        "ray_actor_options": {"num_cpus": replicas.cpus, "num_gpus": replicas.gpus},
        "max_ongoing_requests": _requests(settings),
        "graceful_shutdown_timeout_s": settings.drain,
        "max_constructor_retry_count": 1,  # a model that cannot be loaded is no passing fault
    }
    if replicas.most is None:
        return {**options, "num_replicas": replicas.number}
    scaling = {"min_replicas": replicas.number, "max_replicas": replicas.most}
    return {**options, "autoscaling_config": {**scaling, "target_ongoing_requests": replicas.target}}


def front_app(max_body: int) -> Starlette:
    """The front, made in its own replica."""
    from ray import serve  # pyright: ignore[reportMissingImports]

    handle = serve.get_deployment_handle(MODEL, serve.get_replica_context().app_name)
    replicas = handle.options(method_name="ask", stream=True)

    async def ask(scope: dict[str, Any], body: bytes) -> AsyncGenerator[Message]:
        messages = replicas.remote(scope, body)
        try:
            async for message in messages:
                yield message
        finally:
            messages.cancel()

    app = Starlette()
    app.add_middleware(Front, ask=ask, told=told)
    app.add_middleware(Guard, keys=Keys(()), max_body=max_body)
    return app


def told(error: Exception) -> ApiError:
    """The error that a client gets for one of Ray's."""
    from ray.exceptions import RayActorError  # pyright: ignore[reportMissingImports]
    from ray.serve.exceptions import (  # pyright: ignore[reportMissingImports]
        BackPressureError,
        DeploymentUnavailableError,
    )

    if isinstance(error, BackPressureError):
        return ApiError(429, "every replica is busy. Try again in 1 s.", code="queue_full", headers=AGAIN)
    if isinstance(error, RayActorError):
        return ApiError(503, LOST, code="replica_lost", headers=AGAIN)
    if isinstance(error, DeploymentUnavailableError):
        return ApiError(503, "no replica is running.", code="not_ready", headers={"Retry-After": "5"})
    return ApiError(500, "the server failed; its log says where.")
