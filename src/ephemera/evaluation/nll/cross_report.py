"""What a run's cross-gradients say: their sign and size by projection, beside the learned rates and the gain."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray

from ephemera.evaluation.nll.figures import INK
from ephemera.evaluation.nll.tables import EMPTY, Table
from ephemera.evaluation.shared.records import CROSS_GRADIENTS, CrossGradient, Record, read_records
from ephemera.evaluation.shared.statistics import LEVEL, Estimate, bootstrap, bootstrap_mean, by_cell

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#555555")
MARKERS = "osD^vXP"


@dataclass(frozen=True, eq=False)
class Cross:
    """Cross-gradients of N prompts and M projections, the rates of the first step of K, and the gain that it made."""

    K: int
    projections: list[tuple[int, str]]  # layer and kind of each of the M
    cross_NM: NDArray[np.float64]  # <g_x, g_y>, nats^2 per unit of the adapter's numbers squared
    cosine_NM: NDArray[np.float64]
    rates_NM: NDArray[np.float64]
    base_N: NDArray[np.float64]  # answer NLL without TTA
    gain_N: NDArray[np.float64]  # and that of no TTA minus layer-wise

    @property
    def predicted_N(self) -> NDArray[np.float64]:
        """The gain to first order: the sum of rate times cross-gradient over projections."""
        return (self.rates_NM * self.cross_NM).sum(1)

    @property
    def kinds(self) -> list[str]:
        return list(dict.fromkeys(kind for _, kind in self.projections))

    def columns(self, kind: str | None) -> list[int]:
        """The projections of a kind, or all."""
        return [m for m, (_, own) in enumerate(self.projections) if kind in (None, own)]


def read_cross(folder: Path, run: dict[str, Any], records: Sequence[Record]) -> Cross | None:
    """What a run folder holds, over prompts of which all is known and finite; None without cross-gradients."""
    if not (folder / CROSS_GRADIENTS).is_file():
        return None
    cells = by_cell(records)
    stepped = [K for method, K in cells if method == "layerwise" and K > 0]
    base, K = cells.get(("none", 0), {}), min(stepped, default=0)
    own = cells.get(("layerwise", K), {})
    found = {r.id: r for r in read_records(folder / CROSS_GRADIENTS, CrossGradient) if r.id in own and r.id in base}
    rows = [(r, own[i], base[i].nll) for i, r in found.items()]
    rows = [row for row in rows if np.isfinite([*row[0].cross, *(row[1].rates or [[]])[0], row[1].nll, row[2]]).all()]
    if len(rows) < 2:
        return None
    cross_NM = np.array([r.cross for r, _, _ in rows])
    size_NM = np.array([r.prompt_norm for r, _, _ in rows]) * np.array([r.answer_norm for r, _, _ in rows])
    return Cross(
        K=K,
        projections=[(layer, kind) for layer, kind in run["projections"]],
        cross_NM=cross_NM,
        cosine_NM=np.divide(cross_NM, size_NM, out=np.zeros_like(cross_NM), where=size_NM > 0),
        rates_NM=np.array([(mine.rates or [[]])[0] for _, mine, _ in rows]),
        base_N=np.array([nll for _, _, nll in rows]),
        gain_N=np.array([nll - mine.nll for _, mine, nll in rows]),
    )


def ranks(values_N: ArrayLike) -> NDArray[np.float64]:
    """Ranks from 1; equal values share the mean of theirs."""
    _, place_N, counts = np.unique(np.asarray(values_N), return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[place_N]


def spearman(x_N: ArrayLike, y_N: ArrayLike) -> float:
    """Spearman's rank correlation; 0 if one of them is constant."""
    a_N, b_N = (rank_N - rank_N.mean() for rank_N in (ranks(x_N), ranks(y_N)))
    size = np.sqrt((a_N @ a_N) * (b_N @ b_N))
    return float(a_N @ b_N / size) if size > 0 else 0.0


def spearman_over_prompts(x_N: NDArray[np.float64], y_N: NDArray[np.float64]) -> Estimate:
    """With its bootstrap interval over prompts."""

    def of(index_SN: NDArray[np.int64]) -> NDArray[np.float64]:
        return np.array([spearman(x_N[index_N], y_N[index_N]) for index_N in index_SN])

    return bootstrap(of, x_N, y_N)


def cross_results(cross: Cross) -> dict[str, Any]:
    """For results.json: each projection's figures, those above and below zero by their intervals, and correlations."""
    projections = [
        {
            "layer": layer,
            "kind": kind,
            "cross": vars(bootstrap_mean(cross.cross_NM[:, m])),
            "positive": float((cross.cross_NM[:, m] > 0).mean()),
            "cosine": float(cross.cosine_NM[:, m].mean()),
            "rate": float(cross.rates_NM[:, m].mean()),
        }
        for m, (layer, kind) in enumerate(cross.projections)
    ]
    above = [p["rate"] for p in projections if p["cross"]["low"] > 0]
    below = [p["rate"] for p in projections if p["cross"]["high"] < 0]
    return {
        "K": cross.K,
        "n": len(cross.gain_N),
        "projections": projections,
        "above_zero": _counted(above),
        "below_zero": _counted(below),
        "spearman_gain": vars(spearman_over_prompts(cross.predicted_N, cross.gain_N)),
        "spearman_base": vars(spearman_over_prompts(cross.base_N, cross.gain_N)),
        "spearman_rate": {kind or "all": _follows(cross, kind) for kind in (*cross.kinds, None)},
        "predicted_gain": vars(bootstrap_mean(cross.predicted_N)),
        "gain": vars(bootstrap_mean(cross.gain_N)),
    }


