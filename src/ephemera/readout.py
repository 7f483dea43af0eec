"""What a step's gradient is of: the prompt's NLL at the top, or read off an earlier layer; over which tokens and words."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ephemera.backbone import Backbone, Forward
from ephemera.hardest import hardest, mean_hardest_nll, share_of
from ephemera.lens import Lens, load_lens
from ephemera.objective import Predicted, TokenBatch, mean_nll, predicted
from ephemera.subset import ALL, by_place, check_template, check_tokens, hardest_percent, own_text


@dataclass(frozen=True, eq=False)
class Objective:
    """The prompt loss of a step.

    `exit_layer` E: the forward stops after E layers and the loss is read there, through `lens`, the model's final norm
    and head (without a lens: the "logit lens"); adapters sit below. None: at the top, as in the paper. `tokens`: which
    tokens are scored: "all", "last-8", "every-2" (every second one, the last among them), or "hardest-50%" (of each
    row's tokens the half with the highest NLL, chosen anew at each step). `template`: the words that prompts share, with
    {} where each has its own; only the latter are scored (the hardest of them, the last of the prompt among them).
    `vocabulary`: the softmax runs over the first so many ids and the target alone; byte-pair tokenizers number their
    tokens by how early they were merged, so the first are the common ones. All of these are the same for a row whatever
    its batch.
    """

    exit_layer: int | None = None
    lens: Lens | None = None
    tokens: str = ALL
    vocabulary: int | None = None
    template: str | None = None

    def __post_init__(self):
        check_tokens(self.tokens)
        if self.template is not None:
            check_template(self.template)
        if self.vocabulary is not None and self.vocabulary < 1:
            raise ValueError(f"vocabulary={self.vocabulary}: give 1 or more ids, or none for the whole vocabulary.")
        if self.lens is not None and (self.exit_layer is None or self.lens.exit_layers != (self.exit_layer,)):
            raise ValueError(
                f"the lens reads after layers {self.lens.exit_layers}, the objective after {self.exit_layer}; "
                "pick the layer: lens.only(exit_layer)."
            )

    def predicted(self, backbone: Backbone, batch: TokenBatch) -> Predicted | None:
        """The tokens that may be scored, the same at each step; None: all. ValueError where the template does not fit."""
        if self.template is None and self.tokens == ALL:
            return None
        scored_BT = by_place(batch.on_host, self.tokens)
        if self.template is not None:
            scored_BT = scored_BT & own_text(batch.on_host, self.template, backbone.tokenizer)
        return predicted(batch.on_host, scored_BT).to(batch.device)

    def nll_B(
        self,
        backbone: Backbone,
        out: Forward,
        batch: TokenBatch,
        tokens: Predicted | None,
        *,
        twice_differentiable: bool = False,
    ) -> Tensor:
        """Mean NLL [B] of each row's scored tokens given the tokens before them; 0 where there is none.

        `tokens` is what `predicted()` gave for the batch.
        """
        hidden_BTD = out.hidden_BTD if self.exit_layer is None else self.states(backbone, out.hidden_BTD)
        percent = hardest_percent(self.tokens)
        if self.vocabulary is not None:
            return common_nll(backbone, hidden_BTD, tokens or batch.predicted, self.vocabulary, percent)
        if percent is None:
            shared = out.shared
            if shared is not None and self.exit_layer is not None:  # at an exit the loss is another than the one kept
                shared = replace(shared, kept=None, record=None)
            return mean_nll(
                hidden_BTD,
                batch,
                backbone.logits,
                tokens=tokens,
                shared=shared,
                twice_differentiable=twice_differentiable,
            )
        return mean_hardest_nll(
            hidden_BTD,
            tokens or batch.predicted,
            backbone.logits,
            percent,
            twice_differentiable=twice_differentiable,
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
            "template": self.template,
        }
        return None if settings == PROMPT_SETTINGS else settings

    def save_lens(self, folder: str | Path) -> None:
        if self.lens is not None:
            self.lens.save_pretrained(folder)


PROMPT_SETTINGS = {"exit_layer": None, "lens": None, "tokens": ALL, "vocabulary": None, "template": None}
PROMPT = Objective()


def load_objective(settings: dict[str, Any] | None, folder: Path) -> Objective:
    """From what a network's file says; its lens lies in `folder`, or where "lens" points from there."""
    if settings is None:
        return PROMPT
    lens = None if settings["lens"] is None else load_lens(folder / settings["lens"])
    return Objective(**{**settings, "lens": lens})


def common_nll(
    backbone: Backbone,
    hidden_BTD: Tensor,
    tokens: Predicted,
    vocabulary: int,
    percent: int | None = None,
) -> Tensor:
    """As `mean_nll`, with a softmax over the ids below `vocabulary` and the target: the head's cost falls by their share.

    With `percent`, over so many percent of each row's tokens, the hardest.
    """
    h_ND, targets_N = tokens.states(hidden_BTD), tokens.targets_N
    weight_VD, bias_V = backbone.head.get_parameter("weight"), getattr(backbone.head, "bias", None)
    wide = torch.promote_types(h_ND.dtype, torch.float32)
    common_NV = F.linear(h_ND, weight_VD[:vocabulary], None if bias_V is None else bias_V[:vocabulary]).to(wide)
    own_N = (h_ND.to(wide) * weight_VD[targets_N].to(wide)).sum(1) + (0 if bias_V is None else bias_V[targets_N])
    cap = backbone.logits.softcap
    if cap is not None:
        common_NV, own_N = (torch.tanh(x / cap) * cap for x in (common_NV, own_N))
    total_N = common_NV.logsumexp(1)
    total_N = torch.where(targets_N < vocabulary, total_N, torch.logaddexp(total_N, own_N))
    nll_N = total_N - own_N
    if percent is None:
        return tokens.means(nll_N)
    kept_B = share_of(tokens.counts_B, percent)
    return tokens.means(nll_N, hardest(nll_N.detach(), tokens, kept_B), kept_B)
