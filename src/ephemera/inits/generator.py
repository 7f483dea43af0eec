"""LoraGenerator: a prompt's adapter from its own last hidden state, in one pass (TaskWeaver 4.2)."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ephemera import artifact
from ephemera.batch import TokenBatch
from ephemera.gate import load_gate
from ephemera.hub import OnHub, card_of
from ephemera.inits.protocol import Init
from ephemera.llm.cached_layers import CachedLayers
from ephemera.llm.frozen_lm import FrozenLM
from ephemera.lora import LoraBatch, Projection
from ephemera.made_for import MadeFor, Reach, checked_reach, read_made_for

NAME = "generator"  # of its files
RETIRED = {"source": "last", "head_rank": None}  # in files of earlier versions


class Module:
    """One kind of adapted module: the same shapes in each of `layers`; `places` among all projections."""

    def __init__(self, kind: str, in_features: int, out_features: int):
        self.kind = kind
        self.in_features = in_features
        self.out_features = out_features
        self.layers: list[int] = []
        self.places: list[int] = []


def modules_of(projections: Sequence[Projection]) -> list[Module]:
    """Projections of one kind and shape share a head (TaskWeaver 4.2); a layer's second such one has its own."""
    found: dict[tuple[str, int, int, int], Module] = {}
    seen: Counter[tuple[str, int, int, int]] = Counter()
    for place, p in enumerate(projections):
        shape = (p.kind, p.in_features, p.out_features)
        module = found.setdefault((*shape, seen[*shape, p.layer]), Module(*shape))
        seen[*shape, p.layer] += 1
        module.layers.append(p.layer)
        module.places.append(place)
    return list(found.values())


