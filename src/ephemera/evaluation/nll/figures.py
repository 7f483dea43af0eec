"""The paper's figures 3, 4 and 5, from a run's statistics and records."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from ephemera.config import METHODS
from ephemera.evaluation.nll.tables import method_names
from ephemera.evaluation.shared.records import Record, write_bytes
from ephemera.evaluation.shared.statistics import LEVEL, Cell, Consistency, Estimate, layerwise_rates

FIGURES = "figures"
# Okabe and Ito's palette, told apart by colour-blind readers too; markers tell them apart in grey.
INK, GRID = "#333333", "#dddddd"
STYLES: dict[str, dict[str, Any]] = {
    "none": {"color": "#555555", "linestyle": "--"},
    "fixed": {"color": "#D55E00", "marker": "s"},
    "uniform": {"color": "#CC79A7", "marker": "D"},
    "stepwise": {"color": "#009E73", "marker": "^"},
    "layerwise": {"color": "#0072B2", "marker": "o"},
    "averaged": {"color": "#E69F00", "marker": "v"},
    "first": {"color": "#F0E442", "marker": "d"},
    "linear": {"color": "#8C564B", "marker": "1"},
    "cosine": {"color": "#8C564B", "marker": "2"},
    "exponential": {"color": "#8C564B", "marker": "3"},
    "constants": {"color": "#117733", "marker": "8"},
    "swapped": {"color": "#56B4E9", "marker": "X", "linestyle": ":"},
    "mean": {"color": "#332288", "marker": "P", "linestyle": ":"},
    "template": {"color": "#882255", "marker": "<", "linestyle": ":"},
    "other-task": {"color": "#999933", "marker": ">", "linestyle": ":"},
    "h-swapped": {"color": "#44AA99", "marker": "h", "linestyle": ":"},
    "shuffled": {"color": "#AA4499", "marker": "p", "linestyle": ":"},
    "redrawn": {"color": "#777777", "marker": "*", "linestyle": ":"},
}
SETTINGS: dict[Any, Any] = {
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": GRID,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
    "savefig.dpi": 160,
    "savefig.facecolor": "white",
}


def write_figures(
    folder: Path,
    run: dict[str, Any],
    records: Sequence[Record],
    cells: Sequence[Cell],
    consistency: Consistency | None,
) -> dict[str, Path]:
    """{caption: PNG}: fig3.png always, fig4.png where there are layer-wise records, fig5.png where of several K."""
    written: dict[str, Path] = {}
    with styled():
        caption = (
            f"Answer NLL against the number of steps, and its paired difference to no TTA; bands are {LEVEL} % "
            "intervals over prompts (LDTTA Fig. 3)."
        )
        written[caption] = save_figure(folder, "fig3", nll_against_steps(cells, method_names(run)))
        rates = layerwise_rates(records)
        if rates:
            longest = max(rates)
            caption = (
                f"Layer-wise rates of the {longest}-step schedule, averaged over {len(rates[longest])} prompts "
                "(LDTTA Fig. 4, there as multipliers)."
            )
            rates_KM = rates[longest].mean(0)
            written[caption] = save_figure(folder, "fig4", rate_heat_map(rates_KM, run["projections"]))
        if consistency and consistency.differences:  # one schedule alone has nothing to agree with
            caption = (
                f"How far the rates of shorter schedules are from those of K = {consistency.longest} at the same step, "
                f"and the mean rate of each step; whiskers are {LEVEL} % intervals over prompts (LDTTA Fig. 5)."
            )
            written[caption] = save_figure(folder, "fig5", consistency_bars(consistency))
    return written


def styled() -> AbstractContextManager[None]:
    """The figures' style, for as long as a block runs."""
    return plt.rc_context(SETTINGS)


