"""Training ScaleNet: the first-order meta-gradient of the answer's NLL after adaptation (LDTTA 3.3)."""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from ephemera.adapt import adapt
from ephemera.config import ObjectiveSettings, OptimizerSettings, TrainScaleNet
from ephemera.early_exit.lens import Lens, load_lens
from ephemera.inits import Init, ZeroInit, load_init
from ephemera.llm.frozen_lm import FrozenLM, describe
from ephemera.made_for import MadeFor
from ephemera.prepared import bytes_of
from ephemera.prompt_loss import PromptLoss
from ephemera.rates import AveragedRate, PerProjectionRate, ScaleNet, load_rate, place_rate
from ephemera.rows import load_rows
from ephemera.scoring import (
    Encoded,
    answer_nll,
    batches_of,
    prompt_batch,
    search_base_rates,
    training_representations,
)
from ephemera.training.card import read_metrics, write_card
from ephemera.training.loop import Schedule, Trainee, train
from ephemera.training.meta_gradient import scalenet_backward
from ephemera.training.one_step import OneStepTrainee, plan_of
from ephemera.training.run import begin, kept_settings, open_run

NORMALIZATION_PROMPTS = 128
AVERAGED_PROMPTS = 64


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
            nlls, rates = [], []
            for rows in batches_of(self.backbone, self.validation, self.batch_size):
                batch = prompt_batch(self.backbone, rows)
                lora = self.init(self.backbone, batch, [0] * len(rows))
                trace = adapt(self.backbone, batch, lora, self.rates, K)
                nlls.append(answer_nll(self.backbone, rows, trace.lora, reach=self.rates.reach))
                rates.append(trace.rates_BKM)
            log_rates_NKM = torch.cat(rates).clamp(min=1e-12).log()
            report[f"validation_nll_{K}"] = torch.cat(nlls).mean().item()
            report[f"validation_spread_prompts_{K}"] = log_rates_NKM.std(0).mean().item()
            report[f"validation_spread_projections_{K}"] = log_rates_NKM.mean(0).std(-1, correction=0).mean().item()
        return report


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


def train_scalenet(config: TrainScaleNet, *, resume: bool = False) -> Path:
    """`ephemera train scalenet`: returns the folder of the trained network, `<output>/network`."""
    torch.manual_seed(config.optimizer.seed)
    folder = Path(config.output)
    lora = config.model.lora
    init = load_init(config.init, **lora.model_dump(exclude={"target_modules", "layers"}))
    accelerator, backbone = open_run(
        config, folder, init.lora_settings.get("target_modules") or lora.target_modules, lora.layers
    )
    init = init.placed(backbone)
    objective = settled_objective(config.objective)
    objective.check(backbone)
    if objective.lens is not None:
        objective.lens.to(backbone.device)
    rows, validation = load_rows(backbone, config.train), load_rows(backbone, config.validation)
    config = _settle(config, folder, backbone, init, validation, accelerator, objective, resume=resume)
    network = _network(config, backbone, objective)
    sample = random.Random(config.optimizer.seed).sample(list(rows), min(NORMALIZATION_PROMPTS, len(rows)))
    trainee, plan = _trainee(config, backbone, init, network, rows, validation)
    schedule = Schedule(config.checkpoint_every, config.validate_every)
    if config.scalenet.constants is not None and isinstance(trainee, OneStepTrainee) and isinstance(network, ScaleNet):
        first = _constants(config, trainee, backbone, objective)
        train(first, rows, _faster(config), schedule, folder / "constants", accelerator, resume=resume, plan=plan)
        assert isinstance(first.network, PerProjectionRate)
        first.network.made_for = _made_for(config, folder / "constants")
        first.network.save_pretrained(folder / "constants" / "network")
        network.start_from(first.network.log_rates_KM.detach().exp().cpu())
        trainee.take_over(first)
    if isinstance(network, ScaleNet):
        network.fit_normalization(training_representations(backbone, sample, exit_layer=objective.exit_layer).cpu())
    network.to(backbone.device)
    train(trainee, rows, config.optimizer, schedule, folder, accelerator, resume=resume, plan=plan)
    if objective.lens is not None:
        objective.lens.requires_grad_(False)
    if accelerator.is_main_process:
        network.made_for = _made_for(config, folder)
        network.save_pretrained(folder / "network")
        if (
            isinstance(network, ScaleNet)
            and isinstance(trainee, ScaleNetTrainee)
            and config.scalenet.granularity == "layer"
        ):
            average = averaged_rate(
                backbone, init, network, sample[:AVERAGED_PROMPTS], batch_size=config.optimizer.batch_size
            )
            average.save_pretrained(folder / "network" / "averaged", lens="..")
        write_card(folder / "network", folder, config, describe(backbone), rows=len(rows), validated=len(validation))
    accelerator.wait_for_everyone()
    accelerator.end_training()  # closes the trackers, and ends the process group: nothing may wait after it
    return folder / "network"


