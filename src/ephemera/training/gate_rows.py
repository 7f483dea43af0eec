"""What a gate is settled from: labelled rows under a network, their answers' NLL with each share of the adapter."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from ephemera.adaptation import Adaptation
from ephemera.batch import TokenBatch
from ephemera.begin import adapt_from, from_base
from ephemera.gate import SHARES
from ephemera.guard import kl, log_p, read_with, signals
from ephemera.inits import LoraGenerator, ZeroInit
from ephemera.llm.frozen_lm import FrozenLM
from ephemera.prepared import prepare
from ephemera.rates import PerProjectionRate, ScaleNet, place_rate
from ephemera.scoring import Encoded, batches_of, parts_of, prompt_batch


@dataclass(frozen=True, eq=False)
class Measured:
    """N rows under a network: answer NLL of the base model and with each share S of the adapter, and what the prompt tells.

    `kl_NS`: KL(adapted || base) of the first token. `signals_NF`: the gate's signals.
    """

    tasks: list[str]
    ids: list[str]
    base_N: Tensor
    nll_NS: Tensor
    kl_NS: Tensor
    signals_NF: Tensor
    h_NH: Tensor

    @property
    def tensors(self) -> dict[str, Tensor]:
        names = ("base_N", "nll_NS", "kl_NS", "signals_NF", "h_NH")
        return {name: getattr(self, name).contiguous() for name in names}

    @property
    def change_NS(self) -> Tensor:
        return self.nll_NS - self.base_N[:, None]

    def kept_NS(self, risk_NS: Tensor | None, threshold: float, tau: float, most: float) -> Tensor:
        """Which share [N,S] each row keeps, one-hot: the largest that risk and trust region allow; none: no entry.

        Without a risk, the largest that the trust region allows.
        """
        allowed_NS = (self.kl_NS <= tau) & self.kl_NS.isfinite() & (torch.tensor(SHARES) <= most)
        if risk_NS is not None:
            allowed_NS &= risk_NS <= threshold
        return allowed_NS & (allowed_NS.int().cumsum(1) == 1)

    def change_N(self, kept_NS: Tensor) -> Tensor:
        return torch.where(kept_NS, self.change_NS, 0.0).sum(1)


def read_measured(path: Path, rows: Sequence[Encoded]) -> Measured:
    """What an earlier run measured; ValueError if it was on other rows."""
    with safe_open(path, "pt") as file:
        told = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    ids = json.loads(told["ids"])
    if sorted(ids) != sorted(row.id for row in rows):
        raise ValueError(f"{path} was measured on other rows; give another output, or remove it.")
    return Measured(json.loads(told["tasks"]), ids, **tensors)


class Rated:
    """Prompts adapted by one step of a trained network, from the zero start."""

    def __init__(self, backbone: FrozenLM, network: ScaleNet | PerProjectionRate, seed: int):
        self.backbone, self.network, self.seed = backbone, place_rate(network, backbone), seed

    def __call__(self, rows: Sequence[Encoded]) -> tuple[TokenBatch, Adaptation]:
        parts = [[row.prompt for row in rows[part]] for part in parts_of(self.backbone, rows)]
        ready = prepare(self.backbone, ZeroInit(), parts, [self.seed] * len(rows), objective=self.network.objective)
        return ready.batch, ready.adapted(self.network)


class Generated:
    """Prompts with the adapters that a generator makes of them."""

    def __init__(self, backbone: FrozenLM, generator: LoraGenerator):
        generator.gate = None  # an earlier one
        self.backbone, self.generator = backbone, generator.placed(backbone)

    def __call__(self, rows: Sequence[Encoded]) -> tuple[TokenBatch, Adaptation]:
        batch = prompt_batch(self.backbone, rows)
        made, _ = adapt_from(self.backbone, batch, self.generator, [0] * len(rows), None, 0, "answer")
        return batch, from_base(made, batch)


@torch.no_grad()
def measure(
    backbone: FrozenLM,
    adapted: Callable[[Sequence[Encoded]], tuple[TokenBatch, Adaptation]],
    rows: Sequence[Encoded],
    *,
    batch_size: int,
) -> Measured:
    """Adapt to each row once, and score its answer with each share of the adapter."""
    tasks: list[str] = []
    ids: list[str] = []
    found: list[list[Tensor]] = []
    for some in batches_of(backbone, rows, batch_size):
        batch, made = adapted(some)
        answers = [row.answer for row in some]
        assert made.reading is not None
        assert made.h_BH is not None
        base_BV = log_p(backbone, made.reading.hidden_BTD[:, -1])
        nll, kls = [], []
        for share in (*SHARES, 0.0):
            read = read_with(backbone, batch, made, share)
            nll.append(read.answer_nll(answers))
            kls.append(kl(log_p(backbone, read.hidden_BTD[:, -1]), base_BV))
        nll_BS, kl_BS = torch.stack(nll, 1), torch.stack(kls, 1)
        found.append([nll_BS[:, -1], nll_BS[:, :-1], kl_BS[:, :-1], signals(base_BV, batch, made), made.h_BH])
        tasks += [row.task for row in some]
        ids += [row.id for row in some]
    return Measured(tasks, ids, *(torch.cat(column).cpu() for column in zip(*found, strict=True)))
