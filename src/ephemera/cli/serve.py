"""The command that serves."""

from __future__ import annotations

import os
import socket
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ephemera.cli.options import Device, Dtype, Model, Quantization, ReachOption, app, quiet, say_quantised, unshipped
from ephemera.downloads import DEFAULT_MODEL
from ephemera.made_for import FORMATS

if TYPE_CHECKING:
    from ephemera.config import Serve
    from ephemera.model import AdaptiveLM
    from ephemera.serving.engine.methods import Method

LOOPBACK = ("127.0.0.1", "localhost", "::1")

Rates = Annotated[
    list[str] | None,
    typer.Option(
        "--rate",
        "-r",
        help="Name, folder or number; one of each kind (fixed, stepwise, layerwise, constant, averaged). Repeatable. Served "
        "beside the networks that ship for the model, if they adapt the same projections, and the fixed rate 0.05.",
        show_default=False,
    ),
]
Start = Annotated[
    str,
    typer.Option(
        "--init",
        "-i",
        help="Where adapters start: zero, a generator, the folder of a plain PEFT LoRA, or a hub id of either.",
    ),
]
StepsDefault = Annotated[
    int | None,
    typer.Option(
        "--steps",
        "-k",
        min=0,
        help="Steps of a request that names none. Default: what each method's rate was validated at, 1 for a number.",
        show_default=False,
    ),
]
MaxKl = Annotated[
    float | None,
    typer.Option(
        min=1e-6,
        help="Most nats of KL by which an adapter may move an answer's first token; it is shrunk until it does. "
        "Default: no bound.",
        show_default=False,
    ),
]


@app.command(
    epilog="""Examples:

    ephemera serve

    ephemera serve --port 8080 --rate scalenet-squad --steps 3

    EPHEMERA_API_KEYS=first,second ephemera serve --host 0.0.0.0"""
)
def serve(
    model: Model = DEFAULT_MODEL,
    rate: Rates = None,
    init: Start = "zero",
    steps: StepsDefault = None,
    reach: ReachOption = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 8000,
    dtype: Dtype = None,
    quantization: Quantization = "none",
    device: Device = None,
    api_key: Annotated[
        list[str] | None, typer.Option(help="A key that clients must send. Repeatable; or EPHEMERA_API_KEYS=A,B.")
    ] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="Listen beyond this machine without keys.")] = False,
    cors: Annotated[list[str] | None, typer.Option(help="An origin whose pages may call. Repeatable.")] = None,
    max_batch: Annotated[int, typer.Option(min=1, help="Answers decoded together.")] = 32,
    max_queue: Annotated[int, typer.Option(min=1, help="Prompts that may wait; more get 429.")] = 256,
    max_steps: Annotated[int, typer.Option(min=1, help="Most steps a request may ask for.")] = 8,
    max_kl: MaxKl = None,
    max_prompt_tokens: Annotated[int, typer.Option(min=2, help="Longest prompt.")] = 4096,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 1024,
    max_body: Annotated[int, typer.Option(min=1024, help="Largest request body, in bytes.")] = 1 << 20,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds until a request is given up.")] = 300,
    drain: Annotated[int, typer.Option(min=0, help="Seconds that a shutdown waits for answers under way.")] = 30,
) -> None:
    """Serve OpenAI's API, adapting to every request, and a page to try it."""
    settings = _settings(
        model={"name": model, "dtype": dtype, "quantization": quantization, "device": device},
        rates=rate or [],
        init=init,
        steps=steps,
        reach=reach,
        api_keys=_keys(api_key or [], host, insecure=insecure),
        cors=cors or [],
        max_batch=max_batch,
        max_queue=max_queue,
        max_steps=max_steps,
        max_kl=max_kl,
        max_prompt_tokens=max_prompt_tokens,
        max_tokens=max_tokens,
        max_body=max_body,
        timeout=timeout,
        drain=drain,
    )
    import uvicorn

    from ephemera.serving.build import build

    listening = _bind(host, port)
    quiet()
    web = build(settings, lambda lm, known: _announce(lm, known, model, told=not rate and init == "zero"))
    shown = f"[{host}]" if ":" in host else host
    print(f"at http://{shown}:{listening.getsockname()[1]} (the page), .../v1 (the API)", file=sys.stderr, flush=True)
    config = uvicorn.Config(web, log_level="warning", timeout_graceful_shutdown=drain, server_header=False)
    uvicorn.Server(config).run(sockets=[listening])


def _settings(**values: Any) -> Serve:
    from ephemera.config import Serve, check_config
    from ephemera.made_for import checked_reach

    if values["reach"] is not None:
        checked_reach(values["reach"])
    return check_config(Serve, values)


def _keys(given: list[str], host: str, *, insecure: bool) -> list[str]:
    """The API keys of the options and of the environment; ValueError if others could reach a server that has none."""
    keys = [*given, *filter(None, (k.strip() for k in os.environ.get("EPHEMERA_API_KEYS", "").split(",")))]
    if any(not key.strip() for key in given):
        raise ValueError("--api-key is empty; give a key of your own choice, e.g. --api-key $(openssl rand -hex 16).")
    if host not in LOOPBACK and not keys and not insecure:
        raise ValueError(
            f"--host {host} opens the server to others, and no API key is set. Give --api-key KEY (or "
            "EPHEMERA_API_KEYS), or --insecure if whoever reaches this address may use it."
        )
    return keys


def _announce(lm: AdaptiveLM, known: list[Method], model: str, *, told: bool) -> None:
    """The ids that are served; if `told`, also the prompts' formats for which no network ships."""
    from ephemera.serving.engine.methods import DEFAULT

    say_quantised(lm.backbone)
    print(f"serving {', '.join(dict.fromkeys(m.model_id for m in known))}", file=sys.stderr)
    missing = [f for f in FORMATS if all(m.name != DEFAULT or m.format != f for m in known)]
    if missing and told:
        served = "the model itself and a fixed rate are served" if missing == [*FORMATS] else "those are not adapted to"
        print(unshipped(model, " and ".join(missing), served), file=sys.stderr)


def _bind(host: str, port: int) -> socket.socket:
    """The socket to listen on; taken before the model is loaded, so that a taken port is known at once."""
    listening: socket.socket | None = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
    except OSError as error:
        if listening is not None:
            listening.close()
        raise ValueError(
            f"cannot listen on {host} port {port}: {error.strerror or error}. Choose another with --host and --port."
        ) from None
    return listening
