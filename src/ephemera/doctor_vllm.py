"""`ephemera doctor --vllm URL --adapter FOLDER`: does a vLLM server load an adapter while it runs, and use it?"""

from __future__ import annotations

import json
import urllib.error
import urllib.request
import uuid
from pathlib import Path
from typing import Any

from ephemera.doctor import Check

PROMPT = "Question: who wrote Hamlet?\nAnswer:"
SECONDS = 120.0
APART = 0.02  # nats by which the same token's log-probability differs, if the text does not; noise is smaller
SWITCH = "start it with VLLM_ALLOW_RUNTIME_LORA_UPDATING=True and --enable-lora"


class _Refused(Exception):
    """What a server said, or why it could not be asked."""

    def __init__(self, words: str, status: int | None = None):
        super().__init__(words)
        self.status = status


def examine_vllm(url: str, adapter: Path) -> list[Check]:
    """Reach the server, load the adapter under a new name, compare its answer with the base model's, and unload it.

    Stops at the first check that fails.
    """
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"--vllm is {url!r}; allowed is an address such as http://localhost:8000. Give the server's.")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        if not (adapter / file).is_file():
            raise ValueError(
                f"--adapter is {str(adapter)!r}, which holds no {file}; allowed is a folder of PEFT's two files. "
                "Make one by `ephemera export --all`, and give one of its folders."
            )
    root = url.rstrip("/").removesuffix("/v1")
    try:
        model = _ask(f"{root}/v1/models")["data"][0]["id"]
    except (_Refused, KeyError, IndexError, TypeError) as error:
        return [Check("vllm", f"{root} lists no model ({error})", "start the server, or correct the address")]
    checks = [Check("vllm", f"{root} serves {model}")]
    name = f"ephemera-doctor-{uuid.uuid4().hex[:8]}"  # engines keep adapters by name: an old one would answer
    try:
        _ask(f"{root}/v1/load_lora_adapter", lora_name=name, lora_path=str(adapter.resolve()))
    except _Refused as error:
        if error.status in (404, 405):
            return [*checks, Check("runtime LoRA loading", "it is switched off", SWITCH)]
        fix = f"read the server's log; the folder must be readable there, and {SWITCH} --max-lora-rank of at least {_rank(adapter)}"
        return [*checks, Check("runtime LoRA loading", f"the server refused the adapter ({error})", fix)]
    checks.append(Check("runtime LoRA loading", f"{adapter} loaded as {name}"))
    try:
        checks.append(_compared(root, model, name, _prompt(adapter)))
    finally:
        try:
            _ask(f"{root}/v1/unload_lora_adapter", lora_name=name)
        except _Refused as error:
            checks.append(Check("unloading", f"the server kept {name} ({error})", "restart it, or unload it there"))
    return checks


def _compared(root: str, model: str, name: str, prompt: str) -> Check:
    fields = {"prompt": prompt, "max_tokens": 16, "temperature": 0, "logprobs": 1}
    try:
        (plain, plain_logs), (adapted, logs) = (
            _answer(_ask(f"{root}/v1/completions", model=who, **fields)) for who in (model, name)
        )
    except (_Refused, KeyError, IndexError, TypeError) as error:
        return Check("answer", f"the server did not answer ({error})", "read the server's log")
    moved = any(abs(a - b) > APART for a, b in zip(plain_logs[:1], logs[:1], strict=False))
    if plain == adapted and not moved:
        fix = "use an adapter that moves its prompt (a higher --rate), or check that the server applies adapters to this model"
        return Check("answer", f"the adapter changes nothing: both say {plain!r}", fix)
    return Check("answer", f"base {plain!r}, adapted {adapted!r}")


def _answer(reply: dict[str, Any]) -> tuple[str, list[float]]:
    choice = reply["choices"][0]
    logs = (choice.get("logprobs") or {}).get("token_logprobs") or []
    return choice["text"], [value for value in logs if value is not None]


def _prompt(adapter: Path) -> str:
    """The prompt that the adapter was made for, if a manifest beside it says so."""
    try:
        listed = json.loads((adapter.resolve().parent / "manifest.json").read_text(encoding="utf-8"))["adapters"]
        found = next(entry["prompt"] for entry in listed if entry["name"] == adapter.resolve().name)
    except (OSError, ValueError, KeyError, TypeError, StopIteration):
        return PROMPT
    return found if isinstance(found, str) else PROMPT


def _rank(adapter: Path) -> Any:
    try:
        return json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))["r"]
    except (OSError, ValueError, KeyError, TypeError):
        return "the adapter's r"


def _ask(url: str, **fields: Any) -> Any:
    """A GET, or with fields a POST; the JSON of the answer, or its text. `_Refused` where there is none."""
    data = json.dumps(fields).encode() if fields else None
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=SECONDS) as reply:
            text = reply.read().decode(errors="replace")
    except urllib.error.HTTPError as error:
        said = " ".join(error.read().decode(errors="replace").split())[:200]
        raise _Refused(f"status {error.code}: {said}", error.code) from error
    except (OSError, ValueError) as error:
        raise _Refused(str(getattr(error, "reason", error))) from error
    try:
        return json.loads(text)
    except ValueError:
        return text
