"""The peers' objectives against slow autograd and loops by hand, the vote's counting, and a whole run on a tiny model."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import benchmarks.peers_quality as runner
import pytest
import torch
import torch.nn.functional as F
from benchmarks.peers_methods import EntropyLoss, Ready, Still, majority, read, slot_delta, tlm_weights, votes_for
from torch import Tensor

from ephemera.cost import from_config
from ephemera.llm.frozen_lm import FrozenLM, describe
from ephemera.llm.load import load_backbone
from ephemera.lora import LoraBatch
from ephemera.made_for import MadeFor
from ephemera.rates import PerProjectionRate
from ephemera.scoring import Encoded
from reference import close, merged_model, merged_weights, slow_nll
from tiny_models import length_gate, random_ids, random_lora, save_tiny, tiny_backbone

ANSWERS = random_ids([3, 1, 5], seed=5)
ROWS = [
    Encoded(str(i), ids, answer) for i, (ids, answer) in enumerate(zip(random_ids([12, 9, 15]), ANSWERS, strict=True))
]


def logits_of(backbone: FrozenLM, ids: list[int], weights: dict[str, Tensor] | None = None) -> Tensor:
    return torch.func.functional_call(backbone.model, weights or {}, (), {"input_ids": torch.tensor([ids])}).logits[0]


def slow_entropy(backbone: FrozenLM, ids: list[int], weights: dict[str, Tensor] | None = None) -> Tensor:
    """Of the distribution at every token but the last, one after the other."""
    found = []
    for logits_V in logits_of(backbone, ids, weights)[:-1]:
        p_V = logits_V.softmax(0)
        found.append(-(p_V * p_V.log()).sum())
    return torch.stack(found).mean()


def stepped(ready: Ready, method: str, setting: dict[str, float]) -> LoraBatch:
    lora = read(ready, method, setting)[0].lora
    assert lora is not None
    return lora


def gradients(lora: LoraBatch, row: int, loss: Tensor) -> list[Tensor]:
    return [g[row] for g in torch.autograd.grad(loss, lora.B, allow_unused=True, materialize_grads=True)]


def test_the_entropy_is_that_of_every_distribution_by_itself(llama: FrozenLM):
    lora, ready = random_lora(llama, 3), Ready(llama, ROWS)
    out = llama.forward(ready.batch, lora)
    have_B = EntropyLoss().nll_B(llama, out, ready.batch)
    want = [slow_entropy(llama, row.prompt, merged_weights(llama, lora, b)) for b, row in enumerate(ROWS)]
    close(have_B, torch.stack(want))


def test_an_entropy_step_follows_autograd(llama: FrozenLM):
    ready = Ready(llama, ROWS)
    have, start = stepped(ready, "entropy", {"rate": 0.5}), ready.entropy.made.initial_lora.leaves()
    for b, row in enumerate(ROWS):
        grads = gradients(start, b, slow_entropy(llama, row.prompt, merged_weights(llama, start, b)))
        close([B[b] for B in have.B], [-0.5 * g for g in grads])


def test_tlm_weighs_each_prompts_step_by_its_perplexity(llama: FrozenLM):
    ready = Ready(llama, ROWS)
    nll = [slow_nll(llama.model, row.prompt) for row in ROWS]
    between = torch.stack(nll).median().item() - 1e-6  # one prompt lies below
    have = stepped(ready, "tlm", {"rate": 0.5, "log_p0": between})
    _, share_B = read(ready, "tlm", {"rate": 0.5, "log_p0": between})
    start, alone = ready.nll.made.initial_lora.leaves(), []
    for b, row in enumerate(ROWS):
        loss = slow_nll(llama.model, row.prompt, weights=merged_weights(llama, start, b))
        perplexity = loss.detach().exp()
        weight = perplexity / math.exp(between) if perplexity > math.exp(between) else 0 * perplexity
        close([B[b] for B in have.B], [-0.5 * g for g in gradients(start, b, weight * loss)])
        alone.append(weight.item() == 0)
    assert sum(alone) == 1
    assert (share_B == 0).tolist() == alone
    assert tlm_weights(torch.tensor([2.0, 3.0]), 3.0).tolist() == [0, 0], "at the threshold: not above it"


def test_query_only_moves_as_adapters_on_queries_do(llama: FrozenLM):
    ready = Ready(llama, ROWS)
    have, start = stepped(ready, "query-only", {"rate": 0.5}), ready.nll.made.initial_lora.leaves()
    queries = [p.kind == "q" for p in llama.projections]
    assert True in queries
    assert False in queries
    for b, row in enumerate(ROWS):
        grads = gradients(start, b, slow_nll(llama.model, row.prompt, weights=merged_weights(llama, start, b)))
        want = [-0.5 * g if q else 0 * g for g, q in zip(grads, queries, strict=True)]
        close([B[b] for B in have.B], want)
    named = tiny_backbone("llama", target_modules=["q_proj", "down_proj"])
    moved = [bool(B.any()) for B in stepped(Ready(named, ROWS), "query-only", {"rate": 0.5}).B]
    assert moved == [p.module.endswith("q_proj") for p in named.projections], "also where modules are named"


def slow_slot(backbone: FrozenLM, ids: list[int], lr: float, steps: int) -> Tensor:
    """AdamW written out, on the logits of one prompt."""
    states_TD = backbone.decoder(input_ids=torch.tensor([ids])).last_hidden_state[0]
    delta_D = torch.zeros(states_TD.shape[1], dtype=states_TD.dtype)
    first, second = torch.zeros_like(delta_D), torch.zeros_like(delta_D)
    for k in range(1, steps + 1):
        at = delta_D.clone().requires_grad_()
        losses = [
            F.cross_entropy(backbone.head(states_TD[t] + at), torch.tensor(ids[t + 1])) for t in range(len(ids) - 1)
        ]
        (grad,) = torch.autograd.grad(torch.stack(losses).mean(), at)
        first, second = 0.9 * first + 0.1 * grad, 0.999 * second + 0.001 * grad**2
        delta_D = delta_D * (1 - lr * 1e-8)
        delta_D = delta_D - lr * (first / (1 - 0.9**k)) / ((second / (1 - 0.999**k)).sqrt() + 1e-5)
    return delta_D


def test_slots_delta_is_that_of_a_loop_by_hand(llama: FrozenLM):
    ready = Ready(llama, ROWS)
    have_BD = slot_delta(llama, ready.reading.hidden_BTD, ready.batch.scored, lr=0.1, steps=3)
    assert have_BD.abs().max() > 0.1
    for b, row in enumerate(ROWS):
        close(have_BD[b], slow_slot(llama, row.prompt, 0.1, 3))


def test_slots_delta_acts_at_every_answer_token(llama: FrozenLM):
    ready, setting = Ready(llama, ROWS), {"lr": 0.3, "steps": 3}
    made, _ = read(ready, "slot", setting)
    nll_B = made.answer_nll(ANSWERS)
    texts = made.generate(max_new_tokens=4)
    for b, row in enumerate(ROWS):
        delta_D = slow_slot(llama, row.prompt, 0.3, 3)

        def log_p(ids: list[int], delta_D: Tensor = delta_D) -> Tensor:
            states_TD = llama.decoder(input_ids=torch.tensor([ids])).last_hidden_state[0]
            return llama.head(states_TD + delta_D).log_softmax(-1)

        of_TV = log_p(row.prompt + row.answer)[len(row.prompt) - 1 : -1]
        close(nll_B[b], -of_TV[torch.arange(len(row.answer)), row.answer].mean())
        ids = list(row.prompt)
        for _ in range(4):
            ids.append(int(log_p(ids)[-1].argmax()))
        said = ids[len(row.prompt) :]
        end = said.index(2) + 1 if 2 in said else len(said)
        assert texts[b][:end] == said[:end]
    assert not llama.head._forward_pre_hooks


def test_the_base_models_reading_is_its_own(llama: FrozenLM):
    alone, after = Ready(llama, ROWS), Ready(llama, ROWS)
    assert after.nll.h_BH.shape[0] == 3
    want = [slow_nll(merged_model(llama, None), r.prompt + r.answer, first=len(r.prompt)) for r in ROWS]
    for ready in (alone, after):
        close(read(ready, "none", {})[0].answer_nll(ANSWERS), torch.stack(want))
    assert Still(0.0).uses_representation == "step"


def test_the_majority_and_its_ties():
    assert majority(["no", "yes", "yes"]) == "yes"
    assert majority(["no", "yes", "yes", "no"]) == "no", "the one that was sampled first"
    assert majority([None, None, "yes"]) == "yes", "a sample that names nothing has no vote"
    assert majority([None, None]) is None
    assert majority([]) is None


def test_votes_cost_what_one_adapted_answer_costs(llama: FrozenLM):
    shape = from_config("tiny", llama.model.config.to_dict())
    answer = shape.decode_flops(60, 8)
    adapted = 2 * shape.forward_flops(60) + shape.decode_flops(60, 1) + answer
    n = votes_for(shape, 60, 8)
    assert n > 1
    assert shape.forward_flops(60, scored=1) + n * answer <= adapted
    assert shape.forward_flops(60, scored=1) + (n + 1) * answer > adapted
    assert votes_for(shape, 2, 500) == 1


def test_the_lowest_nll_over_the_sets_wins():
    entries = [
        {"setting": {"rate": 1.0}, "change": {"a": -0.1, "b": -0.1}},
        {"setting": {"rate": 2.0}, "change": {"a": -0.5, "b": 0.1}},
        {"setting": {"rate": 3.0}, "change": {"a": -9.0, "b": None}},
    ]
    assert runner.best(entries) == {"rate": 2.0}, "null is a number that was not finite"


SNLI = [
    {"premise": f"A man number {i} rides a horse.", "hypothesis": "A man is outside.", "label": i % 3} for i in range(4)
]
NQ = [{"question": f"who wrote book {i}", "answer": ["the miller", "a river"][i % 2 :]} for i in range(4)]


@pytest.fixture
def material(tmp_path: Path) -> dict[str, Any]:
    model = save_tiny(tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 512}))  # room for the templates
    for task, rows in (("snli", SNLI), ("nq_open", NQ)):
        (tmp_path / task).mkdir()
        for split, some in (("validation", rows[:2]), ("test", rows[1:])):
            (tmp_path / task / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    backbone = load_backbone(str(model), dtype="float32", device="cpu")
    network = PerProjectionRate(
        projections=len(backbone.projections),
        base_rates=[3.0],
        trained_for=describe(backbone),
        made_for=MadeFor(("own",), "chat", "answer", 1),
    )
    network.gate = length_gate(backbone, 0.5)
    network.save_pretrained(tmp_path / "network")
    return {"source": str(tmp_path / "{task}"), "model": str(model), "network": str(tmp_path / "network")}


def test_a_whole_run(material: dict[str, Any], tmp_path: Path):
    given = [f"--{key}={value}" for key, value in material.items()]
    given += ["--tasks=snli+nq-open", "--max-new-tokens=4", "--batch-size=2", f"--output={tmp_path / 'run'}"]
    assert runner.main(given) == 0
    records = [json.loads(line) for line in (tmp_path / "run" / "records.jsonl").read_text().splitlines()]
    methods = [m for m in runner.METHODS if m != "vote"]
    assert len(records) == 2 * 3 * len(methods) + 3, "two sets of three rows; only snli has choices to vote on"
    assert not {"prompt", "answer", "text"} & {key for record in records for key in record}
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert set(results["run"]["price"]) == set(methods) - {"none"}
    for method, entries in results["run"]["validation"].items():
        assert [entry["setting"] for entry in entries] == runner.GRID[method]
        assert all(set(entry["change"]) == {"snli", "nq-open"} for entry in entries)
        assert results["run"]["settings"][method] == runner.best(entries)
    vote = next(cell for cell in results["cells"] if cell["method"] == "vote")
    assert vote["harmed"] is None, "a vote has no NLL"
    assert vote["quality"]["n"] == 3
    table = (tmp_path / "run" / "table.md").read_text()
    assert f"n {results['run']['votes']['snli']}" in table
    assert "at commit" in table
    before = (tmp_path / "run" / "records.jsonl").read_bytes()
    assert runner.main(given) == 0
    assert (tmp_path / "run" / "records.jsonl").read_bytes() == before, "a second run has nothing to add"


def test_what_it_refuses(material: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    given = [f"--source={material['source']}", f"--model={material['model']}", f"--output={tmp_path / 'run'}"]
    assert runner.main([*given, "--methods=none,magic"]) == 2
    assert "magic" in capsys.readouterr().err
    assert runner.main([*given, "--network=0.1"]) == 2
    assert "reach answer" in capsys.readouterr().err
