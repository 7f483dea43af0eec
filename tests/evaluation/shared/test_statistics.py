"""Statistics of records against cases worked by hand."""

from __future__ import annotations

import numpy as np
import pytest

from ephemera.evaluation.shared.records import Record
from ephemera.evaluation.shared.statistics import (
    bootstrap_mean,
    bootstrap_ratio,
    schedule_consistency,
    spread_of_A,
    summarize,
)


def record(method: str, K: int, id: str, nll: float, **more) -> Record:
    return Record(
        **{"method": method, "K": K, "id": id, "nll": nll, "tokens": 1, "prompt_nll": [], "seconds": 1.0, **more}
    )


def test_bootstrap_of_a_case_worked_by_hand():
    # The resampled mean of 0, 0, 0, 1 is j/4 with j ~ Binomial(4, 1/4): P(0) = 0.316, P(j <= 2) = 0.949,
    # P(j <= 3) = 0.996. So the 2.5 % point is 0 and the 97.5 % point 3/4.
    estimate = bootstrap_mean([0, 0, 0, 1])
    assert (estimate.mean, estimate.low, estimate.high, estimate.n) == (0.25, 0.0, 0.75, 4)


def test_bootstrap_agrees_with_the_normal_interval_and_its_seed():
    values = np.random.default_rng(1).normal(3, 2, 400)
    estimate = bootstrap_mean(values)
    half = 1.96 * values.std() / 20
    assert estimate.low == pytest.approx(values.mean() - half, abs=0.02)
    assert estimate.high == pytest.approx(values.mean() + half, abs=0.02)
    assert bootstrap_mean(values) == estimate
    assert bootstrap_mean(values, seed=1) != estimate


def test_bootstrap_needs_a_prompt():
    with pytest.raises(ValueError, match="at least one prompt"):
        bootstrap_mean([])


def test_a_ratio_of_means_against_one_draw_at_a_time():
    random = np.random.default_rng(2)
    below = random.normal(2, 1, 30)
    above = 0.5 * below + random.normal(0, 0.3, 30)
    estimate = bootstrap_ratio(above, below)
    draws = [random.integers(0, 30, 30) for _ in range(5000)]
    ratios = [sum(above[i] for i in draw) / sum(below[i] for i in draw) for draw in draws]
    assert estimate.mean == pytest.approx(above.sum() / below.sum())
    assert (estimate.low, estimate.high) == pytest.approx(np.percentile(ratios, [2.5, 97.5]), abs=0.01)
    assert np.isnan(bootstrap_ratio([1.0, np.nan], [1.0, 1.0]).mean)


def test_the_share_of_the_gain_that_a_control_keeps():
    records = [record("none", 0, i, 4.0) for i in "ab"]
    records += [record("layerwise", 1, i, nll) for i, nll in zip("ab", (2.0, 3.0), strict=True)]
    records += [record("template", 1, i, nll) for i, nll in zip("ab", (3.5, 2.5), strict=True)]
    none, layerwise, template = summarize(records)
    assert none.kept is None
    assert layerwise.kept is None
    assert template.kept is not None
    assert template.against_layerwise is not None
    assert template.kept.mean == pytest.approx((0.5 + 1.5) / (2.0 + 1.0))
    assert template.against_layerwise.mean == pytest.approx((1.5 - 0.5) / 2)
    records[2] = record("layerwise", 1, "a", 6.0)
    assert summarize(records)[2].kept is None, "no gain to keep: +2 and -1"


def test_the_spread_that_is_A_s():
    random = np.random.default_rng(3)
    gains, ids = random.normal(1.0, 0.4, 4000), [str(i) for i in range(4000)]
    records = [record("none", 0, i, 5.0) for i in ids]
    for method in ("layerwise", "redrawn"):  # each draw of A adds a deviation of 0.3
        noise = random.normal(0, 0.3, 4000)
        records += [record(method, 1, i, 5.0 - g + e) for i, g, e in zip(ids, gains, noise, strict=True)]
    (spread,) = spread_of_A(records)
    assert (spread.K, spread.n) == (1, 4000)
    assert spread.of_A == pytest.approx(0.3, rel=0.03)
    assert spread.of_gain == pytest.approx(0.5, rel=0.03)
    assert spread.share == pytest.approx(0.36, rel=0.06)
    assert spread_of_A([r for r in records if r.method != "redrawn"]) == []


