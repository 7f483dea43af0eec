"""Training the generator end to end through the frozen model (TaskWeaver 4.3), alone or with a ScaleNet."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ephemera.adapt import adapt
from ephemera.batch import TokenBatch
from ephemera.config import JointSettings, TrainGenerator, brought
from ephemera.inits import LoraGenerator, load_generator
from ephemera.llm.cached_layers import CachedLayers
from ephemera.llm.frozen_lm import FrozenLM, describe
from ephemera.llm.precision import DTYPES
from ephemera.llm.prefill import prefill, whole_reading
from ephemera.llm.processes import dealt, of_all
from ephemera.lora import LoraBatch
from ephemera.made_for import MadeFor
from ephemera.rates import ScaleNet
from ephemera.scoring import Encoded, answer_gradient, batches_of, prompt_batch
from ephemera.training.card import write_generator_card
from ephemera.training.loop import Schedule, train
from ephemera.training.many_steps import fit_normalization
from ephemera.training.meta_gradient import rates_backward
from ephemera.training.mixture import mix, task_rows
from ephemera.training.run import begin, kept_settings, open_run

NORMALIZATION_PROMPTS = 256
VALIDATION_BATCH = 8


class GeneratorTrainee:
    """A generator under `loop.train`; with a ScaleNet, K in 0..Kmax steps are taken from the generated start.

    Both learn from one answer backward at Phi^(K). With prompt gradients as constants (LDTTA Eq. 17-19)
    Phi^(K) = Phi^(0) - sum_k rate^(k) g^(k), so dL/dPhi^(0) = dL/dPhi^(K): the generator needs no graph through the steps.
    """

    def __init__(
        self,
        backbone: FrozenLM,
        generator: LoraGenerator,
        *,
        validation: dict[str, list[Encoded]],
        scalenet: ScaleNet | None = None,
        joint: JointSettings | None = None,
        seed: int = 0,
    ):
        self.backbone = backbone
        self.generator = generator
        self.scalenet = scalenet
        self.joint = joint
        self.network = nn.ModuleDict({"generator": generator} | ({} if scalenet is None else {"scalenet": scalenet}))
        self.validation = validation
        self.seed = seed

    @property
    def learning_rates(self) -> dict[str, float]:
        return {"generator.": 1.0} | ({} if self.joint is None else {"scalenet.": self.joint.learning_rate_factor})

    def backward(self, rows: Sequence[Encoded], step: int) -> dict[str, float]:
        """One prompt forward, K steps, one answer forward and backward."""
        batch = prompt_batch(self.backbone, rows)
        start, reading = self._start(batch)
        lora, trace, K = start, None, 0
        if self.scalenet is not None:
            K = random.Random(f"{self.seed}:{step}").randint(0, self.scalenet.max_steps)
            trace = adapt(self.backbone, batch, start, self.scalenet, K, keep_grads=True)
            lora = trace.lora
        nll_B, grads = answer_gradient(self.backbone, rows, lora, reach=self.generator.reach, reading=reading)
        usable_B = nll_B.isfinite()
        if trace is not None and self.joint is not None and K:
            usable_B = rates_backward(trace, nll_B, grads, clip=self.joint.clip_prompt)
        # A row that diverged has NaN gradients, which must not spoil the others'
        kept = grads.where(usable_B, None).buffers
        torch.autograd.backward(start.buffers, [g / len(rows) for g in kept])
        used = int(usable_B.sum())
        return {
            "K": K,
            "nll": nll_B[usable_B].mean().item() if used else float("nan"),
            "non_finite": len(rows) - used,
        }

    def _start(self, batch: TokenBatch) -> tuple[LoraBatch, CachedLayers | None]:
        """The generated adapters; with reach `answer` from the reading of the prompts that their answers go on from."""
        if self.generator.reach == "all":
            return self.generator(self.backbone, batch, [0] * len(batch.ids_BT)), None
        reading = whole_reading(self.backbone, batch, None)
        return self.generator.after(self.backbone, batch, reading), reading

    def _answer_nll(self, rows: Sequence[Encoded], lora: LoraBatch, reading: CachedLayers | None) -> Tensor:
        read = prefill(
            self.backbone, prompt_batch(self.backbone, rows), lora, reach=self.generator.reach, cached=reading
        )
        return read.answer_nll([row.answer for row in rows])

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Mean answer NLL of each task; with a neighbour's adapter (does it ignore its input?); after one step."""
        report: dict[str, float] = {}
        every, swapped, stepped = [], [], []
        for task, rows in self.validation.items():
            found = of_all([self._validated(some) for some in dealt(batches_of(self.backbone, rows, VALIDATION_BATCH))])
            nlls = [nll_B for nll_B, _, _ in found]
            swapped += [change_B for _, change_B, _ in found if change_B is not None]
            stepped += [nll_B for _, _, nll_B in found if nll_B is not None]
            report[f"validation_nll_{task}"] = torch.cat(nlls).mean().item()
            every += nlls
        report["validation_nll"] = torch.cat(every).mean().item()
        if swapped:
            report["validation_nll_swapped"] = report["validation_nll"] + torch.cat(swapped).mean().item()
        if stepped:
            report["validation_nll_1"] = torch.cat(stepped).mean().item()
        return report

    def _validated(self, rows: Sequence[Encoded]) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """A batch's answer NLL [B], its change with a neighbour's adapter, and the NLL after one step."""
        batch = prompt_batch(self.backbone, rows)
        lora, reading = self._start(batch)
        nll_B, change_B, after_B = self._answer_nll(rows, lora, reading), None, None
        if len(rows) > 1:  # a row alone has no neighbour
            neighbours = lora.rows(torch.arange(len(rows)).roll(1))
            change_B = (self._answer_nll(rows, neighbours, reading) - nll_B).cpu()
        if self.scalenet is not None:
            trace = adapt(self.backbone, batch, lora, self.scalenet, 1)
            after_B = self._answer_nll(rows, trace.lora, reading).cpu()
        return nll_B.cpu(), change_B, after_B


