"""`ephemera train gate`: from labelled rows, the risk of harm, and the threshold that keeps the harmed share under alpha."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ephemera import artifact
from ephemera.backbone import Backbone
from ephemera.config import TrainGate, dump_yaml
from ephemera.gate import SIGNALS, Gate
from ephemera.guard import SHRINK, SHRINKS, signals, with_share
from ephemera.inits import ZeroInit
from ephemera.load import load_backbone
from ephemera.prepared import prepare
from ephemera.rates import PerProjectionRate, ScaleNet, adapted_by, load_rate, place_rate
from ephemera.rates.protocol import NAME as RATE
from ephemera.rows import load_rows
from ephemera.scoring import Encoded, batches_of, parts_of

SHARES = tuple(SHRINK**n for n in range(SHRINKS))
TAUS = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, float("inf"))


@dataclass(frozen=True, eq=False)
class Measured:
    """N rows under a network: answer NLL of the base model and with each share S of the adapter, and what the prompt tells.

    `kl_NS`: KL(adapted || base) of the first token. `signals_NSF`: the gate's signals, had it kept that share.
    """

    tasks: list[str]
    ids: list[str]
    base_N: Tensor
    nll_NS: Tensor
    kl_NS: Tensor
    signals_NSF: Tensor
    h_NH: Tensor

    @property
    def tensors(self) -> dict[str, Tensor]:
        names = ("base_N", "nll_NS", "kl_NS", "signals_NSF", "h_NH")
        return {name: getattr(self, name).contiguous() for name in names}

    def rows(self, index: Sequence[int]) -> Measured:
        at = list(index)
        return Measured(
            [self.tasks[i] for i in at],
            [self.ids[i] for i in at],
            *(t[at] for t in (self.base_N, self.nll_NS, self.kl_NS, self.signals_NSF, self.h_NH)),
        )

    def within(self, tau: float, most: float = 1.0) -> Measured:
        """Each row at the largest share of at most `most` inside the trust region, S = 1; the base model's if none is."""
        inside_NS = (self.kl_NS <= tau) & self.kl_NS.isfinite() & (torch.tensor(SHARES) <= most)
        first_N = torch.where(inside_NS.any(1), inside_NS.int().argmax(1), len(SHARES) - 1)
        pick = torch.arange(len(first_N)), first_N
        nll_N = torch.where(inside_NS.any(1), self.nll_NS[pick], self.base_N)
        kl_N, signals_NF = self.kl_NS[pick], self.signals_NSF[pick]
        return Measured(
            self.tasks, self.ids, self.base_N, nll_N[:, None], kl_N[:, None], signals_NF[:, None], self.h_NH
        )

    @property
    def change_N(self) -> Tensor:
        return self.nll_NS[:, 0] - self.base_N


def read_measured(path: Path, rows: Sequence[Encoded]) -> Measured:
    """What an earlier run measured; ValueError if it was on other rows."""
    with safe_open(path, "pt") as file:
        told = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    ids = json.loads(told["ids"])
    if sorted(ids) != sorted(row.id for row in rows):
        raise ValueError(f"{path} was measured on other rows; give another output, or remove it.")
    return Measured(json.loads(told["tasks"]), ids, **tensors)


@torch.no_grad()
def measure(
    backbone: Backbone, network: ScaleNet | PerProjectionRate, rows: Sequence[Encoded], *, batch_size: int, seed: int
) -> Measured:
    """Adapt to each row once, and score its answer with each share of the adapter."""
    tasks: list[str] = []
    ids: list[str] = []
    found: list[list[Tensor]] = []
    for some in batches_of(backbone, rows, batch_size):
        parts = [[row.prompt for row in some[part]] for part in parts_of(backbone, some)]
        ready = prepare(
            backbone, ZeroInit(), parts, [seed] * len(some), objective=network.objective, normalize=network.normalize
        )
        trace, answers = ready.adapted(network), [row.answer for row in some]
        whole = ready.read(trace.lora)
        base_B = ready.answer_nll(answers, None)
        nll, kl, told = [], [], []
        for share in SHARES:
            share_B = torch.full_like(base_B, share)
            read = with_share(whole, trace, share_B)
            kl_B = kl_of(backbone, read.hidden_BTD[:, -1], read.base_BD)
            nll.append(read.answer_nll(answers))
            kl.append(kl_B)
            told.append(signals(read, trace, share_B, kl_B))
        found.append([base_B, torch.stack(nll, 1), torch.stack(kl, 1), torch.stack(told, 1), ready.h_BH])
        tasks += [row.task for row in some]
        ids += [row.id for row in some]
    base_N, nll_NS, kl_NS, signals_NSF, h_NH = (torch.cat(column).cpu() for column in zip(*found, strict=True))
    return Measured(tasks, ids, base_N, nll_NS, kl_NS, signals_NSF, h_NH)