def _faster(config: TrainScaleNet) -> OptimizerSettings:
    assert config.scalenet.constants is not None
    return config.optimizer.model_copy(update={"learning_rate": config.scalenet.constants, "weight_decay": 0.0})


def _constants(
    config: TrainScaleNet, trainee: OneStepTrainee, backbone: FrozenLM, objective: PromptLoss
) -> OneStepTrainee:
    """The same training of constants, which see no prompt."""
    settings = config.scalenet.model_copy(update={"granularity": "constant"})
    network = _network(config.model_copy(update={"scalenet": settings}), backbone, objective)
    return trainee.with_network(network.to(backbone.device))


def _network(config: TrainScaleNet, backbone: FrozenLM, objective: PromptLoss) -> ScaleNet | PerProjectionRate:
    settings = config.scalenet
    assert settings.base_rates is not None
    made_for = MadeFor(tuple(config.train.task.split("+")), config.train.format, settings.reach)
    common: dict[str, Any] = {
        "projections": len(backbone.projections),
        "base_rates": settings.base_rates,
        "trained_for": describe(backbone),
        "objective": objective,
        "made_for": made_for,
        "trains": settings.trains,
    }
    if settings.granularity == "constant":
        return PerProjectionRate(**common)
    own = settings.model_dump(
        exclude={"max_steps", "base_rates", "trains", "reach", "start", "constants", "harm_weight"}
    )
    network = ScaleNet(hidden_size=backbone.hidden_size, **common, **own)
    if settings.start is not None:
        constants = place_rate(load_rate(settings.start), backbone)
        if not isinstance(constants, PerProjectionRate):
            raise ValueError(
                f"scalenet.start={settings.start} holds no per-projection constants (granularity: constant)."
            )
        network.start_from(constants.log_rates_KM.detach().exp().cpu())
    return network


