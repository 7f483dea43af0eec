"""Do a prompt's two halves tell whether its adapter will harm the answer? AUROC beside the gate's own signals.

    python -m benchmarks.gate_candidates runs/universal-gate [--limit 300] [--output docs/results/universal/gate-candidates.json]

The folder is that of `ephemera train gate`: its rows, its network, and what each row's adapter did to its answer. Each
prompt's own words, without what all prompts of the run share, are cut in the middle:

- `agreement`: the cosine of the two halves' gradients by B;
- `rated agreement`: their inner product, each projection's times its rate: what a step on one half takes off the other's
  loss, to first order;
- `held-out drop`: what a step on one half, at the prompt's own rates, does take off the other's, mean of both ways.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterable, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ephemera.adapt import adapt
from ephemera.batch import ScoredTokens, TokenBatch, pad, scored_tokens
from ephemera.config import TrainGate, load_config
from ephemera.gate import SHARES, SIGNALS
from ephemera.inits import ZeroInit
from ephemera.llm.frozen_lm import FrozenLM
from ephemera.llm.load import load_backbone
from ephemera.lora import LoraBatch
from ephemera.rates import Rate, adapted_by, load_rate, place_rate
from ephemera.rows import load_rows
from ephemera.saving import json_text
from ephemera.scoring import Encoded, batches_of
from ephemera.training.gate import auroc
from ephemera.training.gate_rows import Measured, read_measured

CANDIDATES = ("agreement", "rated agreement", "held-out drop")
DRAWS = 1000


def shared_ends(prompts: Sequence[Sequence[int]]) -> tuple[int, int]:
    """How many tokens all prompts begin and end with alike: the template's."""

    def alike(columns: Iterable[tuple[int, ...]]) -> int:
        return len(list(takewhile(lambda column: len(set(column)) == 1, columns)))

    return alike(zip(*prompts, strict=False)), alike(zip(*(prompt[::-1] for prompt in prompts), strict=False))


def halves_of(batch: TokenBatch, first: int, last: int) -> tuple[ScoredTokens, ScoredTokens]:
    """Of a batch padded on the left: each row's own tokens, cut in the middle."""
    T = batch.ids_BT.shape[1]
    places_BT = torch.arange(T)[None].expand(len(batch.lengths), -1)
    starts_B1 = T - torch.tensor(batch.lengths)[:, None] + first
    middles_B1 = (starts_B1 + T - last) // 2
    early_BT = (places_BT >= starts_B1) & (places_BT < middles_B1)
    late_BT = (places_BT >= middles_B1) & (places_BT < T - last)
    return scored_tokens(batch, early_BT), scored_tokens(batch, late_BT)


def half_step(backbone: FrozenLM, batch: TokenBatch, lora: LoraBatch, tokens: ScoredTokens) -> LoraBatch:
    """The gradient of one half's NLL."""
    at = lora.leaves()
    with torch.enable_grad():
        nll_B = tokens.means(
            backbone.token_nll(tokens.states(backbone.forward(batch, at).hidden_BTD), tokens.targets_N)
        )
        return at.with_buffers(*torch.autograd.grad(nll_B.sum(), at.buffers, materialize_grads=True, allow_unused=True))


@torch.no_grad()
def half_nll(backbone: FrozenLM, batch: TokenBatch, lora: LoraBatch, tokens: ScoredTokens) -> Tensor:
    return tokens.means(backbone.token_nll(tokens.states(backbone.forward(batch, lora).hidden_BTD), tokens.targets_N))


def candidates(backbone: FrozenLM, rate: Rate, ids: Sequence[list[int]], ends: tuple[int, int], seed: int) -> Tensor:
    """`CANDIDATES` [B,3] of some prompts."""
    batch = pad(ids, pad_id=backbone.pad_id)
    start = ZeroInit()(backbone, batch, [seed] * len(ids))
    rates_BM = adapt(backbone, batch, start, rate, 1).rates_BKM[:, 0].detach()
    parts = halves_of(batch, *ends)
    grads = [half_step(backbone, batch, start, part) for part in parts]
    inner_BM = grads[0].dot_BM(grads[1])
    norms_B = grads[0].dot_BM(grads[0]).sum(1).sqrt() * grads[1].dot_BM(grads[1]).sum(1).sqrt()
    drops = []
    for mine, other in ((0, 1), (1, 0)):
        stepped = start.step(grads[mine], rates_BM)
        drops.append(half_nll(backbone, batch, start, parts[other]) - half_nll(backbone, batch, stepped, parts[other]))
    agreement_B = inner_BM.sum(1) / norms_B.clamp(min=1e-12)
    return torch.stack([agreement_B, (inner_BM * rates_BM).sum(1), (drops[0] + drops[1]) / 2], 1)


def report(measured: Measured, rows: list[int], told_NC: Tensor, config: TrainGate) -> dict[str, Any]:
    """AUROC of each candidate and of the gate's signals on the same rows, with 95 % bootstrap intervals."""
    at = SHARES.index(config.most)
    scores = {name: told_NC[:, i] for i, name in enumerate(CANDIDATES)}
    scores |= {name: measured.signals_NF[rows, i] for i, name in enumerate(SIGNALS)}
    scores["first-token KL"] = measured.kl_NS[rows, at]
    change_N = measured.change_NS[rows, at]
    generator = torch.Generator().manual_seed(config.seed)
    draws = [torch.randint(len(rows), (len(rows),), generator=generator) for _ in range(DRAWS)]
    found: dict[str, Any] = {}
    for name, score_N in scores.items():
        found[name] = {}
        for what, positive_N in (("harmed", change_N > config.harm), ("helped", change_N < -config.harm)):
            drawn = [auroc(score_N[i], positive_N[i]) for i in draws]
            known = torch.tensor([x for x in drawn if x is not None])
            low, high = known.quantile(torch.tensor([0.025, 0.975])).tolist() if len(known) else (None, None)
            found[name][what] = {"auroc": auroc(score_N, positive_N), "low": low, "high": high}
    return {
        "rows": len(rows),
        "harmed": (change_N > config.harm).sum().item(),
        "helped": (change_N < -config.harm).sum().item(),
        "share": config.most,
        "auroc": found,
    }


def measure(folder: Path, limit: int) -> dict[str, Any]:
    config = load_config(TrainGate, str(folder / "config.yaml"))
    rate = load_rate(config.network)
    backbone = load_backbone(config.model.name, dtype=config.model.dtype, device="cpu", **adapted_by(rate))
    place_rate(rate, backbone)
    rows: list[Encoded] = load_rows(backbone, config.data)
    measured = read_measured(folder / "seen.safetensors", rows)
    ends = shared_ends([row.prompt for row in rows])
    place = {(task, id): i for i, (task, id) in enumerate(zip(measured.tasks, measured.ids, strict=True))}
    drawn = random.Random(config.seed).sample(rows, min(limit, len(rows)))
    found: list[Tensor] = []
    order: list[int] = []
    for some in batches_of(backbone, drawn, config.batch_size):
        found.append(candidates(backbone, rate, [row.prompt for row in some], ends, config.seed))
        order += [place[row.task, row.id] for row in some]
    return {"template_tokens": ends, **report(measured, order, torch.cat(found), config)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="what `ephemera train gate` wrote")
    parser.add_argument("--limit", type=int, default=300, help="rows, drawn at random")
    parser.add_argument("--output", type=Path, help="a JSON file")
    options = parser.parse_args()
    result = measure(options.folder, options.limit)
    if options.output:
        options.output.write_text(json_text(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
