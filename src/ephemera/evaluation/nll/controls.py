"""Controls of the layer-wise network: what of its gain is the prompt's own? One function and one entry each.

Adapters of different prompts have different A: A is drawn from (seed, prompt). So factors cannot be averaged. A mean adapter
stacks its parts along the rank, which is the mean of their products B A to the digit.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from ephemera.adaptation import Adaptation
from ephemera.evaluation.nll.adapting import adapted
from ephemera.inits import Init
from ephemera.llm.frozen_lm import FrozenLM
from ephemera.llm.share import Share
from ephemera.lora import LoraBatch
from ephemera.made_for import Reach
from ephemera.rates import Rate, Trains
from ephemera.scoring import Encoded, batches_of, parts_of

DONORS = 16  # adapters in a mean


@dataclass(frozen=True, eq=False)
class Material:
    """What controls draw on: the run's network and rows, the task's bare template, and rows of another task."""

    backbone: FrozenLM
    init: Init
    rule: Rate
    rows: Sequence[Encoded]
    template: Encoded | None
    other: Sequence[Encoded]
    seed: int
    batch_size: int
    _donors: dict[int, LoraBatch] = field(default_factory=dict)

    def adapted(self, rows: Sequence[Encoded], K: int, *, seed: int | None = None) -> Adaptation:
        """A batch of rows after K steps of the network."""
        return adapted(self.backbone, self.init, rows, self.rule, K, seed=self.seed if seed is None else seed)

    def adapters_of(self, rows: Sequence[Encoded], K: int) -> LoraBatch:
        """The adapters of any rows, in their order."""
        different = list({row.id: row for row in rows}.values())
        batches = batches_of(self.backbone, different, self.batch_size)
        place = {row.id: i for i, row in enumerate(row for batch in batches for row in batch)}
        return LoraBatch.cat([self.adapted(batch, K).lora for batch in batches]).rows([place[row.id] for row in rows])

    def donors(self) -> list[Encoded]:
        """The rows whose adapters are averaged: one more than a mean takes, since no prompt is its own donor."""
        return random.Random(self.seed).sample(list(self.rows), min(DONORS + 1, len(self.rows)))

    def donors_lora(self, K: int) -> LoraBatch:
        if K not in self._donors:
            self._donors[K] = self.adapters_of(self.donors(), K)
        return self._donors[K]


class GivenRates:
    """The network's gradient, reach and gate at rates [B,K,M] that are given."""

    def __init__(self, of: Rate, rates_BKM: Tensor):
        self.of, self.rates_BKM = of, rates_BKM
        self.max_steps, self.objective, self.label, self.gate = of.max_steps, of.objective, of.label, of.gate
        self.uses_representation: Literal["no", "step"] = of.uses_representation  # the gate looks at h(x)
        self.trains: Trains = of.trains
        self.reach: Reach = of.reach
        self.trained_for, self.made_for = of.trained_for, of.made_for

    def rates_BM(self, h_BH: Tensor | None, k: int, K: int, *, like: Tensor, projections: int) -> Tensor:
        assert self.rates_BKM.shape[1:] == (K, projections)
        return self.rates_BKM[:, k - 1].to(like)

    def check(self, backbone: FrozenLM) -> None:
        self.of.check(backbone)


def swapped(material: Material, rows: Sequence[Encoded], own: Adaptation, K: int) -> Adaptation:
    """Each prompt is answered with its neighbour's adapter."""
    index = _neighbours(rows)
    return replace(own, lora=own.lora.rows(index), fallback_B=own.fallback_B[index])


def mean(material: Material, rows: Sequence[Encoded], own: Adaptation, K: int) -> Adaptation:
    """Each prompt is answered with the mean of 16 other prompts' adapters, the same for nearly all prompts."""
    lora, ids = material.donors_lora(K), [row.id for row in material.donors()]
    n = min(DONORS, len(ids) - 1)
    chosen = torch.tensor([[i for i, other in enumerate(ids) if other != row.id][:n] for row in rows])
    whole = stacked([lora.rows(chosen[:, i]) for i in range(n)], [1 / n] * n)
    start = stacked([own.initial_lora] * n, [1.0] + [0.0] * (n - 1))  # the same start, at the mean's rank
    return _answered_with(own, whole, start)


