"""A trained network on disk: NAME.json beside NAME.safetensors, each whole or not at all, made for one model."""

from __future__ import annotations

import json
import shlex
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ephemera import hub
from ephemera.llm.frozen_lm import FrozenLM, describe
from ephemera.llm.weights import check_finite
from ephemera.messages import unknown
from ephemera.saving import json_text, reason, whole_folder

NETWORKS = Path(__file__).parent / "pretrained"
Made = TypeVar("Made")


class Unsupported(ValueError):
    """A network's file asks for something that this version does not have."""


def shipped(name: str) -> list[str]:
    """The networks of one kind ("rate", "generator") that come with the package."""
    return sorted(p.parent.name for p in NETWORKS.glob(f"*/{name}.json"))


def find(spec: str | Path, name: str, *, also: list[str]) -> Path:
    """The folder of a shipped name, a path or a hub id; ValueError names what there is (`also`: what else is allowed)."""
    if hub.is_id(spec):
        return hub.fetch(str(spec), name)
    folder = NETWORKS / spec if (NETWORKS / spec / f"{name}.json").exists() else Path(spec).expanduser()
    if not (folder / f"{name}.json").exists():
        if folder.is_dir():
            raise ValueError(f"{folder} holds no {name}: {name}.json and {name}.safetensors are expected there.")
        raise unknown(name, str(spec), [*shipped(name), *also])
    return folder


def save(folder: Path, name: str, config: dict[str, Any], state: dict[str, Tensor]) -> None:
    with whole_folder(folder) as scratch:
        save_file({key: t.contiguous().cpu() for key, t in state.items()}, scratch / f"{name}.safetensors")
        (scratch / f"{name}.json").write_text(json_text(config, indent=1) + "\n")


def without_retired(config: dict[str, Any], neutral: dict[str, Any]) -> dict[str, Any]:
    """The configuration without the settings that are gone; Unsupported if one differs from its neutral value."""
    for key, value in neutral.items():
        if config.get(key) not in (None, value):
            raise Unsupported(
                f"sets {key} to {config[key]!r}, which this version no longer supports (only {value!r}): "
                "use an earlier version or train again without it."
            )
    return {key: value for key, value in config.items() if key not in neutral}


def load(folder: Path, name: str, make: Callable[[dict[str, Any], dict[str, Tensor]], Made]) -> Made:
    """What `make` builds from the configuration and tensors; ValueError where they are not intact."""
    try:
        state = load_file(folder / f"{name}.safetensors")
        check_finite(f"{name}.safetensors", state.items())
        return make(json.loads((folder / f"{name}.json").read_text()), state)
    except Unsupported as error:
        raise ValueError(f"the {name} in {folder} {error}") from error
    except PermissionError as error:
        raise ValueError(
            f"cannot read the {name} in {folder}: {reason(error)}. Ask its owner to run `chmod -R a+rX {shlex.quote(str(folder))}`."
        ) from error
    except (OSError, SafetensorError, AttributeError, KeyError, TypeError, RuntimeError, ValueError) as error:
        why = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"the {name} in {folder} is corrupt or incomplete ({why}). "
            f"It needs an intact {name}.json and {name}.safetensors; take them from a backup or train again."
        ) from error


def check_model(trained_for: dict[str, Any], backbone: FrozenLM, what: str) -> None:
    """ValueError if `backbone` is not the model that a network was trained for; both are named."""
    if trained_for.get("projections") != [p.name for p in backbone.projections]:
        raise ValueError(
            f"this {what} was trained for {trained_for['name']} ({len(trained_for['projections'])} projections, first "
            f"{trained_for['projections'][0]}); the model at hand is {backbone.name} ({len(backbone.projections)} "
            f"projections, first {backbone.projections[0].name}). Use that model, loaded with its own adapted layers and modules "
            f"({adapted_layers(trained_for)}; from_pretrained(..., rate=...) does so), or train one for this."
        )
    if trained_for["fingerprint"] != backbone.fingerprint():
        raise ValueError(
            f"this {what} was trained for {trained_for['name']} ({_short(trained_for)}); the model at hand is "
            f"{backbone.name} ({_short(describe(backbone))}). Use that model, or train one for this."
        )
    warn_of_quantization(trained_for, backbone, what)


def warn_of_quantization(trained_for: dict[str, Any], backbone: FrozenLM, what: str) -> None:
    """A warning if a network's model was quantised otherwise than `backbone` is: nobody has measured it there."""
    made, here = trained_for.get("quantization", "none"), backbone.quantization
    if made != here:
        words = {name: "unquantised weights" if name == "none" else f"{name} weights" for name in (made, here)}
        warnings.warn(
            f"this {what} was trained and validated on {words[made]} of {trained_for['name']}; the model at hand has "
            f"{words[here]}. It is used all the same: compare answers with and without it, or train one for this.",
            stacklevel=2,
        )


def adapted_layers(trained_for: dict[str, Any]) -> str:
    return f"target_modules={trained_for.get('target_modules', 'qv')!r}, layers={trained_for.get('layers', 'all')!r}"


def _short(description: dict[str, Any]) -> str:
    return (
        f"{description['model_type']}, hidden size {description['hidden_size']}, weights {description['fingerprint']}"
    )
