"""What a step's gradient is of: the prompt's NLL at the top, or read off an earlier layer; over which words."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ephemera import artifact
from ephemera.batch import ScoredTokens, TokenBatch
from ephemera.early_exit.lens import Lens, load_lens
from ephemera.llm.frozen_lm import Forward, FrozenLM


@dataclass(frozen=True, eq=False)
class PromptLoss:
    """The prompt loss of a step.

    `exit_layer` E: the forward stops after E layers and the loss is read there, through `lens`, the model's final norm
    and head (without a lens: the "logit lens"); adapters sit below. None: at the top, as in the paper.
    `vocabulary`: the softmax runs over the first so many ids and the target only; byte-pair tokenizers number their
    tokens by how early they were merged, so the first are the common ones. Both are the same for a row whatever its
    batch.
    """

    exit_layer: int | None = None
    lens: Lens | None = None
    vocabulary: int | None = None

    def __post_init__(self):
        if self.vocabulary is not None and self.vocabulary < 1:
            raise ValueError(f"vocabulary={self.vocabulary}: give 1 or more ids, or none for the whole vocabulary.")
        if self.lens is not None and (self.exit_layer is None or self.lens.exit_layers != (self.exit_layer,)):
            raise ValueError(
                f"the lens reads after layers {self.lens.exit_layers}, the objective after {self.exit_layer}; "
                "pick the layer: lens.only(exit_layer)."
            )

    def nll_B(
        self,
        backbone: FrozenLM,
        out: Forward,
        batch: TokenBatch,
        *,
        twice_differentiable: bool = False,
    ) -> Tensor:
        """Mean NLL [B] of each row's tokens given the tokens before them; 0 if there is none."""
        hidden_BTD = out.hidden_BTD if self.exit_layer is None else self.states(backbone, out.hidden_BTD)
        if self.vocabulary is not None:
            return common_nll(backbone, hidden_BTD, batch.scored, self.vocabulary)
        return backbone.mean_nll(hidden_BTD, batch, out=out, twice_differentiable=twice_differentiable)

    def states(self, backbone: FrozenLM, h: Tensor) -> Tensor:
        """States [...,D] after E layers -> what the head takes: through the lens and the model's final norm."""
        moved = h if self.lens is None or self.exit_layer is None else self.lens(h, self.exit_layer)
        return backbone.norm(moved)

    def check(self, backbone: FrozenLM) -> None:
        """ValueError where it does not fit the model and its adapted layers, as loaded."""
        if self.vocabulary is not None and not isinstance(backbone.head, nn.Linear):
            raise ValueError(
                f"vocabulary needs a plain linear head; {backbone.name} has a {type(backbone.head).__name__}."
            )
        if self.exit_layer is None:
            return
        if backbone.final_norm is None:
            raise ValueError(
                f"exit_layer: ephemera does not know how to stop a {backbone.model.config.model_type} early. "
                "Use the prompt objective."
            )
        highest = max(p.layer for p in backbone.projections)
        if not 1 <= self.exit_layer <= backbone.layers or highest >= self.exit_layer:
            raise ValueError(
                f"the loss is read off after {self.exit_layer} of {backbone.layers} layers, but layer {highest} is adapted, "
                f'which lies above. Adapt layers below alone: lora={{"layers": "first-{self.exit_layer}"}}.'
            )
        if self.lens is not None:
            self.lens.check(backbone)

    def describe(self, lens: str = ".") -> dict[str, Any] | None:
        """As it stands in a network's file; the lens itself lies at `lens` from there. None for the paper's own."""
        settings = {
            "exit_layer": self.exit_layer,
            "lens": None if self.lens is None else lens,
            "vocabulary": self.vocabulary,
        }
        return None if settings == PROMPT_SETTINGS else settings

    def save_lens(self, folder: str | Path) -> None:
        if self.lens is not None:
            self.lens.save_pretrained(folder)


PROMPT_SETTINGS = {"exit_layer": None, "lens": None, "vocabulary": None}
RETIRED = {"tokens": "all", "template": None}  # in files of earlier versions
PROMPT = PromptLoss()


def load_objective(settings: dict[str, Any] | None, folder: Path) -> PromptLoss:
    """From what a network's file says; its lens lies in `folder`, or where "lens" points from there."""
    if settings is None:
        return PROMPT
    settings = artifact.without_retired(settings, RETIRED)
    lens = None if settings["lens"] is None else load_lens(folder / settings["lens"])
    return PromptLoss(**{**settings, "lens": lens})


def common_nll(backbone: FrozenLM, hidden_BTD: Tensor, tokens: ScoredTokens, vocabulary: int) -> Tensor:
    """As `mean_nll`, with a softmax over the ids below `vocabulary` and the target: the head's cost falls by their share."""
    h_ND, targets_N = tokens.states(hidden_BTD), tokens.targets_N
    if not backbone.plain_head:
        return tokens.means(_common_of_all(backbone.logits(h_ND), targets_N, vocabulary))
    weight_VD, bias_V = backbone.head.get_parameter("weight"), getattr(backbone.head, "bias", None)
    wide = torch.promote_types(h_ND.dtype, torch.float32)
    common_NV = F.linear(h_ND, weight_VD[:vocabulary], None if bias_V is None else bias_V[:vocabulary]).to(wide)
    own_N = (h_ND.to(wide) * weight_VD[targets_N].to(wide)).sum(1) + (0 if bias_V is None else bias_V[targets_N])
    cap = backbone.logits.softcap
    if cap is not None:
        common_NV, own_N = (torch.tanh(x / cap) * cap for x in (common_NV, own_N))
    total_N = common_NV.logsumexp(1)
    total_N = torch.where(targets_N < vocabulary, total_N, torch.logaddexp(total_N, own_N))
    return tokens.means(total_N - own_N)


def _common_of_all(logits_NV: Tensor, targets_N: Tensor, vocabulary: int) -> Tensor:
    """The same [N] of whole logits: of a head whose weight is sharded or not in memory."""
    wide_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
    own_N = wide_NV.gather(1, targets_N[:, None])[:, 0]
    total_N = wide_NV[:, :vocabulary].logsumexp(1)
    return torch.where(targets_N < vocabulary, total_N, torch.logaddexp(total_N, own_N)) - own_N