def template(material: Material, rows: Sequence[Encoded], own: Adaptation, K: int) -> Adaptation:
    """Each prompt is answered with the adapter of the task's template, its fields empty."""
    assert material.template is not None
    return _answered_with(own, material.adapters_of([material.template] * len(rows), K))


def other_task(material: Material, rows: Sequence[Encoded], own: Adaptation, K: int) -> Adaptation:
    """Each prompt is answered with the adapter of a prompt of another task."""
    place = {row.id: i for i, row in enumerate(material.rows)}
    others = [material.other[place[row.id] % len(material.other)] for row in rows]
    return _answered_with(own, material.adapters_of(others, K))


def h_swapped(material: Material, rows: Sequence[Encoded], own: Adaptation, K: int) -> Adaptation:
    """ScaleNet sees the neighbour's h(x): each prompt steps along its own gradient, at its neighbour's rates."""
    return _at_rates(material, rows, own.rates_BKM[_neighbours(rows)])


def shuffled(material: Material, rows: Sequence[Encoded], own: Adaptation, K: int) -> Adaptation:
    """Each prompt steps at its own rates, which have changed places among the projections: one draw for each prompt."""
    M = own.rates_BKM.shape[2]
    order_BM = torch.tensor([random.Random(f"{material.seed}:{row.id}").sample(range(M), M) for row in rows])
    return _at_rates(material, rows, own.rates_BKM.gather(2, order_BM[:, None].expand_as(own.rates_BKM)))


def redrawn(material: Material, rows: Sequence[Encoded], own: Adaptation, K: int) -> Adaptation:
    """The same steps from another draw of A."""
    return material.adapted(rows, K, seed=material.seed + 1)


# The names are those of `config.CONTROLS`.
CONTROLS: dict[str, Callable[[Material, Sequence[Encoded], Adaptation, int], Adaptation]] = {
    "swapped": swapped,
    "mean": mean,
    "template": template,
    "other-task": other_task,
    "h-swapped": h_swapped,
    "shuffled": shuffled,
    "redrawn": redrawn,
}


def controlled(material: Material, method: str, rows: Sequence[Encoded], own: Adaptation, K: int) -> Adaptation:
    """What a control makes of a batch whose own layer-wise adaptation is `own`, with its own wall time.

    The prompt's losses are left out: most controls take no step on the prompt.
    """
    start = time.perf_counter()
    made = CONTROLS[method](material, rows, own, K)
    seconds = own.seconds if method == "swapped" else time.perf_counter() - start
    return replace(made, prompt_nll_BK=made.prompt_nll_BK[:, :0], reach=own.reach, seconds=seconds)


def stacked(loras: Sequence[LoraBatch], weights: Sequence[float]) -> LoraBatch:
    """The weighted sum of adapters' products B A, as one adapter: their factors side by side along the rank."""
    first, n = loras[0], len(loras)
    return LoraBatch.of(
        first.projections,
        A=[torch.cat(A, 1) for A in zip(*(lora.A for lora in loras), strict=True)],
        B=[
            torch.cat([w * b for w, b in zip(weights, B, strict=True)], 2)
            for B in zip(*(lora.B for lora in loras), strict=True)
        ],
        r=n * first.r,
        lora_alpha=n * first.lora_alpha,  # the scaling, alpha / r, stays
    )


def _neighbours(rows: Sequence[Encoded]) -> Tensor:
    return torch.arange(len(rows)).roll(1)


def _answered_with(own: Adaptation, lora: LoraBatch, start: LoraBatch | None = None) -> Adaptation:
    """`own` prompts with other adapters, none of which fell back on this prompt's account."""
    nobody_B = torch.zeros_like(own.fallback_B)
    return replace(own, lora=lora, initial_lora=start or own.initial_lora, fallback_B=nobody_B)


def _at_rates(material: Material, rows: Sequence[Encoded], rates_BKM: Tensor) -> Adaptation:
    K, places = rates_BKM.shape[1], parts_of(material.backbone, rows)
    parts = [
        adapted(
            material.backbone,
            material.init,
            rows[place],
            GivenRates(material.rule, rates_BKM[place]),
            K,
            seed=material.seed,
        )
        for place in places
    ]
    return Adaptation.joined(parts, [Share.whole(range(len(rows))[place]) for place in places])
