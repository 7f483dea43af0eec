"""A rate, an init, an architecture and a task that are new need their own file and one entry: nothing else knows the kinds there are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ephemera import AdaptiveLM, artifact, inits, load_rate, rates
from ephemera.adapt import adapt
from ephemera.batch import TokenBatch
from ephemera.config import DataSettings
from ephemera.gate import Gate
from ephemera.inits import Init, ZeroInit
from ephemera.llm import architectures
from ephemera.llm.architectures import Architecture
from ephemera.llm.frozen_lm import FrozenLM
from ephemera.lora import LoraBatch
from ephemera.prompt_loss import PROMPT, PromptLoss
from ephemera.rates.protocol import NAME
from ephemera.rows import load_tasks
from ephemera.serving.engine import methods
from ephemera.tasks import load
from ephemera.tasks.base import Task
from reference import close
from tiny_models import left, random_ids, random_lora, tiny_backbone

PROMPT_TEXT = "The river runs past the old mill."


class HalvingRate:
    """A new kind of rate: half as far at each step."""

    label = "halving"
    max_steps = None
    uses_representation = "no"
    reach = "all"
    trains = "both"

    def __init__(
        self,
        first: float,
        trained_for: dict[str, Any] | None = None,
        objective: PromptLoss = PROMPT,
        made_for: None = None,
    ):
        self.first, self.trained_for, self.objective, self.made_for = first, trained_for, objective, made_for
        self.gate: Gate | None = None

    @classmethod
    def from_file(cls, config: dict[str, Any], state: dict[str, Tensor]) -> HalvingRate:
        return cls(state["first"].item(), **config)

    def rates_BM(self, h_BH: Tensor | None, k: int, K: int, *, like: Tensor, projections: int) -> Tensor:
        return like.new_full((like.shape[0], projections), self.first * 0.5 ** (k - 1))

    def check(self, backbone: FrozenLM) -> None: ...


def test_a_rate(llama: FrozenLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(rates.RATES, "halving", HalvingRate)
    artifact.save(tmp_path / "mine", NAME, {"kind": "halving"}, {"first": torch.tensor(0.4)})
    lm = AdaptiveLM(llama, rate=str(tmp_path / "mine"))
    adaptation = lm.adapt(PROMPT_TEXT, steps=2)
    close(adaptation.rates_BKM[0], torch.tensor([[0.4], [0.2]]).expand(2, len(llama.projections)), 1e-6)
    assert lm.generate(PROMPT_TEXT, adaptation=adaptation, max_new_tokens=3)
    offered = methods.build(llama, "zero", [load_rate(tmp_path / "mine")])
    assert "halving" in [method.name for method in offered]


def test_a_file_of_an_unknown_kind_is_refused(tmp_path: Path):
    artifact.save(tmp_path, NAME, {"kind": "halvign"}, {"first": torch.tensor(0.4)})
    with pytest.raises(ValueError, match="is of an unknown kind 'halvign'") as error:
        load_rate(tmp_path)
    assert "corrupt" not in str(error.value)


class ConstantInit(Init):
    """A new kind of init: the same small adapter for every prompt."""

    label = "constant-start"

    @classmethod
    def open(cls, spec: str | Path, **settings: Any) -> ConstantInit | None:
        return cls() if spec == "constant-start" else None

    def __call__(self, backbone: FrozenLM, batch: TokenBatch, seeds: Sequence[int]) -> LoraBatch:
        return random_lora(backbone, 1).rows([0] * len(seeds))


def test_an_init(llama: FrozenLM, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(inits, "INITS", (ConstantInit, *inits.INITS))
    lm = AdaptiveLM(llama, init="constant-start", rate=0.1)
    adaptation = lm.adapt([PROMPT_TEXT, "Who?"], steps=1)
    close(adaptation.initial_lora.rows([1]).tensors, random_lora(llama, 1).tensors)
    assert lm.generate([PROMPT_TEXT, "Who?"], adaptation=adaptation, max_new_tokens=3)
    names = [method.name for method in methods.build(llama, "constant-start", [load_rate(0.1)])]
    assert names == ["none", "fixed", "constant-start", "constant-start+fixed"]


@pytest.mark.parametrize("known", [False, True])
def test_an_architecture(known: bool, monkeypatch: pytest.MonkeyPatch):
    """A model type that is not in the table adapts by transformers' own layers; its row lets it pack and stop early."""
    want = steps(tiny_backbone("olmo2"))
    row = architectures.ARCHITECTURES["olmo2"]
    monkeypatch.delitem(architectures.ARCHITECTURES, "olmo2")
    if known:
        monkeypatch.setitem(architectures.ARCHITECTURES, "olmo2", Architecture(final_norm=row.final_norm))
    backbone = tiny_backbone("olmo2")
    assert (backbone.final_norm is not None) == known
    close(steps(backbone).tensors, want.tensors)
    exit_after_one = PromptLoss(exit_layer=1)
    lower = backbone.with_adapters_on("qv", [0])
    if known:
        exit_after_one.check(lower)
    else:
        with pytest.raises(ValueError, match="does not know how to stop"):
            exit_after_one.check(lower)


def steps(backbone: FrozenLM) -> LoraBatch:
    batch = left(random_ids([9, 4]))
    return adapt(backbone, batch, ZeroInit(r=2)(backbone, batch, [0, 0]), load_rate(0.3), 2).lora


def test_a_task(llama: FrozenLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Its rows are read, encoded and refused like those of the others."""
    capitals = Task(
        name="capitals",
        prompt=lambda row: f"Capital of {row['country']}?",
        answer=lambda row: row["capital"],
        max_new_tokens=4,
        fields=("country", "capital"),
        hub=None,
        hub_splits={},
        wheel={},
    )
    monkeypatch.setitem(load.TASKS, "capitals", capitals)
    rows = tmp_path / "test.jsonl"
    rows.write_text('{"country": "Norway", "capital": "Oslo"}\n{"country": "Chile", "capital": "Santiago"}\n')
    settings = DataSettings(task="capitals", source=str(rows), limit=2)
    (found,) = load_tasks(llama, settings)
    assert {example.prompt for example in found.examples.values()} == {"Capital of Norway?", "Capital of Chile?"}
    assert sorted(len(row.answer) > 0 for row in found.rows) == [True, True]
    rows.write_text('{"country": "Norway"}\n')
    with pytest.raises(ValueError, match="capital"):
        load_tasks(llama, settings)
    with pytest.raises(ValueError, match="Did you mean 'capitals'"):
        load_tasks(llama, DataSettings(task="capitols", source=str(rows)))
