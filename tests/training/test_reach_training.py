"""Training over several steps with reach `answer`: the meta-gradient against autograd and finite differences, a row at a time."""

from collections.abc import Sequence

import pytest
import torch
from test_generator import random_generator
from test_training import TableRate, encoded, finite_difference
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from counting import count_layers
from ephemera.adapt import adapt, meta_gradient
from ephemera.inits import Init, ZeroInit
from ephemera.llm.frozen_lm import FrozenLM
from ephemera.lora import LoraBatch
from ephemera.made_for import MadeFor
from ephemera.prompt_loss import PromptLoss
from ephemera.rates import PerProjectionRate, ScaleNet, Trains
from ephemera.scoring import Encoded, answer_gradient, answer_nll
from ephemera.training.many_steps import ScaleNetTrainee
from ephemera.training.meta_gradient import scalenet_backward
from reference import close, merged_weights, slow_nll, slow_representation
from test_prompt_loss import EXIT, random_lens, slow_loss
from test_reach import Slow
from tiny_models import left, random_lora, random_scalenet, tiny_backbone

MADE = MadeFor(("squad",), reach="answer")
INIT = ZeroInit(r=2, init_std=0.1)


def answer_loss(backbone: FrozenLM, row: Encoded, lora: LoraBatch, b: int = 0) -> Tensor:
    """The adapter acts from the last prompt token on."""
    return Slow(backbone, row.prompt, merged_weights(backbone, lora, b)).nll(row.answer) / len(row.answer)


def prompt_gradient(backbone: FrozenLM, row: Encoded, at: LoraBatch) -> list[Tensor]:
    """Of the prompt's own NLL, with the adapter on every token; a constant from there on."""
    leaves = at.leaves()
    nll = slow_nll(backbone.model, row.prompt, weights=merged_weights(backbone, leaves, 0))
    return [g.detach() for g in torch.autograd.grad(nll, leaves.tensors)]


def unrolled(backbone: FrozenLM, rows: Sequence[Encoded], lora: LoraBatch, table_BKM: Tensor) -> Tensor:
    """Summed answer NLL after the steps, with a graph to the rates."""
    total, M = table_BKM.new_zeros(()), table_BKM.shape[2]
    for b, row in enumerate(rows):
        current = lora.rows([b])
        for k in range(table_BKM.shape[1]):
            grads = prompt_gradient(backbone, row, current)
            current = current.with_tensors(
                [t - table_BKM[b, k, i % M] * g for i, (t, g) in enumerate(zip(current.tensors, grads, strict=True))]
            )
        total = total + answer_loss(backbone, row, current)
    return total


def example(architecture: str, layers: str, start: str, K: int):
    backbone = tiny_backbone(architecture, layers=layers)
    rows = encoded([6, 9], [3, 1])
    batch = left([row.prompt for row in rows])
    lora = random_lora(backbone, 2) if start == "random" else INIT(backbone, batch, [5, 5])
    torch.manual_seed(6)
    table = 0.02 + 0.1 * torch.rand(2, K, len(backbone.projections), dtype=torch.float64)
    return backbone, rows, lora, table if start == "random" else 5 * table


def meta(backbone: FrozenLM, rows: Sequence[Encoded], lora: LoraBatch, table: Tensor, *, keeps: bool) -> Tensor:
    batch = left([row.prompt for row in rows])
    trace = adapt(backbone, batch, lora, TableRate(table), table.shape[1], keep_grads=True, keep_reading=keeps)
    assert (trace.reading is not None and trace.reading.layers == backbone.layers) == keeps
    reading = trace.reading
    nll_B, grads = answer_gradient(backbone, rows, trace.lora, reach="answer", reading=reading)
    want = [answer_loss(backbone, row, trace.lora, b) for b, row in enumerate(rows)]
    close(nll_B, torch.stack(want).detach())
    return meta_gradient(grads, trace.grads)


@pytest.mark.parametrize(
    ("architecture", "layers", "start", "K"),
    [
        *[("llama", "all", "zero", K) for K in (1, 2, 3)],
        *[("llama", "all", "random", 2), ("llama", "last-1", "random", 2), ("llama", "last-1", "zero", 2)],
        *[("gemma3", "all", "zero", 2), ("mistral", "all", "random", 2), ("gpt_neox", "all", "zero", 2)],
    ],
)
def test_meta_gradient_is_autograd_with_detached_gradients(architecture, layers, start, K):
    backbone, rows, lora, table = example(architecture, layers, start, K)
    table.requires_grad_()
    (want,) = torch.autograd.grad(unrolled(backbone, rows, lora, table), table)
    assert want.abs().flatten(0, 1).amax(0).min() > 1e-5  # of every projection
    close(meta(backbone, rows, lora, table.detach(), keeps=start == "zero"), want)


@pytest.mark.parametrize(("start", "K"), [("zero", 1), ("random", 2)])
def test_finite_differences(start, K):
    """Of the last step, which no other follows, first order is exact."""
    backbone, rows, lora, table = example("llama", "all", start, K)

    def loss_after(last_BM: Tensor) -> Tensor:
        tables = torch.cat([table[:, :-1], last_BM[:, None]], 1)
        trace = adapt(backbone, left([row.prompt for row in rows]), lora, TableRate(tables), K)
        return sum((answer_loss(backbone, row, trace.lora, b).detach() for b, row in enumerate(rows)), torch.zeros(()))

    want = finite_difference(loss_after, table[:, -1].clone())
    close(meta(backbone, rows, lora, table, keeps=start == "zero")[:, -1], want, 1e-6)


