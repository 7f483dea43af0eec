"""Other ways to spend a prompt's test-time compute, on the same prompts as ours: read by benchmarks/peers_quality.py.

Steps of the same loop: one from B = 0, adapters that act from the last prompt token on.

- `uniform`: the prompt's NLL at one rate for all projections.
- `query-only`: the same, with adapters on the query projections only.
- `entropy`: the mean entropy of the next-token distributions instead of the NLL (Tent, arXiv 2006.10726).
- `tlm`: each prompt's step is weighted by its perplexity, above a threshold (TLM, arXiv 2505.20633).
- `ungated`, `network`: the network that ships, without and with its gate.

And without adapters:

- `slot`: a vector on the last hidden state, fitted to the prompt, added at every generated token (arXiv 2505.12392).
- `vote`: the majority of sampled answers (self-consistency, arXiv 2203.11171).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from ephemera.adapt import adapt
from ephemera.batch import ScoredTokens, TokenBatch
from ephemera.cost import ModelShape
from ephemera.guard import guard
from ephemera.inits import ZeroInit
from ephemera.llm.cached_layers import CachedLayers
from ephemera.llm.frozen_lm import Forward, FrozenLM
from ephemera.llm.precision import wide_of
from ephemera.llm.prefill import Prefill, fork, whole_reading
from ephemera.prepared import Prepared
from ephemera.prompt_loss import PROMPT, PromptLoss
from ephemera.rates import FixedRate, PerProjectionRate, ScaleNet
from ephemera.scoring import Encoded, prompt_batch

Setting = dict[str, float]

QUERIES = ("q", "q_proj")  # a projection is named by its kind or by its module
# What is tried on validation rows. 3 is TLM's own log threshold, 2 lets more prompts take a step
GRID: dict[str, list[Setting]] = {
    "uniform": [{"rate": rate} for rate in (0.3, 1.0, 3.0, 10.0)],
    "query-only": [{"rate": rate} for rate in (1.0, 3.0, 10.0, 30.0)],
    "entropy": [{"rate": rate} for rate in (0.1, 0.3, 1.0, 3.0)],
    "tlm": [{"rate": rate, "log_p0": log_p0} for log_p0 in (3.0, 2.0) for rate in (0.3, 1.0, 3.0)],
    "slot": [{"lr": lr, "steps": 3} for lr in (0.01, 0.03, 0.1)],
}


@dataclass(frozen=True, eq=False)
class EntropyLoss(PromptLoss):
    """Tent's objective (arXiv 2006.10726): the mean entropy of the distributions that the prompt's tokens are predicted by."""

    def nll_B(
        self, backbone: FrozenLM, out: Forward, batch: TokenBatch, *, twice_differentiable: bool = False
    ) -> Tensor:
        """Mean entropy [B] in nats, at the positions that the prompt NLL counts."""
        logits_NV = backbone.logits(batch.scored.states(out.hidden_BTD))
        log_p_NV = logits_NV.to(wide_of(logits_NV.dtype)).log_softmax(-1)
        return batch.scored.means(-(log_p_NV.exp() * log_p_NV).sum(-1))


def query_only(rates_BM: Tensor, kinds: Sequence[str]) -> Tensor:
    """Zero for all projections but the queries: at B = 0 the others' gradients do not touch theirs."""
    return rates_BM * torch.tensor([kind in QUERIES for kind in kinds], dtype=rates_BM.dtype, device=rates_BM.device)


def tlm_weights(nll_B: Tensor, log_p0: float) -> Tensor:
    """TLM's weight P / P0 of each prompt if its perplexity P is above P0, else 0 (arXiv 2505.20633).

    Their lambda is part of the rate. The weight is a constant to the gradient.
    """
    return torch.where(nll_B > log_p0, (nll_B - log_p0).exp(), 0.0)


@torch.enable_grad()
def slot_delta(backbone: FrozenLM, hidden_BTD: Tensor, tokens: ScoredTokens, *, lr: float, steps: int) -> Tensor:
    """SLOT's vector [B,D] on the last hidden states: AdamW from zero on the prompt's NLL (arXiv 2505.12392).

    AdamW works number by number, so a batch's sum gives each prompt its own steps.
    """
    states_ND = tokens.states(hidden_BTD).detach()
    delta_BD = torch.zeros_like(hidden_BTD[:, 0]).requires_grad_()
    optimizer = torch.optim.AdamW([delta_BD], lr=lr, weight_decay=1e-8, eps=1e-5)
    for _ in range(steps):
        nll_B = tokens.means(backbone.token_nll(states_ND + delta_BD[tokens.rows_N], tokens.targets_N))
        (delta_BD.grad,) = torch.autograd.grad(nll_B.sum(), delta_BD)
        optimizer.step()
    return delta_BD.detach()


