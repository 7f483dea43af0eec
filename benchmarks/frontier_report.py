"""The frontier as a table and a figure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.frontier_points import COMMON, Point, points

REFERENCES = {"layer-wise": Point(network="scalenet-nq-open"), "uniform": Point()}
RESAMPLES = 10_000
TOP = "loss at the top, one rate"
EARLY = "early exit, lens trained to match the last layer, one rate"
EARLY_COMMON = "the same, over the common words"
EARLY_OTHER = "early exit: other words, layers, kinds, K"
NETWORK = "trained networks"
NETWORK_LABELS = {
    "scalenet-nq-open": "full",
    "scalenet-fast": "fast (exit 8)",
}


def write_report(folder: Path, results: dict[str, Any]) -> None:
    """table.md and frontier.png from what results.json holds; points that lack quality or time show a dash."""
    rows = summarize(results)
    (folder / "table.md").write_text(table(results, rows))
    if any(row["prefills"] is not None and "layer-wise" in row["shares"] for row in rows):
        draw(folder / "frontier.png", rows)


def summarize(results: dict[str, Any]) -> list[dict[str, Any]]:
    found = []
    base = np.array(results.get("none", {}).get("nlls", []))
    for point in points():
        entry = results["points"].get(point.key)
        if entry is None:
            continue
        shares = {}
        nlls = np.array(entry["nlls"]) if "nlls" in entry else None
        if nlls is not None:
            for name, reference in REFERENCES.items():
                full = results["points"].get(reference.key, {})
                if "nlls" in full:
                    shares[name] = share(base, nlls, np.array(full["nlls"]))
        found.append(
            {
                "point": point,
                "nll": None if nlls is None else float(nlls.mean()),
                "shares": shares,
                "rates": entry.get("rates"),
                "prefills": entry["time"]["prefills"] if "time" in entry else None,
            }
        )
    return found


def share(base_N: np.ndarray, nll_N: np.ndarray, full_N: np.ndarray) -> tuple[float, float, float]:
    """Gain kept of the full gain, with its 95 % bootstrap interval over prompts."""
    draws = np.random.default_rng(0).integers(0, len(base_N), (RESAMPLES, len(base_N)))
    many = (base_N - nll_N)[draws].mean(1) / (base_N - full_N)[draws].mean(1)
    low, high = np.percentile(many, [2.5, 97.5])
    return float((base_N - nll_N).mean() / (base_N - full_N).mean()), float(low), float(high)


def table(results: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    settings, timing = results.get("settings", {}), results.get("timing")
    lines = ["Time to first token (steps, prefill, first token) in plain prefills."]
    if settings:
        lines[0] = (
            f"NQ-Open validation, {settings['rows']} prompts, {settings['model']} in {settings['dtype']}; rates chosen on "
            f"{settings['search']} others. Gain kept of layer-wise (scalenet-nq-open, K=1) and of the best uniform rate over "
            "all layers (K=1), with 95 % bootstrap intervals; time to first token (steps, prefill, first token) in plain prefills."
        )
    if timing is not None:
        facts = results["machine"]
        lines += [
            "",
            f"Timed in {timing.get('dtype', 'bfloat16')} on {facts['cpu']}, {timing['threads']} threads, batch {timing['batch']}, {timing['rounds']} rounds; a plain "
            f"prefill takes {timing['plain']['median']:.3f} s [{timing['plain']['min']:.3f}, {timing['plain']['max']:.3f}].",
        ]
    if "none" in results:
        lines += ["", f"Without steps: NLL {np.mean(results['none']['nlls']):.3f}."]
    lines += ["", "| | NLL | of layer-wise | of uniform | prefills | rates |", "|---|--:|--:|--:|--:|---|"]
    for row in rows:
        shares = [
            "–" if name not in row["shares"] else "{:.0%} [{:.0%}, {:.0%}]".format(*row["shares"][name])
            for name in REFERENCES
        ]
        nll = "–" if row["nll"] is None else f"{row['nll']:.3f}"
        prefills = "–" if row["prefills"] is None else f"{row['prefills']:.2f}"
        rates = "" if not row["rates"] else ", ".join(f"{rate:.3g}" for rate in row["rates"])
        lines.append(f"| {row['point'].key} | {nll} | {shares[0]} | {shares[1]} | {prefills} | {rates} |")
    return "\n".join(lines) + "\n"


def draw(path: Path, rows: list[dict[str, Any]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7.5, 4.8))
    groups = {
        TOP: ("o", "tab:gray"),
        EARLY: ("^", "tab:blue"),
        EARLY_COMMON: ("v", "tab:cyan"),
        EARLY_OTHER: ("s", "tab:green"),
        NETWORK: ("*", "tab:red"),
    }
    for name, (marker, color) in groups.items():
        mine = [
            r for r in rows if r["prefills"] is not None and "layer-wise" in r["shares"] and _group(r["point"]) == name
        ]
        if not mine:
            continue
        x, y = [r["prefills"] for r in mine], [100 * r["shares"]["layer-wise"][0] for r in mine]
        axes.scatter(x, y, marker=marker, color=color, s=90 if marker == "*" else 36, label=name, zorder=3)
        for row, a, b in zip(mine, x, y, strict=True):
            label = _label(row["point"])
            if label:
                axes.annotate(label, (a, b), xytext=(5, -2), textcoords="offset points", fontsize=7)
    axes.axhline(85, color="0.8", lw=0.8)
    axes.axvline(2, color="0.8", lw=0.8)
    axes.set_ylim(bottom=-8)
    axes.set_xlabel("time to first token, in plain prefills")
    axes.set_ylabel("gain kept, % of layer-wise over all layers")
    axes.legend(fontsize=8, loc="lower right")
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _group(point: Point) -> str:
    if point.network is not None:
        return NETWORK
    if point.exit_layer is None:
        return TOP
    plain = (point.targets, point.K, point.lens) == ("qv", 1, True)
    if not plain or point.layers != f"first-{point.exit_layer}" or point.vocabulary not in (None, COMMON):
        return EARLY_OTHER
    return EARLY if point.vocabulary is None else EARLY_COMMON


def _label(point: Point) -> str:
    """Of points that stand apart."""
    if point.network is not None:
        return NETWORK_LABELS.get(point.network, Path(point.network).name)
    if point.exit_layer is None:
        if point in (Point(), Point(K=2)):
            return "all layers" + " K=2" * (point.K == 2)
        return {"last-15": "last 15 layers"}.get(point.layers, "")
    return f"exit {point.exit_layer}" if _group(point) in (EARLY, EARLY_COMMON) else ""
