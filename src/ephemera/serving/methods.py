"""What a model name may ask for: where the adapter starts and how it moves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ephemera.backbone import Backbone
from ephemera.errors import nearest
from ephemera.generator import LoraGenerator, lora_of
from ephemera.inits import Init, ZeroInit
from ephemera.model import FELL_BACK, UNCHANGED, AdaptiveLM
from ephemera.rates import AveragedRate, FixedRate, Rate, ScaleNet, adapted_by, load_rate, place_rate
from ephemera.store import DEFAULT_MODEL

BASE = "none"
SHIPPED_RATES = ("scalenet-nq-open", "stepwise-nq-open", "0.05")  # for the default model; the last is the paper's
SHIPPED_INIT = "taskweaver"


@dataclass(frozen=True, eq=False)
class Method:
    """One model id: no start and no rate is the model itself. `max_steps`: the most that a request may ask for."""

    model_id: str
    name: str
    init: Init | None
    rate: Rate | None
    max_steps: int

    def adapts(self, steps: int) -> bool:
        """Whether an adapter is needed at all: LoRA's own start without a step changes nothing."""
        return self.init is not None and (steps > 0 or not isinstance(self.init, ZeroInit))

    def note(self, *, fell_back: bool, tokens: int, steps: int) -> str | None:
        """Why an answer came from the adapter's start."""
        note = FELL_BACK if fell_back else UNCHANGED if tokens < 2 and steps else None
        started = self.init is not None and bool(lora_of(self.init))
        return note.replace("unadapted", "from its start") if note and started else note


def specs(model: str, rates: Sequence[str], init: str | None) -> tuple[list[Rate], str]:
    """Rates and init as given, or what comes with the package for the default model, or the paper's fixed rate.

    The shipped generator starts adapters on every layer: beside a rate for some of them the start is zero.
    """
    ships = model == DEFAULT_MODEL
    rules = [load_rate(spec) for spec in rates or (SHIPPED_RATES if ships else ("0.05",))]
    everywhere = all(adapted_by(rule).get("layers", "all") == "all" for rule in rules)
    return rules, init or (SHIPPED_INIT if ships and everywhere else "zero")


def trained(rules: Sequence[Rate]) -> Rate | None:
    """The first rate that was trained for certain projections: the model is loaded with those."""
    return next((rule for rule in rules if adapted_by(rule)), None)


def kind_of(rate: Rate) -> str:
    if isinstance(rate, FixedRate):
        return "fixed"
    if isinstance(rate, AveragedRate):
        return "averaged"
    assert isinstance(rate, ScaleNet)
    return "layerwise" if rate.config["granularity"] == "layer" else "stepwise"


def build(
    backbone: Backbone, init: str | Init, rates: Sequence[Rate], *, most_steps: int = 8, joined: bool = True
) -> list[Method]:
    """Every model id that these make, the unadapted model first. ValueError where one does not fit the model.

    `joined`: also learned rates from a start other than zero. Those that ship were trained from zero, and from the
    shipped generator their first step ruins the answer: together they are only served where that start was asked for.
    """
    started = AdaptiveLM(backbone, init=init).init
    name = "generated" if isinstance(started, LoraGenerator) else "peft"
    starts: list[tuple[str, Init]] = [] if isinstance(started, ZeroInit) else [(name, started)]
    moves: dict[str, Rate] = {}
    for rule in rates:
        kind = kind_of(rule)
        if kind in moves:
            raise ValueError(f"two {kind} rates were given; a server takes one of each kind.")
        moves[kind] = place_rate(rule, backbone)
    zero = started if isinstance(started, ZeroInit) else ZeroInit()
    model = Path(backbone.name).name if Path(backbone.name).expanduser().exists() else backbone.name
    methods = [Method(model, BASE, None, None, 0)]

    def add(name: str, start: Init, rule: Rate | None) -> None:
        most = 0 if rule is None else min(most_steps, rule.max_steps or most_steps)
        methods.append(Method(f"{model}:{name}", name, start, rule, most))

    for kind, rule in moves.items():
        add(kind, zero, rule)
    for start_name, start in starts:
        add(start_name, start, None)
        for kind, rule in moves.items():
            if joined or isinstance(rule, FixedRate):
                add(f"{start_name}+{kind}", start, rule)
    return methods


def find(methods: Sequence[Method], model_id: str) -> Method | str:
    """The method of a model id, or words that name the nearest."""
    for method in methods:
        if method.model_id == model_id:
            return method
    ids = [m.model_id for m in methods]
    hint = nearest(model_id, ids)
    return f"no model {model_id!r} here. {hint + ' ' if hint else ''}GET /v1/models lists them: {', '.join(ids)}."