@dataclass(frozen=True, eq=False)
class ShiftedPrefill(Prefill):
    """Prompts read by the base model, whose last hidden states move by `delta_BD` from the first answer token on."""

    delta_BD: Tensor | None = None

    def _answer_states(
        self, answers: Sequence[Sequence[int]], rows: Sequence[int] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        states_ND, targets_N, of_N = super()._answer_states(answers, rows)
        assert self.delta_BD is not None
        delta_BD = self.delta_BD if rows is None else self.delta_BD[list(rows)]
        return states_ND + delta_BD[of_N], targets_N, of_N

    def generate(self, **kwargs: Any) -> list[list[int]]:
        delta_BD = self.delta_BD
        assert delta_BD is not None
        hook = self.backbone.head.register_forward_pre_hook(lambda _, given: (given[0] + delta_BD[:, None],))
        try:
            return super().generate(**kwargs)
        finally:
            hook.remove()


class Still(FixedRate):
    """A rate of zero that looks at h(x)."""

    @property
    def uses_representation(self) -> Literal["step"]:
        return "step"


class Ready:
    """A batch of prompts; what several methods need of it is computed once, when the first asks."""

    def __init__(self, backbone: FrozenLM, rows: Sequence[Encoded], seed: int = 0):
        self.backbone, self.rows, self.seed = backbone, rows, seed

    def _prepared(self, objective: PromptLoss) -> Prepared:
        """A step's gradient and the base model's reading, with the last hidden states of all tokens."""
        with torch.no_grad():
            lora = ZeroInit()(self.backbone, self.batch, [self.seed] * len(self.rows))
        still = Still(0.0, objective, "answer")
        made = adapt(self.backbone, self.batch, lora, still, 1, keep_grads=True, keep_reading=True)
        made = made.with_reading(whole_reading(self.backbone, self.batch, made.reading))
        assert made.h_BH is not None
        return Prepared(self.backbone, self.batch, made, made.h_BH)

    @cached_property
    def batch(self) -> TokenBatch:
        return prompt_batch(self.backbone, self.rows)

    @cached_property
    def nll(self) -> Prepared:
        return self._prepared(PROMPT)

    @cached_property
    def entropy(self) -> Prepared:
        return self._prepared(EntropyLoss())

    @cached_property
    def reading(self) -> CachedLayers:
        """The base model's own: of the step, if one was made."""
        known = self.nll.made.reading if "nll" in self.__dict__ else None
        return whole_reading(self.backbone, self.batch, known)

    @property
    def plain(self) -> Prefill:
        """That reading as a prefill whose cache may grow."""
        never_B = torch.zeros(len(self.rows), dtype=torch.bool, device=self.backbone.device)
        return Prefill(self.backbone, self.batch, None, self.reading.hidden_BTD, fork(self.reading.cache), never_B)


@torch.no_grad()
def read(
    ready: Ready, method: str, setting: Setting, network: ScaleNet | PerProjectionRate | None = None
) -> tuple[Prefill, Tensor]:
    """The prompts as a method has read them, and the share [B] of its step that each was given (0: it was left alone)."""
    backbone, one_B = ready.backbone, torch.ones(len(ready.rows))
    if method == "none":
        return ready.plain, 0 * one_B
    if method == "slot":
        hidden_BTD = ready.reading.hidden_BTD
        delta_BD = slot_delta(backbone, hidden_BTD, ready.batch.scored, lr=setting["lr"], steps=round(setting["steps"]))
        return ShiftedPrefill(**{**vars(ready.plain), "delta_BD": delta_BD}), one_B
    if method in ("network", "ungated"):
        assert network is not None, f"{method} needs a network"
        made = ready.nll.adapted(network)
        if method == "network" and network.gate is not None:
            made, guarded = guard(network.gate, backbone, ready.nll.batch, made)
            assert made.share_B is not None
            return guarded, made.share_B.cpu()
        return ready.nll.read(made.lora), one_B
    prepared = ready.entropy if method == "entropy" else ready.nll
    rates_BM = prepared.rates_BM(FixedRate(setting["rate"], reach="answer"))
    if method == "query-only":
        rates_BM = query_only(rates_BM, [p.kind for p in backbone.projections])
    if method == "tlm":
        one_B = tlm_weights(prepared.made.prompt_nll_BK[:, 0], setting["log_p0"])
        rates_BM = rates_BM * one_B[:, None]
    return prepared.read(prepared.step(rates_BM)), one_B.cpu()


def majority(votes: Sequence[str | None]) -> str | None:
    """What most samples name; of several alike the one that was sampled first. None if no sample names a choice."""
    counts = Counter(vote for vote in votes if vote is not None)  # keeps the order of first appearance
    return max(counts, key=lambda vote: counts[vote]) if counts else None


def votes_for(shape: ModelShape, tokens: float, new: float) -> int:
    """How many answers of `new` tokens cost the FLOPs of one adapted answer to a prompt of so many tokens; at least one.

    Adapted: a forward and a backward pass with the head at every token, the last token again, one answer.
    Sampled: a forward pass with the head at the last token, then the answers.
    """
    answer = shape.decode_flops(tokens, new)
    adapted = shape.step_flops(tokens) + shape.decode_flops(tokens, 1) + answer
    return max(1, int((adapted - shape.forward_flops(tokens, scored=1)) / answer))


def narrowed(backbone: FrozenLM) -> FrozenLM:
    """The model with adapters on its query projections only: what `query-only` costs."""
    return backbone.with_adapters_on("q", backbone.adapted_layers)
