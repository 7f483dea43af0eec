"""A calibrated gate: the risk that adapting to a prompt harms its answer. It is applied by guard.py."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ephemera import artifact

NAME = "gate"  # of its files, beside those of its network
SIGNALS = (
    "prompt NLL",
    "prompt tokens",
    "first-token entropy",
    "first-token KL",
    "step length",
    "mean log rate",
    "shrunk",
)


@dataclass(frozen=True, eq=False)
class Gate:
    """A calibrated gate of one network.

    `most`: the share of an adapter's B that is kept at most. `tau`: most nats of KL(adapted || base) of the first answer
    token. Risk is a logistic regression on `SIGNALS` and
    h(x), both standardised: sigmoid(bias + signal_F . weight_F + h_H . weight_H). A row whose risk is above `threshold`
    abstains. `calibration`: alpha, rows and figures on them.
    """

    tau: float
    threshold: float
    most: float
    state: dict[str, Tensor]
    calibration: dict[str, Any]

    def risk_B(self, signals_BF: Tensor, h_BH: Tensor | None) -> Tensor:
        s = {key: t.to(signals_BF.device) for key, t in self.state.items()}
        logit_B = s["bias"] + ((signals_BF - s["mean_F"]) / s["std_F"]).clamp(-5, 5) @ s["weight_F"]
        if h_BH is not None and "weight_H" in s:
            logit_B = logit_B + ((h_BH - s["mean_H"]) / s["std_H"]).clamp(-5, 5) @ s["weight_H"]
        return logit_B.sigmoid()

    def save(self, folder: str | Path) -> None:
        config = {
            "tau": self.tau,
            "threshold": self.threshold,
            "most": self.most,
            "calibration": self.calibration,
        }
        artifact.save(Path(folder), NAME, config, self.state)


def load_gate(folder: str | Path) -> Gate | None:
    """The gate beside a network; None if it has none."""
    folder = Path(folder)
    if not (folder / f"{NAME}.json").exists():
        return None
    return artifact.load(folder, NAME, lambda config, state: Gate(state=state, **config))
