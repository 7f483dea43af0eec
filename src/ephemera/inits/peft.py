"""An adapter that PEFT trained and saved, as the start of every prompt's."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ephemera.batch import TokenBatch
from ephemera.inits.peft_targets import PeftTargets
from ephemera.inits.protocol import Init
from ephemera.llm.frozen_lm import FrozenLM
from ephemera.llm.projections import ALL_LINEAR
from ephemera.llm.weights import check_finite, listed
from ephemera.lora import LoraBatch

WEIGHTS = "adapter_model.safetensors"
NEUTRAL = (None, False)
# Keys of PEFT's configuration that a plain LoRA may set: how it was trained, what it is called, and which modules it is on
HARMLESS = frozenset(
    {
        *("peft_type", "task_type", "r", "lora_alpha", "target_modules", "exclude_modules"),
        *("layers_to_transform", "layers_pattern", "init_lora_weights", "base_model_name_or_path", "revision"),
        *("auto_mapping", "peft_version", "inference_mode", "lora_dropout", "fan_in_fan_out", "runtime_config"),
        *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "megatron_core", "qalora_group_size"),
        *("ensure_weight_tying",),
    }
)
# Of the others, what stands for "not used" besides null and false
UNUSED: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    **dict.fromkeys(("rank_pattern", "alpha_pattern"), ({},)),
    **dict.fromkeys(("modules_to_save", "target_parameters", "trainable_token_indices", "layer_replication"), ([], {})),
}
PLAIN_STARTS = (None, True, False, "true", "false", "gaussian", "orthogonal")  # others change the model's own weights


def not_plain(config: Mapping[str, Any]) -> list[str]:
    """Settings of an adapter_config.json that make it more than B A beside the frozen weights, on every token.

    A key that is not known counts as one, unless it is off: a later PEFT may have put a new method behind it.
    """
    found = [] if config.get("peft_type") == "LORA" else [f"peft_type={config.get('peft_type')}"]
    for key, value in config.items():
        if key not in HARMLESS and value not in (*NEUTRAL, *UNUSED.get(key, ())):
            found.append(key)
    start = config.get("init_lora_weights", True)
    if (start.lower() if isinstance(start, str) else start) not in PLAIN_STARTS:
        found.append(f"init_lora_weights={start}")
    return found


@dataclass(frozen=True, eq=False)
class PeftInit(Init):
    """One adapter for every prompt: what PEFT trained and saved (a task LoRA), as a start or as it is."""

    factors: dict[str, tuple[Tensor, Tensor]]  # module: A [r,I], B [O,r]
    r: int
    lora_alpha: float
    target_modules: str | list[str]
    folder: Path
    selected: PeftTargets | None = None  # which modules PEFT puts it on; None: those of `factors`

    label = "peft"

    @classmethod
    def open(cls, spec: str | Path, **settings: Any) -> PeftInit | None:
        return cls.load(spec) if (Path(spec).expanduser() / "adapter_config.json").exists() else None

    @property
    def lora_settings(self) -> dict[str, Any]:
        return {"r": self.r, "lora_alpha": self.lora_alpha, "target_modules": self.target_modules}

    @staticmethod
    def load(folder: str | Path) -> PeftInit:
        """Read adapter_config.json and adapter_model.safetensors; ValueError where they are not plain, whole LoRA.

        A setting that changes what the adapter computes is refused by its name, and so is one that is not known.
        """
        folder = Path(folder).expanduser()
        try:
            config = json.loads((folder / "adapter_config.json").read_text())
            special = not_plain(config)
            state = {} if special else load_file(folder / WEIGHTS)
            r, lora_alpha = int(config.get("r", 8)), float(config.get("lora_alpha", 8))  # PEFT's own defaults
            selected = None if special else PeftTargets.of(config)
        except (AttributeError, OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            pickled = (folder / "adapter_model.bin").exists() and not (folder / WEIGHTS).exists()
            fix = " Save its adapter_model.bin again as safetensors, with PEFT's save_pretrained." if pickled else ""
            raise ValueError(
                f"{folder} holds no readable PEFT adapter ({str(error).splitlines()[0]}); adapter_config.json and "
                f"{WEIGHTS} of a LoRA are expected.{fix}"
            ) from error
        if special:
            begins = " alora_invocation_tokens: PEFT applies it from those tokens on, not to the whole prompt."
            raise ValueError(
                f"the adapter in {folder} is not a plain LoRA ({', '.join(special)}); only one rank, one lora_alpha and "
                f"no further trained modules are read.{begins if 'alora_invocation_tokens' in special else ''} Merge it "
                "into its model with PEFT (merge_and_unload) if PEFT can, or train a plain LoRA."
            )
        if r < 1 or not math.isfinite(lora_alpha):
            raise ValueError(f"the adapter in {folder} has r={r} and lora_alpha={lora_alpha}; r must be 1 or more.")
        factors = _factors(state, r, folder)
        check_finite(f"the adapter in {folder}", state.items())
        # By the modules that it holds: target_modules may be a pattern, or full paths
        names = sorted({module.rpartition(".")[2] for module in factors})
        usual = set(names) <= {"q_proj", "v_proj"}
        return PeftInit(factors, r, lora_alpha, "qv" if usual else names, folder, selected)

    def check(self, backbone: FrozenLM) -> None:
        """ValueError where the adapter holds modules that this model, as loaded, does not adapt, or lacks some."""
        shapes = {p.module: (p.in_features, p.out_features) for p in backbone.projections if p.rows is None}
        for module, (A_RI, B_OR) in self.factors.items():
            if shapes.get(module) != (A_RI.shape[1], B_OR.shape[0]):
                raise ValueError(
                    f"the adapter in {self.folder} has {module} ({A_RI.shape[1]} to {B_OR.shape[0]}); {backbone.name} has "
                    f"{'it as ' + str(shapes[module]) if module in shapes else 'no such adapted module'}. Use the model "
                    f"it was trained for, with target_modules={self.target_modules!r}."
                )
        chosen = self._chosen(backbone)
        missing = [module for module in chosen if module not in self.factors]
        extra = [module for module in self.factors if chosen and module not in chosen]
        if missing or extra:
            what = f"lacks {listed(missing)}" if missing else f"holds {listed(extra)} besides"
            raise ValueError(
                f"the adapter in {self.folder} {what}: its adapter_config.json (target_modules and its like) names other "
                f"modules of {backbone.name} than {WEIGHTS} has. Likely one of the two files is another adapter's or "
                "incomplete; copy both again."
            )

    def _chosen(self, backbone: FrozenLM) -> list[str]:
        """The modules of the model that PEFT would put the adapter on; empty if its configuration does not say."""
        if self.selected is None:
            return []
        linear = [
            name for name, m in backbone.model.named_modules() if isinstance(m, nn.Linear) and m is not backbone.head
        ]
        if str(self.selected.target_modules).lower() == ALL_LINEAR:
            return linear
        return [name for name in linear if self.selected.selects(name)]

    def __call__(self, backbone: FrozenLM, batch: TokenBatch, seeds: Sequence[int]) -> LoraBatch:
        A, B = [], []
        for p in backbone.projections:
            zeros = torch.zeros(self.r, p.in_features), torch.zeros(p.out_features, self.r)
            A_RI, B_OR = self.factors.get(p.module, zeros)
            A.append(A_RI.to(backbone.device).expand(len(seeds), -1, -1))
            B.append(B_OR.to(backbone.device).expand(len(seeds), -1, -1))
        return LoraBatch.of(backbone.projections, tuple(A), tuple(B), r=self.r, lora_alpha=self.lora_alpha)


def _factors(state: Mapping[str, Tensor], r: int, folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """{module: (A, B)} in float32; ValueError for any tensor that is not half of a whole pair of rank r."""
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        module, dot, matrix = key.removeprefix("base_model.model.").rpartition(".lora_")
        if not dot or matrix not in ("A.weight", "B.weight"):
            raise ValueError(
                f"the adapter in {folder} holds more than LoRA factors ({key}, ...); only lora_A and lora_B are read."
            )
        pairs.setdefault(module, {})[matrix[0]] = tensor
    if not pairs:
        raise ValueError(f"the adapter in {folder} is empty: {WEIGHTS} holds no tensors. Copy it again.")
    for module, pair in pairs.items():
        A_RI, B_OR = pair.get("A"), pair.get("B")
        if A_RI is None or B_OR is None or {A_RI.ndim, B_OR.ndim} != {2} or not A_RI.shape[0] == B_OR.shape[1] == r:
            raise ValueError(f"the adapter in {folder} has no whole pair of rank {r} (its config's r) for {module}.")
    return {module: (pair["A"].float(), pair["B"].float()) for module, pair in pairs.items()}