def _trainee(
    config: TrainScaleNet,
    backbone: FrozenLM,
    init: Init,
    network: ScaleNet | PerProjectionRate,
    rows: Sequence[Encoded],
    validation: Sequence[Encoded],
) -> tuple[Trainee, list[list[int]] | None]:
    """What `loop.train` trains, and its own plan of batches if prompts are prepared for several passes."""
    optimizer, settings = config.optimizer, config.scalenet
    one_step = settings.reach == "answer" and settings.max_steps == 1 and isinstance(init, ZeroInit)
    if not one_step:
        alone = {
            "optimizer.passes": optimizer.passes > 1,
            "scalenet.harm_weight": settings.harm_weight,
            "scalenet.constants": settings.constants is not None,
        }
        for name, given in alone.items():
            if given:
                raise ValueError(f"{name} is for one step from the zero start with reach answer; leave it out.")
        if config.objective.tune_lens and isinstance(network, PerProjectionRate):
            raise ValueError("objective.tune_lens trains a lens with a ScaleNet; constants have none.")
        trainee = ScaleNetTrainee(
            backbone,
            init,
            network,
            validation=validation,
            validation_steps=config.validation_steps,
            batch_size=optimizer.batch_size,
            clip_prompt=optimizer.clip_prompt,
            seed=optimizer.seed,
            tune_lens=config.objective.tune_lens,
        )
        return trainee, None
    if config.objective.tune_lens:
        raise ValueError("objective.tune_lens is not for one step with reach answer; leave it out.")
    assert isinstance(init, ZeroInit)
    plan = plan_of(
        rows,
        [bytes_of(backbone, len(row.prompt), init.r) for row in rows],
        batch_size=optimizer.batch_size,
        samples=optimizer.samples,
        passes=optimizer.passes,
        memory=int(optimizer.memory_gb * 1e9),
        seed=optimizer.seed,
    )
    trainee = OneStepTrainee(
        backbone,
        init,
        network,
        plan=plan,
        validation=validation,
        batch_size=optimizer.batch_size,
        clip_prompt=optimizer.clip_prompt,
        harm_weight=settings.harm_weight,
        seed=optimizer.seed,
    )
    return trainee, plan.batches


def _made_for(config: TrainScaleNet, folder: Path) -> MadeFor:
    """What the network is for, with the last figures of metrics.jsonl; the steps are those of the lowest validation NLL."""
    lines = read_metrics(folder)
    last = next(line for line in reversed(lines) if any(key.startswith("validation_nll_") for key in line))
    figures = {key: value for key, value in last.items() if key.startswith(("validation_nll_", "validation_harmed"))}
    by_steps = {int(key.removeprefix("validation_nll_")): v for key, v in figures.items() if "nll" in key}
    steps = min((K for K in by_steps if K), key=lambda K: by_steps[K] if math.isfinite(by_steps[K]) else math.inf)
    tasks = tuple(config.train.task.split("+"))
    return MadeFor(tasks, config.train.format, config.scalenet.reach, steps, figures)


def settled_objective(settings: ObjectiveSettings) -> PromptLoss:
    """With the exit layer's own lens, where one is named."""
    if settings.lens is not None and settings.exit_layer is None:
        raise ValueError("objective.lens is for an early exit; give objective.exit_layer, or no lens.")
    if settings.tune_lens and settings.lens is None:
        raise ValueError("objective.tune_lens trains a lens: give objective.lens, where it starts.")
    lens = None
    if settings.lens is not None and settings.exit_layer is not None:
        lens = load_lens(settings.lens).only(settings.exit_layer)
    return PromptLoss(settings.exit_layer, lens, settings.vocabulary)


def _settle(
    config: TrainScaleNet,
    folder: Path,
    backbone: FrozenLM,
    init: Init,
    validation: Sequence[Encoded],
    accelerator: Accelerator,
    objective: PromptLoss,
    *,
    resume: bool,
) -> TrainScaleNet:
    """Fill in the base rates, and keep the whole configuration beside the run; a resumed run reads it."""
    kept = kept_settings(config, folder) if resume else None
    if kept is not None:
        return kept
    tables = {}
    if config.scalenet.base_rates is None:
        rates, tables = search_base_rates(
            backbone,
            init,
            validation[:100],
            steps=config.scalenet.max_steps,
            batch_size=config.optimizer.batch_size,
            objective=objective,
            reach=config.scalenet.reach,
        )
        config = config.model_copy(update={"scalenet": config.scalenet.model_copy(update={"base_rates": rates})})
        print(f"base rates from {len(validation[:100])} validation rows: {rates}", file=sys.stderr)
    elif len(config.scalenet.base_rates) != config.scalenet.max_steps:
        raise ValueError(
            f"scalenet.base_rates has {len(config.scalenet.base_rates)} rates for scalenet.max_steps="
            f"{config.scalenet.max_steps}; give one per step."
        )
    begin(config, folder, accelerator, beside={"base_rates": tables} if tables else None)
    return config
