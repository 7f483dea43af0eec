"""Training ScaleNet: the first-order meta-gradient of the answer's NLL after adaptation (LDTTA 3.3)."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ephemera.adapt import Trace, adapt, meta_gradient
from ephemera.backbone import Backbone, describe
from ephemera.config import DataSettings, ObjectiveSettings, TrainScaleNet, fill
from ephemera.flat import FlatLora
from ephemera.generator import load_init, place_init, targets_of
from ephemera.inits import Init
from ephemera.lens import Lens, load_lens
from ephemera.lora import LoraBatch
from ephemera.objective import last_tokens, mean_nll, pad
from ephemera.rates import AveragedRate, ScaleNet
from ephemera.readout import Objective
from ephemera.scoring import (
    Encoded,
    answer_nll,
    batches_of,
    encode_examples,
    prompt_batch,
    search_base_rates,
    training_representations,
)
from ephemera.tasks import load_dataset
from ephemera.training.card import write_card
from ephemera.training.loop import Schedule, train
from ephemera.training.run import begin, kept_settings, open_run

NORMALIZATION_PROMPTS = 512
AVERAGED_PROMPTS = 64
VANISHED = 0.05  # of the base rate


class WithLens(nn.Module):
    """What is trained where the lens is trained too."""

    def __init__(self, rates: ScaleNet, lens: Lens):
        super().__init__()
        self.rates = rates
        self.lens = lens.requires_grad_()


class ScaleNetTrainee:
    """ScaleNet under `loop.train`: K is drawn anew for each batch, K = 0 has no gradient and costs nothing.

    With `tune_lens` the exit objective's lens learns with it, at that share of the learning rate.
    """

    def __init__(
        self,
        backbone: Backbone,
        init: Init,
        network: ScaleNet,
        *,
        validation: Sequence[Encoded],
        validation_steps: Sequence[int],
        batch_size: int,
        clip_prompt: float,
        seed: int,
        sparsity: float = 0.0,
        tune_lens: float = 0.0,
    ):
        self.backbone = backbone
        self.init = init
        self.rates = network
        self.tune_lens = tune_lens
        lens = network.objective.lens
        self.network = WithLens(network, lens) if tune_lens and lens is not None else network
        self.validation = validation
        self.validation_steps = validation_steps
        self.batch_size = batch_size
        self.clip_prompt = clip_prompt
        self.seed = seed
        self.sparsity = sparsity

    @property
    def learning_rates(self) -> dict[str, float]:
        return {"rates.": 1.0, "lens.": self.tune_lens} if isinstance(self.network, WithLens) else {"": 1.0}

    def backward(self, rows: Sequence[Encoded], step: int) -> dict[str, float] | None:
        K = random.Random(f"{self.seed}:{step}").randint(0, self.rates.max_steps)
        if K == 0:
            return None
        # A fresh A for each prompt and pass over the data (LDTTA 4.1)
        return scalenet_backward(
            self.backbone,
            self.init,
            self.rates,
            rows,
            K,
            seed=self.seed * 1_000_003 + step,
            clip=self.clip_prompt,
            sparsity=self.sparsity,
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
                nlls.append(answer_nll(self.backbone, rows, trace.lora))
                rates.append(trace.rates_BKM)
            log_rates_NKM = torch.cat(rates).clamp(min=1e-12).log()
            report[f"validation_nll_{K}"] = torch.cat(nlls).mean().item()
            report[f"validation_spread_prompts_{K}"] = log_rates_NKM.std(0).mean().item()
            report[f"validation_spread_projections_{K}"] = log_rates_NKM.mean(0).std(-1, correction=0).mean().item()
        return report


def answer_gradient(backbone: Backbone, rows: Sequence[Encoded], lora: LoraBatch) -> tuple[Tensor, FlatLora]:
    """Answer NLL [B] under the adapters, and its gradient by them: one forward and one backward pass."""
    joined = pad([row.prompt + row.answer for row in rows], pad_id=backbone.pad_id).to(backbone.device)
    answers = last_tokens(joined, [len(row.answer) for row in rows])
    leaves = FlatLora.of(lora).leaves()
    with torch.enable_grad():
        hidden_BTD = backbone.forward(joined, leaves.lora).hidden_BTD
        nll_B = mean_nll(hidden_BTD, joined, backbone.logits, tokens=answers)
        grads = torch.autograd.grad(nll_B.sum(), leaves.tensors, allow_unused=True, materialize_grads=True)
    return nll_B.detach(), leaves.with_tensors(grads)


def scalenet_backward(
    backbone: Backbone,
    init: Init,
    network: ScaleNet,
    rows: Sequence[Encoded],
    K: int,
    *,
    seed: int,
    clip: float | None = None,
    sparsity: float = 0.0,
    through_gradients: bool = False,
) -> dict[str, float]:
    """Adapt K steps, score the answers, and leave the batch's mean meta-gradient in the network.

    K + 1 forward and backward passes; besides one pass's memory only the K prompt gradients are kept.
    `clip` bounds each prompt's own gradient (by log rates): a prompt that diverged should not
    drown the others. Rows that are not finite give no gradient. `sparsity` presses on each log-rate, until the
    rate has all but vanished: the penalty is `sparsity * log(1 + s / VANISHED)`, summed over steps and projections.
    `through_gradients`: the prompt gradients are not constants but functions of the lens, which gets its share.
    """
    batch = prompt_batch(backbone, rows)
    lora = init(backbone, batch, [seed] * len(rows))
    trace = adapt(backbone, batch, lora, network, K, keep_grads=True, second_order=through_gradients)
    nll_B, answer_grads = answer_gradient(backbone, rows, trace.lora)
    penalty_BKM = None
    if sparsity:
        base_K1 = trace.rates_BKM.new_tensor(network.base_rates[:K])[:, None]
        penalty_BKM = sparsity / (trace.rates_BKM.detach() + VANISHED * base_K1)
    if through_gradients:
        lens_backward(trace, nll_B, answer_grads, clip=clip, lens=network.objective.lens)
    used = rates_backward(trace, nll_B, answer_grads, clip=clip, penalty_BKM=penalty_BKM)
    return {
        "K": K,
        "nll": nll_B[used].mean().item() if bool(used.any()) else float("nan"),
        "prompt_nll_first": trace.prompt_nll_BK[:, 0].mean().item(),
        "non_finite": len(rows) - int(used.sum()),
    }


def rates_backward(
    trace: Trace,
    nll_B: Tensor,
    answer_grads: FlatLora,
    *,
    clip: float | None,
    penalty_BKM: Tensor | None = None,
) -> Tensor:
    """Leave the batch's mean meta-gradient in ScaleNet; which rows were usable: bool [B].

    `penalty_BKM`: a further gradient by the rates, which is not clipped.
    """
    drates_BKM = meta_gradient(answer_grads, trace.grads)
    usable_B = ~trace.fallback_B & nll_B.isfinite() & drates_BKM.isfinite().flatten(1).all(1)
    drates_BKM = torch.where(usable_B[:, None, None], drates_BKM, 0.0)
    if clip is not None:
        norm_B = (drates_BKM * trace.rates_BKM.detach()).flatten(1).norm(dim=1)
        drates_BKM = drates_BKM * (clip / norm_B.clamp(min=clip))[:, None, None]
    if penalty_BKM is not None:
        drates_BKM = drates_BKM + torch.where(usable_B[:, None, None], penalty_BKM, 0.0)
    rates_BKM = torch.where(usable_B[:, None, None], trace.rates_BKM, 0.0)
    rates_BKM.backward(drates_BKM.to(rates_BKM.dtype) / len(nll_B))
    return usable_B


def lens_backward(
    trace: Trace, nll_B: Tensor, answer_grads: FlatLora, *, clip: float | None, lens: Lens | None
) -> None:
    """Leave dL_answer/dlens, through the steps' gradients, in the lens: each prompt clipped as its rates' gradient is."""
    assert lens is not None
    with torch.no_grad():
        drates_BKM = meta_gradient(answer_grads, trace.grads)
        norm_B = (drates_BKM * trace.rates_BKM).flatten(1).norm(dim=1)
        usable_B = ~trace.fallback_B & nll_B.isfinite() & norm_B.isfinite()
        factor_B = torch.ones_like(norm_B) if clip is None else clip / norm_B.clamp(min=clip)
        by_lora = answer_grads.scaled((factor_B / len(nll_B))[:, None].expand_as(drates_BKM[:, 0])).where(
            usable_B, None
        )
    leaves = list(lens.parameters())
    grads = torch.autograd.grad(trace.lora.tensors, leaves, by_lora.lora.tensors, retain_graph=True)
    for leaf, grad in zip(leaves, grads, strict=True):
        leaf.grad = grad if leaf.grad is None else leaf.grad + grad


def averaged_rate(
    backbone: Backbone, init: Init, network: ScaleNet, rows: Sequence[Encoded], *, batch_size: int
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
    return AveragedRate(table_KKM, describe(backbone), network.objective, network.normalize)


def lasting(average: AveragedRate, network: ScaleNet) -> Tensor:
    """Which projections' mean rates reach VANISHED times the base rate in any step of any schedule: bool [M]."""
    base_K1 = average.table_KKM.new_tensor(network.base_rates)[:, None]
    return (average.table_KKM / base_K1 >= VANISHED).flatten(0, 1).any(0)