def save_figure(folder: Path, name: str, figure: Figure) -> Path:
    """FOLDER/figures/NAME.png."""
    (folder / FIGURES).mkdir(parents=True, exist_ok=True)
    data = io.BytesIO()
    figure.savefig(data, format="png", metadata={"Software": None})
    plt.close(figure)
    path = folder / FIGURES / f"{name}.png"
    write_bytes(path, data.getvalue())
    return path


def nll_against_steps(cells: Sequence[Cell], names: dict[str, str]) -> Figure:
    """Fig. 3: one line per method, from the unadapted model at K = 0; beside it the paired differences."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.8))
    base = next((c.nll for c in cells if c.method == "none"), None)
    zero = Estimate(0.0, 0.0, 0.0, base.n) if base else None
    least_room = 0.1 * base.mean if base else 0.0
    _lines(left, cells, names, lambda c: c.nll, base=base, least_room=least_room)
    _lines(right, cells, names, lambda c: c.against_none, base=zero, least_room=least_room)
    left.set(title="Answer NLL, nats per token", xlabel="steps K")
    right.set(title="Paired difference to no TTA", xlabel="steps K")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=7, columnspacing=1.4)
    return figure


def _lines(
    axes: Axes,
    cells: Sequence[Cell],
    names: dict[str, str],
    of: Callable[[Cell], Estimate | None],
    *,
    base: Estimate | None,
    least_room: float,
) -> None:
    """One line and band per method, from `base` at K = 0.

    The frame ends as far above `base` as the best line is below it (or `least_room`): one method that
    diverges must not flatten the others. What is above is marked with its value.
    """
    found = [(c, e) for c in cells if c.K > 0 and (e := of(c)) and math.isfinite(e.mean)]
    start = [(0, base)] if base else []
    if base:
        axes.axhline(base.mean, **STYLES["none"], linewidth=1.5, label=names["none"])
        axes.axhspan(base.low, base.high, color=STYLES["none"]["color"], alpha=0.08, linewidth=0)
    for method in METHODS:
        mine = [(c.K, e) for c, e in found if c.method == method]
        if mine:
            style, line = STYLES[method], [*start, *mine]
            Ks, estimates = [K for K, _ in line], [e for _, e in line]
            first = slice(len(start), None)
            order = 4 if method == "layerwise" else 3
            axes.plot(
                Ks, [e.mean for e in estimates], **style, lw=2, ms=6, markevery=first, zorder=order, label=names[method]
            )
            low, high = [e.low for _, e in mine], [e.high for _, e in mine]
            axes.fill_between(Ks[first], low, high, color=style["color"], alpha=0.1, linewidth=0)
    shown = [e for _, e in found] + [e for _, e in start]
    lowest = min((e.mean for e in shown), default=0.0)
    cap = base.mean + max(base.mean - lowest, least_room) if base else math.inf
    above = [(c, e) for c, e in found if e.mean > cap]
    low = min((e.low for e in shown), default=0.0)
    high = max((min(e.high, cap) for e in shown), default=1.0)
    margin = 0.06 * (high - low) or 1.0
    axes.set_ylim(low - margin, high + margin)
    axes.set_xticks(range(max(c.K for c in cells) + 1))
    axes.grid(axis="y")
    _mark_above(axes, above)


def _mark_above(axes: Axes, above: Sequence[tuple[Cell, Estimate]]) -> None:
    """Values that are off the top of the frame, stacked over their K."""
    at: dict[int, int] = {}
    for cell, estimate in above:
        axes.annotate(
            f"{estimate.mean:.3g} ↑",
            (cell.K, 1),
            xycoords=("data", "axes fraction"),
            xytext=(0, -12 - 13 * at.get(cell.K, 0)),
            textcoords="offset points",
            ha="center",
            fontsize=9,
            color=STYLES[cell.method]["color"],
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8, "alpha": 0.85},
        )
        at[cell.K] = at.get(cell.K, 0) + 1


def rate_heat_map(rates_KM: np.ndarray, projections: Sequence[tuple[int, str]]) -> Figure:
    """Fig. 4: layers from top to bottom; columns q_1 v_1 q_2 v_2 ..., the kinds of each step.

    `projections` holds (layer, kind) of each of the M columns of `rates_KM`.
    """
    kinds = list(dict.fromkeys(kind for _, kind in projections))
    layers = 1 + max(layer for layer, _ in projections)
    steps = len(rates_KM)
    map_LC = np.full((layers, steps * len(kinds)), np.nan)
    for m, (layer, kind) in enumerate(projections):
        map_LC[layer, kinds.index(kind) :: len(kinds)] = rates_KM[:, m]
    positive = map_LC[map_LC > 0]
    low, high = (positive.min(), positive.max()) if positive.size else (1.0, 1.0)
    scale = LogNorm(low, high) if high > low else LogNorm(low / 2, high * 2)
    figure, axes = plt.subplots(figsize=(max(5.0, 2.4 + 0.55 * map_LC.shape[1]), max(3.2, 1.6 + 0.19 * layers)))
    image = axes.imshow(np.ma.masked_less_equal(map_LC, 0), norm=scale, cmap="viridis", aspect="auto")
    for step in range(1, steps):
        axes.axvline(step * len(kinds) - 0.5, color="white", linewidth=2.5)
    labels = [f"${kind}_{{{k}}}$" if len(kind) == 1 else f"{kind} {k}" for k in range(1, steps + 1) for kind in kinds]
    crowded = any(len(kind) > 1 for kind in kinds)
    axes.set_xticks(range(len(labels)), labels, fontsize=10 if crowded else 13, rotation=90 if crowded else 0)
    axes.set_yticks(range(0, layers, 1 if layers <= 16 else 5))
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set(ylabel="layer", title=f"Learning rate by layer and step, K = {steps}")
    figure.colorbar(image, ax=axes, label="rate (log scale)", pad=0.02).outline.set_visible(False)  # pyright: ignore[reportCallIssue]
    return figure


def consistency_bars(consistency: Consistency) -> Figure:
    """Fig. 5: shorter schedules against the longest at the same step, and the mean rate of each step."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), width_ratios=(1.6, 1))
    schedules = sorted({d.K for d in consistency.differences})
    colors = plt.get_cmap("Blues")(np.linspace(0.25, 0.75, len(schedules)))
    width = 0.8 / len(schedules)
    for K, color in zip(schedules, colors, strict=True):
        mine = [d for d in consistency.differences if d.K == K]
        groups = [[other for other in schedules if other >= d.k] for d in mine]
        x = [d.k + (group.index(K) - (len(group) - 1) / 2) * width for d, group in zip(mine, groups, strict=True)]
        left.bar(x, [d.percent.mean for d in mine], width * 0.9, color=color, label=f"K = {K}")
        _whiskers(left, x, [d.percent for d in mine])
    left.axhline(0, color=INK, linewidth=1)
    left.set(title=f"Rates of shorter schedules against K = {consistency.longest}, %", xlabel="step k")
    left.set_xticks(range(1, max(schedules) + 1))
    left.grid(axis="y")
    left.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=len(schedules))
    steps = range(1, consistency.longest + 1)
    right.plot(steps, [e.mean for e in consistency.magnitudes], **STYLES["layerwise"], linewidth=2)
    _whiskers(right, steps, consistency.magnitudes)
    right.set(title="Mean rate of each step, all schedules", xlabel="step k", yscale="log")
    right.set_xticks(steps)
    right.grid(axis="y")
    return figure


def _whiskers(axes: Axes, x: Sequence[float], estimates: Sequence[Estimate]) -> None:
    means = [e.mean for e in estimates]
    lengths = [[e.mean - e.low for e in estimates], [e.high - e.mean for e in estimates]]
    axes.errorbar(x, means, yerr=lengths, fmt="none", ecolor=INK, capsize=3, linewidth=1.2)
