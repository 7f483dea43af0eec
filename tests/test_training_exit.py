"""ScaleNet trained for some layers and an early exit: its lens's gradient, sparsity, and the folder it leaves."""

import json
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from ephemera import AdaptiveLM
from ephemera.adapt import adapt
from ephemera.backbone import describe
from ephemera.inits import ZeroInit
from ephemera.lens import Lens
from ephemera.rates import AveragedRate, FixedRate, ScaleNet, load_rate
from ephemera.readout import Objective
from ephemera.training import scalenet
from ephemera.training.scalenet import lasting, scalenet_backward, train_scalenet
from test_readout import EXIT, random_lens, slow_loss
from test_training import answer_loss, encoded, material, settings  # noqa: F401
from tiny import close, count_layers, left, merged_weights, random_scalenet, tiny_backbone


def network_for(backbone, **more) -> ScaleNet:
    drawn = random_scalenet(backbone, trained_for=describe(backbone))
    network = ScaleNet(**{**drawn.config, "base_rates": [0.5]}, **more).double()
    network.load_state_dict(drawn.state_dict())
    return network


@pytest.mark.parametrize("clip", [None, 0.01])
def test_the_lens_gradient_is_autograd_through_the_step(clip):
    backbone = tiny_backbone("llama", depth=3, layers="first-2")
    lens = random_lens(backbone).requires_grad_()
    objective = Objective(exit_layer=EXIT, lens=lens, vocabulary=60)
    network, rows = network_for(backbone, objective=objective), encoded([6, 9], [3, 2])
    M = len(backbone.projections)
    with sdpa_kernel(SDPBackend.MATH):
        scalenet_backward(backbone, ZeroInit(r=2), network, rows, 1, seed=5, clip=clip, through_gradients=True)
        start = ZeroInit(r=2)(backbone, left([row.prompt for row in rows]), [5] * 2)
        rates_BM = adapt(backbone, left([r.prompt for r in rows]), start, network, 1).rates_BKM[:, 0].double()
        wanted = [torch.zeros_like(p) for p in lens.parameters()]
        for b, row in enumerate(rows):
            leaves = start.rows([b]).leaves()
            loss = slow_loss(backbone, objective, row.prompt, merged_weights(backbone, leaves, 0))
            grads = torch.autograd.grad(loss, leaves.tensors, create_graph=True)
            rates = [rates_BM[b, i].clone().requires_grad_() for i in range(M)]
            moved = [t.detach() - rates[i % M] * g for i, (t, g) in enumerate(zip(leaves.tensors, grads, strict=True))]
            answer = answer_loss(backbone, row, leaves.with_tensors(moved), 0)
            by_rate = torch.stack(torch.autograd.grad(answer, rates, retain_graph=True))
            norm = (by_rate * rates_BM[b]).norm().item()
            factor = 1.0 if clip is None else min(1.0, clip / norm)
            assert clip is None or factor < 1
            by_lens = torch.autograd.grad(answer, list(lens.parameters()))
            wanted = [w + factor * g / 2 for w, g in zip(wanted, by_lens, strict=True)]
    assert max(w.abs().max() for w in wanted) > 1e-5
    close([p.grad for p in lens.parameters()], wanted, 1e-6)


def test_sparsity_is_the_gradient_of_its_penalty(llama):
    network, rows = random_scalenet(llama), encoded([6, 9, 5], [3, 1, 2])
    scalenet_backward(llama, ZeroInit(r=2), network, rows, 2, seed=5)
    without = [p.grad.clone() for p in network.parameters()]
    network.zero_grad()
    scalenet_backward(llama, ZeroInit(r=2), network, rows, 2, seed=5, sparsity=0.3)
    have = [p.grad - w for p, w in zip(network.parameters(), without, strict=True)]
    batch = left([row.prompt for row in rows])
    trace = adapt(llama, batch, ZeroInit(r=2)(llama, batch, [5] * 3), network, 2, keep_grads=True)
    s_BKM = trace.rates_BKM / torch.tensor(network.base_rates[:2])[:, None]
    penalty = 0.3 * (1 + s_BKM / scalenet.VANISHED).log().flatten(1).sum(1).mean()
    close(have, torch.autograd.grad(penalty, list(network.parameters())), 1e-6)


def test_what_lasts_and_what_is_pruned(llama):
    network = network_for(llama)
    table = torch.full((1, 1, 4), 0.5)
    table[0, 0, 1] = 0.5 * 0.049
    keep = lasting(AveragedRate(table, describe(llama)), network)
    assert keep.tolist() == [True, False, True, True]
    small = network.pruned(keep)
    h = torch.randn(2, 2 * llama.hidden_size, dtype=torch.float64)
    small.double()
    close(small.scales(h, 1, 1), network.scales(h, 1, 1)[:, keep], 1e-5)
    names = [p.name for p, kept in zip(llama.projections, keep.tolist(), strict=True) if kept]
    small.check(llama.with_adapters_on("qv", "all", names))
    with pytest.raises(ValueError, match=r"\(3 projections, .*\(4 projections, first"):
        small.check(llama)


