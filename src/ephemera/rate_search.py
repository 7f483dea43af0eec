"""Which fixed rates do best on validation rows: one rate for all steps, or a schedule that ScaleNet starts from."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from ephemera.adapt import adapt
from ephemera.inits import Init
from ephemera.llm.frozen_lm import FrozenLM
from ephemera.made_for import Reach
from ephemera.prompt_loss import PROMPT, PromptLoss
from ephemera.rates import UNIFORM_GRID, FixedRate
from ephemera.scoring import Encoded, answer_nll, batches_of, prompt_batch

LATER_GRID = (0.0, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3)


@dataclass(frozen=True)
class RateSearch:
    """Rates are judged by the mean answer NLL that they leave on these rows."""

    backbone: FrozenLM
    init: Init
    rows: Sequence[Encoded]
    batch_size: int = 16
    seed: int = 0
    objective: PromptLoss = PROMPT
    reach: Reach = "all"

    def uniform(self, steps: int, grid: Sequence[float] = UNIFORM_GRID) -> dict[int, dict[float, float]]:
        """Mean answer NLL of every rate in `grid` after K = 1..steps uniform steps: {K: {rate: NLL}}."""
        every = range(1, steps + 1)
        by_rate = {rate: self.mean_nll([rate] * steps, after=every) for rate in grid}
        return {K: {rate: nll[K] for rate, nll in by_rate.items()} for K in every}

    def schedule(self, steps: int) -> tuple[list[float], dict[str, dict[float, float]]]:
        """A schedule to start ScaleNet from: the best first step, then one rate for all later ones.

        Found greedily: the best uniform rate for K = 1; after it, the share of it that does best for K = 2.
        The share is kept above zero, so that training can enlarge it.
        """
        first_table = self.uniform(1)[1]
        first = _refined(first_table)
        later_table = {share: self.mean_nll((first, first * share), after=(2,))[2] for share in LATER_GRID}
        share = max(best(later_table), min(s for s in LATER_GRID if s > 0))
        return [first] + [first * share] * (steps - 1), {"first": first_table, "later_share": later_table}

    def mean_nll(self, rates: Sequence[float], *, after: Collection[int]) -> dict[int, float]:
        """Mean answer NLL over the rows, after the steps of these numbers."""
        sums = dict.fromkeys(after, 0.0)
        for rows in batches_of(self.backbone, self.rows, self.batch_size):
            batch = prompt_batch(self.backbone, rows)
            lora = self.init(self.backbone, batch, [self.seed] * len(rows))
            for k, rate in enumerate(rates, start=1):
                lora = adapt(self.backbone, batch, lora, FixedRate(rate, self.objective), 1).lora
                if k in sums:
                    sums[k] += answer_nll(self.backbone, rows, lora, reach=self.reach).double().sum().item()
        return {k: total / len(self.rows) for k, total in sums.items()}


def best(table: dict[float, float]) -> float:
    """The rate of the lowest finite NLL."""
    return min(table, key=lambda rate: table[rate] if math.isfinite(table[rate]) else math.inf)


def _refined(table: dict[float, float]) -> float:
    """The vertex of the parabola through the grid's best and its neighbours, in log rate."""
    rates = sorted(table)
    i = rates.index(best(table))
    if not 0 < i < len(rates) - 1 or not all(math.isfinite(table[r]) for r in rates[i - 1 : i + 2]):
        return rates[i]
    x0, x1, x2 = (math.log(r) for r in rates[i - 1 : i + 2])
    y0, y1, y2 = (table[r] for r in rates[i - 1 : i + 2])
    above, below = (
        (x1 - x0) ** 2 * (y1 - y2) - (x1 - x2) ** 2 * (y1 - y0),
        (x1 - x0) * (y1 - y2) - (x1 - x2) * (y1 - y0),
    )
    return rates[i] if below == 0 else round(math.exp(x1 - 0.5 * above / below), 4)
