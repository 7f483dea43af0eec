"""Where an adapter starts: LoRA's own zero, or an adapter that was trained with PEFT (generator.py makes a third)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ephemera.backbone import Backbone
from ephemera.lora import LoraBatch
from ephemera.objective import TokenBatch


class Init(Protocol):
    """Gives each row of a batch its first adapter."""

    def __call__(self, backbone: Backbone, batch: TokenBatch, seeds: Sequence[int]) -> LoraBatch: ...


@dataclass(frozen=True)
class ZeroInit:
    """LoRA's own start (LDTTA 4.1): B = 0 and A = init_std * N(0, 1), drawn anew for each prompt.

    A depends on (seed, prompt ids) alone, not on the place in a batch, the padding or the device.
    """

    r: int = 4
    lora_alpha: float = 16.0
    init_std: float = 1e-2

    def __call__(self, backbone: Backbone, batch: TokenBatch, seeds: Sequence[int]) -> LoraBatch:
        projections = backbone.projections
        sizes = [self.r * p.in_features for p in projections]
        dtype = torch.float64 if backbone.dtype == torch.float64 else torch.float32
        generator = torch.Generator()
        ids, mask = batch.on_host.ids_BT, batch.on_host.mask_BT
        rows = []
        for ids_T, mask_T, seed in zip(ids, mask, seeds, strict=True):
            generator.manual_seed(_seed(seed, ids_T[mask_T]))
            rows.append(torch.randn(sum(sizes), generator=generator) * self.init_std)
        A_all = torch.stack(rows).to(backbone.device, dtype)
        return LoraBatch(
            projections,
            A=tuple(
                a.view(len(seeds), self.r, p.in_features)
                for a, p in zip(A_all.split(sizes, 1), projections, strict=True)
            ),
            B=tuple(A_all.new_zeros(len(seeds), p.out_features, self.r) for p in projections),
            r=self.r,
            lora_alpha=self.lora_alpha,
        )


def _seed(seed: int, ids_T: torch.Tensor) -> int:
    digest = hashlib.sha256(f"{seed}:".encode() + ids_T.numpy().tobytes()).digest()
    return int.from_bytes(digest[:8], "little", signed=True)


@dataclass(frozen=True, eq=False)
class PeftInit:
    """One adapter for every prompt: what PEFT trained and saved (a task LoRA), as a start or as it is."""

    factors: dict[str, tuple[Tensor, Tensor]]  # module: A [r,I], B [O,r]
    r: int
    lora_alpha: float
    target_modules: str | list[str]
    folder: Path

    @staticmethod
    def load(folder: str | Path) -> PeftInit:
        """Read adapter_config.json and adapter_model.safetensors; ValueError where they are not plain LoRA."""
        folder = Path(folder).expanduser()
        try:
            config = json.loads((folder / "adapter_config.json").read_text())
            state = load_file(folder / "adapter_model.safetensors")
            r, lora_alpha = int(config["r"]), float(config["lora_alpha"])
            special = [
                k
                for k in ("rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "modules_to_save")
                if config.get(k)
            ]
            if (
                str(config.get("init_lora_weights", True))
                .lower()
                .startswith(("pissa", "olora", "loftq", "corda", "eva"))
            ):
                special.append(f"init_lora_weights={config['init_lora_weights']}")
        except (AttributeError, OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{folder} holds no readable PEFT adapter ({str(error).splitlines()[0]}); adapter_config.json and "
                "adapter_model.safetensors of a LoRA are expected."
            ) from error
        if config.get("peft_type") != "LORA" or special:
            raise ValueError(
                f"the adapter in {folder} is not a plain LoRA ({', '.join(special) or config.get('peft_type')}); only "
                "one rank, one lora_alpha and no further trained modules are read."
            )
        others = [key for key in state if not key.endswith((".lora_A.weight", ".lora_B.weight"))]
        if others:
            raise ValueError(
                f"the adapter in {folder} holds more than LoRA factors ({others[0]}, ...); only lora_A and lora_B are read."
            )
        factors = {}
        for key, A_RI in state.items():
            if key.endswith(".lora_A.weight"):
                module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
                B_OR = state.get(key.replace("lora_A", "lora_B"))
                if B_OR is None or A_RI.shape[0] != r or B_OR.shape[1] != r:
                    raise ValueError(
                        f"the adapter in {folder} has no whole pair of rank {r} (its config's r) for {module}."
                    )
                factors[module] = (A_RI.float(), B_OR.float())
        # By the modules that it holds: target_modules may be a pattern, or full paths
        names = sorted({module.rpartition(".")[2] for module in factors})
        usual = set(names) <= {"q_proj", "v_proj"}
        return PeftInit(factors, r, float(lora_alpha), "qv" if usual else names, folder)

    def check(self, backbone: Backbone) -> None:
        """ValueError where the adapter holds modules that this model, as loaded, does not adapt."""
        shapes = {p.module: (p.in_features, p.out_features) for p in backbone.projections if p.rows is None}
        for module, (A_RI, B_OR) in self.factors.items():
            if shapes.get(module) != (A_RI.shape[1], B_OR.shape[0]):
                raise ValueError(
                    f"the adapter in {self.folder} has {module} ({A_RI.shape[1]} to {B_OR.shape[0]}); {backbone.name} has "
                    f"{'it as ' + str(shapes[module]) if module in shapes else 'no such adapted module'}. Use the model "
                    f"it was trained for, with target_modules={self.target_modules!r}."
                )

    def __call__(self, backbone: Backbone, batch: TokenBatch, seeds: Sequence[int]) -> LoraBatch:
        A, B = [], []
        for p in backbone.projections:
            zeros = torch.zeros(self.r, p.in_features), torch.zeros(p.out_features, self.r)
            A_RI, B_OR = self.factors.get(p.module, zeros)
            A.append(A_RI.to(backbone.device).expand(len(seeds), -1, -1))
            B.append(B_OR.to(backbone.device).expand(len(seeds), -1, -1))
        return LoraBatch(backbone.projections, tuple(A), tuple(B), r=self.r, lora_alpha=self.lora_alpha)
