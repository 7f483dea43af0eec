"""The gate: its calibration against a count by hand, its trust region against merged weights, its training on a tiny model."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ephemera.adapt import adapt
from ephemera.config import TrainGate
from ephemera.decode import merged
from ephemera.gate import SIGNALS, Gate, load_gate
from ephemera.guard import guard, trusted, with_share
from ephemera.inits import ZeroInit
from ephemera.made_for import MadeFor
from ephemera.prefill import prefill
from ephemera.rates import FixedRate, PerProjectionRate, load_rate
from ephemera.training.gate import SHARES, Measured, auroc, calibrated, fit, train_gate
from tiny import close, left, random_ids, tiny_backbone

PROMPTS = random_ids([5, 9, 7])


def read_adapted(backbone, rate: float):
    batch = left(PROMPTS)
    start = ZeroInit(init_std=0.3)(backbone, batch, [0] * len(PROMPTS))
    trace = adapt(backbone, batch, start, FixedRate(rate, reach="answer"), 1, keep_reading=True)
    return prefill(backbone, batch, trace.lora, start, reach="answer", reading=trace.reading), trace


def first_token_kl(backbone, trace, row: int, share: float) -> float:
    """By transformers' own forward: the base model's cache, then the last token with merged weights."""
    ids = PROMPTS[row]
    shrunk = trace.lora.with_tensors([*trace.lora.A, *(b * share for b in trace.lora.B)])
    with torch.no_grad():
        base = backbone.model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        cache = backbone.model(torch.tensor([ids[:-1]]), use_cache=True).past_key_values
        with merged(backbone.model, shrunk, row):
            own = backbone.model(torch.tensor([[ids[-1]]]), past_key_values=cache).logits[0, -1].log_softmax(-1)
    return (own.exp() * (own - base)).sum().item()


def test_the_trust_region_by_merged_weights(llama):
    read, trace = read_adapted(llama, 3.0)
    whole = [first_token_kl(llama, trace, row, 1.0) for row in range(3)]
    tau = max(max(whole) / 3, min(whole))  # some row inside, some outside
    read, share_B, kl_B = trusted(read, trace, tau + 1e-9)
    assert 0 < share_B.min() < share_B.max() == 1
    for row in range(3):
        assert kl_B[row].item() == pytest.approx(first_token_kl(llama, trace, row, share_B[row].item()), abs=1e-5)
        assert kl_B[row] <= tau + 1e-6
        if share_B[row] < 1:  # one step of the search earlier it was outside
            assert whole[row] > tau
            assert first_token_kl(llama, trace, row, 4 * share_B[row].item()) > tau


def test_most_bounds_every_share(llama):
    read, trace = read_adapted(llama, 5.0)
    _, share_B, kl_B = trusted(read, trace, 1e9, 0.25)
    assert share_B.tolist() == [0.25] * 3
    assert kl_B[0].item() == pytest.approx(first_token_kl(llama, trace, 0, 0.25), abs=1e-5)


def test_a_row_left_alone_is_the_base_models(llama):
    read, trace = read_adapted(llama, 5.0)
    state = {"bias": torch.tensor(-5.0), "mean_F": torch.zeros(7), "std_F": torch.ones(7)}
    state["weight_F"] = torch.zeros(7).index_fill(0, torch.tensor(SIGNALS.index("prompt tokens")), 10.0)
    gate = Gate(1e9, 0.5, 1.0, state, {})  # risk grows with the prompt's length
    state["bias"] = torch.tensor(-10 * torch.tensor(6.0).log().item())
    guarded, verdict = guard(gate, read, trace)
    assert verdict.abstained_B.tolist() == [False, True, True]
    answers = [[5, 6], [7], [8, 9]]
    base = prefill(llama, read.batch, None).answer_nll(answers)
    close(guarded.answer_nll(answers)[1:], base[1:], 1e-9)
    close(guarded.answer_nll(answers)[:1], with_share(read, trace, torch.ones(3)).answer_nll(answers)[:1], 1e-9)
    assert (guarded.answer_nll(answers)[0] - base[0]).abs() > 1e-3


def test_the_threshold_by_hand():
    risk, harmed = torch.arange(40) / 40, torch.zeros(40, dtype=torch.bool)
    harmed[[10, 20, 30]] = True
    # (harmed + 1) / 41 <= 0.05 bears one harmed row: up to just before the second
    assert calibrated(risk, harmed, 0.05) == pytest.approx(19 / 40)
    assert calibrated(risk, harmed, 0.01) == -1.0, "too few rows to promise so little: nobody is adapted to"
    assert calibrated(risk, harmed, 0.5) == pytest.approx(39 / 40)


def test_the_promise_holds_on_new_rows():
    """Over many draws the harmed share of new rows stays under alpha."""
    generator, alpha, shares = torch.Generator().manual_seed(0), 0.1, []
    for _ in range(200):
        risk = torch.rand(300, generator=generator)
        harmed = torch.rand(300, generator=generator) < risk * 0.6
        threshold = calibrated(risk[:100], harmed[:100], alpha)
        shares.append((harmed[100:] & (risk[100:] <= threshold)).float().mean().item())
    mean = sum(shares) / len(shares)
    assert 0.5 * alpha < mean <= alpha


def test_auroc_counts_pairs():
    score, positive = torch.tensor([3.0, 1.0, 2.0, 2.0]), torch.tensor([True, False, True, False])
    assert auroc(score, positive) == pytest.approx((2 + 1 + 0.5) / 4)
    assert auroc(score, torch.zeros(4, dtype=torch.bool)) is None


def test_the_risk_finds_what_tells_harm_apart():
    h = torch.randn(200, 6, generator=torch.Generator().manual_seed(1))
    harmed = h[:, 2] > 0
    signals = torch.randn(200, len(SHARES), len(SIGNALS), generator=torch.Generator().manual_seed(2))
    ones = torch.ones(200, len(SHARES))
    rows = Measured(["a"] * 200, [str(i) for i in range(200)], ones[:, 0], ones, ones, signals, h)
    state = fit(rows, harmed, penalty=0.01)
    risk = Gate(1.0, 0.5, 1.0, state, {}).risk_B(signals[:, 0], h)
    found = auroc(risk, harmed)
    assert found is not None
    assert found > 0.95


def network_of(folder: Path, backbone, reach="answer") -> Path:
    from ephemera.backbone import describe

    rate = PerProjectionRate(
        projections=len(backbone.projections),
        base_rates=[3.0],
        trained_for=describe(backbone),
        made_for=MadeFor(("own",), "plain", reach, 1),
    )
    rate.save_pretrained(folder)
    return folder


def test_training_a_gate(llama_folder, tmp_path, capsys):
    from ephemera.load import load_backbone

    network = network_of(tmp_path / "network", load_backbone(str(llama_folder), dtype="float32", device="cpu"))
    rows = tmp_path / "rows.jsonl"
    lines = [{"prompt": f"The river {i} runs past", "answer": f"the mill {i % 5}"} for i in range(24)]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = TrainGate(output=str(tmp_path / "gate"), network=str(network), alpha=0.3, tau=1.0)
    config.model.name, config.model.device = str(llama_folder), "cpu"
    config.data.task, config.data.source, config.data.format = "own", str(rows), "plain"
    train_gate(config)
    report = json.loads((tmp_path / "gate" / "gate.json").read_text())["report"]
    assert report["rows"] == {"fitted": 12, "calibrated": 12}
    assert report["calibration"]["harmed"] <= 0.3
    gate = load_rate(network).gate
    assert gate is not None
    assert (gate.tau, gate.threshold) == (1.0, report["threshold"])
    again = config.model_copy(update={"most": 0.5})
    train_gate(again)  # what was measured is kept
    reloaded = load_gate(network)
    assert reloaded is not None
    assert reloaded.most == 0.5
    with pytest.raises(ValueError, match=r"most=0.3 is not one of the shares"):
        train_gate(config.model_copy(update={"most": 0.3}))
    other = network_of(tmp_path / "other", load_backbone(str(llama_folder), dtype="float32", device="cpu"), "all")
    with pytest.raises(ValueError, match=r"a gate is for a trained network with reach answer; this one has reach all"):
        train_gate(config.model_copy(update={"network": str(other)}))


def test_shares_are_halves():
    assert SHARES[:3] == (1.0, 0.5, 0.25)
    base = torch.zeros(1)
    one: Tensor = torch.tensor([[0.9, 0.4, 0.1, 0.0, 0.0, 0.0]])
    rows = Measured(["a"], ["1"], base, one, one, torch.zeros(1, 6, 7), torch.zeros(1, 2))
    assert rows.within(0.5).change_N.item() == pytest.approx(0.4)
    assert rows.within(2.0, 0.25).change_N.item() == pytest.approx(0.1)
    assert tiny_backbone("llama").layers == 2