def test_normalized_gradients_have_length_one(llama):
    batch = left([row.prompt for row in encoded([6, 9], [1, 1])])
    start = ZeroInit(r=2)(llama, batch, [0, 0])
    for by in ("prompt", "projection"):
        trace = adapt(llama, batch, start, FixedRate(0.7, normalize=by), 1)
        moved = torch.stack(
            [
                torch.stack([(a - b).flatten(1).square().sum(1) for a, b in zip(x, y, strict=True)])
                for x, y in ((trace.lora.A, start.A), (trace.lora.B, start.B))
            ]
        ).sum(0)
        lengths = moved.sqrt() if by == "projection" else moved.sum(0).sqrt()
        close(lengths, torch.full_like(lengths, 0.7), 1e-6)
        plain = adapt(llama, batch, start, FixedRate(0.7), 1)
        a, b = (t.lora.B[0][0] - start.B[0][0] for t in (trace, plain))
        close(a / a.norm(), b / b.norm(), 1e-6)


@pytest.fixture(scope="module")
def lens_folder(material: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    folder = tmp_path_factory.mktemp("lens") / "network"
    lens = Lens(hidden_size=32, exit_layers=[1, 2])
    torch.nn.init.normal_(lens.weight_EDD, std=0.1)
    lens.save_pretrained(folder)
    return folder


def early(material: Path, output: Path, lens_folder: Path, **more):  # noqa: F811
    config = settings(material, output)
    config.model.lora.layers = "first-1"
    config.objective = config.objective.model_copy(
        update={"exit_layer": 1, "lens": str(lens_folder), "vocabulary": 50, "tokens": "last-3", **more}
    )
    return config


def test_a_trained_folder_brings_layers_objective_and_lens(material, lens_folder, tmp_path, monkeypatch):  # noqa: F811
    folder = train_scalenet(early(material, tmp_path / "run", lens_folder))
    for place in (folder, folder / "averaged"):
        rate = load_rate(place)
        assert (rate.objective.exit_layer, rate.objective.tokens, rate.objective.vocabulary) == (1, "last-3", 50)
        assert rate.objective.lens.exit_layers == (1,)
    assert not (folder / "averaged" / "lens.safetensors").exists()
    lm = AdaptiveLM.from_pretrained(str(material / "model"), rate=folder, device="cpu", lora={"r": 2})
    assert {p.layer for p in lm.backbone.projections} == {0}
    calls = count_layers(lm.backbone, monkeypatch)
    lm.adapt(["The river runs past the old mill."], steps=2)
    assert dict(calls) == {0: 2}
    assert lm.generate(["The river runs past the old mill."], max_new_tokens=3)
    whole = AdaptiveLM.from_pretrained(str(material / "model"), device="cpu")
    with pytest.raises(ValueError, match=r"loaded with its own adapted layers .*layers='first-1'; from_pretrained"):
        whole.adapt(["The river runs."], steps=1, rate=folder)


@pytest.mark.parametrize("attention", [None, "sdpa", "eager"])
def test_the_lens_learns_too_where_that_is_asked(material, lens_folder, tmp_path, attention):  # noqa: F811
    config = early(material, tmp_path / "run", lens_folder, tune_lens=0.5)
    config.model.attn_implementation = attention
    rate = load_rate(train_scalenet(config))
    start = scalenet.settled_objective(config.objective)
    moved = (rate.objective.lens.weight_EDD - start.lens.weight_EDD).abs().max()
    assert moved > 1e-3
    config.objective.lens = None
    with pytest.raises(ValueError, match=r"tune_lens trains a lens: give objective.lens"):
        train_scalenet(config)


@pytest.mark.parametrize("kept", [[True, False, True, True], [False, False, False, True], [False] * 4])
def test_vanished_projections_leave_the_loop(material, tmp_path, monkeypatch, kept):  # noqa: F811
    """Which ones vanish is a matter of training (test_sparsity_..., test_what_lasts_...); here: what follows."""
    config = settings(material, tmp_path / "run")
    config.scalenet.sparsity = 0.01
    monkeypatch.setattr(scalenet, "lasting", lambda average, network: torch.tensor(kept))
    if not any(kept):
        with pytest.raises(ValueError, match=r"every rate vanished: lower scalenet.sparsity"):
            train_scalenet(config)
        return
    folder = train_scalenet(config)
    report = json.loads((tmp_path / "run" / "dropped.json").read_text())
    assert len(report["kept"]) == sum(kept)
    assert not set(report["kept"]) & set(report["dropped"])
    assert report["validation_before"].keys() == report["validation_after"].keys()
    lm = AdaptiveLM.from_pretrained(str(material / "model"), rate=folder, device="cpu", lora={"r": 2})
    assert [p.name for p in lm.backbone.projections] == report["kept"]
    rates = lm.adapt(["The river runs past the old mill."], steps=1).rates_BKM
    assert rates.shape == (1, 1, sum(kept))
    assert load_rate(folder / "averaged").table_KKM.shape == (3, 3, sum(kept))


def test_settings_that_do_not_go_together(material, lens_folder, tmp_path):  # noqa: F811
    config = early(material, tmp_path / "run", lens_folder)
    config.model.lora.layers = "all"
    with pytest.raises(ValueError, match=r'after 1 of 2 layers, but layer 1 is adapted.*"first-1"'):
        train_scalenet(config)
    config = settings(material, tmp_path / "run")
    config.objective.lens = str(lens_folder)
    with pytest.raises(ValueError, match=r"objective.lens is for an early exit"):
        train_scalenet(config)
    config = settings(material, tmp_path / "run")
    config.scalenet.sparsity, config.scalenet.granularity = 0.1, "step"
    with pytest.raises(ValueError, match=r"sparsity drops projections one by one"):
        train_scalenet(config)