@torch.no_grad()
def fit_states(backbone: FrozenLM, generator: LoraGenerator, rows: Sequence[Encoded]) -> None:
    states = [generator.state_BH(backbone, prompt_batch(backbone, some)) for some in batches_of(backbone, rows, 8)]
    generator.fit_normalization(torch.cat(states))


def train_generator(config: TrainGenerator, *, resume: bool = False) -> Path:
    """`ephemera train generator`: returns `<output>/network`; a ScaleNet trained with it lies in `<output>/scalenet`."""
    torch.manual_seed(config.optimizer.seed)
    folder = Path(config.output)
    start = None if config.start is None else load_generator(config.start).requires_grad_(True)
    config = _with_start(config, start)
    accelerator, backbone = open_run(config, folder, target_modules=config.model.lora.target_modules)
    kept = kept_settings(config, folder) if resume else None
    config = kept or config
    by_task, validation = task_rows(backbone, config.train), task_rows(backbone, config.validation)
    rows = mix(by_task, config.train, config.optimizer.samples)
    if config.train.stop != "samples":
        config.optimizer.samples = len(rows)
    some = random.Random(config.optimizer.seed).sample(rows, min(NORMALIZATION_PROMPTS, len(rows)))
    generator = start or _fresh(backbone, config, some)
    generator.check(backbone)
    generator.gate = None  # a start's was calibrated for other weights
    tasks = tuple(entry.task for entry in config.train.tasks)
    generator.made_for = MadeFor(tasks, config.train.format, config.generator.reach, steps=0)
    scalenet = _scalenet(backbone, config, some) if config.scalenet else None
    if kept is None:
        begin(config, folder, accelerator)
    trainee = GeneratorTrainee(
        backbone,
        generator.to(backbone.device).train(),
        validation=validation,
        scalenet=scalenet,
        joint=config.scalenet,
        seed=config.optimizer.seed,
    )
    schedule = Schedule(config.checkpoint_every, config.validate_every)
    train(trainee, rows, config.optimizer, schedule, folder, accelerator, resume=resume)
    if accelerator.is_main_process:
        generator.save_pretrained(folder / "network", dtype=DTYPES[config.generator.save_dtype])
        if scalenet is not None:
            scalenet.save_pretrained(folder / "scalenet")
        write_generator_card(
            folder / "network",
            folder,
            config,
            describe(backbone),
            parameters=sum(p.numel() for p in generator.parameters()),
            counts={task: len(found) for task, found in by_task.items()},
            validated=sum(map(len, validation.values())),
        )
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return folder / "network"


def _with_start(config: TrainGenerator, start: LoraGenerator | None) -> TrainGenerator:
    """A copy of the settings; those that a trained generator was made with go with it."""
    config = config.model_copy(deep=True)
    if start is not None:
        own, plain, by = start.config, TrainGenerator(), f"start={config.start}"
        config.model.lora = brought(config.model.lora, own, default=plain.model.lora, by=by)
        config.generator = brought(config.generator, own, default=plain.generator, by=by)
    return config


def _fresh(backbone: FrozenLM, config: TrainGenerator, rows: Sequence[Encoded]) -> LoraGenerator:
    """A new generator, which standardises h by these rows."""
    lora = config.model.lora
    generator = LoraGenerator(
        projections=backbone.projections,
        state_size=backbone.hidden_size,
        trained_for=describe(backbone),
        r=lora.r,
        lora_alpha=lora.lora_alpha,
        init_std=lora.init_std,
        target_modules=lora.target_modules,
        hidden_size=config.generator.hidden_size,
        reach=config.generator.reach,
    )
    fit_states(backbone, generator, rows)
    return generator


def _scalenet(backbone: FrozenLM, config: TrainGenerator, rows: Sequence[Encoded]) -> ScaleNet:
    settings = config.scalenet
    assert settings is not None
    if settings.base_rates is None or len(settings.base_rates) != settings.max_steps:
        raise ValueError(
            f"scalenet.base_rates should hold {settings.max_steps} rates (scalenet.max_steps), the first bold, the others "
            f"small, e.g. [1, 0.001, ...]; got {settings.base_rates}."
        )
    network = ScaleNet(
        hidden_size=backbone.hidden_size,
        projections=len(backbone.projections),
        trained_for=describe(backbone),
        granularity=settings.granularity,
        base_rates=settings.base_rates,
        mlp_size=settings.mlp_size,
        max_log_scale=settings.max_log_scale,
        trains=settings.trains,
    )
    fit_normalization(backbone, network, rows)
    return network.to(backbone.device)