def load_rows(backbone: Backbone, settings: DataSettings) -> list[Encoded]:
    """Examples of a task, or of several joined by "+", as token ids; what was left out is said."""
    every: list[Encoded] = []
    for task in settings.task.split("+"):
        source = fill(settings.source, task)
        data = load_dataset(task, split=settings.split, source=source, limit=settings.limit, seed=settings.seed)
        rows, long = encode_examples(
            backbone,
            data.examples,
            chat=settings.format == "chat",
            max_tokens=settings.max_tokens,
            system=data.task.system,
        )
        print(
            f"{task} {settings.split}: {len(rows)} rows from {data.source} "
            f"({data.dropped} without an answer and {long} over {settings.max_tokens} tokens left out)",
            file=sys.stderr,
        )
        every += rows
    return every


def train_scalenet(config: TrainScaleNet, *, resume: bool = False) -> Path:
    """`ephemera train scalenet`: returns the folder of the trained network, `<output>/network`."""
    torch.manual_seed(config.optimizer.seed)
    folder = Path(config.output)
    lora = config.model.lora
    init = load_init(config.init, **lora.model_dump(exclude={"target_modules", "layers"}))
    accelerator, backbone = open_run(config, folder, targets_of(init) or lora.target_modules, lora.layers)
    init = place_init(init, backbone)
    objective = settled_objective(config.objective)
    objective.check(backbone)
    if objective.lens is not None:
        objective.lens.to(backbone.device)
    if config.scalenet.sparsity and config.scalenet.granularity == "step":
        raise ValueError(
            "scalenet.sparsity drops projections one by one; a step-wise network has one rate for all of them."
        )
    rows, validation = load_rows(backbone, config.train), load_rows(backbone, config.validation)
    config = _settle(config, folder, backbone, init, validation, accelerator, objective, resume=resume)
    assert config.scalenet.base_rates is not None
    network = ScaleNet(
        hidden_size=backbone.hidden_size,
        projections=len(backbone.projections),
        trained_for=describe(backbone),
        **config.scalenet.model_dump(exclude={"max_steps", "base_rates", "sparsity"}),
        base_rates=config.scalenet.base_rates,
        objective=objective,
    )
    sample = random.Random(config.optimizer.seed).sample(list(rows), min(NORMALIZATION_PROMPTS, len(rows)))
    network.fit_normalization(training_representations(backbone, sample, exit_layer=objective.exit_layer).cpu())
    network.to(backbone.device)
    trainee = ScaleNetTrainee(
        backbone,
        init,
        network,
        validation=validation,
        validation_steps=config.validation_steps,
        batch_size=config.optimizer.batch_size,
        clip_prompt=config.optimizer.clip_prompt,
        seed=config.optimizer.seed,
        sparsity=config.scalenet.sparsity,
        tune_lens=config.objective.tune_lens,
    )
    schedule = Schedule(config.checkpoint_every, config.validate_every)
    train(trainee, rows, config.optimizer, schedule, folder, accelerator, resume=resume)
    if objective.lens is not None:
        objective.lens.requires_grad_(False)
    if accelerator.is_main_process:
        if config.scalenet.sparsity:
            backbone, network = _dropped(backbone, trainee, sample[:AVERAGED_PROMPTS], folder)
        network.save_pretrained(folder / "network")
        write_card(folder / "network", folder, config, describe(backbone), rows=len(rows), validated=len(validation))
        if config.scalenet.granularity == "layer":
            average = averaged_rate(
                backbone, init, network, sample[:AVERAGED_PROMPTS], batch_size=config.optimizer.batch_size
            )
            average.save_pretrained(folder / "network" / "averaged", lens="..")
    accelerator.wait_for_everyone()
    accelerator.end_training()  # closes the trackers, and ends the process group: nothing may wait after it
    return folder / "network"