class LoraGenerator(OnHub, nn.Module, Init):
    """Adapters of all projections from h, the frozen model's reading of the prompt (TaskWeaver Eq. 1-3).

        c[l,m,k] = proj(h) + e_layer[l] + e_module[m] + e_matrix[k]        k in {A, B}
        z = LayerNorm(W2 GELU(W1 c))
        A[l,m] = W[m,A] z + b[m,A]      B[l,m] = W[m,B] z + b[m,B]

    Head weights start at zero, A's bias as LoRA's A and B's bias at zero ("Bias-HyperInit"): the first adapter is
    an exact no-op. h is the last layer's state of the last prompt token. It is standardised by training prompts' mean
    and deviation, because the part that tells prompts apart is small beside the part that all prompts share.
    """

    hub_kind: ClassVar[str] = NAME
    label = "generated"

    def __init__(
        self,
        *,
        projections: Sequence[Projection],
        state_size: int,
        hidden_size: int = 1024,
        r: int = 2,
        lora_alpha: float = 8.0,
        init_std: float = 1e-2,
        target_modules: str | list[str] = "qv",
        trained_for: dict[str, Any] | None = None,
        reach: Reach = "all",
        made_for: MadeFor | None = None,
    ):
        super().__init__()
        modules = modules_of(projections)
        self.config = {
            "state_size": state_size,
            "hidden_size": hidden_size,
            "r": r,
            "lora_alpha": lora_alpha,
            "init_std": init_std,
            "target_modules": target_modules,
            "projections": [[p.kind, p.layer, p.in_features, p.out_features] for p in projections],
            "trained_for": trained_for,
            "reach": checked_reach(reach),
        }
        self.reach: Reach = reach
        self.made_for = made_for
        self.modules_of_heads = modules
        self.count = len(projections)
        self.r, self.lora_alpha = r, lora_alpha
        self.target_modules = target_modules
        self.trained_for = trained_for
        self.proj = nn.Linear(state_size, hidden_size)
        self.layer = nn.Embedding(1 + max(p.layer for p in projections), hidden_size)
        self.module = nn.Embedding(len(modules), hidden_size)
        self.matrix = nn.Embedding(2, hidden_size)
        for embedding in (self.layer, self.module, self.matrix):
            nn.init.normal_(embedding.weight, std=0.5)  # about as large as proj(h)
        self.first = nn.Linear(hidden_size, hidden_size)
        self.second = nn.Linear(hidden_size, hidden_size)
        self.norm = nn.LayerNorm(hidden_size)
        self.A_heads = nn.ModuleList(_head(hidden_size, r * m.in_features) for m in modules)
        self.B_heads = nn.ModuleList(_head(hidden_size, r * m.out_features) for m in modules)
        for head in self.A_heads:
            assert isinstance(head, nn.Sequential)
            nn.init.normal_(head[-1].get_parameter("bias"), std=init_std)
        self.mean_H: Tensor
        self.std_H: Tensor
        self.register_buffer("mean_H", torch.zeros(state_size))
        self.register_buffer("std_H", torch.ones(state_size))

    def fit_normalization(self, h_NH: Tensor) -> None:
        """Take mean and deviation of each feature from training prompts' h [N,H]."""
        self.mean_H.copy_(h_NH.mean(0))
        self.std_H.copy_(h_NH.std(0, correction=int(len(h_NH) > 1)).clamp(min=1e-6))

    def state_BH(self, backbone: FrozenLM, batch: TokenBatch) -> Tensor:
        """h [B,H] in float32 from a forward over the prompt alone, without adapters or the vocabulary head."""
        with torch.no_grad():
            hidden_BTD = backbone.forward(batch).hidden_BTD
        return last_state(hidden_BTD, batch)

    def forward(self, h_BH: Tensor) -> list[tuple[Tensor, Tensor]]:
        """(A [B,L,R,I], B [B,L,O,R]) of each module over its layers, from h [B,H]."""
        h_BH = ((h_BH - self.mean_H) / self.std_H).clamp(-5, 5).to(self.proj.weight.dtype)
        # W1 c is a sum of four terms: the sum is taken after W1, which then sees B + L + modules + 2 rows only.
        W1 = self.first.weight
        prompt_BH = self.first(self.proj(h_BH))
        e_layer_LH, e_module_MH, e_matrix_2H = (e.weight @ W1.T for e in (self.layer, self.module, self.matrix))
        c_BLMKH = prompt_BH[:, None, None, None] + e_layer_LH[:, None, None] + e_module_MH[:, None] + e_matrix_2H
        z_BLMKH = self.norm(self.second(F.gelu(c_BLMKH)))
        wide = torch.promote_types(z_BLMKH.dtype, torch.float32)  # adapters are never bfloat16
        made = []
        for m, module in enumerate(self.modules_of_heads):
            z_BLKH = z_BLMKH[:, :, m] if len(module.layers) == z_BLMKH.shape[1] else z_BLMKH[:, module.layers, m]
            A = self.A_heads[m](z_BLKH[:, :, 0]).to(wide).unflatten(-1, (self.r, module.in_features))
            B = self.B_heads[m](z_BLKH[:, :, 1]).to(wide).unflatten(-1, (module.out_features, self.r))
            made.append((A, B))
        return made

    @classmethod
    def open(cls, spec: str | Path, **settings: Any) -> LoraGenerator:
        return load_generator(spec)  # the last kind to be asked: ValueError names what is known

    @classmethod
    def from_pretrained(cls, spec: str | Path) -> LoraGenerator:
        """From a folder, a shipped name, or `user/repo[@revision]` of the hub."""
        return load_generator(spec)

    @property
    def reads_prompts(self) -> bool:
        return True

    @property
    def lora_settings(self) -> dict[str, Any]:
        return {"r": self.r, "lora_alpha": self.lora_alpha, "target_modules": self.target_modules}

    def placed(self, backbone: FrozenLM) -> LoraGenerator:
        """On the model's device; beside a bfloat16 model, if it is not in training, it computes in that."""
        self.check(backbone)
        self.to(backbone.device)
        trained = any(p.requires_grad for p in self.parameters())
        return self.in_dtype(backbone.dtype) if backbone.dtype == torch.bfloat16 and not trained else self

    def lora(self, projections: tuple[Projection, ...], h_BH: Tensor) -> LoraBatch:
        """The adapters of a batch, as the loop and the evaluator take them."""
        A: list[Tensor] = [h_BH] * self.count
        B: list[Tensor] = [h_BH] * self.count
        for module, (A_BLRI, B_BLOR) in zip(self.modules_of_heads, self(h_BH), strict=True):
            for place, A_BRI, B_BOR in zip(module.places, A_BLRI.unbind(1), B_BLOR.unbind(1), strict=True):
                A[place], B[place] = A_BRI, B_BOR
        return LoraBatch.of(projections, tuple(A), tuple(B), r=self.r, lora_alpha=self.lora_alpha)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As an init: (backbone, batch, seeds) -> LoraBatch. With h alone: the module's forward."""
        if args and isinstance(args[0], FrozenLM):
            return self._init(*args, **kwargs)
        return super().__call__(*args, **kwargs)

    def _init(self, backbone: FrozenLM, batch: TokenBatch, seeds: Sequence[int]) -> LoraBatch:
        return self.lora(backbone.projections, self.state_BH(backbone, batch))

    def after(self, backbone: FrozenLM, batch: TokenBatch, reading: CachedLayers) -> LoraBatch:
        """The adapters from the base model's own reading of the prompts, which reach `answer` goes on from."""
        return self.lora(backbone.projections, last_state(reading.hidden_BTD, batch))

    def in_dtype(self, dtype: torch.dtype) -> LoraGenerator:
        """One that computes in `dtype`, for inference beside a model in it; adapters are float32 all the same.

        h is standardised in float32 first: a feature's mean can be large beside its deviation.
        """
        made = copy.deepcopy(self).to(dtype)
        made.mean_H, made.std_H = self.mean_H, self.std_H
        return made

    def check(self, backbone: FrozenLM) -> None:
        """ValueError if it was made for another model, or for other modules of it."""
        shapes = [[p.kind, p.layer, p.in_features, p.out_features] for p in backbone.projections]
        same = self.trained_for is None or self.trained_for["fingerprint"] == backbone.fingerprint()
        if shapes != self.config["projections"] and same:
            raise ValueError(
                f"this generator makes adapters for {self.count} projections ({self.target_modules}); {backbone.name} has "
                f"{len(shapes)}, of other kinds or shapes. Load the model with target_modules={self.target_modules!r}, "
                "or train a generator for it."
            )
        if self.trained_for is not None:
            artifact.check_model(self.trained_for, backbone, NAME)

    def save_pretrained(self, folder: str | Path, *, dtype: torch.dtype | None = None) -> None:
        """Write generator.json and generator.safetensors, and its gate's; `dtype=torch.bfloat16` halves the file.

        The mean and deviation of h stay float32: a feature's mean can be large beside its deviation.
        """
        kept = {"mean_H", "std_H"}
        state = {key: t if dtype is None or key in kept else t.to(dtype) for key, t in self.state_dict().items()}
        made_for = None if self.made_for is None else self.made_for.describe()
        artifact.save(Path(folder), NAME, {**self.config, "made_for": made_for}, state)
        if self.gate is not None:
            self.gate.save(folder)


