"""How far each step moves each projection: fixed, predicted from the prompt (ScaleNet), or its average."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ephemera import artifact
from ephemera.backbone import Backbone
from ephemera.readout import PROMPT, Objective, load_objective

MAX_STEPS = 5  # LDTTA 4.1
# Where the best uniform rate is looked for: from the paper's 1e-2 to well past what diverges
UNIFORM_GRID = (0.01, 0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.5, 3.0, 6.0, 9.0, 13.0, 18.0, 27.0, 40.0, 60.0)
NAME = "rate"  # of its files
# Short names: the paper's gradient, and the cheaper one (docs/performance.md)
PRESETS = {"full": "scalenet-nq-open", "fast": "scalenet-fast"}


Normalize = Literal["none", "prompt", "projection"]


class Rate(Protocol):
    """A rule for steps: how far, along which gradient.

    `uses_representation` says whether it wants h(x), and from which step. `objective` is what the gradient is of.
    `normalize`: the gradient as it is (the paper's), or scaled to length one, over a prompt's projections together or
    each projection by itself; rates are then lengths.
    """

    @property
    def max_steps(self) -> int | None: ...

    @property
    def uses_representation(self) -> Literal["no", "step", "first"]: ...

    @property
    def objective(self) -> Objective: ...

    @property
    def base_rate(self) -> float:
        """The rate of a whole first step: `stop_below` is a share of it."""
        ...

    @property
    def normalize(self) -> Normalize: ...

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
    objective: Objective = PROMPT
    normalize: Normalize = "none"

    def __post_init__(self):
        if not 0 <= self.rate < float("inf"):
            raise ValueError(f"a rate is a number >= 0; got {self.rate}.")

    @property
    def max_steps(self) -> None:
        return None

    @property
    def base_rate(self) -> float:
        return self.rate

    @property
    def uses_representation(self) -> Literal["no"]:
        return "no"

    def rates_BM(self, h_BH: Tensor | None, k: int, K: int, *, like: Tensor, projections: int) -> Tensor:
        return like.new_full((like.shape[0], projections), self.rate)

    def check(self, backbone: Backbone) -> None:
        """Fits every model; its objective may not."""
        self.objective.check(backbone)


@dataclass(frozen=True, eq=False)
class AveragedRate:
    """ScaleNet's rates averaged over training prompts: no dependence on the prompt (LDTTA 4.3).

    `table_KKM[K-1, k-1]` holds the rates [M] of step k of K.
    """

    table_KKM: Tensor
    trained_for: dict[str, Any]
    objective: Objective = PROMPT
    normalize: Normalize = "none"

    @property
    def max_steps(self) -> int:
        return self.table_KKM.shape[0]

    @property
    def base_rate(self) -> float:
        return self.table_KKM[:, 0].max().item()

    @property
    def uses_representation(self) -> Literal["no"]:
        return "no"

    def rates_BM(self, h_BH: Tensor | None, k: int, K: int, *, like: Tensor, projections: int) -> Tensor:
        if like.device not in self._tables:  # once: a copy from the host waits for the device
            self._tables[like.device] = self.table_KKM.to(like.device)
        return self._tables[like.device][K - 1, k - 1].to(like.dtype).expand(like.shape[0], projections)

    @cached_property
    def _tables(self) -> dict[torch.device, Tensor]:
        return {}

    def check(self, backbone: Backbone) -> None:
        artifact.check_model(self.trained_for, backbone, "averaged rate")
        self.objective.check(backbone)

    def save_pretrained(self, folder: str | Path, *, lens: str = ".") -> None:
        """`lens`: where its lens lies, from `folder`; only there (".") is it written too."""
        config = {
            "kind": "averaged",
            "trained_for": self.trained_for,
            "objective": self.objective.describe(lens),
            "normalize": self.normalize,
        }
        artifact.save(Path(folder), NAME, config, {"table_KKM": self.table_KKM})
        if lens == ".":
            self.objective.save_lens(folder)


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
        objective: Objective = PROMPT,
        normalize: Normalize = "none",
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
            "normalize": normalize,
        }
        self.objective = objective
        self.normalize: Normalize = normalize
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
    def base_rate(self) -> float:
        return self.base_rates[0]

    @property
    def uses_representation(self) -> Literal["step", "first"]:
        return self.representation

    def fit_normalization(self, h_NH: Tensor) -> None:
        """Take mean and deviation of each feature from training prompts [N,2D]."""
        self.mean_H.copy_(h_NH.mean(0))
        self.std_H.copy_(h_NH.std(0, correction=int(len(h_NH) > 1)).clamp(min=1e-6))

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
        # Filled where they are: numbers from the host would have it wait for the device
        schedule_B2 = torch.stack([h_BH.new_full(h_BH.shape[:1], n / self.max_steps) for n in (k, K)], 1)
        x_BI = torch.cat([self._normalized(h_BH), schedule_B2], dim=1)
        a = self.out(F.gelu(self.hidden(x_BI))).clamp(max=self.max_log_scale)
        s = torch.where(a <= 0, a.clamp(max=0).exp(), 1 + a + a.square() / 2)
        return s.expand(-1, self.projections)

    def rates_BM(self, h_BH: Tensor | None, k: int, K: int, *, like: Tensor, projections: int) -> Tensor:
        assert h_BH is not None
        return self.base_rates[k - 1] * self.scales(h_BH.to(self.out.weight.dtype), k, K)

    def check(self, backbone: Backbone) -> None:
        if self.trained_for is not None:
            artifact.check_model(self.trained_for, backbone, "ScaleNet")
        self.objective.check(backbone)
        if (self.config["hidden_size"], self.projections) != (backbone.hidden_size, len(backbone.projections)):
            raise ValueError(
                f"this ScaleNet is for hidden size {self.config['hidden_size']} and {self.projections} projections; "
                f"{backbone.name} has {backbone.hidden_size} and {len(backbone.projections)}."
            )

    def save_pretrained(self, folder: str | Path) -> None:
        config = {"kind": "scalenet", **self.config, "objective": self.objective.describe()}
        artifact.save(Path(folder), NAME, config, self.state_dict())
        self.objective.save_lens(folder)

    def pruned(self, keep_M: Tensor) -> ScaleNet:
        """The network of some projections alone: the others have left the loop."""
        assert self.config["granularity"] == "layer"
        assert self.trained_for is not None
        names = [name for name, keep in zip(self.trained_for["projections"], keep_M.tolist(), strict=True) if keep]
        config = {**self.config, "projections": len(names), "trained_for": {**self.trained_for, "projections": names}}
        network = ScaleNet(**config, objective=self.objective)
        state = self.state_dict()
        network.load_state_dict({k: t[keep_M] if k.startswith("out.") else t for k, t in state.items()})
        return network.to(self.out.weight.device)


def adapted_by(rate: Rate | None) -> dict[str, Any]:
    """The projections that a trained rate was made for, as `load_backbone` takes them; none where it fits any."""
    if not isinstance(rate, ScaleNet | AveragedRate) or rate.trained_for is None:
        return {}
    made = rate.trained_for
    # Files from before there was a choice
    settings = {"target_modules": made.get("target_modules", "qv"), "layers": made.get("layers", "all")}
    return {**settings, "only": made["projections"]}


def place_rate(rate: Rate, backbone: Backbone) -> Rate:
    """The rate, checked, on the model's device, and the lens of its objective with it."""
    rate.check(backbone)
    for module in (rate, rate.objective.lens):
        if isinstance(module, nn.Module):
            module.to(backbone.device)
    return rate


def load_rate(spec: str | Path | float) -> Rate:
    """A rate from a number, a folder, a shipped name or a preset's ("full", "fast")."""
    spec = PRESETS.get(str(spec), spec)
    try:
        return FixedRate(float(spec))  # pyright: ignore[reportArgumentType]
    except (TypeError, ValueError) as error:
        if isinstance(spec, float | int):
            raise error
    folder = artifact.find(spec, NAME, also=["a number", "a folder"])
    return artifact.load(folder, NAME, lambda config, state: _make(config, state, folder))


def _make(config: dict[str, Any], state: dict[str, Tensor], folder: Path) -> Rate:
    kind = config.pop("kind")
    config["objective"] = load_objective(
        config.get("objective"), folder
    )  # files from before there was a choice lack it
    if kind == "averaged":
        return AveragedRate(state["table_KKM"], **config)
    network = ScaleNet(**config)
    network.load_state_dict(state)
    return network.eval().requires_grad_(False)
