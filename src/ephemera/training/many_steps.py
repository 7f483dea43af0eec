"""Training rates of K steps: each batch draws its K, adapts, and takes the meta-gradient of its answers (LDTTA 3.3)."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import nn

from ephemera.adapt import adapt
from ephemera.early_exit.lens import Lens
from ephemera.inits import Init
from ephemera.llm.frozen_lm import FrozenLM, describe
from ephemera.llm.processes import dealt, of_all
from ephemera.rates import AveragedRate, PerProjectionRate, ScaleNet
from ephemera.scoring import Encoded, answer_nll, batches_of, prompt_batch
from ephemera.training.meta_gradient import scalenet_backward


class WithLens(nn.Module):
    """What is trained where the lens is trained too."""

    def __init__(self, rates: ScaleNet, lens: Lens):
        super().__init__()
        self.rates = rates
        self.lens = lens.requires_grad_()


class ScaleNetTrainee:
    """Rates under `loop.train`: K is drawn anew for each batch from 1 to Kmax. K = 0 has no gradient, so it is no sample.

    With `tune_lens` the exit objective's lens learns with it, at that share of the learning rate.
    """

    def __init__(
        self,
        backbone: FrozenLM,
        init: Init,
        network: ScaleNet | PerProjectionRate,
        *,
        validation: Sequence[Encoded],
        validation_steps: Sequence[int],
        batch_size: int,
        clip_prompt: float,
        seed: int,
        tune_lens: float = 0.0,
    ):
        self.backbone = backbone
        self.init = init
        self.rates = network
        self.tune_lens = tune_lens
        lens = network.objective.lens
        self.network: nn.Module = network
        if tune_lens and lens is not None and isinstance(network, ScaleNet):
            self.network = WithLens(network, lens)
        self.validation = validation
        self.validation_steps = validation_steps
        self.batch_size = batch_size
        self.clip_prompt = clip_prompt
        self.seed = seed

    @property
    def learning_rates(self) -> dict[str, float]:
        return {"rates.": 1.0, "lens.": self.tune_lens} if isinstance(self.network, WithLens) else {"": 1.0}

    def backward(self, rows: Sequence[Encoded], step: int) -> dict[str, float] | None:
        K = random.Random(f"{self.seed}:{step}").randint(1, self.rates.max_steps)
        # A fresh A for each prompt and pass over the data (LDTTA 4.1)
        return scalenet_backward(
            self.backbone,
            self.init,
            self.rates,
            rows,
            K,
            seed=self.seed * 1_000_003 + step,
            clip=self.clip_prompt,
            through_gradients=isinstance(self.network, WithLens),
        )

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Mean answer NLL per K, and the deviation of log rates over prompts: has ScaleNet collapsed?"""
        report = {}
        for K in self.validation_steps:
            found = []
            for rows in dealt(batches_of(self.backbone, self.validation, self.batch_size)):
                batch = prompt_batch(self.backbone, rows)
                lora = self.init(self.backbone, batch, [0] * len(rows))
                trace = adapt(self.backbone, batch, lora, self.rates, K)
                nll_B = answer_nll(self.backbone, rows, trace.lora, reach=self.rates.reach)
                found.append((nll_B.cpu(), trace.rates_BKM.detach().cpu()))
            nlls, rates = zip(*of_all(found), strict=True)
            log_rates_NKM = torch.cat(rates).clamp(min=1e-12).log()
            report[f"validation_nll_{K}"] = torch.cat(nlls).mean().item()
            report[f"validation_spread_prompts_{K}"] = log_rates_NKM.std(0).mean().item()
            report[f"validation_spread_projections_{K}"] = log_rates_NKM.mean(0).std(-1, correction=0).mean().item()
        return report


@torch.no_grad()
def fit_normalization(backbone: FrozenLM, network: ScaleNet, rows: Sequence[Encoded]) -> None:
    """Let the network standardise h(x) by that of these prompts, unadapted."""
    stop = network.objective.exit_layer
    batches = [prompt_batch(backbone, some) for some in batches_of(backbone, rows, 16)]
    h = [backbone.forward(batch, embedded=True, stop=stop).representation_BH(batch) for batch in batches]
    network.fit_normalization(torch.cat(h).cpu())


def averaged_rate(
    backbone: FrozenLM, init: Init, network: ScaleNet, rows: Sequence[Encoded], *, batch_size: int
) -> AveragedRate:
    """Replace s(x, k, K) by its mean over training prompts, per (k, K) (LDTTA 4.3)."""
    Kmax, M = network.max_steps, len(backbone.projections)
    table_KKM = torch.zeros(Kmax, Kmax, M)
    for K in range(1, Kmax + 1):
        rates = []
        for batch_rows in batches_of(backbone, rows, batch_size):
            batch = prompt_batch(backbone, batch_rows)
            trace = adapt(backbone, batch, init(backbone, batch, [0] * len(batch_rows)), network, K)
            rates.append(trace.rates_BKM[~trace.fallback_B])
        table_KKM[K - 1, :K] = torch.cat(rates).mean(0).cpu()
    return AveragedRate(table_KKM, describe(backbone), network.objective, network.made_for, trains=network.trains)
