"""What the benchmarks share: contenders that take turns."""

from __future__ import annotations

import pytest

from ephemera.bench import timing
from ephemera.bench.timing import machine, machine_lines, ratios, spread, turns


def test_contenders_take_turns():
    order: list[str] = []

    def contender(name: str, seconds: float):
        return lambda: order.append(name) or seconds

    seconds = turns({"a": contender("a", 2.0), "b": contender("b", 1.0)}, 3)
    assert order == ["a", "b"] * 3
    assert seconds == {"a": [2.0] * 3, "b": [1.0] * 3}
    assert ratios(seconds["a"], seconds["b"]) == {"ratio": 2.0, "rounds": [2.0] * 3}


@pytest.mark.parametrize(("budget_s", "rounds"), [(1.0, 2), (35.0, 3), (1000.0, 5)])
def test_a_budget_ends_the_rounds_but_not_before_two(monkeypatch: pytest.MonkeyPatch, budget_s: float, rounds: int):
    now = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

    def ten_seconds() -> float:
        now[0] += 10.0
        return 10.0

    assert len(turns({"a": ten_seconds}, 5, budget_s=budget_s)["a"]) == rounds


def test_spreads_and_machine_facts():
    assert spread([3.0, 1.0, 2.0]) == {"median": 2.0, "min": 1.0, "max": 3.0, "all": [3.0, 1.0, 2.0]}
    facts = machine()
    assert {"torch", "transformers", "peft", "python", "ephemera"} <= set(facts["versions"])
    assert f"{facts['cores']} cores" in machine_lines(facts)[0]
