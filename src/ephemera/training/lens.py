"""Training a tuned lens: at each exit layer, the final layer's next-token distribution on unlabelled prompts."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ephemera.batch import TokenBatch
from ephemera.config import TrainLens
from ephemera.early_exit.lens import Lens
from ephemera.llm.frozen_lm import FrozenLM, describe
from ephemera.llm.processes import dealt, of_all
from ephemera.prompt_loss import PromptLoss
from ephemera.rows import load_rows
from ephemera.scoring import Encoded, batches_of, prompt_batch
from ephemera.training.card import write_lens_card
from ephemera.training.loop import Schedule, train
from ephemera.training.run import begin, kept_settings, open_run

SCALE_PROMPTS = 64
MOST_TOKENS = 512  # of a batch: whole distributions over the vocabulary are held


class LensTrainee:
    """All exit layers at once, from one forward pass: KL(final || lens), summed over layers (Belrose et al., Eq. 8)."""

    def __init__(
        self,
        backbone: FrozenLM,
        network: Lens,
        *,
        validation: Sequence[Encoded],
        batch_size: int,
        token_share: float,
        seed: int,
    ):
        self.backbone = backbone
        self.network = network
        self.validation = validation
        self.batch_size = batch_size
        self.token_share = token_share
        self.seed = seed

    @property
    def learning_rates(self) -> dict[str, float]:
        return {"": 1.0}

    def backward(self, rows: Sequence[Encoded], step: int) -> dict[str, float]:
        final_NV, states = self._read(rows, f"{self.seed}:{step}")
        report = {}
        for layer, h_ND in states.items():
            kl = divergence(final_NV, self._logits(h_ND, layer, self.network)).mean()
            kl.backward()
            report[f"kl_{layer}"] = kl.item()
        return report

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Mean KL per token in nats at each exit layer, and that of the untrained lens."""
        found: list[dict[str, Tensor]] = []
        for i, rows in dealt(list(enumerate(batches_of(self.backbone, self.validation, self.batch_size)))):
            final_NV, states = self._read(rows, f"validation:{i}")
            found.append({})
            for layer, h_ND in states.items():
                for name, lens in (("", self.network), ("untrained_", None)):
                    kl_N = divergence(final_NV, self._logits(h_ND, layer, lens))
                    found[-1][f"validation_kl_{name}{layer}"] = kl_N.cpu()
        batches = of_all(found)
        return {key: torch.cat([batch[key] for batch in batches]).mean().item() for key in batches[0]}

    @torch.no_grad()
    def _read(self, rows: Sequence[Encoded], draw: str) -> tuple[Tensor, dict[int, Tensor]]:
        """Final log-probabilities [N,V] of some tokens, and their states [N,D] after each exit layer."""
        batch = prompt_batch(self.backbone, rows)
        places_N = chosen_tokens(batch, self.token_share, draw)
        hidden_BTD, states = self.backbone.states(batch, self.network.exit_layers)
        final_NV = self.backbone.logits(hidden_BTD.flatten(0, 1)[places_N]).float().log_softmax(-1)
        return final_NV, {layer: h_BTD.flatten(0, 1)[places_N] for layer, h_BTD in states.items()}

    def _logits(self, h_ND: Tensor, layer: int, lens: Lens | None) -> Tensor:
        """The maps are small beside what they are added to: float32, whatever the backbone's dtype."""
        moved_ND = h_ND if lens is None else lens(h_ND.float(), layer).to(h_ND.dtype)
        return self.backbone.logits(PromptLoss(exit_layer=layer).states(self.backbone, moved_ND))


def divergence(final_NV: Tensor, logits_NV: Tensor) -> Tensor:
    """KL(final || lens) [N] in nats, from the one's log-probabilities and the other's logits."""
    return F.kl_div(logits_NV.float().log_softmax(-1), final_NV, log_target=True, reduction="none").sum(-1)


def chosen_tokens(batch: TokenBatch, share: float, draw: str) -> Tensor:
    """Flat places [N] of a random share of the batch's real tokens, the same for the same `draw`."""
    places = batch.mask_BT.flatten().nonzero()[:, 0].tolist()
    count = min(MOST_TOKENS, max(1, round(share * len(places))))
    return torch.tensor(sorted(random.Random(draw).sample(places, count)), device=batch.ids_BT.device)


@torch.no_grad()
def fit_scale(backbone: FrozenLM, lens: Lens, rows: Sequence[Encoded], batch_size: int) -> None:
    """Each feature's root mean square over the prompts' tokens, at each exit layer."""
    squares_ED, tokens = torch.zeros_like(lens.scale_ED), 0
    for batch_rows in batches_of(backbone, rows, batch_size):
        batch = prompt_batch(backbone, batch_rows)
        states = backbone.states(batch, lens.exit_layers)[1]
        squares_ED += torch.stack([h[batch.mask_BT].float().square().sum(0) for h in states.values()])
        tokens += int(batch.mask_BT.sum())
    lens.scale_ED.copy_((squares_ED / tokens).sqrt().clamp(min=1e-6))


def train_lens(config: TrainLens, *, resume: bool = False) -> Path:
    """`ephemera train lens`: returns the folder of the trained lens, `<output>/network`."""
    torch.manual_seed(config.optimizer.seed)
    folder = Path(config.output)
    accelerator, backbone = open_run(config, folder)
    for layer in config.exit_layers:
        if layer > backbone.layers:
            raise ValueError(f"exit_layers names layer {layer}; {backbone.name} has {backbone.layers}.")
        PromptLoss(exit_layer=backbone.layers).check(backbone)
    rows, validation = load_rows(backbone, config.train), load_rows(backbone, config.validation)
    kept = kept_settings(config, folder) if resume else None
    if kept is None:
        begin(config, folder, accelerator)
    config = kept or config
    lens = Lens(
        hidden_size=backbone.hidden_size, exit_layers=sorted(set(config.exit_layers)), trained_for=describe(backbone)
    ).to(backbone.device)
    sample = random.Random(config.optimizer.seed).sample(list(rows), min(SCALE_PROMPTS, len(rows)))
    fit_scale(backbone, lens, sample, config.optimizer.batch_size)
    trainee = LensTrainee(
        backbone,
        lens,
        validation=validation,
        batch_size=config.optimizer.batch_size,
        token_share=config.token_share,
        seed=config.optimizer.seed,
    )
    schedule = Schedule(config.checkpoint_every, config.validate_every)
    train(trainee, rows, config.optimizer, schedule, folder, accelerator, resume=resume)
    if accelerator.is_main_process:
        lens.save_pretrained(folder / "network")
        write_lens_card(
            folder / "network", folder, config, describe(backbone), rows=len(rows), validated=len(validation)
        )
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return folder / "network"