def last_state(hidden_BTD: Tensor, batch: TokenBatch) -> Tensor:
    """h [B,D] in float32: each row's last real token's state, on either padding side, or the only one that was kept."""
    rows_B = torch.arange(hidden_BTD.shape[0], device=hidden_BTD.device)
    places_BT = torch.arange(hidden_BTD.shape[1], device=hidden_BTD.device) * batch.mask_BT
    return hidden_BTD[rows_B, places_BT.argmax(1)].float()


def _head(hidden_size: int, out: int) -> nn.Sequential:
    """A linear head that starts at zero; a Sequential only for the names in saved weights."""
    last = nn.Linear(hidden_size, out)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(last)


def load_generator(spec: str | Path) -> LoraGenerator:
    """A generator from a folder, a shipped name or a hub id (`user/repo[@revision]`)."""
    folder = artifact.find(spec, NAME, also=["a folder", "a hub id (user/repo)"])
    generator = artifact.load(folder, NAME, partial(_make, folder))
    generator.card = card_of(folder)
    generator.gate = load_gate(folder)
    return generator


def _make(folder: Path, config: dict[str, Any], state: dict[str, Tensor]) -> LoraGenerator:
    config = artifact.without_retired(config, RETIRED)
    made_for = config.get("made_for")
    if made_for is not None or "made_for" not in config:  # files from before there was a record say it in their card
        config["made_for"] = replace(read_made_for(made_for, folder), steps=0)
    projections = [Projection(f"{i}", *shape) for i, shape in enumerate(config.pop("projections"))]
    trained_for, targets = config.get("trained_for"), config.get("target_modules")
    if trained_for is not None and not {"name", "fingerprint", "projections"} <= set(trained_for):
        raise ValueError("trained_for describes no model")
    if not isinstance(targets, str | list):
        raise ValueError(f"target_modules is {targets!r}")
    config["lora_alpha"] = float(config["lora_alpha"])
    generator = LoraGenerator(projections=projections, **config)
    generator.load_state_dict({key: t.float() for key, t in state.items()})
    return generator.eval().requires_grad_(False)