def test_pooled_and_mean_nll_weigh_long_answers_differently():
    (cell,) = summarize([record("none", 0, "a", 1.0, tokens=1), record("none", 0, "b", 5.0, tokens=3)])
    assert cell.nll.mean == 3.0
    assert cell.nll_pooled == 4.0  # (1*1 + 5*3) / 4
    assert cell.against_none is None
    assert cell.harmed is None


def test_pairs_are_matched_by_id_over_prompts_that_every_cell_holds():
    records = [
        *(record("none", 0, i, nll) for i, nll in zip("abcd", (1.0, 2.0, 3.0, 100.0), strict=True)),
        *(record("uniform", 1, i, nll) for i, nll in zip("cba", (2.0, 1.5, 1.0), strict=True)),
        *(record("fixed", 1, i, nll) for i, nll in zip("bac", (2.5, 0.5, 3.0 + 1e-9), strict=True)),
    ]
    none, fixed, uniform = summarize(records)
    assert (none.method, fixed.method, uniform.method) == ("none", "fixed", "uniform")
    assert none.n == 4
    assert fixed.against_none is not None
    assert fixed.against_none.n == 3
    assert fixed.against_none.mean == pytest.approx((-0.5 + 0.5 + 0.0) / 3, abs=1e-8)
    assert fixed.against_uniform is not None
    assert fixed.against_uniform.mean == pytest.approx((-0.5 + 1.0 + 1.0) / 3)
    assert uniform.against_uniform is None
    assert fixed.harmed == pytest.approx(1 / 3)  # b; the rise of c is rounding
    assert uniform.harmed == 0.0


def test_a_paired_interval_leaves_out_what_prompts_share():
    base = np.random.default_rng(0).normal(10, 5, 50)
    records = [record("none", 0, str(i), x) for i, x in enumerate(base)]
    records += [record("fixed", 1, str(i), x - 0.25) for i, x in reversed(list(enumerate(base)))]
    _, fixed = summarize(records)
    assert fixed.against_none is not None
    assert fixed.nll.high - fixed.nll.low > 1
    assert fixed.against_none.low == pytest.approx(-0.25)
    assert fixed.against_none.high == pytest.approx(-0.25)


def test_what_is_not_finite_is_harm_and_is_never_hidden():
    records = [record("none", 0, i, 1.0) for i in "ab"]
    records += [record("fixed", 1, "a", float("nan")), record("fixed", 1, "b", 0.5, fallback=True)]
    _, fixed = summarize(records)
    assert np.isnan(fixed.nll.mean)
    assert fixed.harmed == 0.5
    assert fixed.fallbacks == 1


def test_seconds_are_a_median_and_rouge_is_paired_where_texts_exist():
    records = [record("none", 0, i, 1.0, text="t", rouge_lsum=x) for i, x in zip("abc", (0.1, 0.2, 0.3), strict=True)]
    records += [record("layerwise", 1, i, 1.0, seconds=s) for i, s in zip("abc", (1.0, 2.0, 9.0), strict=True)]
    records[-1] = record("layerwise", 1, "c", 1.0, seconds=9.0, text="t", rouge_lsum=0.7)
    _, layerwise = summarize(records)
    assert layerwise.seconds == 2.0
    assert layerwise.rouge_lsum_against_none is not None
    assert layerwise.rouge_lsum_against_none.mean == pytest.approx(0.4)
    assert layerwise.rouge_lsum_against_none.n == 1


def test_schedule_consistency_worked_by_hand():
    records = [
        record("layerwise", 1, "a", 1.0, rates=[[1.0, 3.0]]),
        record("layerwise", 2, "a", 1.0, rates=[[2.0, 2.0], [0.1, 0.3]]),
        record("layerwise", 1, "b", 1.0, rates=[[3.0, 3.0]]),
        record("layerwise", 2, "b", 1.0, rates=[[2.0, 0.0], [0.2, 0.2]]),
        record("layerwise", 2, "c", 1.0, rates=[[9.0, 9.0], [9.0, 9.0]]),  # has no K = 1 to compare with
    ]
    found = schedule_consistency(records)
    assert found is not None
    assert found.longest == 2
    (difference,) = found.differences
    assert (difference.K, difference.k, difference.percent.n) == (1, 1, 2)
    # a: mean of -50 % and +50 %; b: +50 %, its other projection has a baseline of zero
    assert difference.percent.mean == pytest.approx(25)
    # step 1: a (2 + 2) / 2, b (3 + 1) / 2; step 2: only K = 2 has one
    assert [e.mean for e in found.magnitudes] == pytest.approx([2.0, 0.2])
    assert schedule_consistency([record("none", 0, "a", 1.0)]) is None
