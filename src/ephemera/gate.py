"""A calibrated gate: how much of its adapter a prompt may keep, from the risk that it harms the answer. guard.py applies it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ephemera import artifact

NAME = "gate"  # of its files, beside those of its network
SIGNALS = ("prompt NLL", "prompt tokens", "first-token entropy", "step length", "mean log rate")
SHARES = (1.0, 0.5, 0.25, 0.125, 0.0625, 0.03125)  # of an adapter's B that a prompt may keep, or none of it


@dataclass(frozen=True, eq=False)
class Gate:
    """A calibrated gate of one network.

    Each prompt keeps the largest of `SHARES`, at most `most`, at which its risk is at most `threshold`; none if there is
    no such share. Risk is a logistic regression on `SIGNALS` and h(x), both standardised, and on the share:
    sigmoid(bias + signal_F . weight_F + h_H . weight_H + slope * log2 share). `tau`: most nats of KL(adapted || base) of the
    first answer token. `calibration`: alpha, rows and figures on them.
    """

    tau: float
    threshold: float
    most: float
    state: dict[str, Tensor]
    calibration: dict[str, Any]

    def risk_BS(self, signals_BF: Tensor, h_BH: Tensor) -> Tensor:
        """The risk [B,S] of harm at each of `SHARES`."""
        s = {key: t.to(signals_BF.device) for key, t in self.state.items()}
        logit_B = s["bias"] + ((signals_BF - s["mean_F"]) / s["std_F"]).clamp(-5, 5) @ s["weight_F"]
        logit_B = logit_B + ((h_BH - s["mean_H"]) / s["std_H"]).clamp(-5, 5) @ s["weight_H"]
        return (logit_B[:, None] + s["slope"] * logit_B.new_tensor(SHARES).log2()).sigmoid()

    def share_B(self, risk_BS: Tensor) -> Tensor:
        """The share [B] that each prompt keeps; 0: it is left alone."""
        shares_S = risk_BS.new_tensor(SHARES)
        return torch.where((risk_BS <= self.threshold) & (shares_S <= self.most), shares_S, 0.0).amax(1)

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
    gate = artifact.load(folder, NAME, lambda config, state: Gate(state=state, **config))
    if gate.state.get("weight_F", torch.zeros(0)).shape != (len(SIGNALS),) or "slope" not in gate.state:
        raise ValueError(
            f"the gate in {folder} is of an older kind; remove its gate.* files, or train it anew with `ephemera train gate`."
        )
    return gate