def network_for(backbone: FrozenLM, kind: str, trains: Trains = "both") -> ScaleNet | PerProjectionRate:
    if kind == "scalenet":
        return random_scalenet(backbone, made_for=MADE, trains=trains)
    M = len(backbone.projections)
    network = PerProjectionRate(projections=M, base_rates=(1.0, 0.5), made_for=MADE, trains=trains)
    with torch.no_grad():
        network.log_rates_KM.add_(torch.randn_like(network.log_rates_KM))
    return network.double()


@pytest.mark.parametrize(
    ("kind", "trains", "init", "clip"),
    [
        *[("scalenet", "both", "zero", None), ("per-projection", "both", "zero", 0.01)],
        *[("scalenet", "both", "generator", 0.01), ("per-projection", "B", "generator", None)],
    ],
)
def test_the_networks_gradient_is_autograd_over_two_steps(llama, kind, trains, init, clip, monkeypatch):
    network, rows, K, M = network_for(llama, kind, trains), encoded([6, 9, 5], [3, 1, 2]), 2, len(llama.projections)
    start: Init = INIT if init == "zero" else random_generator(llama)
    counts = count_layers(llama, monkeypatch)
    report = scalenet_backward(llama, start, network, rows, K, seed=5, clip=clip)
    # Two steps and the answers; another start reads the prompt for itself, and again without its adapters
    assert counts == dict.fromkeys((0, 1), 3 if init == "zero" else 5)
    have = [p.grad.clone() for p in network.parameters() if p.grad is not None]
    begin = start(llama, left([row.prompt for row in rows]), [5] * 3)
    wanted, losses = [torch.zeros_like(p) for p in network.parameters()], []
    for b, row in enumerate(rows):
        rates, lora = [], begin.rows([b])
        for k in range(1, K + 1):
            h = slow_representation(llama.model, row.prompt, merged_weights(llama, lora, 0)).detach()[None].float()
            rates.append(network.rates_BM(h, k, K, like=h, projections=M)[0])
            grads = prompt_gradient(llama, row, lora)
            if trains == "B":
                grads = [torch.zeros_like(g) for g in grads[:M]] + grads[M:]
            lora = lora.with_tensors(
                [t - rates[-1][i % M] * g for i, (t, g) in enumerate(zip(lora.tensors, grads, strict=True))]
            )
        loss, rates_KM = answer_loss(llama, row, lora), torch.stack(rates)
        losses.append(loss.item())
        norm = (torch.stack(torch.autograd.grad(loss, rates, retain_graph=True)) * rates_KM.detach()).norm().item()
        factor = 1.0 if clip is None else min(1.0, clip / norm)
        assert clip is None or factor < 1
        by_weight = torch.autograd.grad(loss, list(network.parameters()))
        wanted = [total + factor * g / len(rows) for total, g in zip(wanted, by_weight, strict=True)]
    assert max(w.abs().max() for w in wanted) > 1e-4
    close(have, wanted, 1e-6)  # h(x) is float32
    assert report["nll"] == pytest.approx(sum(losses) / 3)


def test_the_lens_gradient_is_autograd_through_the_step():
    backbone = tiny_backbone("llama", depth=3, layers="first-2")
    lens = random_lens(backbone).requires_grad_()
    objective = PromptLoss(exit_layer=EXIT, lens=lens, vocabulary=60)
    drawn = random_scalenet(backbone)
    network = ScaleNet(**{**drawn.config, "base_rates": [0.5]}, objective=objective, made_for=MADE).double()
    network.load_state_dict(drawn.state_dict())
    rows, M = encoded([6, 9], [3, 2]), len(backbone.projections)
    batch = left([row.prompt for row in rows])
    with sdpa_kernel(SDPBackend.MATH):
        scalenet_backward(backbone, INIT, network, rows, 1, seed=5, through_gradients=True)
        start = INIT(backbone, batch, [5] * 2)
        rates_BM = adapt(backbone, batch, start, network, 1).rates_BKM[:, 0].double()
        wanted = [torch.zeros_like(p) for p in lens.parameters()]
        for b, row in enumerate(rows):
            leaves = start.rows([b]).leaves()
            loss = slow_loss(backbone, objective, row.prompt, merged_weights(backbone, leaves, 0))
            grads = torch.autograd.grad(loss, leaves.tensors, create_graph=True)
            moved = [
                t.detach() - rates_BM[b, i % M] * g for i, (t, g) in enumerate(zip(leaves.tensors, grads, strict=True))
            ]
            by_lens = torch.autograd.grad(
                answer_loss(backbone, row, leaves.with_tensors(moved)), list(lens.parameters())
            )
            wanted = [w + g / 2 for w, g in zip(wanted, by_lens, strict=True)]
    assert max(w.abs().max() for w in wanted) > 1e-5
    close([p.grad for p in lens.parameters() if p.grad is not None], wanted, 1e-6)


def test_validation_scores_as_the_network_will_be_used(llama):
    rows, network = encoded([6, 9, 1, 12], [3, 1, 2, 2]), network_for(llama, "per-projection")
    trainee = ScaleNetTrainee(
        llama, INIT, network, validation=rows, validation_steps=[1, 2], batch_size=2, clip_prompt=1.0, seed=0
    )
    report = trainee.validate()
    for K in (1, 2):
        start = INIT(llama, left([row.prompt for row in rows]), [0] * 4)
        lora = adapt(llama, left([row.prompt for row in rows]), start, network, K).lora
        want = torch.stack([answer_loss(llama, row, lora, b) for b, row in enumerate(rows)]).detach()
        assert report[f"validation_nll_{K}"] == pytest.approx(want.mean().item())
        close(answer_nll(llama, rows, lora, reach="answer"), want)
    whole = answer_nll(llama, rows, lora)
    assert (whole - want)[[0, 1, 3]].abs().min() > 1e-4
