"""The gate: its calibration against a count by hand, its trust region against merged weights, its training on a tiny model."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ephemera.adapt import adapt
from ephemera.adaptation import Adaptation
from ephemera.batch import TokenBatch
from ephemera.begin import adapt_from
from ephemera.config import TrainGate
from ephemera.gate import SHARES, SIGNALS, load_gate
from ephemera.guard import guard, log_p, read_with, signals, trusted
from ephemera.inits import ZeroInit, load_generator
from ephemera.llm.cached_layers import CACHE, cache_of
from ephemera.llm.frozen_lm import describe
from ephemera.llm.prefill import prefill
from ephemera.llm.share import Share
from ephemera.made_for import MadeFor
from ephemera.model import AdaptiveLM
from ephemera.rates import AveragedRate, FixedRate, PerProjectionRate, load_rate
from ephemera.training.gate import auroc, calibrated, fit, most_harmed, out_of_fold, train_gate
from ephemera.training.gate_rows import Measured
from reference import close, merged_model
from tiny_models import generator_of, left, length_gate, random_ids

PROMPTS = random_ids([5, 9, 7])


def adapted(backbone, rate: float) -> tuple[TokenBatch, Adaptation, Tensor]:
    """A step on three prompts, and the base model's log-probabilities of the first answer token."""
    batch = left(PROMPTS)
    start = ZeroInit(init_std=0.3)(backbone, batch, [0] * len(PROMPTS))
    rule = PerProjectionRate(
        projections=len(backbone.projections), base_rates=(rate,), made_for=MadeFor(("own",), "plain", "answer", 1)
    ).double()
    rule.gate = length_gate(backbone, 0.5)
    trace = adapt(backbone, batch, start, rule, 1, keep_reading=True)
    assert trace.reading is not None
    return batch, trace, log_p(backbone, trace.reading.hidden_BTD[:, -1])


def first_token_kl(backbone, trace, row: int, share: float) -> float:
    """By transformers' own forward: the base model's cache, then the last token with merged weights."""
    ids = PROMPTS[row]
    shrunk = trace.lora.with_tensors([*trace.lora.A, *(b * share for b in trace.lora.B)])
    with torch.no_grad():
        base = backbone.model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        cache = cache_of(backbone.model(torch.tensor([ids[:-1]]), use_cache=True))
        model = merged_model(backbone, shrunk, row)
        own = model(torch.tensor([[ids[-1]]]), **{CACHE: cache}).logits[0, -1].log_softmax(-1)
    return (own.exp() * (own - base)).sum().item()


def test_the_trust_region_by_merged_weights(llama):
    batch, trace, base_BV = adapted(llama, 3.0)
    whole = [first_token_kl(llama, trace, row, 1.0) for row in range(3)]
    tau = max(max(whole) / 3, min(whole)) + 1e-9  # some row inside, some outside
    _, share_B, kl_B = trusted(llama, batch, trace, torch.ones(3), tau, base_BV)
    assert 0 < share_B.min() < share_B.max() == 1
    for row in range(3):
        assert kl_B[row].item() == pytest.approx(first_token_kl(llama, trace, row, share_B[row].item()), abs=1e-5)
        assert kl_B[row] <= tau + 1e-6
        if share_B[row] < 1:  # one step of the search earlier it was outside
            assert first_token_kl(llama, trace, row, 4 * share_B[row].item()) > tau


def test_a_trust_region_that_no_share_is_in(llama):
    batch, trace, base_BV = adapted(llama, 3.0)
    read, share_B, kl_B = trusted(llama, batch, trace, torch.ones(3), 1e-12, base_BV)
    assert share_B.tolist() == kl_B.tolist() == [0.0] * 3
    answers = [[5, 6], [7], [8, 9]]
    close(read.answer_nll(answers), prefill(llama, batch, None).answer_nll(answers), 1e-9)


