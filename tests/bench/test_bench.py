"""What the benchmarks share, and the two-minute benchmark with its verdict."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from ephemera.bench import quick, timing
from ephemera.bench.contenders import PeftLoop, adapt_batched, initial_lora, max_relative_difference
from ephemera.bench.quick import verdict
from ephemera.bench.timing import machine, machine_lines, ratios, spread, turns
from ephemera.cli import app
from ephemera.llm.load import load_backbone
from given_times import give
from tiny_models import random_ids


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


def test_the_exact_peft_loop_is_exact(llama_folder: Path):
    """In float64 from end to end: a loss that went through float32 would leave 1e-7."""
    backbone = load_backbone(str(llama_folder), dtype=torch.float64)
    prompts = random_ids([12, 9])
    start = initial_lora(backbone, prompts)
    assert start.A[0].dtype == torch.float64
    peft = PeftLoop(backbone).adapt_all(prompts, start, 2)
    assert max_relative_difference(adapt_batched(backbone, prompts, 2), peft) < 1e-11


def test_spreads_and_machine_facts():
    assert spread([3.0, 1.0, 2.0]) == {"median": 2.0, "min": 1.0, "max": 3.0, "all": [3.0, 1.0, 2.0]}
    facts = machine()
    assert {"torch", "transformers", "peft", "python", "ephemera"} <= set(facts["versions"])
    assert f"{facts['cores']} cores" in machine_lines(facts)[0]


def cell(adapt: float, prefill: float, decode: float, ratio: float, **more: float) -> dict[str, Any]:
    seconds = {"prefill": prefill, "adapt": adapt, **{k: v for k, v in more.items() if k in ("peft", "floor")}}
    return {
        "tokens": [29, 37],
        "rounds": 3,
        "seconds": {name: spread([value]) for name, value in seconds.items()},
        "prompts_per_second": 8 / adapt,
        "tokens_per_second": {"decode": decode, "adapted_decode": decode * ratio},
        "first_token_vs_plain": (adapt + prefill) / prefill,
        "adapted_decode_vs_plain": ratio,
        **{k: v for k, v in more.items() if k.startswith("vs_")},
    }


def test_the_verdict_says_what_the_numbers_say():
    slow = cell(2.0, 0.4, 80.0, 0.95, peft=4.0, floor=1.6, vs_peft=2.0, vs_floor=1.25)
    fast = cell(1.0, 0.25, 80.0, 0.8, peft=2.4, floor=0.5, vs_peft=2.4, vs_floor=2.0)
    results = {
        "machine": {"load_average": 0.1},
        "steps": 1,
        "batch": 8,
        "dtypes": {"float32": slow, "bfloat16": fast},
        "left_out": [],
    }
    lines = verdict(results)
    # 8 rows at 80 tokens/s: 0.1 s for a token of each, so a second is ten tokens
    assert "8 prompts of 29-37 tokens with 1 step takes 1.00 s in bfloat16 (8.0 prompts/s)" in lines[0]
    assert "as long as writing 10 tokens" in lines[0]
    assert "after 5.0 times a plain prefill" in lines[1]
    assert "takes 1.39 times as long as without adapting" in lines[1]  # (1 + 0.25 + 6.4 / 0.8) / (0.25 + 6.4)
    assert "80 % of the unadapted speed, less than the 90 %" in lines[2]
    assert "Use --dtype bfloat16: it adapts 2.0 times as fast as float32" in lines[3]
    assert "PEFT loop takes 2.4 times as long" in lines[4]
    assert "0.50 s, ephemera takes 2.00 times that" in lines[4]
    assert len(lines) == 5
    alike = {"float32": cell(1.0, 0.2, 80.0, 1.0), "bfloat16": cell(1.05, 0.2, 80.0, 1.0)}
    busy = verdict({**results, "machine": {"load_average": 1.9}, "dtypes": alike})
    assert "float32 and bfloat16 adapt about equally fast" in busy[3]
    assert "load average 1.9" in busy[-1]
    alone = verdict({**results, "dtypes": {"float32": slow}, "left_out": ["bfloat16"]})
    assert "no instructions for bfloat16 products" in alone[3]
    assert not any("PEFT" in line for line in busy)


def test_a_short_run_on_a_tiny_model(llama_folder: Path, monkeypatch: pytest.MonkeyPatch):
    seconds = {"prefill": 1.0, "adapt": 2.0, "decode": 3.0, "adapted_decode": 4.0, "peft": 5.0, "floor": 1.6}
    give(monkeypatch, quick, seconds)
    result = CliRunner().invoke(app, ["bench", "--model", str(llama_folder), "--minutes", "0", "--json"])
    assert result.exit_code == 0
    results = json.loads(result.stdout)
    assert set(results["dtypes"]) | set(results["left_out"]) == {"float32", "bfloat16"}
    for found in results["dtypes"].values():
        assert found["rounds"] == 2
        assert found["vs_peft"] == 2.5
        assert found["vs_floor"] == 1.25
        assert found["adapted_decode_vs_plain"] == 0.75
        assert found["first_token_vs_plain"] == 3.0
    assert any("PEFT loop takes 2.5 times as long" in line for line in results["verdict"])
    shown = CliRunner().invoke(app, ["bench", "--model", str(llama_folder), "--minutes", "0"]).stdout
    assert "adapt to them, K=1 (s)" in shown
    assert "- Adapting 8 prompts" in shown
