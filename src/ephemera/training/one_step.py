"""Training rates of one step with reach `answer`: each prompt is prepared once, several passes cost its answer's tokens.

From B = 0 a prompt's gradient does not depend on the rates, nor do its keys and values where adapters act on the answer only.
So the meta-gradient (LDTTA Eq. 17-19) stays exact while the prompts of a chunk are read once for all its passes.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ephemera.adapt import meta_gradient
from ephemera.inits import ZeroInit
from ephemera.llm.frozen_lm import FrozenLM
from ephemera.llm.processes import dealt, of_all
from ephemera.prepared import Prepared, prepare
from ephemera.rates import PerProjectionRate, ScaleNet
from ephemera.scoring import Encoded, batches_of, parts_of
from ephemera.training.loop import BUCKET

HARM = 0.05  # nats per answer token by which an answer must have become less likely to count as harmed


@dataclass(frozen=True, eq=False)
class Scored:
    """Prepared rows, and the NLL [B] of their answers under the base model."""

    rows: Sequence[Encoded]
    prepared: Prepared
    base_B: Tensor


@dataclass(frozen=True)
class Plan:
    """Row indices of each optimiser step, and the chunk that they lie in."""

    batches: list[list[int]]
    chunks: list[int]


def plan_of(
    rows: Sequence[Encoded], sizes: Sequence[int], *, batch_size: int, samples: int, passes: int, memory: int, seed: int
) -> Plan:
    """Chunks of shuffled rows whose `sizes` (bytes) fit in `memory`; `passes` over each chunk's batches, in new orders.

    A pure function of its arguments, so that a resumed run sees the same batches. Rows of a batch have similar lengths.
    """
    largest = max(range(len(rows)), key=lambda i: sizes[i])
    if sizes[largest] > memory:
        raise ValueError(
            f"a prompt of {len(rows[largest].prompt)} tokens needs {sizes[largest] / 1e9:.2f} GB to be kept, and "
            f"optimizer.memory_gb allows {memory / 1e9:.2f}. Raise it, or leave such rows out with train.max_tokens."
        )
    batches: list[list[int]] = []
    chunks: list[int] = []
    given, epoch, chunk = 0, 0, 0
    while given < samples:
        order = random.Random(f"{seed}:{epoch}").sample(range(len(rows)), len(rows))
        while order and given < samples:
            held, room = [], memory
            while order and sizes[order[-1]] <= room and given + passes * len(held) < samples:
                room -= sizes[order[-1]]
                held.append(order.pop())
            for n in range(passes):
                made: list[list[int]] = []
                for start in range(0, len(held), BUCKET * batch_size):
                    bucket = sorted(held[start : start + BUCKET * batch_size], key=lambda i: len(rows[i].prompt))
                    made += [bucket[i : i + batch_size] for i in range(0, len(bucket), batch_size)]
                random.Random(f"{seed}:{chunk}:{n}").shuffle(made)
                batches += made
                chunks += [chunk] * len(made)
            given += passes * len(held)
            chunk += 1
        epoch += 1
    return Plan(batches, chunks)


class OneStepTrainee:
    """Rates under `loop.train`, for K = 1 from B = 0 with reach `answer`. A prompt's A is drawn anew in each chunk."""

    def __init__(
        self,
        backbone: FrozenLM,
        init: ZeroInit,
        network: ScaleNet | PerProjectionRate,
        *,
        plan: Plan,
        validation: Sequence[Encoded],
        batch_size: int,
        clip_prompt: float,
        harm_weight: float,
        seed: int,
    ):
        self.backbone, self.init, self.network = backbone, init, network
        self.plan, self.clip_prompt, self.harm_weight, self.seed = plan, clip_prompt, harm_weight, seed
        self.chunk = -1
        self.held: dict[tuple[int, ...], Scored] = {}
        self.validation = validation
        self.batch_size = batch_size
        self.checked: list[Scored] | None = None

    def with_network(self, network: ScaleNet | PerProjectionRate) -> OneStepTrainee:
        """The same training of another network."""
        other = copy.copy(self)
        other.network, other.held = network, {}
        return other

    def take_over(self, other: OneStepTrainee) -> None:
        """Go on with the prompts that another network's training has prepared."""
        self.chunk, self.held, self.checked = other.chunk, other.held, other.checked

    @property
    def learning_rates(self) -> dict[str, float]:
        return {"": 1.0}

    def backward(self, rows: Sequence[Encoded], step: int) -> dict[str, float]:
        if self.plan.chunks[step] != self.chunk:
            self.chunk = self.plan.chunks[step]
            self.held.clear()
        key = tuple(map(id, rows))  # the very rows, which are held: two tasks may have rows of one name
        if key not in self.held:
            seed = self.seed * 1_000_003 + self.chunk
            self.held[key] = scored(self.backbone, self.init, rows, self.network, seed)
        return one_step_backward(self.network, self.held[key], clip=self.clip_prompt, harm_weight=self.harm_weight)

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Mean answer NLL before and after, the share of rows harmed, and the deviation of log rates over prompts."""
        if self.checked is None:  # kept for the whole run
            groups = dealt(batches_of(self.backbone, self.validation, self.batch_size))
            self.checked = [scored(self.backbone, self.init, rows, self.network, 0) for rows in groups]
        found = []
        for some in self.checked:
            rates_BM = some.prepared.rates_BM(self.network)
            lora = some.prepared.step(rates_BM)
            after_B = some.prepared.answer_nll([row.answer for row in some.rows], lora)
            found.append((some.base_B.cpu(), after_B.cpu(), rates_BM.detach().cpu(), [row.task for row in some.rows]))
        base, after, rates, of_tasks = zip(*of_all(found), strict=True)
        base_N, after_N, log_rates_NM = torch.cat(base), torch.cat(after), torch.cat(rates).clamp(min=1e-12).log()
        tasks = [task for some in of_tasks for task in some]
        report = {
            "validation_nll_0": base_N.mean().item(),
            "validation_nll_1": after_N.mean().item(),
            "validation_harmed": (after_N > base_N + HARM).float().mean().item(),
            "validation_spread_prompts_1": log_rates_NM.std(0).mean().item(),
            "validation_spread_projections_1": log_rates_NM.mean(0).std(correction=0).item(),
        }
        for task in sorted(set(tasks)):
            mine = [i for i, other in enumerate(tasks) if other == task]
            report[f"gain {task}"] = (after_N[mine] - base_N[mine]).mean().item()
            report[f"harmed {task}"] = (after_N[mine] > base_N[mine] + HARM).float().mean().item()
        return report


def scored(
    backbone: FrozenLM, init: ZeroInit, rows: Sequence[Encoded], network: ScaleNet | PerProjectionRate, seed: int
) -> Scored:
    parts = [[row.prompt for row in rows[part]] for part in parts_of(backbone, rows)]
    made = prepare(backbone, init, parts, [seed] * len(rows), objective=network.objective)
    with torch.no_grad():
        return Scored(rows, made, made.answer_nll([row.answer for row in rows], None))


def one_step_backward(
    network: ScaleNet | PerProjectionRate, some: Scored, *, clip: float | None, harm_weight: float = 0.0
) -> dict[str, float]:
    """Leave the batch's mean meta-gradient in the network (LDTTA Eq. 17-19): one pass over the answers' tokens.

    `harm_weight`: an answer that became less likely than the base model has it counts so much more.
    """
    prepared = some.prepared
    with torch.enable_grad():
        rates_BM = prepared.rates_BM(network)
        stepped = prepared.step(rates_BM.detach())
        B_BN = stepped.B_BN.requires_grad_()
        moved = stepped.with_buffers(stepped.A_BN, B_BN)
        nll_B = prepared.answer_nll([row.answer for row in some.rows], moved)
        (dB_BN,) = torch.autograd.grad(nll_B.sum(), B_BN)
    grads = prepared.made.grads[0]
    drates_BM = meta_gradient(grads.with_buffers(grads.A_BN, dB_BN), [grads])[:, 0]
    usable_B = ~prepared.made.fallback_B & nll_B.isfinite() & drates_BM.isfinite().all(1)
    drates_BM = torch.where(usable_B[:, None], drates_BM, 0.0)
    drates_BM = drates_BM * (1 + harm_weight * (nll_B > some.base_B))[:, None]
    if clip is not None:
        norm_B = (drates_BM * rates_BM.detach()).norm(dim=1)
        drates_BM = drates_BM * (clip / norm_B.clamp(min=clip))[:, None]
    rates_BM.backward(drates_BM / len(nll_B))
    change_B = (nll_B.detach() - some.base_B)[usable_B]
    return {
        "K": 1,
        "nll": nll_B[usable_B].mean().item() if bool(usable_B.any()) else float("nan"),
        "change": change_B.mean().item(),
        "harmed": (change_B > HARM).float().mean().item(),
        "non_finite": len(some.rows) - int(usable_B.sum()),
    }