def first_token_kl_everywhere(backbone, trace, row: int, share: float) -> float:
    """As `first_token_kl`, of adapters that act on the prompt too."""
    ids = torch.tensor([PROMPTS[row]])
    shrunk = trace.lora.with_tensors([*trace.lora.A, *(b * share for b in trace.lora.B)])
    with torch.no_grad():
        base = backbone.model(ids).logits[0, -1].log_softmax(-1)
        own = merged_model(backbone, shrunk, row)(ids).logits[0, -1].log_softmax(-1)
    return (own.exp() * (own - base)).sum().item()


@pytest.mark.parametrize(("reach", "eta"), [("answer", 3.0), ("all", 0.5)])
def test_a_bound_without_a_gate_by_merged_weights(llama, reach, eta):
    batch = left(PROMPTS)
    start, rate = ZeroInit(init_std=0.3), FixedRate(eta, reach=reach)
    free, _ = adapt_from(llama, batch, start, [0] * 3, rate, 1, reach)
    far = first_token_kl if reach == "answer" else first_token_kl_everywhere
    whole = [far(llama, free, row, 1.0) for row in range(3)]
    bound = max(max(whole) / 3, min(whole)) + 1e-9
    made, read = adapt_from(llama, batch, start, [0] * 3, rate, 1, reach, max_kl=bound)
    assert made.share_B is not None
    assert made.kl_B is not None
    assert read is not None
    assert 0 < made.share_B.min() < made.share_B.max() == 1
    for row in range(3):
        assert made.kl_B[row].item() == pytest.approx(far(llama, made, row, 1.0), abs=1e-5)
        assert made.kl_B[row] <= bound + 1e-6
        close(made.lora.B[0][row], free.lora.B[0][row] * made.share_B[row], 1e-12)


def test_a_bound_beside_a_gate(llama):
    """The tighter of the bound and the gate's own trust region holds."""
    batch, trace, _ = adapted(llama, 3.0)
    gate = length_gate(llama, 0.5)
    free, _ = guard(gate, llama, batch, trace)
    assert free.kl_B is not None
    bound = free.kl_B.max().item() / 3
    less, _ = guard(gate, llama, batch, trace, bound)
    same, _ = guard(gate, llama, batch, trace, 1e12)
    assert less.kl_B is not None
    assert same.share_B is not None
    assert free.kl_B.max() > bound >= less.kl_B.max()
    assert same.share_B.equal(free.share_B if free.share_B is not None else torch.zeros(0))


def test_a_row_left_alone_is_the_base_models(llama):
    batch, trace, _ = adapted(llama, 5.0)
    gate = length_gate(llama, 0.5, by_length=10.0, tokens=6.0)  # risk grows with the prompt's length
    kept, read = guard(gate, llama, batch, trace)
    assert kept.abstained_B.tolist() == [False, True, True]
    answers = [[5, 6], [7], [8, 9]]
    base = prefill(llama, batch, None).answer_nll(answers)
    close(read.answer_nll(answers)[1:], base[1:], 1e-9)
    close(read.answer_nll(answers)[:1], read_with(llama, batch, trace, 1.0).answer_nll(answers)[:1], 1e-9)
    assert (read.answer_nll(answers)[0] - base[0]).abs() > 1e-3
    assert [bool(B_BOR[1:].any()) for B_BOR in kept.lora.B] == [False] * len(kept.lora.B)


def test_the_share_follows_the_risk_and_is_bounded(llama):
    batch, trace, base_BV = adapted(llama, 5.0)
    gate = length_gate(llama, 0.5)
    gate.state["slope"] = torch.ones(())
    gate.state["bias"] = torch.tensor(1.5)  # sigmoid(1.5 + log2 share) <= 1/2 from a quarter on
    risk_BS = gate.risk_BS(signals(base_BV, batch, trace), torch.zeros(3, 2 * llama.hidden_size))
    torch.testing.assert_close(risk_BS[0, :3], torch.tensor([1.5, 0.5, -0.5]).sigmoid())
    assert gate.share_B(risk_BS).tolist() == [0.25] * 3
    assert replace(gate, most=0.125).share_B(risk_BS).tolist() == [0.125] * 3
    assert replace(gate, threshold=0.0).share_B(risk_BS).tolist() == [0.0] * 3


