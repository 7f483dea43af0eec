"""The search of fixed rates, against steps one by one."""

import pytest
import torch

from ephemera.adapt import adapt
from ephemera.inits import ZeroInit
from ephemera.rate_search import LATER_GRID, RateSearch, best
from ephemera.rates import FixedRate
from ephemera.scoring import Encoded, prompt_batch
from reference import merged_weights, slow_nll
from tiny_models import random_ids, tiny_backbone


def test_rates_are_judged_by_the_answers_they_leave():
    backbone = tiny_backbone("llama", dtype=torch.float32)
    pairs = zip(random_ids([5, 3, 7], seed=1), random_ids([2, 3, 1], seed=2), strict=True)
    rows = [Encoded(str(i), prompt, answer) for i, (prompt, answer) in enumerate(pairs)]
    search = RateSearch(backbone, ZeroInit(), rows, batch_size=2)

    def slow(*rates: float) -> float:
        total = 0.0
        for row in rows:
            batch = prompt_batch(backbone, [row])
            lora = ZeroInit()(backbone, batch, [0])
            for rate in rates:
                lora = adapt(backbone, batch, lora, FixedRate(rate), 1).lora
            weights = merged_weights(backbone, lora, 0)
            total += slow_nll(backbone.model, row.prompt + row.answer, first=len(row.prompt), weights=weights).item()
        return total / len(rows)

    table = search.uniform(2, [0.5, 3.0])
    assert table[1] == pytest.approx({0.5: slow(0.5), 3.0: slow(3.0)}, abs=1e-5)
    assert table[2] == pytest.approx({0.5: slow(0.5, 0.5), 3.0: slow(3.0, 3.0)}, abs=1e-5)
    rates, tables = search.schedule(3)
    first, later = rates[0], rates[1]
    assert rates == [first, later, later]
    assert best(tables["first"]) / 4 < first < best(tables["first"]) * 4
    share = best(tables["later_share"])
    assert later == pytest.approx(first * max(share, LATER_GRID[1]))
    assert tables["later_share"][share] == pytest.approx(slow(first, first * share), abs=1e-5)


def test_a_rate_whose_loss_is_not_finite_is_never_the_best():
    assert best({1.0: float("nan"), 2.0: 3.0, 4.0: float("inf")}) == 2.0
