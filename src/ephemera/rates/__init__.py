"""How far each step moves each projection: fixed, constant per projection, predicted from the prompt (ScaleNet), averaged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ephemera import artifact
from ephemera.downloads import DEFAULT_MODEL
from ephemera.gate import load_gate
from ephemera.hub import card_of
from ephemera.llm.frozen_lm import FrozenLM
from ephemera.made_for import Format, read_made_for
from ephemera.messages import unknown
from ephemera.prompt_loss import load_objective
from ephemera.rates.averaged import AveragedRate
from ephemera.rates.fixed import DECAYS, UNIFORM_GRID, DecayedRate, FixedRate
from ephemera.rates.per_projection import PerProjectionRate
from ephemera.rates.protocol import MAX_STEPS, NAME, RETIRED, Rate, Trains
from ephemera.rates.scalenet import ScaleNet

__all__ = [
    "DECAYS",
    "MAX_STEPS",
    "UNIFORM_GRID",
    "AveragedRate",
    "DecayedRate",
    "FixedRate",
    "PerProjectionRate",
    "Rate",
    "ScaleNet",
    "Trains",
    "adapted_by",
    "default_rate",
    "default_steps",
    "load_rate",
    "place_rate",
]

# The kinds of rates that files hold, by what their "kind" says. A new one is a file in this folder and an entry here.
RATES: dict[str, type[AveragedRate | PerProjectionRate | ScaleNet]] = {
    "averaged": AveragedRate,
    "per-projection": PerProjectionRate,
    "scalenet": ScaleNet,
}
# Short names: the paper's gradient, and the cheaper one (docs/performance.md)
PRESETS = {"full": "scalenet-nq-open", "fast": "scalenet-fast"}
# What a prompt is adapted by if nobody names a rate: {model: {format: shipped network}}
DEFAULT_RATES: dict[str, dict[Format, str]] = {DEFAULT_MODEL: {"chat": "universal", "plain": "universal-plain"}}
STEPS = 1  # of a rate that was not trained; a trained one takes what it was validated at


def default_rate(model: str, format: Format) -> Rate | None:
    """The network that ships for a model and a prompt format; None if there is none: prompts are not adapted to."""
    name = DEFAULT_RATES.get(model, {}).get(format)
    return None if name is None else load_rate(name)


def default_steps(rate: Rate | None) -> int:
    """The steps that a prompt takes if nobody says how many; none without a rate."""
    if rate is None:
        return 0
    return STEPS if rate.made_for is None else rate.made_for.steps


def adapted_by(rate: Rate | None) -> dict[str, Any]:
    """The projections that a trained rate was made for, as `load_backbone` takes them; none where it fits any."""
    if rate is None or rate.trained_for is None:
        return {}
    made = rate.trained_for
    # Files from before there was a choice
    settings = {"target_modules": made.get("target_modules", "qv"), "layers": made.get("layers", "all")}
    return {**settings, "only": made["projections"]}


def place_rate(rate: Rate, backbone: FrozenLM) -> Rate:
    """The rate, checked, on the model's device, and the lens of its objective with it."""
    rate.check(backbone)
    for module in (rate, rate.objective.lens):
        if isinstance(module, nn.Module):
            module.to(backbone.device)
    return rate


def load_rate(spec: str | Path | float) -> Rate:
    """A rate from a number, a folder, a shipped name, a preset's ("full", "fast"), or a hub id (`user/repo[@revision]`)."""
    spec = PRESETS.get(str(spec), spec)
    try:
        return FixedRate(float(spec))  # pyright: ignore[reportArgumentType]
    except (TypeError, ValueError) as error:
        if isinstance(spec, float | int):
            raise error
    folder = artifact.find(spec, NAME, also=["a number", "a folder", "a hub id (user/repo)"])
    return artifact.load(folder, NAME, lambda config, state: _make(config, state, folder))


def _make(config: dict[str, Any], state: dict[str, Tensor], folder: Path) -> Rate:
    config = artifact.without_retired(config, RETIRED)
    kind = config.pop("kind")
    if kind not in RATES:
        raise artifact.Unsupported(f"is of an {unknown('kind', kind, RATES)} A later version may know it.")
    config["objective"] = load_objective(
        config.get("objective"), folder
    )  # files from before there was a choice lack it
    config["made_for"] = read_made_for(config.get("made_for"), folder)
    rate = RATES[kind].from_file(config, state)
    rate.gate = load_gate(folder)
    rate.card = card_of(folder)
    return rate
