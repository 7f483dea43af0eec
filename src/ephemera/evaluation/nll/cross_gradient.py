"""The cross-gradient <g_x, g_y> of LDTTA Eq. 5: does a step on the prompt point where the answer's loss falls?"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.progress import track
from torch import Tensor

from ephemera.begin import adapt_from, reach_of
from ephemera.evaluation.shared.progress import console
from ephemera.evaluation.shared.records import CROSS_GRADIENTS, CrossGradient, RecordFile
from ephemera.inits import Init
from ephemera.llm.frozen_lm import FrozenLM
from ephemera.lora import LoraBatch
from ephemera.made_for import Reach
from ephemera.rates import Rate
from ephemera.scoring import Encoded, answer_gradient, parts_of, prompt_batch


def cross_gradient(
    backbone: FrozenLM, rows: Sequence[Encoded], lora: LoraBatch, *, reach: Reach = "all"
) -> tuple[Tensor, Tensor, Tensor]:
    """<g_x, g_y> [B,M] of each prompt and projection at these adapters, |g_x| [B,M] and |g_y| [B,M] (LDTTA Eq. 5).

    g_x is the gradient of the prompt's mean NLL by the projection's A and B, g_y that of the answer's mean NLL given the
    prompt; both signs of Eq. 5's log-likelihoods are turned, so the product is the same up to the two token counts. With
    reach `answer` the adapters act from the last prompt token on as far as g_y goes.
    """
    batch, at = prompt_batch(backbone, rows), lora.leaves()
    with torch.enable_grad():
        nll_B = backbone.mean_nll(backbone.forward(batch, at).hidden_BTD, batch)
        flat = torch.autograd.grad(nll_B.sum(), at.buffers, allow_unused=True, materialize_grads=True)
    of_prompt = at.with_buffers(*flat)
    _, of_answer = answer_gradient(backbone, rows, lora, reach=reach)
    norms = (of_prompt.dot_BM(of_prompt).sqrt(), of_answer.dot_BM(of_answer).sqrt())
    return of_prompt.dot_BM(of_answer), *norms


def write_cross_gradients(
    folder: Path, backbone: FrozenLM, init: Init, rule: Rate, batches: Sequence[Sequence[Encoded]], *, seed: int
) -> None:
    """cross_gradient.jsonl: a line for each prompt at its start adapter; a stopped run goes on where it was."""
    alike = backbone.parallel in ("tensor", "fsdp")
    file, reach = RecordFile(folder, CrossGradient, name=CROSS_GRADIENTS, alike=alike), reach_of(init, rule)
    for rows in track(batches, "cross-gradients", console=console(), disable=not sys.stderr.isatty()):
        if file.has(row.id for row in rows):
            continue
        for part in parts_of(backbone, rows):
            some = rows[part]
            start, _ = adapt_from(backbone, prompt_batch(backbone, some), init, [seed] * len(some), None, 0, reach)
            found = cross_gradient(backbone, some, start.lora, reach=reach)
            cross, of_prompt, of_answer = ([[float(f"{x:.6g}") for x in row] for row in t.tolist()] for t in found)
            file.add(
                [
                    CrossGradient(id=row.id, cross=cross[b], prompt_norm=of_prompt[b], answer_norm=of_answer[b])
                    for b, row in enumerate(some)
                ]
            )
    file.gather()
