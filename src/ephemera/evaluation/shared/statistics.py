"""What per-prompt records add up to: means, paired differences, bootstrap intervals. Pure functions of records.

Letters: N prompts, K steps of a schedule, k one of them, M projections. NLL is in nats per answer token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ephemera.config import METHODS
from ephemera.evaluation.shared.records import Record

RESAMPLES, SEED = 10_000, 0
LEVEL = 95  # per cent
HARM = 1e-6  # nats: less is rounding

ById = dict[str, Record]
Cells = dict[tuple[str, int], ById]


@dataclass(frozen=True)
class Estimate:
    """The mean of n prompts and its 95 % percentile bootstrap interval."""

    mean: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Cell:
    """One method with K steps.

    `n`, `nll`, `nll_pooled`, `fallbacks`, `seconds` and `rouge_lsum` are over all its records; the differences
    (its own minus the other's) and `harmed` are over the prompts that every cell of the run holds.
    """

    method: str
    K: int
    n: int
    nll: Estimate  # mean over prompts
    nll_pooled: float  # mean over the answer tokens of all prompts
    against_none: Estimate | None  # NLL minus the unadapted model's
    against_uniform: Estimate | None  # NLL minus that of the best uniform rate at the same K
    against_layerwise: Estimate | None  # NLL minus that of the layer-wise network at the same K
    kept: Estimate | None  # share of the layer-wise network's gain at the same K
    harmed: float | None  # fraction of prompts
    fallbacks: int  # prompts
    seconds: float  # median per prompt, its batch's time divided by its rows
    rouge_lsum: Estimate | None
    rouge_lsum_against_none: Estimate | None


@dataclass(frozen=True)
class ScheduleDifference:
    """Layer-wise rates at step k of a K-step schedule against step k of the longest one, in per cent."""

    K: int
    k: int
    percent: Estimate


@dataclass(frozen=True)
class Consistency:
    """LDTTA Fig. 5: do shorter schedules begin as the longest does, and how large is each step."""

    longest: int
    differences: list[ScheduleDifference]
    magnitudes: list[Estimate]  # mean rate of step 1, 2, ... over projections and all schedules


@dataclass(frozen=True)
class Spread:
    """How much of the spread of the gain over prompts comes from the draw of A, from two draws of each prompt."""

    K: int
    n: int
    of_A: float  # deviation between draws of one prompt, nats
    of_gain: float  # deviation of the layer-wise gain over prompts, nats
    share: float  # of the gain's variance


def bootstrap_mean(values_N: ArrayLike, *, resamples: int = RESAMPLES, seed: int = SEED) -> Estimate:
    """Mean of per-prompt values and its percentile bootstrap interval: prompts are drawn with replacement.

    Of paired differences this is the paired bootstrap. A value that is not finite makes all of it so.
    """
    values_N = np.asarray(values_N, dtype=np.float64)
    if values_N.ndim != 1 or len(values_N) == 0:
        raise ValueError(f"a mean needs one value per prompt, of at least one prompt; got shape {values_N.shape}.")
    return bootstrap(lambda index_SN: values_N[index_SN].mean(1), values_N, resamples=resamples, seed=seed)


def bootstrap_ratio(above_N: ArrayLike, below_N: ArrayLike) -> Estimate:
    """The ratio of two means over the same prompts, and its paired bootstrap interval."""
    above_N, below_N = np.asarray(above_N, dtype=np.float64), np.asarray(below_N, dtype=np.float64)

    def ratio(index_SN: NDArray[np.int64]) -> NDArray[np.float64]:
        with np.errstate(divide="ignore", invalid="ignore"):
            return above_N[index_SN].mean(1) / below_N[index_SN].mean(1)

    return bootstrap(ratio, above_N, below_N)


def bootstrap(
    of: Callable[[NDArray[np.int64]], NDArray[np.float64]],
    *values: NDArray[np.float64],
    resamples: int = RESAMPLES,
    seed: int = SEED,
) -> Estimate:
    """A figure of prompts and its percentile interval: prompts are drawn with replacement.

    `of(index_SN)` gives the figure [S] of each of S draws of N prompts. `values` [N] are what it looks at: one that is
    not finite makes all of it so.
    """
    n = len(values[0])
    if not all(np.isfinite(values_N).all() for values_N in values):
        return Estimate(float("nan"), float("nan"), float("nan"), n)
    random = np.random.default_rng(seed)
    at_once = max(1, 4_000_000 // n)  # 32 MB of indices
    figures: list[NDArray[np.float64]] = []
    for start in range(0, resamples, at_once):
        figures.append(of(random.integers(0, n, (min(at_once, resamples - start), n))))
    low, high = np.percentile(np.concatenate(figures), [(100 - LEVEL) / 2, (100 + LEVEL) / 2])
    return Estimate(of(np.arange(n)[None])[0].item(), low.item(), high.item(), n)


def by_cell(records: Sequence[Record]) -> Cells:
    """{(method, K): {id: record}}, methods in the order of tables, then by K."""
    cells: Cells = {}
    for record in records:
        cells.setdefault((record.method, record.K), {})[record.id] = record
    return {key: cells[key] for key in sorted(cells, key=lambda key: (METHODS.index(key[0]), key[1]))}


def shared_ids(cells: Cells) -> list[str]:
    """The prompts that every cell holds: paired comparisons are all over the same ones."""
    first, *others = cells.values()
    return [i for i in first if all(i in other for other in others)]


def paired_difference(mine: ById, other: ById, ids: Sequence[str]) -> Estimate | None:
    """Mean of (mine - other) in NLL over `ids`; None where there are no such prompts."""
    return bootstrap_mean([mine[i].nll - other[i].nll for i in ids]) if ids else None


def paired_rouge(mine: ById, other: ById, ids: Sequence[str]) -> Estimate | None:
    """Mean of (mine - other) in ROUGE-Lsum over those of `ids` for which both generated a text."""
    pairs = [(mine[i].rouge_lsum, other[i].rouge_lsum) for i in ids]
    differences = [a - b for a, b in pairs if a is not None and b is not None]
    return bootstrap_mean(differences) if differences else None


def kept_share(mine: ById, layerwise: ById, base: ById, ids: Sequence[str]) -> Estimate | None:
    """The gain of a method over `ids`, as a share of the layer-wise network's.

    None where there is nothing to keep: the interval of the network's own gain reaches zero.
    """
    own = paired_difference(layerwise, base, ids)
    if own is None or not own.high < 0:
        return None
    return bootstrap_ratio(*([base[i].nll - adapted[i].nll for i in ids] for adapted in (mine, layerwise)))


def spread_of_A(records: Sequence[Record]) -> list[Spread]:
    """For each K with the control `redrawn`: two draws of a prompt differ by twice the variance that is A's."""
    cells = by_cell(records)
    base, spreads = cells.get(("none", 0), {}), []
    for (method, K), redrawn in cells.items():
        own = cells.get(("layerwise", K), {})
        ids = [i for i in redrawn if i in own and i in base]
        nll_3N = np.array([[of[i].nll for i in ids] for of in (base, own, redrawn)])
        if method != "redrawn" or len(ids) < 2 or not np.isfinite(nll_3N).all():
            continue
        base_N, own_N, redrawn_N = nll_3N
        of_A, of_gain = np.sqrt(np.mean((own_N - redrawn_N) ** 2) / 2), np.std(base_N - own_N, ddof=1)
        share = of_A**2 / of_gain**2 if of_gain > 0 else np.nan
        spreads.append(Spread(K, len(ids), of_A.item(), of_gain.item(), float(share)))
    return spreads


def harmed_fraction(mine: ById, base: ById, ids: Sequence[str]) -> float | None:
    """The fraction of prompts whose NLL rose; one that is no longer a number has risen."""
    if not ids:
        return None
    return sum(not mine[i].nll <= base[i].nll + HARM for i in ids) / len(ids)


def pooled_nll(records: Sequence[Record]) -> float:
    """Sum of NLL over all answer tokens, divided by their number."""
    return sum(r.nll * r.tokens for r in records) / sum(r.tokens for r in records)


def summarize(records: Sequence[Record]) -> list[Cell]:
    """Every (method, K) that the records hold."""
    cells = by_cell(records)
    if not cells:
        raise ValueError("there are no records to summarise.")
    ids = shared_ids(cells)
    base = cells.get(("none", 0))
    return [_cell(cells, method, K, base, ids) for method, K in cells]


def _cell(cells: Cells, method: str, K: int, base: ById | None, ids: Sequence[str]) -> Cell:
    mine = cells[method, K]
    base = None if method == "none" else base
    uniform = None if method == "uniform" else cells.get(("uniform", K))
    layerwise = None if method == "layerwise" else cells.get(("layerwise", K))
    rows = list(mine.values())
    rouge = [r.rouge_lsum for r in rows if r.rouge_lsum is not None]
    return Cell(
        method=method,
        K=K,
        n=len(rows),
        nll=bootstrap_mean([r.nll for r in rows]),
        nll_pooled=pooled_nll(rows),
        against_none=paired_difference(mine, base, ids) if base else None,
        against_uniform=paired_difference(mine, uniform, ids) if uniform else None,
        against_layerwise=paired_difference(mine, layerwise, ids) if layerwise else None,
        kept=kept_share(mine, layerwise, base, ids) if layerwise and base else None,
        harmed=harmed_fraction(mine, base, ids) if base else None,
        fallbacks=sum(r.fallback for r in rows),
        seconds=float(np.median([r.seconds for r in rows])),
        rouge_lsum=bootstrap_mean(rouge) if rouge else None,
        rouge_lsum_against_none=paired_rouge(mine, base, ids) if base else None,
    )


def layerwise_rates(records: Sequence[Record]) -> dict[int, NDArray[np.float64]]:
    """{K: rates [N,K,M]} of the layer-wise records, over the prompts that every K holds with finite rates."""
    cells = {key: mine for key, mine in by_cell(records).items() if key[0] == "layerwise" and key[1] > 0}
    if not cells:
        return {}
    ids = [i for i in shared_ids(cells) if all(np.isfinite(np.array(mine[i].rates)).all() for mine in cells.values())]
    return {K: np.array([mine[i].rates for i in ids], dtype=np.float64) for (_, K), mine in cells.items() if ids}


def schedule_consistency(records: Sequence[Record]) -> Consistency | None:
    """LDTTA Fig. 5 from the recorded rates (there: multipliers); None without layer-wise records.

    Each prompt's per cent differences are averaged over projections, then over prompts. Where the longest
    schedule's rate is zero there is no percentage, and the projection is left out of that prompt's mean.
    """
    rates = layerwise_rates(records)
    if not rates:
        return None
    longest = max(rates)
    differences = []
    for K in sorted(rates.keys() - {longest}):
        for k in range(1, K + 1):
            baseline_NM = rates[longest][:, k - 1]
            counts_NM = baseline_NM > 0
            ratio_NM = np.divide(rates[K][:, k - 1], baseline_NM, out=np.ones_like(baseline_NM), where=counts_NM)
            percent_N = 100 * (ratio_NM - 1).sum(1) / np.maximum(counts_NM.sum(1), 1)
            differences.append(ScheduleDifference(K, k, bootstrap_mean(percent_N)))
    magnitudes = []
    for k in range(1, longest + 1):
        of_schedules_SN = np.stack([rates_NKM[:, k - 1].mean(1) for K, rates_NKM in rates.items() if k <= K])
        magnitudes.append(bootstrap_mean(of_schedules_SN.mean(0)))
    return Consistency(longest, differences, magnitudes)