def settled_objective(settings: ObjectiveSettings) -> Objective:
    """With the exit layer's own lens, where one is named."""
    if settings.lens is not None and settings.exit_layer is None:
        raise ValueError("objective.lens is for an early exit; give objective.exit_layer, or no lens.")
    if settings.tune_lens and settings.lens is None:
        raise ValueError("objective.tune_lens trains a lens: give objective.lens, where it starts.")
    lens = None
    if settings.lens is not None and settings.exit_layer is not None:
        lens = load_lens(settings.lens).only(settings.exit_layer)
    return Objective(settings.exit_layer, lens, settings.tokens, settings.vocabulary, settings.template)


def _dropped(
    backbone: Backbone, trainee: ScaleNetTrainee, rows: Sequence[Encoded], folder: Path
) -> tuple[Backbone, ScaleNet]:
    """Model and network without the projections whose rates vanished; what that cost is kept in dropped.json."""
    average = averaged_rate(backbone, trainee.init, trainee.rates, rows, batch_size=trainee.batch_size)
    keep_M = lasting(average, trainee.rates)
    if not bool(keep_M.any()):
        raise ValueError("every rate vanished: lower scalenet.sparsity.")
    network = trainee.rates.pruned(keep_M)
    assert network.trained_for is not None
    names = network.trained_for["projections"]
    before, names_before = trainee.validate(), [p.name for p in backbone.projections]
    backbone = backbone.with_adapters_on(backbone.target_modules, backbone.adapted_layers, names)
    trainee.backbone, trainee.rates = backbone, network
    report = {
        "kept": names,
        "dropped": [name for name in names_before if name not in names],
        "validation_before": before,
        "validation_after": trainee.validate(),
    }
    (folder / "dropped.json").write_text(json.dumps(report, indent=1) + "\n")
    print(f"{len(report['dropped'])} of {len(names_before)} projections left the loop", file=sys.stderr)
    return backbone, network


def _settle(
    config: TrainScaleNet,
    folder: Path,
    backbone: Backbone,
    init: Init,
    validation: Sequence[Encoded],
    accelerator: Accelerator,
    objective: Objective,
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
            normalize=config.scalenet.normalize,
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
