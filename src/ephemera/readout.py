"""What a step's gradient is of: the prompt's NLL at the top, or read off an earlier layer; over which tokens and words."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ephemera.backbone import Backbone, Forward
from ephemera.lens import Lens, load_lens
from ephemera.objective import TokenBatch, mean_nll

TOKENS = "all"


@dataclass(frozen=True, eq=False)
class Objective:
    """The prompt loss of a step.

    `exit_layer` E: the forward stops after E layers and the loss is read there, through `lens`, the model's final norm
    and head (without a lens: the "logit lens"); adapters sit below. None: at the top, as in the paper. `tokens`: which
    tokens are scored: "all", "last-8", or "every-2" (every second one, the last among them). `vocabulary`: the softmax
    runs over the first so many ids and the target alone; byte-pair tokenizers number their tokens by how early they
    were merged, so the first are the common ones. All of these are the same for a row whatever its batch.
    """

    exit_layer: int | None = None
    lens: Lens | None = None
    tokens: str = TOKENS
    vocabulary: int | None = None

    def __post_init__(self):
        if re.fullmatch(r"all|(last|every)-[1-9]\d*", self.tokens) is None:
            raise ValueError(f'tokens={self.tokens!r} is unknown; it is "all", "last-8", "every-2", or the like.')
        if self.vocabulary is not None and self.vocabulary < 1:
            raise ValueError(f"vocabulary={self.vocabulary}: give 1 or more ids, or none for the whole vocabulary.")
        if self.lens is not None and (self.exit_layer is None or self.lens.exit_layers != (self.exit_layer,)):
            raise ValueError(
                f"the lens reads after layers {self.lens.exit_layers}, the objective after {self.exit_layer}; "
                "pick the layer: lens.only(exit_layer)."
            )

    def nll_B(
        self, backbone: Backbone, out: Forward, batch: TokenBatch, *, twice_differentiable: bool = False
    ) -> Tensor:
        """Mean NLL [B] of each row's scored tokens given the tokens before them; 0 where there is none."""
        hidden_BTD = out.hidden_BTD if self.exit_layer is None else self.states(backbone, out.hidden_BTD)
        scored_BT = None if self.tokens == TOKENS else scored(batch, self.tokens)
        if self.vocabulary is not None:
            return common_nll(backbone, hidden_BTD, batch, scored_BT, self.vocabulary)
        return mean_nll(
            hidden_BTD, batch, backbone.logits, scored_BT=scored_BT, twice_differentiable=twice_differentiable
        )

    def states(self, backbone: Backbone, h: Tensor) -> Tensor:
        """States [...,D] after E layers -> what the head takes: through the lens and the model's final norm."""
        assert backbone.final_norm is not None
        moved = h if self.lens is None or self.exit_layer is None else self.lens(h, self.exit_layer)
        return backbone.decoder.get_submodule(backbone.final_norm)(moved)

    def check(self, backbone: Backbone) -> None:
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
            "tokens": self.tokens,
            "vocabulary": self.vocabulary,
        }
        return None if settings == PROMPT_SETTINGS else settings

    def save_lens(self, folder: str | Path) -> None:
        if self.lens is not None:
            self.lens.save_pretrained(folder)


PROMPT_SETTINGS = {"exit_layer": None, "lens": None, "tokens": TOKENS, "vocabulary": None}
PROMPT = Objective()


def load_objective(settings: dict[str, Any] | None, folder: Path) -> Objective:
    """From what a network's file says; its lens lies in `folder`, or where "lens" points from there."""
    if settings is None:
        return PROMPT
    lens = None if settings["lens"] is None else load_lens(folder / settings["lens"])
    return Objective(**{**settings, "lens": lens})


def scored(batch: TokenBatch, tokens: str) -> Tensor:
    """Which tokens count [B,T], by their places from each row's end; all of a row's places are real tokens."""
    kind, _, number = tokens.partition("-")
    from_end_BT = batch.lengths_B[:, None] - 1 - batch.position_ids_BT
    if kind == "last":
        return batch.mask_BT & (from_end_BT < int(number))
    return batch.mask_BT & (from_end_BT % int(number) == 0)


def common_nll(
    backbone: Backbone, hidden_BTD: Tensor, batch: TokenBatch, scored_BT: Tensor | None, vocabulary: int
) -> Tensor:
    """As `mean_nll`, with a softmax over the ids below `vocabulary` and the target: the head's cost falls by their share."""
    scored_BT = batch.mask_BT if scored_BT is None else scored_BT
    predicted = scored_BT[:, 1:] & batch.mask_BT[:, :-1]
    rows_N, places_N = predicted.nonzero(as_tuple=True)
    h_ND, targets_N = hidden_BTD[rows_N, places_N], batch.ids_BT[rows_N, places_N + 1]
    weight_VD, bias_V = backbone.head.get_parameter("weight"), getattr(backbone.head, "bias", None)
    wide = torch.promote_types(h_ND.dtype, torch.float32)
    common_NV = F.linear(h_ND, weight_VD[:vocabulary], None if bias_V is None else bias_V[:vocabulary]).to(wide)
    own_N = (h_ND.to(wide) * weight_VD[targets_N].to(wide)).sum(1) + (0 if bias_V is None else bias_V[targets_N])
    if backbone.softcap is not None:
        common_NV, own_N = (torch.tanh(x / backbone.softcap) * backbone.softcap for x in (common_NV, own_N))
    total_N = common_NV.logsumexp(1)
    total_N = torch.where(targets_N < vocabulary, total_N, torch.logaddexp(total_N, own_N))
    nll_N = total_N - own_N
    sums_B = nll_N.new_zeros(batch.ids_BT.shape[0]).index_add(0, rows_N, nll_N)
    return sums_B / predicted.sum(1).clamp(min=1)