def measured(change_NS: Tensor, *, tasks: Sequence[str] | None = None, kl_NS: Tensor | None = None) -> Measured:
    n = len(change_NS)
    kl_NS = torch.zeros_like(change_NS) if kl_NS is None else kl_NS
    told = torch.zeros(n, len(SIGNALS)), torch.zeros(n, 2)
    return Measured(list(tasks or ["a"] * n), [str(i) for i in range(n)], torch.zeros(n), change_NS, kl_NS, *told)


def test_the_threshold_by_hand():
    risk, change = torch.arange(40) / 40, torch.zeros(40)
    change[[10, 20, 30]] = 1.0
    few = [str(i // 10) for i in range(40)]  # of each task: only the total counts
    rows = measured(change[:, None].expand(-1, len(SHARES)), tasks=few)
    at = lambda alpha: calibrated(rows, risk[:, None].expand(-1, len(SHARES)), TrainGate(alpha=alpha, tau=1.0))  # noqa: E731
    # (harmed + 1) / 41 <= 0.05 bears one harmed row: up to just before the second
    assert at(0.05) == pytest.approx(19 / 40)
    assert at(0.01) == -1.0, "too few rows to promise so little: nobody is adapted to"
    assert at(0.5) == pytest.approx(39 / 40)


def test_no_task_is_harmed_more_than_alpha():
    """Harm in one task of two: a quarter of its rows, an eighth of all."""
    risk = torch.arange(80) / 80
    harmed = torch.tensor([i % 8 == 1 for i in range(80)])
    rows = measured(harmed.float()[:, None].expand(-1, len(SHARES)), tasks=["ab"[i % 2] for i in range(80)])
    threshold = calibrated(rows, risk[:, None].expand(-1, len(SHARES)), TrainGate(alpha=0.15, tau=1.0))
    adapted = risk <= threshold
    assert (harmed & adapted).sum() == 3, "were 15 % of the task harmed, 3 of its 40 rows or fewer had a chance of 13 %"
    alone = measured(rows.nll_NS, tasks=[str(i) for i in range(80)])
    pooled = calibrated(alone, risk[:, None].expand(-1, len(SHARES)), TrainGate(alpha=0.15))
    assert pooled == pytest.approx(79 / 80)


@pytest.mark.parametrize(
    ("n", "alpha", "confidence"), [(40, 0.15, 0.8), (120, 0.05, 0.8), (60, 0.05, 0.9), (20, 0.05, 0.8)]
)
def test_the_most_harmed_rows_are_those_of_scipys_binomial(n, alpha, confidence):
    binom = pytest.importorskip("scipy.stats").binom
    want = max((k for k in range(n) if binom.cdf(k, n, alpha) <= 1 - confidence), default=-1)
    assert most_harmed(n, alpha, confidence) == want


def test_the_promise_holds_on_new_rows():
    """Over many draws the harmed share of new rows stays under alpha."""
    generator, alpha, shares = torch.Generator().manual_seed(0), 0.1, []
    for _ in range(60):
        risk = torch.rand(200, generator=generator)
        harmed = torch.rand(200, generator=generator) < risk * 0.6
        rows = measured(harmed[:100].float()[:, None].expand(-1, len(SHARES)))
        threshold = calibrated(
            rows, risk[:100, None].expand(-1, len(SHARES)), TrainGate(alpha=alpha, tau=1.0, most=1.0)
        )
        shares.append((harmed[100:] & (risk[100:] <= threshold)).float().mean().item())
    mean = sum(shares) / len(shares)
    assert 0.5 * alpha < mean <= alpha


def test_auroc_counts_pairs():
    score, positive = torch.tensor([3.0, 1.0, 2.0, 2.0]), torch.tensor([True, False, True, False])
    assert auroc(score, positive) == pytest.approx((2 + 1 + 0.5) / 4)
    assert auroc(score, torch.zeros(4, dtype=torch.bool)) is None


def test_the_risk_finds_what_tells_harm_apart():
    """Harm follows one feature of h, and only at the two largest shares."""
    generator = torch.Generator().manual_seed(1)
    h, told = torch.randn(200, 6, generator=generator), torch.randn(200, len(SIGNALS), generator=generator)
    harmed = (h[:, 2] > 0)[:, None] & (torch.tensor(SHARES) >= 0.5)
    rows = replace(measured(harmed.float()), h_NH=h, signals_NF=told)
    risk = out_of_fold(rows, TrainGate(penalty=0.01))
    found = auroc(risk[:, 0], harmed[:, 0])
    assert found is not None
    assert found > 0.95
    assert (risk[:, 1:] < risk[:, :-1]).all(), "a smaller share is never riskier here"
    state = fit(told, h, harmed, penalty=0.01)
    assert state["weight_H"].abs().argmax() == 2


def test_averaged_rates_pass_a_gate_too(llama, tmp_path):
    batch, trace, _ = adapted(llama, 3.0)
    made_for = MadeFor(("own",), "plain", "answer", 1)
    AveragedRate(trace.rates_BKM[:1].float(), describe(llama), made_for=made_for).save_pretrained(tmp_path)
    length_gate(llama, 0.5).save(tmp_path)
    made, _ = adapt_from(llama, batch, ZeroInit(init_std=0.3), [0] * 3, load_rate(tmp_path), 1, "answer")
    want, _ = guard(length_gate(llama, 0.5), llama, batch, trace)
    assert made.share_B is not None
    assert want.share_B is not None
    close(made.share_B, want.share_B, 1e-6)
    close(made.lora.tensors, want.lora.tensors, 1e-6)


def test_joined_rows_keep_their_shares_and_distances(llama):
    """Two batches whose rows are told out of order: each row has the share and the KL of its own batch."""
    rule = PerProjectionRate(
        projections=len(llama.projections), base_rates=(3.0,), made_for=MadeFor(("own",), "plain", "answer", 1)
    ).double()
    rule.gate = length_gate(llama, 0.5)
    places = [[2, 0], [1]]
    parts = [
        adapt_from(llama, left([PROMPTS[i] for i in rows]), ZeroInit(init_std=0.3), rows, rule, 1, "answer")[0]
        for rows in places
    ]
    whole = Adaptation.joined(parts, [Share.whole(rows) for rows in places])
    for part, rows in zip(parts, places, strict=True):
        for own, all_B in ((part.share_B, whole.share_B), (part.kl_B, whole.kl_B)):
            assert own is not None
            assert all_B is not None
            assert own.tolist() == all_B[rows].tolist()
    assert whole.kl_B is not None
    assert len(set(whole.kl_B.tolist())) > 1
    ungated = replace(parts[1], share_B=None, kl_B=None)
    apart = Adaptation.joined([parts[0], ungated], [Share.whole(rows) for rows in places])
    assert apart.share_B is apart.kl_B is None


def network_of(folder: Path, backbone, reach="answer") -> Path:
    rate = PerProjectionRate(
        projections=len(backbone.projections),
        base_rates=[3.0],
        trained_for=describe(backbone),
        made_for=MadeFor(("own",), "plain", reach, 1),
    )
    rate.save_pretrained(folder)
    return folder


def test_training_a_gate(llama_folder, tmp_path, capsys):
    from ephemera.llm.load import load_backbone

    network = network_of(tmp_path / "network", load_backbone(str(llama_folder), dtype="float32", device="cpu"))
    rows = tmp_path / "rows.jsonl"
    lines = [{"prompt": f"The river {i} runs past", "answer": f"the mill {i % 5}"} for i in range(24)]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = TrainGate(output=str(tmp_path / "gate"), network=str(network), alpha=0.3, tau=1.0)
    config.model.name, config.model.device = str(llama_folder), "cpu"
    config.data.task, config.data.source, config.data.format = "own", str(rows), "plain"
    train_gate(config)
    report = json.loads((tmp_path / "gate" / "gate.json").read_text())["report"]
    assert report["rows"] == 24
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


def test_a_generators_gate(llama_folder, tmp_path):
    """Long prompts are left to the base model, short ones keep their whole adapter; in the library and on disk."""
    plain = AdaptiveLM.from_pretrained(str(llama_folder), rate="none", dtype="float32", device="cpu")
    folder = generator_of(tmp_path / "generator", plain.backbone)
    prompts = ["The river", "The river runs past the old mill and on to the sea, where nobody looks for it."]
    answers = ["runs past", "the mill"]
    free = AdaptiveLM(plain.backbone, init=folder)
    wanted, base = free.answer_nll(prompts, answers, free.adapt(prompts)), plain.answer_nll(prompts, answers)
    generator = load_generator(folder)
    lengths = [len(plain.encode(prompt)) for prompt in prompts]
    generator.gate = length_gate(
        plain.backbone, 0.5, by_length=50.0, tokens=sum(lengths) / 2, state_size=plain.backbone.hidden_size
    )
    generator.save_pretrained(tmp_path / "gated")
    lm = AdaptiveLM(plain.backbone, init=tmp_path / "gated")
    made = lm.adapt(prompts)
    assert made.share_B is not None
    assert made.share_B.tolist() == [1.0, 0.0]
    assert made.notes[0] is None
    assert (made.notes[1] or "").endswith("answered unadapted")
    nll = lm.answer_nll(prompts, answers, made)
    assert nll.tolist() == pytest.approx([wanted[0].item(), base[1].item()], abs=1e-5)
    assert lm.generate(prompts[1:], max_new_tokens=6) == plain.generate(prompts[1:], max_new_tokens=6)
    assert abs(wanted[0] - base[0]) > 1e-3
    stepped = lm.adapt(prompts, rate=0.1, steps=1)  # it was calibrated without steps
    assert stepped.share_B is None


def test_training_a_generators_gate(llama_folder, tmp_path):
    plain = AdaptiveLM.from_pretrained(str(llama_folder), rate="none", dtype="float32", device="cpu")
    folder = generator_of(tmp_path / "generator", plain.backbone)
    free = AdaptiveLM(plain.backbone, init=folder)
    lines = [{"prompt": f"The river {i} runs past", "answer": f"the mill {i % 5}"} for i in range(24)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = TrainGate(output=str(tmp_path / "gate"), network=str(folder), alpha=0.5, confidence=0.5, tau=100.0)
    config.model.name, config.model.device = str(llama_folder), "cpu"
    config.data.task, config.data.source, config.data.format = "own", str(tmp_path / "rows.jsonl"), "plain"
    train_gate(config)
    records = [json.loads(line) for line in (tmp_path / "gate" / "records.jsonl").read_text().splitlines()]
    by_id = {record["id"]: record for record in records}
    assert len(by_id) == 24
    prompts, answers = [line["prompt"] for line in lines], [line["answer"] for line in lines]
    whole, base = free.answer_nll(prompts, answers, free.adapt(prompts)), plain.answer_nll(prompts, answers)
    assert sorted(r["nll"]["1.0"] for r in records) == pytest.approx(sorted(whole.tolist()), abs=1e-4)
    assert sorted(r["base_nll"] for r in records) == pytest.approx(sorted(base.tolist()), abs=1e-4)
    gate = load_generator(folder).gate
    assert gate is not None
    assert gate.tau == 100.0
    everywhere = generator_of(tmp_path / "all", plain.backbone, reach="all")
    with pytest.raises(ValueError, match=r"a gate is for a trained network with reach answer; this one has reach all"):
        train_gate(config.model_copy(update={"network": str(everywhere)}))


def test_shares_are_halves():
    assert SHARES[:3] == (1.0, 0.5, 0.25)
    change, kl = torch.tensor([[0.9, 0.4, 0.1, 0.0, 0.0, 0.0]]), torch.tensor([[0.9, 0.3, 0.1, 0.0, 0.0, 0.0]])
    rows = measured(change, kl_NS=kl)
    assert rows.change_N(rows.kept_NS(None, 1.0, 0.5, 1.0)).item() == pytest.approx(0.4)
    assert rows.change_N(rows.kept_NS(None, 1.0, 2.0, 0.25)).item() == pytest.approx(0.1)
    assert not rows.kept_NS(torch.ones(1, 6), 0.5, 2.0, 1.0).any()
