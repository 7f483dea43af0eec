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

from ephemera.config import ObjectiveSettings, OptimizerSettings, TrainScaleNet
from ephemera.early_exit.lens import load_lens
from ephemera.inits import Init, ZeroInit
from ephemera.llm import processes
from ephemera.llm.frozen_lm import FrozenLM, describe
from ephemera.made_for import MadeFor
from ephemera.prepared import bytes_of
from ephemera.prompt_loss import PromptLoss
from ephemera.rate_search import RateSearch
from ephemera.rates import PerProjectionRate, ScaleNet, load_rate, place_rate
from ephemera.rows import load_rows
from ephemera.scoring import Encoded
from ephemera.training.card import read_metrics, write_card
from ephemera.training.loop import Schedule, Trainee, train
from ephemera.training.many_steps import ScaleNetTrainee, averaged_rate, fit_normalization
from ephemera.training.one_step import OneStepTrainee, plan_of
from ephemera.training.run import begin, kept_settings, open_run

NORMALIZATION_PROMPTS = 128
AVERAGED_PROMPTS = 64


def train_scalenet(config: TrainScaleNet, *, resume: bool = False) -> Path:
    """`ephemera train scalenet`: returns the folder of the trained network, `<output>/network`."""
    torch.manual_seed(config.optimizer.seed)
    folder = Path(config.output)
    model, init = config.model.started(config.init)
    config = config.model_copy(update={"model": model})
    accelerator, backbone = open_run(config, folder)
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
        if accelerator.is_main_process:
            first.network.made_for = _made_for(config, folder / "constants")
            first.network.save_pretrained(folder / "constants" / "network")
        network.start_from(first.network.log_rates_KM.detach().exp().cpu())
        trainee.take_over(first)
    if isinstance(network, ScaleNet):
        fit_normalization(backbone, network, sample)
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
    network = ScaleNet(
        hidden_size=backbone.hidden_size,
        granularity=settings.granularity,
        mlp_size=settings.mlp_size,
        max_log_scale=settings.max_log_scale,
        **common,
    )
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
    if config.validation_steps not in ([1], TrainScaleNet().validation_steps):
        raise ValueError(f"validation_steps={config.validation_steps}: one step is validated at K = 1; leave it out.")
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
        batch_size, reach = config.optimizer.batch_size, config.scalenet.reach
        search = RateSearch(backbone, init, validation[:100], batch_size, objective=objective, reach=reach)
        rates, tables = processes.from_first(search.schedule(config.scalenet.max_steps))
        config = config.model_copy(update={"scalenet": config.scalenet.model_copy(update={"base_rates": rates})})
        print(f"base rates from {len(validation[:100])} validation rows: {rates}", file=sys.stderr)
    elif len(config.scalenet.base_rates) != config.scalenet.max_steps:
        raise ValueError(
            f"scalenet.base_rates has {len(config.scalenet.base_rates)} rates for scalenet.max_steps="
            f"{config.scalenet.max_steps}; give one per step."
        )
    begin(config, folder, accelerator, beside={"base_rates": tables} if tables else None)
    return config
