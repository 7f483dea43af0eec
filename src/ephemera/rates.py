"""How far each step moves each projection: fixed, predicted from the prompt (ScaleNet), or its average."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ephemera.backbone import Backbone, describe
from ephemera.errors import unknown

MAX_STEPS = 5  # LDTTA 4.1
# Where the best uniform rate is looked for: from the paper's 1e-2 to well past what diverges
UNIFORM_GRID = (0.01, 0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.5, 3.0, 6.0, 9.0, 13.0, 18.0, 27.0, 40.0, 60.0)
NETWORKS = Path(__file__).parent / "networks"
CONFIG_FILE, WEIGHTS_FILE = "rate.json", "rate.safetensors"


class Rate(Protocol):
    """A rule for step sizes. `uses_representation` says whether it wants h(x), and from which step."""

    @property
    def max_steps(self) -> int | None: ...

    @property
    def uses_representation(self) -> Literal["no", "step", "first"]: ...

    def rates_BM(self, h_BH: Tensor | None, k: int, K: int, *, like: Tensor, projections: int) -> Tensor:
        """Learning rates [B,M] of step k of K (from 1); `like` is any tensor [B,...] on the right device."""
        ...

    def check(self, backbone: Backbone) -> None:
        """ValueError if it was made for another model."""
        ...


@dataclass(frozen=True)
class FixedRate:
    """One rate for every prompt, step and projection (naive TTA; the paper's baseline is 5e-2)."""

    rate: float

    def __post_init__(self):
        if not 0 <= self.rate < float("inf"):
            raise ValueError(f"a rate is a number >= 0; got {self.rate}.")

    @property
    def max_steps(self) -> None:
        return None

    @property
    def uses_representation(self) -> Literal["no"]:
        return "no"

    def rates_BM(self, h_BH: Tensor | None, k: int, K: int, *, like: Tensor, projections: int) -> Tensor:
        return like.new_full((like.shape[0], projections), self.rate)

    def check(self, backbone: Backbone) -> None:
        """Fits every model."""


@dataclass(frozen=True, eq=False)
class AveragedRate:
    """ScaleNet's rates averaged over training prompts: no dependence on the prompt (LDTTA 4.3).

    `table_KKM[K-1, k-1]` holds the rates [M] of step k of K.
    """

    table_KKM: Tensor
    trained_for: dict[str, Any]

    @property
    def max_steps(self) -> int:
        return self.table_KKM.shape[0]

    @property
    def uses_representation(self) -> Literal["no"]:
        return "no"

    def rates_BM(self, h_BH: Tensor | None, k: int, K: int, *, like: Tensor, projections: int) -> Tensor:
        return self.table_KKM[K - 1, k - 1].to(like).expand(like.shape[0], projections)

    def check(self, backbone: Backbone) -> None:
        _check_model(self.trained_for, backbone, "averaged rate")

    def save_pretrained(self, folder: str | Path) -> None:
        _save(Path(folder), {"kind": "averaged", "trained_for": self.trained_for}, {"table_KKM": self.table_KKM})


class ScaleNet(nn.Module):
    """Rates from the prompt's representation: eta_k * s(h(x), k, K) (LDTTA Eq. 13-16).

    A two-layer MLP over [normalised h(x), k/Kmax, K/Kmax]. Its output a is clamped from above and made
    positive by `s = exp(a) if a <= 0 else 1 + a + a^2/2` (Eq. 16). The last layer starts at zero, so that
    s = 1. Layer-wise: one output per adapted projection; step-wise: one for all.

    The base rate eta may differ by step. The paper has one (1e-2); the best first step is hundreds of
    times bolder than what any later step bears, so s = 1 should mean a schedule that already works.
    """

    def __init__(
        self,
        *,
        hidden_size: int,
        projections: int,
        granularity: Literal["layer", "step"] = "layer",
        base_rates: Sequence[float] = (1e-2,) * MAX_STEPS,
        mlp_size: int = 128,
        max_log_scale: float = 4.0,
        normalization: Literal["standardize", "layernorm", "none"] = "standardize",
        representation: Literal["step", "first"] = "step",
        trained_for: dict[str, Any] | None = None,
    ):
        super().__init__()
        self.config = {
            "hidden_size": hidden_size,
            "projections": projections,
            "granularity": granularity,
            "base_rates": list(base_rates),
            "mlp_size": mlp_size,
            "max_log_scale": max_log_scale,
            "normalization": normalization,
            "representation": representation,
            "trained_for": trained_for,
        }
        self.base_rates = tuple(base_rates)
        self.max_log_scale = max_log_scale
        self.normalization = normalization
        self.representation: Literal["step", "first"] = representation
        self.trained_for = trained_for
        self.projections = projections
        self.hidden = nn.Linear(2 * hidden_size + 2, mlp_size)
        self.out = nn.Linear(mlp_size, projections if granularity == "layer" else 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)
        self.mean_H: Tensor
        self.std_H: Tensor
        self.register_buffer("mean_H", torch.zeros(2 * hidden_size))
        self.register_buffer("std_H", torch.ones(2 * hidden_size))

    @property
    def max_steps(self) -> int:
        return len(self.base_rates)

    @property
    def uses_representation(self) -> Literal["step", "first"]:
        return self.representation

    def fit_normalization(self, h_NH: Tensor) -> None:
        """Take mean and deviation of each feature from training prompts [N,2D]."""
        self.mean_H.copy_(h_NH.mean(0))
        self.std_H.copy_(h_NH.std(0).clamp(min=1e-6))

    def _normalized(self, h_BH: Tensor) -> Tensor:
        if self.normalization == "standardize":
            # Clamped: a feature far outside the training prompts should not decide alone.
            return ((h_BH - self.mean_H) / self.std_H).clamp(-5, 5)
        if self.normalization == "layernorm":
            halves = h_BH.chunk(2, dim=1)
            return torch.cat([F.layer_norm(half, half.shape[1:]) for half in halves], dim=1)
        return h_BH

    def scales(self, h_BH: Tensor, k: int, K: int) -> Tensor:
        """Multipliers s [B,M] of step k of K (Eq. 13 and 16)."""
        # A diverged row has no h(x): its gradient is zero, but zero times NaN would spoil the whole batch's.
        h_BH = h_BH.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
        schedule_B2 = h_BH.new_tensor([k / self.max_steps, K / self.max_steps]).expand(h_BH.shape[0], 2)
        x_BI = torch.cat([self._normalized(h_BH), schedule_B2], dim=1)
        a = self.out(F.gelu(self.hidden(x_BI))).clamp(max=self.max_log_scale)
        s = torch.where(a <= 0, a.clamp(max=0).exp(), 1 + a + a.square() / 2)
        return s.expand(-1, self.projections)

    def rates_BM(self, h_BH: Tensor | None, k: int, K: int, *, like: Tensor, projections: int) -> Tensor:
        assert h_BH is not None
        return self.base_rates[k - 1] * self.scales(h_BH.to(self.out.weight.dtype), k, K)

    def check(self, backbone: Backbone) -> None:
        if self.trained_for is not None:
            _check_model(self.trained_for, backbone, "ScaleNet")
        if (self.config["hidden_size"], self.projections) != (backbone.hidden_size, len(backbone.projections)):
            raise ValueError(
                f"this ScaleNet is for hidden size {self.config['hidden_size']} and {self.projections} projections; "
                f"{backbone.name} has {backbone.hidden_size} and {len(backbone.projections)}."
            )

    def save_pretrained(self, folder: str | Path) -> None:
        _save(Path(folder), {"kind": "scalenet", **self.config}, self.state_dict())


def shipped() -> list[str]:
    """Names of the networks that come with the package."""
    return sorted(p.parent.name for p in NETWORKS.glob(f"*/{CONFIG_FILE}"))


def load_rate(spec: str | Path | float) -> Rate:
    """A rate from a number, a folder or a shipped name."""
    try:
        return FixedRate(float(spec))  # pyright: ignore[reportArgumentType]
    except (TypeError, ValueError) as error:
        if isinstance(spec, float | int):
            raise error
    folder = NETWORKS / spec if (NETWORKS / spec / CONFIG_FILE).exists() else Path(spec).expanduser()
    if not (folder / CONFIG_FILE).exists():
        if folder.is_dir():
            raise ValueError(f"{folder} holds no rate: {CONFIG_FILE} and {WEIGHTS_FILE} are expected there.")
        raise unknown("rate", str(spec), [*shipped(), "a number", "a folder"])
    return _load(folder)


def _load(folder: Path) -> Rate:
    try:
        config = json.loads((folder / CONFIG_FILE).read_text())
        state = load_file(folder / WEIGHTS_FILE)
        kind = config.pop("kind")
        if kind == "averaged":
            return AveragedRate(state["table_KKM"], config["trained_for"])
        network = ScaleNet(**config)
        network.load_state_dict(state)
        return network.eval().requires_grad_(False)
    except (OSError, SafetensorError, AttributeError, KeyError, TypeError, RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"the rate in {folder} is corrupt or incomplete ({reason}). "
            f"It needs an intact {CONFIG_FILE} and {WEIGHTS_FILE}; take them from a backup or train again."
        ) from error


def _save(folder: Path, config: dict[str, Any], state: dict[str, Tensor]) -> None:
    """Each file appears whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        save_file({key: t.contiguous().cpu() for key, t in state.items()}, Path(scratch) / WEIGHTS_FILE)
        (Path(scratch) / CONFIG_FILE).write_text(json.dumps(config, indent=1) + "\n")
        for name in (WEIGHTS_FILE, CONFIG_FILE):
            os.replace(Path(scratch) / name, folder / name)


def _check_model(trained_for: dict[str, Any], backbone: Backbone, what: str) -> None:
    if trained_for.get("projections") != [p.name for p in backbone.projections]:
        raise ValueError(
            f"this {what} was trained for {trained_for['name']} ({len(trained_for['projections'])} projections, first "
            f"{trained_for['projections'][0]}); the model at hand is {backbone.name} ({len(backbone.projections)} "
            f"projections, first {backbone.projections[0].name}). Use that model, or train one for this."
        )
    if trained_for["fingerprint"] != backbone.fingerprint():
        raise ValueError(
            f"this {what} was trained for {trained_for['name']} ({describe_short(trained_for)}); the model at hand is "
            f"{backbone.name} ({describe_short(describe(backbone))}). Use that model, or train one for this."
        )


def describe_short(description: dict[str, Any]) -> str:
    return (
        f"{description['model_type']}, hidden size {description['hidden_size']}, weights {description['fingerprint']}"
    )
