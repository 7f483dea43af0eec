"""`ephemera train gate`: from labelled rows, the risk of harm, and the threshold that keeps the harmed share under alpha."""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ephemera import artifact
from ephemera.cards import add_harm, harm_table
from ephemera.config import TrainGate, dump_yaml
from ephemera.gate import SHARES, SIGNALS, Gate
from ephemera.hub import is_id
from ephemera.inits import LoraGenerator, load_generator
from ephemera.inits.generator import NAME as GENERATOR
from ephemera.rates import PerProjectionRate, ScaleNet, adapted_by, load_rate
from ephemera.rates.protocol import NAME as RATE
from ephemera.rows import load_rows
from ephemera.saving import json_text, save_tensors
from ephemera.scoring import Encoded
from ephemera.training.gate_rows import Generated, Measured, Rated, measure, read_measured

FOLDS = 5
TAUS = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, float("inf"))


def fit(signals_NF: Tensor, h_NH: Tensor, harmed_NS: Tensor, *, penalty: float) -> dict[str, Tensor]:
    """Logistic regression of harm at each share on signals and h(x), standardised, with an L2 penalty on the weights."""
    state = {"mean_F": signals_NF.mean(0), "std_F": signals_NF.std(0).clamp(min=1e-6)}
    state |= {"mean_H": h_NH.mean(0), "std_H": h_NH.std(0).clamp(min=1e-6)}
    weight_F, weight_H = (torch.zeros(n, requires_grad=True) for n in (signals_NF.shape[1], h_NH.shape[1]))
    bias, slope = torch.zeros((), requires_grad=True), torch.ones((), requires_grad=True)
    x_NF = ((signals_NF - state["mean_F"]) / state["std_F"]).clamp(-5, 5)
    h_NH = ((h_NH - state["mean_H"]) / state["std_H"]).clamp(-5, 5)
    halvings_S = torch.tensor(SHARES).log2()
    optimizer = torch.optim.LBFGS([weight_F, weight_H, bias, slope], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        logit_NS = (bias + x_NF @ weight_F + h_NH @ weight_H)[:, None] + slope * halvings_S
        value = torch.nn.functional.binary_cross_entropy_with_logits(logit_NS, harmed_NS.float(), reduction="sum")
        # A feature of h counts as one of many: its weight is held so much tighter
        value = value + penalty * (weight_F.square().sum() + weight_H.square().sum() * len(weight_H) / 6)
        value.backward()
        return value

    optimizer.step(loss)  # pyright: ignore[reportArgumentType]
    learned = {"weight_F": weight_F, "weight_H": weight_H, "bias": bias, "slope": slope}
    return state | {name: t.detach() for name, t in learned.items()}


def out_of_fold(rows: Measured, config: TrainGate) -> Tensor:
    """The risk [N,S] of each row, by a regression that never saw it."""
    order = random.Random(config.seed).sample(range(len(rows.ids)), len(rows.ids))
    risk_NS = torch.zeros_like(rows.nll_NS)
    harmed_NS = rows.change_NS > config.harm
    for fold in range(FOLDS):
        held = order[fold::FOLDS]
        known = sorted(set(order) - set(held))
        state = fit(rows.signals_NF[known], rows.h_NH[known], harmed_NS[known], penalty=config.penalty)
        risk_NS[held] = Gate(config.tau, 1.0, 1.0, state, {}).risk_BS(rows.signals_NF[held], rows.h_NH[held])
    return risk_NS


def calibrated(rows: Measured, risk_NS: Tensor, config: TrainGate) -> float:
    """The largest threshold up to which the harmed share stays under alpha (conformal risk control, cross-validated).

    With n rows, (harmed + 1) / (n + 1) <= alpha: then a further row like them is harmed with a probability of about alpha at
    most (Angelopoulos et al., 2024, Eq. 4; Cohen et al., 2024, for risks out of fold). And of each task so few are harmed that
    its own share is under alpha at `confidence` (Bates et al., 2021, by the binomial's tail); a task with too few rows to
    show it counts in the total only. -1 if no threshold does: every row is left alone.
    """
    n, threshold, counts = len(rows.ids), -1.0, Counter(rows.tasks)
    bearable = {task: most_harmed(rows, config.alpha, config.confidence) for task, rows in counts.items()}
    for candidate in sorted(set(risk_NS.flatten().tolist())):
        harmed_N = rows.change_N(rows.kept_NS(risk_NS, candidate, config.tau, config.most)) > config.harm
        by_task = Counter(task for task, harmed in zip(rows.tasks, harmed_N.tolist(), strict=True) if harmed)
        if (by_task.total() + 1) / (n + 1) > config.alpha or any(
            0 <= bearable[task] < k for task, k in by_task.items()
        ):
            break
        threshold = candidate
    return threshold


def most_harmed(n: int, alpha: float, confidence: float) -> int:
    """The most harmed rows of n that show a share under alpha: were it alpha, so few would have a chance of 1 - confidence
    at most. -1 if not even none would show it."""
    tail, k = 0.0, -1
    while (tail := tail + math.comb(n, k + 1) * alpha ** (k + 1) * (1 - alpha) ** (n - k - 1)) <= 1 - confidence:
        k += 1
    return k


def auroc(score_N: Tensor, positive_N: Tensor) -> float | None:
    """The chance that a positive row scores higher than another, ties counted half; None without both kinds."""
    p, q = score_N[positive_N], score_N[~positive_N]
    if not len(p) or not len(q):
        return None
    return ((p[:, None] > q).float().mean() + 0.5 * (p[:, None] == q).float().mean()).item()


def train_gate(config: TrainGate) -> Path:
    """`ephemera train gate`: fits on one half of the rows, calibrates on the other, and puts the gate beside the network."""
    folder = Path(config.output)
    if is_id(config.network):
        raise ValueError(
            f"network is {config.network!r}, of the hub; a gate is written into a folder. Allowed: a folder. "
            "Save it first: load_rate(...).save_pretrained(folder)."
        )
    home, network = _network(config.network)
    targets: dict[str, Any] = (
        {"target_modules": network.target_modules} if isinstance(network, LoraGenerator) else adapted_by(network)
    )
    backbone = config.model.load(**targets)
    adapted = (
        Generated(backbone, network) if isinstance(network, LoraGenerator) else Rated(backbone, network, config.seed)
    )
    rows = load_rows(backbone, config.data)
    if len(rows) < 20:
        raise ValueError(f"a gate needs at least 20 labelled rows; data has {len(rows)}. Raise data.limit.")
    if config.most not in SHARES:
        raise ValueError(
            f"most={config.most} is not one of the shares that are measured: {', '.join(map(str, SHARES))}."
        )
    folder.mkdir(parents=True, exist_ok=True)

    def of_part(part: str, rows: Sequence[Encoded]) -> Measured:
        """Measured once for a folder: other settings of the gate are then settled in seconds."""
        path = folder / f"{part}.safetensors"
        if not path.exists():
            found = measure(backbone, adapted, rows, batch_size=config.batch_size)
            save_tensors(found.tensors, path, {"tasks": json.dumps(found.tasks), "ids": json.dumps(found.ids)})
        return read_measured(path, rows)

    seen = of_part("seen", rows)
    unseen = None if config.unseen is None else of_part("unseen", load_rows(backbone, config.unseen))
    gate, report = settle(seen, unseen, config)
    torch_free = {"report": report, "config": config.model_dump(mode="json")}
    (folder / "gate.json").write_text(json_text(torch_free, indent=1) + "\n")
    (folder / "config.yaml").write_text(dump_yaml(config))
    with (folder / "records.jsonl").open("w") as file:
        for part, measured in (("seen", seen), ("unseen", unseen)):
            for line in _lines(part, measured):
                file.write(json_text(line) + "\n")
    gate.save(home)
    add_harm(home / "README.md", harm_table(gate.calibration, network.made_for and network.made_for.validation))
    return folder


def _network(spec: str) -> tuple[Path, ScaleNet | PerProjectionRate | LoraGenerator]:
    """A trained network with reach answer, rate or generator, and its folder."""
    places = (artifact.NETWORKS / spec, Path(spec).expanduser())
    kind = GENERATOR if any((place / f"{GENERATOR}.json").exists() for place in places) else RATE
    network = load_generator(spec) if kind == GENERATOR else load_rate(spec)
    if not isinstance(network, ScaleNet | PerProjectionRate | LoraGenerator) or network.reach != "answer":
        raise ValueError(
            f"network={spec}: a gate is for a trained network with reach answer; this one has reach {network.reach}."
        )
    return artifact.find(spec, kind, also=["a folder"]), network


def settle(seen: Measured, unseen: Measured | None, config: TrainGate) -> tuple[Gate, dict[str, Any]]:
    """The gate, and what it does: to the rows it was calibrated on (out of fold), by task, and to tasks it never saw."""
    risk_NS, harmed_NS = out_of_fold(seen, config), seen.change_NS > config.harm
    threshold = calibrated(seen, risk_NS, config)
    state = fit(seen.signals_NF, seen.h_NH, harmed_NS, penalty=config.penalty)
    gate = Gate(config.tau, threshold, config.most, state, {})

    def figures(rows: Measured, risk_NS: Tensor | None, **other: float) -> dict[str, float]:
        limits = {"threshold": threshold, "tau": config.tau, "most": config.most} | other
        return _figures(rows, rows.kept_NS(risk_NS, **limits), config.harm)

    report: dict[str, Any] = {
        **config.model_dump(include={"alpha", "confidence", "harm", "tau", "most"}),
        "threshold": threshold,
        "rows": len(seen.ids),
        "trust_region": {str(tau): figures(seen, None, tau=tau) for tau in TAUS},
        "shares": {str(most): figures(seen, None, tau=math.inf, most=most) for most in SHARES},
        "auroc": _aurocs(seen, risk_NS, config),
        "calibration": figures(seen, risk_NS),
        "curve": _curve(seen, risk_NS, config),
        "tasks": _by_task(seen, risk_NS, figures),
    }
    if unseen is not None:
        risk = gate.risk_BS(unseen.signals_NF, unseen.h_NH)
        report["unseen"] = figures(unseen, risk)
        report["unseen_curve"] = _curve(unseen, risk, config)
        report["unseen_tasks"] = _by_task(unseen, risk, figures)
    kept = {key: report[key] for key in ("alpha", "confidence", "harm", "rows", "calibration")}
    return replace(gate, calibration=kept), report


def _figures(rows: Measured, kept_NS: Tensor, harm: float) -> dict[str, float]:
    change_N = rows.change_N(kept_NS)
    return {
        "n": len(change_N),
        "change": change_N.mean().item(),
        "harmed": (change_N > harm).float().mean().item(),
        "helped": (change_N < -harm).float().mean().item(),
        "share": (kept_NS * torch.tensor(SHARES)).sum(1).mean().item(),
        "abstained": 1 - kept_NS.any(1).float().mean().item(),
    }


def _by_task(
    rows: Measured, risk_NS: Tensor, figures: Callable[[Measured, Tensor | None], dict[str, float]]
) -> dict[str, dict[str, dict[str, float]]]:
    """Of each task: with the gate, and at the largest share that the trust region allows."""
    found = {}
    for task in sorted(set(rows.tasks)):
        mine = [i for i, other in enumerate(rows.tasks) if other == task]
        some = Measured([task] * len(mine), [rows.ids[i] for i in mine], *(t[mine] for t in rows.tensors.values()))
        found[task] = {"gate": figures(some, risk_NS[mine]), "always": figures(some, None)}
    return found


def _aurocs(rows: Measured, risk_NS: Tensor, config: TrainGate) -> dict[str, dict[str, float | None]]:
    """How well each candidate tells harmed and helped rows apart, at the largest share."""
    at = SHARES.index(config.most)
    scores = {name: rows.signals_NF[:, i] for i, name in enumerate(SIGNALS)}
    scores |= {"first-token KL": rows.kl_NS[:, at], "learned risk": risk_NS[:, at]}
    change_N = rows.change_NS[:, at]
    return {
        name: {"harmed": auroc(score_N, change_N > config.harm), "helped": auroc(score_N, change_N < -config.harm)}
        for name, score_N in scores.items()
    }


def _curve(rows: Measured, risk_NS: Tensor, config: TrainGate) -> list[dict[str, Any]]:
    """Over thresholds, what the gate does, and what the same shares do when they are dealt to rows at random."""
    generator = torch.Generator().manual_seed(config.seed)
    curve = []
    for tenth in range(11):
        threshold = risk_NS.flatten().quantile(tenth / 10).item()
        kept_NS = rows.kept_NS(risk_NS, threshold, config.tau, config.most)
        dealt_NS = kept_NS[torch.randperm(len(kept_NS), generator=generator)]
        random_N = _figures(rows, dealt_NS, config.harm)
        curve.append({"threshold": threshold, **_figures(rows, kept_NS, config.harm), "at_random": random_N})
    return curve


def _lines(part: str, measured: Measured | None) -> list[dict[str, Any]]:
    if measured is None:
        return []
    return [
        {
            "part": part,
            "task": task,
            "id": measured.ids[i],
            "base_nll": round(measured.base_N[i].item(), 5),
            "nll": dict(zip(map(str, SHARES), (round(x, 5) for x in measured.nll_NS[i].tolist()), strict=True)),
            "kl": [float(f"{x:.4g}") for x in measured.kl_NS[i].tolist()],
            "signals": dict(zip(SIGNALS, (round(x, 4) for x in measured.signals_NF[i].tolist()), strict=True)),
        }
        for i, task in enumerate(measured.tasks)
    ]
