"""Cross-gradients against autograd through merged weights, and against a step that is as good as none."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor

from ephemera.config import Evaluate, check_config
from ephemera.evaluation.nll.cross_gradient import cross_gradient
from ephemera.evaluation.nll.cross_report import read_cross, spearman
from ephemera.evaluation.nll.grid import evaluate
from ephemera.evaluation.nll.report import read_run, write_report
from ephemera.evaluation.shared.records import CROSS_GRADIENTS, CrossGradient, RecordFile, read_records
from ephemera.inits import ZeroInit
from ephemera.llm.frozen_lm import FrozenLM
from ephemera.llm.load import load_backbone
from ephemera.lora import LoraBatch
from ephemera.rates import PerProjectionRate
from ephemera.scoring import Encoded, answer_nll, prompt_batch
from reference import close, merged_weights, slow_nll
from tiny_models import random_ids, random_lora, tiny_backbone

ROWS = [Encoded(str(i), p, random_ids([1 + i], seed=4)[0]) for i, p in enumerate(random_ids([5, 7, 9]))]


def slow(backbone: FrozenLM, row: Encoded, lora: LoraBatch, b: int) -> tuple[Tensor, Tensor, Tensor]:
    """[M] each: two backward passes through merged weights, and the inner product of each projection's A and B."""

    def gradient(ids: list[int], first: int) -> list[Tensor]:
        leaves = [t[b : b + 1].detach().requires_grad_() for t in lora.tensors]
        of_row = LoraBatch.of(
            lora.projections,
            leaves[: len(leaves) // 2],
            leaves[len(leaves) // 2 :],
            r=lora.r,
            lora_alpha=lora.lora_alpha,
        )
        loss = slow_nll(backbone.model, ids, first=first, weights=merged_weights(backbone, of_row, 0))
        return list(torch.autograd.grad(loss, leaves))

    g_x, g_y = gradient(row.prompt, 1), gradient(row.prompt + row.answer, len(row.prompt))
    M = len(lora.projections)

    def dot(a: list[Tensor], c: list[Tensor]) -> Tensor:
        return torch.stack([(a[m] * c[m]).sum() + (a[M + m] * c[M + m]).sum() for m in range(M)])

    return dot(g_x, g_y), dot(g_x, g_x).sqrt(), dot(g_y, g_y).sqrt()


@pytest.mark.parametrize("architecture", ["llama", "gpt_neox"])
@pytest.mark.parametrize("start", ["zero", "random"])
def test_it_is_the_inner_product_of_two_plain_gradients(architecture, start):
    backbone = tiny_backbone(architecture)
    lora = (
        random_lora(backbone, 3)
        if start == "random"
        else ZeroInit(init_std=0.3)(backbone, prompt_batch(backbone, ROWS), [0] * 3)
    )
    found = cross_gradient(backbone, ROWS, lora)
    assert found[0].shape == (3, len(backbone.projections))
    for b, row in enumerate(ROWS):
        for have_BM, want_M in zip(found, slow(backbone, row, lora, b), strict=True):
            close(have_BM[b], want_M)


@pytest.mark.parametrize("reach", ["all", "answer"])
def test_a_tiny_step_lowers_the_answers_loss_by_rate_times_cross_gradient(reach):
    backbone = tiny_backbone()
    start = ZeroInit(init_std=0.3)(backbone, prompt_batch(backbone, ROWS), [0] * 3)
    cross_BM, *_ = cross_gradient(backbone, ROWS, start, reach=reach)
    batch, at = prompt_batch(backbone, ROWS), start.leaves()
    nll_B = backbone.mean_nll(backbone.forward(batch, at).hidden_BTD, batch)
    grads = at.with_buffers(*torch.autograd.grad(nll_B.sum(), at.buffers, allow_unused=True, materialize_grads=True))
    rates_BM = 1e-5 * torch.rand(cross_BM.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    before_B, after_B = (answer_nll(backbone, ROWS, lora, reach=reach) for lora in (start, start.step(grads, rates_BM)))
    fall_B = (rates_BM * cross_BM).sum(1)
    torch.testing.assert_close(before_B - after_B, fall_B, rtol=2e-3, atol=0.0)
    assert fall_B.abs().min() > 1e-8


def test_spearman_is_scipys():
    random = np.random.default_rng(0)
    for ties in (False, True):
        x, y = random.normal(size=40), random.normal(size=40)
        x, y = (x.round(), (x + y).round()) if ties else (x, x + y)
        assert spearman(x, y) == pytest.approx(spearmanr(x, y)[0])
    assert spearman([1.0, 2.0, 3.0], [5.0, 5.0, 5.0]) == 0.0


@pytest.fixture
def setting(llama_folder: Path, tmp_path: Path) -> dict:
    rows = [{"prompt": f"The river {'runs ' * (i % 4)}past {i}", "answer": f"the mill {i % 3}"} for i in range(7)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    backbone = load_backbone(str(llama_folder), dtype="float32", device="cpu")
    rate = PerProjectionRate(projections=len(backbone.projections), base_rates=[0.01])
    rate.save_pretrained(tmp_path / "network")
    return {
        "model": {"name": str(llama_folder), "dtype": "float32", "device": "cpu"},
        "data": {"task": "own", "source": str(tmp_path / "rows.jsonl"), "limit": None},
        "layerwise": str(tmp_path / "network"),
        "methods": ["none", "layerwise"],
        "steps": [0, 1],
        "generate": [],
        "batch_size": 3,
        "output": str(tmp_path / "run"),
    }


def test_a_run_writes_them_and_the_report_shows_them(setting, monkeypatch):
    plain = evaluate(check_config(Evaluate, setting))
    write_report(plain)
    assert not (plain / CROSS_GRADIENTS).exists()
    assert "## Cross-gradient" not in (plain / "table.md").read_text()

    adds = RecordFile.add

    def add_once(self, records):
        adds(self, records)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RecordFile, "add", add_once)
        with pytest.raises(SystemExit):
            evaluate(check_config(Evaluate, {**setting, "cross_gradient": True}))
    folder = evaluate(check_config(Evaluate, {**setting, "cross_gradient": True}))
    records = read_records(folder / CROSS_GRADIENTS, CrossGradient)
    assert len({r.id for r in records}) == len(records) == 7
    write_report(folder)
    assert (folder / "figures" / "cross_gradient.png").read_bytes().startswith(b"\x89PNG")
    found = json.loads((folder / "results.json").read_text())["cross_gradient"]
    assert (found["K"], found["n"]) == (1, 7)
    assert [p["rate"] for p in found["projections"]] == pytest.approx([0.01] * len(found["projections"]))
    # Rates this small: the gain is the one foretold
    cross = read_cross(folder, *read_run(folder))
    assert cross is not None
    np.testing.assert_allclose(cross.gain_N, cross.predicted_N, rtol=0.1, atol=2e-6)
    assert found["spearman_gain"]["mean"] > 0.9
    means = np.mean([r.cross for r in records], 0)
    assert [p["cross"]["mean"] for p in found["projections"]] == pytest.approx(means, rel=1e-4)
    sides = [sum(p["cross"][end] * sign > 0 for p in found["projections"]) for end, sign in (("low", 1), ("high", -1))]
    assert [found[side]["n"] for side in ("above_zero", "below_zero")] == sides
    assert found["spearman_rate"] == {"q": 0.0, "v": 0.0, "all": 0.0}  # all rates are the same
    want = np.mean([sum(r.cross) for r in records])
    assert f"| all | {want:.3g}".replace("-", "−") in (folder / "table.md").read_text()


def test_lines_without_a_record_and_wild_numbers_are_left_out(setting):
    folder = evaluate(check_config(Evaluate, {**setting, "cross_gradient": True}))
    path = folder / CROSS_GRADIENTS
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[0]["cross"][0] = None
    lines[1]["id"] = "nobody"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    cross = read_cross(folder, *read_run(folder))
    assert cross is not None
    assert len(cross.gain_N) == 5
