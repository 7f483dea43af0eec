"""Figures of an analysis: norms by layer and module, cosines between tasks, embeddings, controls."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure

from ephemera.evaluation.adapters.analysis import CONTROLS, Analysis, Control
from ephemera.evaluation.nll.figures import FIGURES, INK, SETTINGS, save_figure
from ephemera.evaluation.shared.statistics import LEVEL, Estimate

# Okabe and Ito's palette, grey for its pale yellow; a marker of its own tells each task apart in grey, and beyond eight tasks.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#888888")
MARKERS = ("o", "s", "^", "D", "v", "X", "P", "<", ">", "h", "*")
CONTROL_COLORS = {
    "base": "#999999",
    "own": "#0072B2",
    "same_task": "#56B4E9",
    "other_task": "#D55E00",
    "mean": "#E69F00",
    "random": "#CC79A7",
}


def write_figures(analysis: Analysis) -> dict[str, Path]:
    """{caption: PNG}: norms, cosines and controls; embedding where adapters vary at all."""
    folder = analysis.folder
    (folder / FIGURES).mkdir(exist_ok=True)
    written: dict[str, Path] = {}
    with plt.rc_context(SETTINGS):
        caption = "Frobenius norm of (alpha / r) B A by layer and module, mean over each task's prompts."
        written[caption] = save_figure(folder, "norms", norms_heat_map(analysis))
        caption = "Mean cosine between the updates of different prompts, as they are and without their common mean."
        written[caption] = save_figure(folder, "cosines", cosine_matrices(analysis))
        if analysis.embeddings:
            caption = "Updates in two dimensions, one mark per prompt."
            written[caption] = save_figure(folder, "embedding", embedding_scatter(analysis))
        caption = (
            f"Answer NLL with each prompt's own adapter and with others; whiskers are {LEVEL} % intervals, on the right "
            "of the paired difference to its own."
        )
        written[caption] = save_figure(folder, "controls", control_bars(analysis.controls["all"]))
    return written


def norms_heat_map(analysis: Analysis) -> Figure:
    """One panel per kind of module: layers from top to bottom, a column for each task."""
    kinds = list(dict.fromkeys(kind for _, kind in analysis.projections))
    layers, tasks = 1 + max(layer for layer, _ in analysis.projections), len(analysis.tasks)
    maps_JLS = np.zeros((len(kinds), layers, tasks))
    for s in range(tasks):
        for (layer, kind), norm in zip(
            analysis.projections, analysis.norms_NM[analysis.task_N == s].mean(0).tolist(), strict=True
        ):
            j = kinds.index(kind)  # several modules of one kind (experts) count together
            maps_JLS[j, layer, s] = math.hypot(maps_JLS[j, layer, s], norm)
    positive = maps_JLS[maps_JLS > 0]
    low, high = (positive.min(), positive.max()) if positive.size else (0.0, 1.0)
    wide = positive.size > 0 and high > 20 * low
    scale = LogNorm(low, high) if wide else Normalize(0, high)
    width = max(1.5, 0.36 * tasks)
    figure, panels = plt.subplots(
        1,
        len(kinds),
        figsize=(1.9 + (width + 0.4) * len(kinds), max(3.4, 2.0 + 0.19 * layers)),
        squeeze=False,
        sharey=True,
    )
    figure.suptitle("Norm of the update by layer", x=0.01, ha="left", fontsize=12)
    for axes, kind, map_LS in zip(panels[0], kinds, maps_JLS, strict=True):
        axes.imshow(np.ma.masked_less_equal(map_LS, 0) if wide else map_LS, norm=scale, cmap="viridis", aspect="auto")
        axes.set_title(kind, loc="center")
        axes.set_xticks(range(tasks), analysis.tasks, rotation=90)
        axes.set_yticks(range(0, layers, 1 if layers <= 16 else 5))
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
    panels[0][0].set_ylabel("layer")
    label = "mean over prompts" + (" (log scale)" if wide else "")
    shades = ScalarMappable(scale, "viridis")
    figure.colorbar(shades, ax=panels, label=label, pad=0.02).outline.set_visible(False)  # pyright: ignore[reportCallIssue]
    return figure


def cosine_matrices(analysis: Analysis) -> Figure:
    """Tasks by tasks, from -1 to 1: the updates, and what is left of them without the mean update."""
    tasks = analysis.tasks
    side = max(2.6, 0.62 * len(tasks))
    figure, panels = plt.subplots(1, 2, figsize=(2 * side + 3.2, side + 1.9), sharey=True)
    titles = ("Cosine between updates", "Without the mean update")
    for axes, title, cosines in zip(
        panels, titles, (analysis.updates.cosines, analysis.updates.cosines_centred), strict=True
    ):
        cosines_SS = np.array(cosines, dtype=np.float64)
        axes.imshow(cosines_SS, cmap="RdBu", vmin=-1, vmax=1)
        for (i, j), value in np.ndenumerate(cosines_SS):
            text = f"{value:.2f}".replace("-", "−") if math.isfinite(value) else "–"
            axes.text(j, i, text, ha="center", va="center", fontsize=9, color="white" if abs(value) > 0.6 else INK)
        axes.set_title(title)
        axes.set_xticks(range(len(tasks)), tasks, rotation=90)
        axes.set_yticks(range(len(tasks)), tasks)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
    shades = ScalarMappable(Normalize(-1, 1), "RdBu")
    bar = figure.colorbar(shades, ax=panels, label="mean cosine between prompts", pad=0.02, shrink=0.9)
    bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]
    return figure


def embedding_scatter(analysis: Analysis) -> Figure:
    """One panel per method; only PCA's axes have a meaning."""
    count = len(analysis.embeddings)
    figure, panels = plt.subplots(1, count, figsize=(0.8 + 4.6 * count, 5.0), squeeze=False)
    for axes, (method, places_N2) in zip(panels[0], analysis.embeddings.items(), strict=True):
        for s, task in enumerate(analysis.tasks):
            x_N, y_N = places_N2[analysis.task_N == s].T.numpy()
            axes.scatter(
                x_N,
                y_N,
                s=26,
                color=COLORS[s % len(COLORS)],
                marker=MARKERS[s % len(MARKERS)],
                alpha=0.8,
                edgecolors="white",
                linewidths=0.4,
                label=task,
            )
        axes.set_title(method)
        if method == "PCA":
            first, second = (f"{100 * share:.0f} % of the variance" for share in [*analysis.pca_shares, 0.0][:2])
            axes.set(xlabel=f"component 1, {first}", ylabel=f"component 2, {second}")
            axes.grid()
        else:
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(True)
            axes.spines[:].set_color("#bbbbbb")
    columns = min(len(analysis.tasks), 2 * count)
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, markerscale=1.4, handletextpad=0.2)
    return figure


