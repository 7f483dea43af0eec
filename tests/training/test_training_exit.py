"""ScaleNet trained for some layers and an early exit: its lens's gradient, sparsity, and the folder it leaves."""

from pathlib import Path

import pytest
import torch
from test_training import answer_loss, encoded, material, settings  # noqa: F401
from torch.nn.attention import SDPBackend, sdpa_kernel

from counting import count_layers
from ephemera import AdaptiveLM
from ephemera.adapt import adapt
from ephemera.early_exit.lens import Lens
from ephemera.inits import ZeroInit
from ephemera.llm.frozen_lm import describe
from ephemera.prompt_loss import PromptLoss
from ephemera.rates import ScaleNet, load_rate
from ephemera.training import scalenet
from ephemera.training.meta_gradient import scalenet_backward
from ephemera.training.scalenet import train_scalenet
from reference import close, merged_weights
from test_prompt_loss import EXIT, random_lens, slow_loss
from tiny_models import left, random_scalenet, tiny_backbone


def network_for(backbone, **more) -> ScaleNet:
    drawn = random_scalenet(backbone, trained_for=describe(backbone))
    network = ScaleNet(**{**drawn.config, "base_rates": [0.5]}, **more).double()
    network.load_state_dict(drawn.state_dict())
    return network


@pytest.mark.parametrize("clip", [None, 0.01])
def test_the_lens_gradient_is_autograd_through_the_step(clip):
    backbone = tiny_backbone("llama", depth=3, layers="first-2")
    lens = random_lens(backbone).requires_grad_()
    objective = PromptLoss(exit_layer=EXIT, lens=lens, vocabulary=60)
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
        update={"exit_layer": 1, "lens": str(lens_folder), "vocabulary": 50, **more}
    )
    return config


def test_a_trained_folder_brings_layers_objective_and_lens(material, lens_folder, tmp_path, monkeypatch):  # noqa: F811
    folder = train_scalenet(early(material, tmp_path / "run", lens_folder))
    for place in (folder, folder / "averaged"):
        rate = load_rate(place)
        assert (rate.objective.exit_layer, rate.objective.vocabulary) == (1, 50)
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


def test_settings_that_do_not_go_together(material, lens_folder, tmp_path):  # noqa: F811
    config = early(material, tmp_path / "run", lens_folder)
    config.model.lora.layers = "all"
    with pytest.raises(ValueError, match=r'after 1 of 2 layers, but layer 1 is adapted.*"first-1"'):
        train_scalenet(config)
    config = settings(material, tmp_path / "run")
    config.objective.lens = str(lens_folder)
    with pytest.raises(ValueError, match=r"objective.lens is for an early exit"):
        train_scalenet(config)