def _counted(rates: Sequence[float]) -> dict[str, Any]:
    return {"n": len(rates), "rate": float(np.median(rates)) if rates else None}


def _follows(cross: Cross, kind: str | None) -> float:
    """Spearman correlation over projections of mean rate with mean cross-gradient."""
    some = cross.columns(kind)
    return spearman(cross.cross_NM[:, some].mean(0), cross.rates_NM[:, some].mean(0))


def _short(rate: float | None) -> str:
    return EMPTY if rate is None else f"{rate:.2g}"


def cross_table(cross: Cross, results: dict[str, Any]) -> Table:
    """One row per kind of projection, and one of all."""
    gain, base = results["spearman_gain"], results["spearman_base"]
    sides = (results["above_zero"], results["below_zero"])
    counts = [f"{side['n']} projections (median rate {_short(side['rate'])})" for side in sides]
    note = (
        "Inner product of the prompt's and the answer's gradient at the start adapter, per token each; above zero a step on "
        f"the prompt lowers the answer's NLL. Mean over {results['n']} prompts of the sum over projections, with its {LEVEL} % "
        "interval; share of (prompt, projection) pairs above zero; mean cosine; mean rate of step 1 of "
        f"{cross.K}, and its Spearman "
        "correlation over projections with the mean cross-gradient. By its interval it is above zero in "
        f"{counts[0]}, and below in {counts[1]}. Spearman correlation over prompts of the gain "
        f"at K = {cross.K} with the sum of rate times cross-gradient: {_signed(gain)}; "
        f"with the base model's NLL, which any gain may follow: {_signed(base)}. Mean gain "
        f"{results['gain']['mean']:.3f} nats; to first order, rates times cross-gradient, "
        f"{results['predicted_gain']['mean']:.3f}."
    )
    note = re.sub(r"-(?=\d)", "−", note)
    rows = []
    for kind in (*cross.kinds, None):
        some = cross.columns(kind)
        total = bootstrap_mean(cross.cross_NM[:, some].sum(1))
        rows.append(
            [
                kind or "all",
                f"{total.mean:.3g} [{total.low:.3g}, {total.high:.3g}]".replace("-", "−"),
                f"{100 * (cross.cross_NM[:, some] > 0).mean():.0f} %",
                f"{cross.cosine_NM[:, some].mean():+.3f}".replace("-", "−"),
                f"{cross.rates_NM[:, some].mean():.3g}",
                f"{results['spearman_rate'][kind or 'all']:+.2f}".replace("-", "−"),
            ]
        )
    header = ["projections", "cross-gradient", "above zero", "cosine", "mean rate", "rate follows it"]
    return Table("Cross-gradient", note, header, rows)


def cross_figure(cross: Cross, results: dict[str, Any]) -> Figure:
    """Size and sign of the cross-gradient by layer, the learned rate beside it, and what both together foretell."""
    figure, ((size, sign), (rate, scatter)) = plt.subplots(2, 2, figsize=(11, 8))
    found = results["projections"]
    _by_layer(size, cross, lambda m: found[m]["cross"]["mean"], lambda m: found[m]["cross"])
    size.axhline(0, color=INK, linewidth=1)
    largest = max(abs(p["cross"]["mean"]) for p in found)
    size.set_yscale("symlog", linthresh=largest / 100 or 1.0)
    size.set(title="Cross-gradient, mean over prompts (log scale)", ylabel="⟨g_x, g_y⟩")
    _by_layer(sign, cross, lambda m: 100 * found[m]["positive"])
    sign.axhline(50, color=INK, linewidth=1)
    sign.set(title="Prompts whose cross-gradient is above zero", ylabel="%", ylim=(-3, 103))
    _by_layer(rate, cross, lambda m: found[m]["rate"])
    rate.set(title=f"Learned rate, step 1 of {cross.K}, mean over prompts", ylabel="rate", yscale="log")
    for axes in (size, sign, rate):
        axes.set_xlabel("layer")
        axes.grid(axis="y")
    size.legend(title="projection")
    scatter.scatter(cross.predicted_N, cross.gain_N, s=22, color=COLORS[0], alpha=0.7, linewidth=0)
    scatter.axhline(0, color=INK, linewidth=1)
    scatter.axvline(0, color=INK, linewidth=1)
    scatter.set(title=f"Gain, K = {cross.K}; Spearman {_signed(results['spearman_gain'])}".replace("-", "−"))
    scatter.set(xlabel="sum of rate × cross-gradient, nats (first order)", ylabel="fall of the answer's NLL, nats")
    scatter.grid()
    return figure


def _signed(found: dict[str, float]) -> str:
    return f"{found['mean']:+.2f} [{found['low']:+.2f}, {found['high']:+.2f}]"


def _by_layer(
    axes: Axes,
    cross: Cross,
    value: Callable[[int], float],
    interval: Callable[[int], dict[str, float]] | None = None,
) -> None:
    """One line per kind of projection over its layers, with a band where there is an interval."""
    for i, kind in enumerate(cross.kinds):
        some = cross.columns(kind)
        layers, color = [cross.projections[m][0] for m in some], COLORS[i % len(COLORS)]
        axes.plot(layers, [value(m) for m in some], color=color, marker=MARKERS[i % len(MARKERS)], ms=5, label=kind)
        if interval is not None:
            low, high = ([interval(m)[end] for m in some] for end in ("low", "high"))
            axes.fill_between(layers, low, high, color=color, alpha=0.15, linewidth=0)
