"""The tuned lens: what the model would say after its last layer, read off an earlier one (Belrose et al., 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ephemera import artifact
from ephemera.hub import OnHub, card_of
from ephemera.llm.frozen_lm import FrozenLM

NAME = "lens"  # of its files


class Lens(OnHub, nn.Module):
    """One affine map per exit layer E: h -> h + W_E (h / scale_E) + b_E; the model's own final norm and head follow.

    Maps start at zero, which is the untrained "logit lens". E counts layers: the state after E of them. `scale_E` is each
    feature's size over training prompts: a few features of a residual stream are thousands of times the others.
    """

    hub_kind: ClassVar[str] = NAME

    def __init__(self, *, hidden_size: int, exit_layers: Sequence[int], trained_for: dict[str, Any] | None = None):
        super().__init__()
        self.config = {"hidden_size": hidden_size, "exit_layers": list(exit_layers), "trained_for": trained_for}
        self.exit_layers = tuple(exit_layers)
        self.trained_for = trained_for
        self.weight_EDD = nn.Parameter(torch.zeros(len(exit_layers), hidden_size, hidden_size))
        self.bias_ED = nn.Parameter(torch.zeros(len(exit_layers), hidden_size))
        self.scale_ED: Tensor
        self.register_buffer("scale_ED", torch.ones(len(exit_layers), hidden_size))

    def forward(self, h: Tensor, exit_layer: int) -> Tensor:
        """The state [...,D] after `exit_layer` layers, moved to where the last layer would leave it."""
        e = self.exit_layers.index(exit_layer)
        weight_DD, bias_D, scale_D = (t[e].to(h) for t in (self.weight_EDD, self.bias_ED, self.scale_ED))
        return h + F.linear(h / scale_D, weight_DD, bias_D)

    def only(self, exit_layer: int) -> Lens:
        """The map of one exit layer, as a lens of its own."""
        if exit_layer not in self.exit_layers:
            raise ValueError(
                f"this lens reads after layers {', '.join(map(str, self.exit_layers))}, not after {exit_layer}; take one "
                f"of those, or train one: ephemera train lens --set exit_layers=[{exit_layer}]."
            )
        e = self.exit_layers.index(exit_layer)
        lens = Lens(hidden_size=self.weight_EDD.shape[1], exit_layers=[exit_layer], trained_for=self.trained_for)
        lens.load_state_dict({key: t[e : e + 1] for key, t in self.state_dict().items()})
        return lens.to(self.weight_EDD.device).eval().requires_grad_(False)

    def check(self, backbone: FrozenLM) -> None:
        """ValueError if it was made for another model."""
        if self.trained_for is not None and self.trained_for["fingerprint"] != backbone.fingerprint():
            raise ValueError(
                f"this lens was trained for {self.trained_for['name']} (weights {self.trained_for['fingerprint']}); the "
                f"model at hand is {backbone.name} (weights {backbone.fingerprint()}). Use that model, or train one for this."
            )
        if self.trained_for is not None:
            artifact.warn_of_quantization(self.trained_for, backbone, "lens")
        if self.weight_EDD.shape[1] != backbone.hidden_size:
            raise ValueError(
                f"this lens is for hidden size {self.weight_EDD.shape[1]}; {backbone.name} has {backbone.hidden_size}."
            )

    @classmethod
    def from_pretrained(cls, spec: str | Path) -> Lens:
        """From a folder, a shipped name, or `user/repo[@revision]` of the hub."""
        return load_lens(spec)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write lens.json and lens.safetensors; the maps as bfloat16, which halves the file."""
        state = {k: t if k == "scale_ED" else t.to(torch.bfloat16) for k, t in self.state_dict().items()}
        artifact.save(Path(folder), NAME, self.config, state)


def load_lens(spec: str | Path) -> Lens:
    """A lens from a folder, a shipped name or a hub id (`user/repo[@revision]`)."""
    folder = artifact.find(spec, NAME, also=["a folder", "a hub id (user/repo)"])
    lens = artifact.load(folder, NAME, _make)
    lens.card = card_of(folder)
    return lens


def _make(config: dict[str, Any], state: dict[str, Tensor]) -> Lens:
    lens = Lens(**config)
    lens.load_state_dict({key: t.float() for key, t in state.items()})
    return lens.eval().requires_grad_(False)