def kl_of(backbone: Backbone, h_BD: Tensor, base_BD: Tensor | None) -> Tensor:
    assert base_BD is not None
    p_BV, q_BV = (backbone.logits(h).float().log_softmax(-1) for h in (h_BD, base_BD))
    return (p_BV.exp() * (p_BV - q_BV)).sum(1)


def fit(rows: Measured, harmed_N: Tensor, *, penalty: float) -> dict[str, Tensor]:
    """Logistic regression of harm on the signals and h(x), both standardised, with an L2 penalty on the weights."""
    x_NF, h_NH = rows.signals_NSF[:, 0], rows.h_NH
    state = {"mean_F": x_NF.mean(0), "std_F": x_NF.std(0).clamp(min=1e-6)}
    state |= {"mean_H": h_NH.mean(0), "std_H": h_NH.std(0).clamp(min=1e-6)}
    weights = [torch.zeros(n, requires_grad=True) for n in (x_NF.shape[1], h_NH.shape[1])]
    bias = torch.zeros((), requires_grad=True)
    x_NF = ((x_NF - state["mean_F"]) / state["std_F"]).clamp(-5, 5)
    h_NH = ((h_NH - state["mean_H"]) / state["std_H"]).clamp(-5, 5)
    optimizer = torch.optim.LBFGS([*weights, bias], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        logit_N = bias + x_NF @ weights[0] + h_NH @ weights[1]
        value = torch.nn.functional.binary_cross_entropy_with_logits(logit_N, harmed_N.float(), reduction="sum")
        # A feature of h counts as one of many: its weight is held so much tighter
        value = value + penalty * (weights[0].square().sum() + weights[1].square().sum() * h_NH.shape[1] / 10)
        value.backward()
        return value

    optimizer.step(loss)  # pyright: ignore[reportArgumentType]
    return {**state, "weight_F": weights[0].detach(), "weight_H": weights[1].detach(), "bias": bias.detach()}


def calibrated(risk_N: Tensor, harmed_N: Tensor, alpha: float, tasks: Sequence[str] = ()) -> float:
    """The largest threshold on the risk that keeps the harmed share under alpha (conformal risk control).

    With n rows, (harmed and adapted + 1) / (n + 1) <= alpha: then a further row like them is harmed with a probability of
    at most alpha (Angelopoulos et al., 2024, Eq. 4). -1 where no threshold does: every row is left alone. With each row's
    task, no task's own share exceeds alpha either, as far as these rows tell.
    """
    n, threshold, harmed = len(risk_N), -1.0, 0
    counts, harmed_of = Counter(tasks), Counter[str]()
    order = risk_N.argsort().tolist()
    for at, i in enumerate(order):
        if harmed_N[i]:
            harmed += 1
            if tasks:
                harmed_of[tasks[i]] += 1
        if (harmed + 1) / (n + 1) > alpha or any(k > alpha * counts[task] for task, k in harmed_of.items()):
            break
        tied = at + 1 < n and risk_N[order[at + 1]] == risk_N[i]
        threshold = threshold if tied else risk_N[i].item()
    return threshold


def auroc(score_N: Tensor, positive_N: Tensor) -> float | None:
    """The chance that a positive row scores higher than another, ties counted half; None without both kinds."""
    p, q = score_N[positive_N], score_N[~positive_N]
    if not len(p) or not len(q):
        return None
    return ((p[:, None] > q).float().mean() + 0.5 * (p[:, None] == q).float().mean()).item()


def train_gate(config: TrainGate) -> Path:
    """`ephemera train gate`: fits on one half of the rows, calibrates on the other, and puts the gate beside the network."""
    folder = Path(config.output)
    network = load_rate(config.network)
    if not isinstance(network, ScaleNet | PerProjectionRate) or network.reach != "answer":
        raise ValueError(
            f"network={config.network}: a gate is for a trained network with reach answer; this one has reach {network.reach}."
        )
    backbone = load_backbone(
        config.model.name, dtype=config.model.dtype, device=config.model.device, **adapted_by(network)
    )
    place_rate(network, backbone)
    rows = load_rows(backbone, config.data)
    if len(rows) < 20:
        raise ValueError(f"a gate needs at least 20 labelled rows; data has {len(rows)}. Raise data.limit.")
    if config.most is not None and config.most not in SHARES:
        raise ValueError(
            f"most={config.most} is not one of the shares that are measured: {', '.join(map(str, SHARES))}."
        )
    folder.mkdir(parents=True, exist_ok=True)

    def of_part(part: str, rows: Sequence[Encoded]) -> Measured:
        """Measured once for a folder: other settings of the gate are then settled in seconds."""
        path = folder / f"{part}.safetensors"
        if not path.exists():
            found = measure(backbone, network, rows, batch_size=config.batch_size, seed=config.seed)
            save_file(found.tensors, path, {"tasks": json.dumps(found.tasks), "ids": json.dumps(found.ids)})
        return read_measured(path, rows)

    seen = of_part("seen", rows)
    unseen = None if config.unseen is None else of_part("unseen", load_rows(backbone, config.unseen))
    gate, report = settle(seen, unseen, config)
    torch_free = {"report": report, "config": config.model_dump(mode="json")}
    (folder / "gate.json").write_text(json.dumps(torch_free, indent=1) + "\n")
    (folder / "config.yaml").write_text(dump_yaml(config))
    with (folder / "records.jsonl").open("w") as file:
        for part, measured in (("seen", seen), ("unseen", unseen)):
            for line in _lines(part, measured):
                file.write(json.dumps(line) + "\n")
    gate.save(artifact.find(config.network, RATE, also=["a folder"]))
    return folder


def settle(seen: Measured, unseen: Measured | None, config: TrainGate) -> tuple[Gate, dict[str, Any]]:
    """The gate, and what it does: to the calibration half, by task, and to tasks it never saw.

    The share of the adapter is chosen on the fitting half only, so the promise made on the other half holds.
    """
    order = random.Random(config.seed).sample(range(len(seen.ids)), len(seen.ids))
    half = len(order) // 2
    fitting, checking = seen.rows(order[:half]), seen.rows(order[half:])
    tried = {most: _trial(fitting, most, config) for most in (SHARES if config.most is None else ())}
    most = config.most or min(tried, key=lambda share: tried[share]["change"])
    gate = _gate(fitting, checking, most, config)
    within = checking.within(config.tau, most)
    risk_N = gate.risk_B(within.signals_NSF[:, 0], within.h_NH)
    adapted_N = risk_N <= gate.threshold
    report: dict[str, Any] = {
        "alpha": config.alpha,
        "harm": config.harm,
        "tau": config.tau,
        "most": most,
        "threshold": gate.threshold,
        "rows": {"fitted": len(fitting.ids), "calibrated": len(checking.ids)},
        "tried": {str(share): figures for share, figures in tried.items()},
        "trust_region": {str(tau): _figures(seen.within(tau, most).change_N, None, config.harm) for tau in TAUS},
        "shares": {
            str(share): _figures(seen.within(config.tau, share).change_N, None, config.harm) for share in SHARES
        },
        "auroc": _aurocs(within, risk_N, config.harm),
        "calibration": _figures(within.change_N, adapted_N, config.harm),
        "curve": _curve(within.change_N, risk_N, config.harm),
        "tasks": _by_task(within, adapted_N, config.harm),
    }
    if unseen is not None:
        other = unseen.within(config.tau, most)
        risk = gate.risk_B(other.signals_NSF[:, 0], other.h_NH)
        report["unseen"] = _figures(other.change_N, risk <= gate.threshold, config.harm)
        report["unseen_curve"] = _curve(other.change_N, risk, config.harm)
        report["unseen_tasks"] = _by_task(other, risk <= gate.threshold, config.harm)
    kept = {key: report[key] for key in ("alpha", "harm", "rows", "calibration")}
    return replace(gate, calibration=kept), report


def _gate(fitting: Measured, checking: Measured, most: float, config: TrainGate) -> Gate:
    """The risk of harm at this share, fitted on some rows, and its threshold, calibrated on others."""
    fitting, checking = fitting.within(config.tau, most), checking.within(config.tau, most)
    state = fit(fitting, fitting.change_N > config.harm, penalty=config.penalty)
    gate = Gate(config.tau, 1.0, most, state, {})
    risk_N = gate.risk_B(checking.signals_NSF[:, 0], checking.h_NH)
    threshold = calibrated(risk_N, checking.change_N > config.harm, config.alpha, checking.tasks)
    return replace(gate, threshold=threshold)


def _trial(rows: Measured, most: float, config: TrainGate) -> dict[str, float]:
    """What a gate at this share does to each half of some rows, fitted and calibrated on the other."""
    half = len(rows.ids) // 2
    parts = rows.rows(range(half)), rows.rows(range(half, len(rows.ids)))
    change, adapted = [], []
    for known, new in (parts, parts[::-1]):
        middle = len(known.ids) // 2
        gate = _gate(known.rows(range(middle)), known.rows(range(middle, len(known.ids))), most, config)
        within = new.within(config.tau, most)
        change.append(within.change_N)
        adapted.append(gate.risk_B(within.signals_NSF[:, 0], within.h_NH) <= gate.threshold)
    return _figures(torch.cat(change), torch.cat(adapted), config.harm)


def _figures(change_N: Tensor, adapted_N: Tensor | None, harm: float) -> dict[str, float]:
    adapted_N = torch.ones_like(change_N, dtype=torch.bool) if adapted_N is None else adapted_N
    change_N = torch.where(adapted_N, change_N, 0.0)
    return {
        "n": len(change_N),
        "change": change_N.mean().item(),
        "harmed": (change_N > harm).float().mean().item(),
        "helped": (change_N < -harm).float().mean().item(),
        "adapted": adapted_N.float().mean().item(),
    }


def _by_task(rows: Measured, adapted_N: Tensor, harm: float) -> dict[str, dict[str, float]]:
    found = {}
    for task in sorted(set(rows.tasks)):
        mine = [i for i, other in enumerate(rows.tasks) if other == task]
        found[task] = {
            **_figures(rows.change_N[mine], adapted_N[mine], harm),
            "change_always": rows.change_N[mine].mean().item(),
            "harmed_always": (rows.change_N[mine] > harm).float().mean().item(),
        }
    return found


def _aurocs(rows: Measured, risk_N: Tensor, harm: float) -> dict[str, dict[str, float | None]]:
    scores = {name: rows.signals_NSF[:, 0, i] for i, name in enumerate(SIGNALS)} | {"learned risk": risk_N}
    change_N = rows.change_N
    return {
        name: {"harmed": auroc(score_N, change_N > harm), "helped": auroc(score_N, change_N < -harm)}
        for name, score_N in scores.items()
    }


def _curve(change_N: Tensor, risk_N: Tensor, harm: float) -> list[dict[str, float]]:
    """Risk and coverage: the same share adapted, by lowest risk; by chance it would be harmed in proportion."""
    order = risk_N.argsort()
    curve = []
    for tenth in range(11):
        chosen_N = torch.zeros_like(risk_N, dtype=torch.bool)
        chosen_N[order[: round(len(order) * tenth / 10)]] = True
        curve.append({"coverage": tenth / 10, **_figures(change_N, chosen_N, harm)})
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
            "signals": dict(zip(SIGNALS, (round(x, 4) for x in measured.signals_NSF[i, 0].tolist()), strict=True)),
        }
        for i, task in enumerate(measured.tasks)
    ]