def control_bars(controls: Sequence[Control]) -> Figure:
    """NLL of every control; beside it, paired by prompt, how much worse it is than the prompt's own adapter."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 1.5 + 0.46 * len(controls)), sharey=True)
    y = range(len(controls))
    colors = [CONTROL_COLORS[c.name] for c in controls]
    left.barh(y, [c.nll.mean for c in controls], 0.7, color=colors)
    right.barh(y, [c.against_own.mean for c in controls], 0.7, color=colors)
    _whiskers(left, [c.nll for c in controls])
    _whiskers(right, [c.against_own for c in controls])
    left.set_yticks(y, [CONTROLS[c.name] for c in controls])
    left.invert_yaxis()
    right.axvline(0, color=INK, linewidth=1)
    left.set(title="Answer NLL, nats per token", xlabel="lower is better")
    right.set(title="Paired difference to the own adapter", xlabel="right of zero: the own adapter is better")
    for axes in (left, right):
        axes.grid(axis="x")
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
    return figure


def _whiskers(axes: Axes, estimates: Sequence[Estimate]) -> None:
    means = [e.mean for e in estimates]
    lengths = [[e.mean - e.low for e in estimates], [e.high - e.mean for e in estimates]]
    axes.errorbar(means, range(len(means)), xerr=lengths, fmt="none", ecolor=INK, capsize=3, linewidth=1.2)
