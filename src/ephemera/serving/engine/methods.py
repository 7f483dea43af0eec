"""What a model name may ask for: where the adapter starts and how it moves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ephemera.adaptation import beyond, told
from ephemera.begin import gate_of, reach_of
from ephemera.gate import Gate
from ephemera.inits import Init, ZeroInit, default_start
from ephemera.llm.frozen_lm import FrozenLM
from ephemera.llm.model_files import called
from ephemera.made_for import FORMATS, Format, Reach
from ephemera.messages import nearest
from ephemera.model import AdaptiveLM
from ephemera.rates import (
    FixedRate,
    Rate,
    adapted_by,
    default_rate,
    default_steps,
    load_rate,
    place_rate,
)

BASE = "none"
DEFAULT = "universal"  # the networks that ship for a model, one for each prompt format
FIXED = 0.05  # the paper's (LDTTA 4.1)


@dataclass(frozen=True, eq=False)
class Method:
    """One model id: no start and no rate is the model itself. `max_steps`: the most that a request may ask for.

    `asked_reach`: where adapters act, if not as the rate was trained for. `max_kl`: how far an adapter may move the first
    token's distribution, in nats. `unasked`: takes the place of this one where nobody asks for steps.
    """

    model_id: str
    name: str
    init: Init | None
    rate: Rate | None
    max_steps: int
    asked_reach: Reach | None = None
    max_kl: float | None = None
    unasked: Method | None = None

    @property
    def reach(self) -> Reach:
        return self.asked_reach or reach_of(self.init, self.rate)

    @property
    def format(self) -> Format | None:
        """The prompts that its network was trained on; None: it was not trained."""
        if self.rate is not None and self.rate.made_for is not None:
            return self.rate.made_for.format
        return None if self.init is None else self.init.format

    def gate(self, steps: int) -> Gate | None:
        return None if self.init is None else gate_of(self.rate, self.reach, self.init, steps)

    def adapts(self, steps: int) -> bool:
        """Whether an adapter is needed at all: LoRA's own start without a step changes nothing."""
        return self.init is not None and (steps > 0 or not self.init.zero)

    def steps(self, asked: int | None) -> int:
        """As asked, else what the rate was validated at; never more than may be asked for."""
        return min(default_steps(self.rate) if asked is None else asked, self.max_steps)

    def started(self, steps: int) -> bool:
        """Whether a row that is left alone is answered from something else than the base model."""
        if self.init is None or self.init.label is None:
            return False
        return self.gate(steps) is None and not (self.max_kl is not None and self.init.reads_prompts)

    def beyond(self, format: Format, steps: int) -> str | None:
        """What to say where a network answers prompts of another kind than it was trained on."""
        made = self.rate.made_for if self.rate is not None and steps else None
        start = None if self.init is None else self.init.made_for
        return told(beyond(made, format, self.asked_reach), beyond(start, format, self.asked_reach))


@dataclass(frozen=True)
class Offer:
    """What a server is to be loaded with: the rates that were named, where adapters start, the networks that ship.

    `unasked`: generators that take the place of `defaults` where no steps are asked for.
    """

    rates: tuple[Rate, ...]
    init: str
    defaults: Mapping[Format, Rate]
    unasked: Mapping[Format, Init]

    @property
    def trained(self) -> Rate | None:
        """The first rate that was trained for certain projections: the model is loaded with those."""
        return next((rule for rule in (*self.rates, *self.defaults.values()) if adapted_by(rule)), None)


def offer(model: str, rates: Sequence[str], init: str = "zero") -> Offer:
    """What is named, the networks that ship for the model, and the paper's fixed rate.

    Those that ship are left out beside a rate for other projections, and where adapters have another start: the model is
    loaded with one set of projections.
    """
    named = [load_rate(spec) for spec in rates]
    sets = [adapted_by(rule) for rule in named if adapted_by(rule)]
    defaults: dict[Format, Rate] = {}
    unasked: dict[Format, Init] = {}
    for format in reversed(FORMATS) if init == "zero" else ():
        rule = default_rate(model, format)
        if rule is not None and all(given == adapted_by(rule) for given in sets):
            defaults[format] = rule
            start = default_start(model, format)
            if start is not None:
                unasked[format] = start
    fixed = [] if any(isinstance(rule, FixedRate) for rule in named) else [FixedRate(FIXED)]
    return Offer((*named, *fixed), init, defaults, unasked)


def build(
    backbone: FrozenLM,
    init: str | Init,
    rates: Sequence[Rate],
    *,
    defaults: Mapping[Format, Rate] | None = None,
    unasked: Mapping[Format, Init] | None = None,
    most_steps: int = 8,
    reach: Reach | None = None,
    max_kl: float | None = None,
) -> list[Method]:
    """Every method that these make, the unadapted model first. ValueError where one does not fit the model.

    The networks of `defaults` share one model id: a request's format chooses between them (`find`), and the generators of
    `unasked` stand in for them. `reach`: of all methods, in place of each rate's own; `all` leaves those generators out.
    `max_kl`: bounds the adapters of all methods.
    """
    started = AdaptiveLM(backbone, init=init).init
    starts: list[tuple[str, Init]] = [] if started.label is None else [(started.label, started)]
    moves: dict[str, Rate] = {}
    for rule in rates:
        kind = rule.label
        if kind in moves:
            raise ValueError(f"two {kind} rates were given; a server takes one of each kind.")
        moves[kind] = place_rate(rule, backbone)
    zero = started if isinstance(started, ZeroInit) else ZeroInit()
    model = called(backbone.name)
    methods = [Method(model, BASE, None, None, 0)]

    def made(name: str, start: Init, rule: Rate | None, unasked: Method | None = None) -> Method:
        most = 0 if rule is None else min(most_steps, rule.max_steps or most_steps)
        return Method(f"{model}:{name}", name, start, rule, most, reach, max_kl, unasked)

    for format, rule in (defaults or {}).items():
        first = None if reach == "all" else (unasked or {}).get(format)
        alone = None if first is None else made(DEFAULT, first.placed(backbone), None)
        methods.append(made(DEFAULT, zero, place_rate(rule, backbone), alone))
    for kind, rule in moves.items():
        methods.append(made(kind, zero, rule))
    for start_name, start in starts:
        methods.append(made(start_name, start, None))
        for kind, rule in moves.items():
            methods.append(made(f"{start_name}+{kind}", start, rule))
    return methods


def find(methods: Sequence[Method], model_id: str, format: Format | None = None) -> Method | str:
    """The method of a model id, of several the one made for a format; or words that name the nearest."""
    found = [method for method in methods if method.model_id == model_id]
    if found:
        return next((method for method in found if method.format == format), found[0])
    ids = list(dict.fromkeys(m.model_id for m in methods))
    hint = nearest(model_id, ids)
    return f"no model {model_id!r} here. {hint + ' ' if hint else ''}GET /v1/models lists them: {', '.join(ids)}."
