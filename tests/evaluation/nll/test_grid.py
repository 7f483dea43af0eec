"""Records and grids that resume, the swapped control against merged weights, a report of a real run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ephemera import scoring
from ephemera.adapt import adapt
from ephemera.adaptation import Adaptation
from ephemera.config import Evaluate
from ephemera.evaluation.nll.adapting import adapted
from ephemera.evaluation.nll.grid import evaluate, score
from ephemera.evaluation.nll.report import write_report
from ephemera.evaluation.shared.records import RECORDS, RUN, Record, RecordFile, read_records, write_json
from ephemera.inits import ZeroInit
from ephemera.llm.frozen_lm import FrozenLM
from ephemera.llm.load import load_backbone
from ephemera.rates import FixedRate, ScaleNet
from ephemera.scoring import Encoded, answer_nll, batches_of, encode_examples, prompt_batch
from ephemera.tasks import load_dataset

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "dog", "ran", "to", "big", "red", "house", "what", "is", "who"]


def record(method: str, K: int, id: str, nll: float, **more) -> Record:
    return Record(
        **{"method": method, "K": K, "id": id, "nll": nll, "tokens": 1, "prompt_nll": [], "seconds": 1.0, **more}
    )


def tiny_model(folder: Path, layers: int = 2) -> str:
    """A random Llama and a word tokenizer, saved."""
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.3,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


def own_rows(path: Path, n: int) -> str:
    random = np.random.default_rng(0)
    with path.open("w") as file:
        for i in range(n):
            words = [*random.choice(WORDS, 4 + i), *random.choice(WORDS, 1 + i % 3)]
            prompt, answer = " ".join(words[: 4 + i]), " ".join(words[4 + i :])
            file.write(json.dumps({"prompt": prompt, "answer": answer}) + "\n")
    return str(path)


@pytest.fixture
def setting(tmp_path):
    """Keyword arguments of an Evaluate config on a tiny model and 7 rows of one's own."""
    data = {"task": "own", "source": own_rows(tmp_path / "rows.jsonl", 7)}
    return {
        "model": {"name": tiny_model(tmp_path / "model"), "dtype": "float32", "device": "cpu"},
        "data": data,
        "validation": data,
        "methods": ["none", "fixed", "uniform"],
        "steps": [0, 1, 2],
        "uniform_rates": {1: 2.0, 2: 1.0},
        "generate": [0, 2],
        "generate_methods": ["none", "fixed"],
        "batch_size": 2,
    }


def run(setting: dict, output: Path, **more) -> dict[tuple, dict]:
    """The run's records, without the one field that is a measurement of time."""
    folder = evaluate(Evaluate(**{**setting, **more, "output": str(output)}))
    records = read_records(folder / RECORDS, Record)
    assert len({(r.method, r.K, r.id) for r in records}) == len(records)
    return {(r.method, r.K, r.id): r.model_dump(exclude={"seconds"}) for r in records}


def test_decays_against_steps_one_by_one(setting, tmp_path):
    """Rates of three steps by hand, each step a loop of its own."""
    decays = {
        "first": [1, 0, 0],
        "linear": [1, 2 / 3, 1 / 3],
        "cosine": [1, (1 + np.cos(np.pi / 3)) / 2, (1 + np.cos(2 * np.pi / 3)) / 2],
        "exponential": [1, 1 / 2, 1 / 4],
    }
    found = run(setting, tmp_path / "run", methods=["none", *decays], steps=[0, 1, 3], generate=[])
    backbone = load_backbone(setting["model"]["name"], dtype="float32", device="cpu")
    examples = load_dataset("own", source=setting["data"]["source"]).examples
    rows, _ = encode_examples(backbone, examples, chat=False, max_tokens=64)
    for row in rows:
        batch = prompt_batch(backbone, [row])
        for decay, shares in decays.items():
            lora = ZeroInit()(backbone, batch, [0])
            for share in shares:
                lora = adapt(backbone, batch, lora, FixedRate(2.0 * share), 1).lora
            want = answer_nll(backbone, [row], lora).item()
            assert found[decay, 3, row.id]["nll"] == pytest.approx(want, abs=2e-5)
        assert found["first", 3, row.id]["nll"] == pytest.approx(found["linear", 1, row.id]["nll"], abs=2e-5)
    with pytest.raises(ValueError, match="no rate for K = 1, from which cosine decays"):
        run(setting, tmp_path / "other", methods=["cosine"], uniform_rates={2: 1.0}, steps=[2])


def test_constants_and_their_folder_go_together(setting):
    with pytest.raises(
        ValueError, match="constants=None: the method constants and the folder of its rates go together"
    ):
        Evaluate(**{**setting, "methods": ["none", "constants"]})
    with pytest.raises(ValueError, match="constants=x: the method constants"):
        Evaluate(**{**setting, "constants": "x"})


def test_records_resume(tmp_path):
    file = RecordFile(tmp_path, Record)
    file.add([record("none", 0, "a", 1.0, text="line\u2028separator"), record("none", 0, "b", 2.0)])
    with file.path.open("ab") as raw:  # a write that was cut off, inside a character
        raw.write('{"method":"none","K":0,"id":"c","text":"é'.encode()[:-1])
    again = RecordFile(tmp_path, Record)
    assert [r.id for r in again.records] == ["a", "b"]
    again.add([record("none", 0, "b", 9.0), record("none", 0, "c", 3.0), record("none", 0, "c", 3.0)])
    assert [(r.id, r.nll) for r in read_records(again.path, Record)] == [("a", 1.0), ("b", 2.0), ("c", 3.0)]
    assert again.has([("none", 0, "a"), ("none", 0, "c")])
    assert not again.has([("none", 0, "a"), ("none", 0, "d")])


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    RecordFile(tmp_path, Record).add([record("none", 0, "a", 1.0)])
    path = tmp_path / RECORDS
    path.write_text("{]\n" + path.read_text())
    with pytest.raises(ValueError, match=r"records\.jsonl:1 is not a record"):
        read_records(path, Record)


def test_records_of_a_diverged_prompt_can_be_read_again(tmp_path):
    RecordFile(tmp_path, Record).add(
        [record("fixed", 2, "a", 1.0, prompt_nll=[3.0, float("nan")], rates=[[float("inf")]])]
    )
    (again,) = RecordFile(tmp_path, Record).records
    assert again.prompt_nll[0] == 3.0
    assert np.isnan([again.prompt_nll[1], again.rates[0][0]]).all()
    line = (tmp_path / RECORDS).read_text()
    assert json.loads(line, parse_constant=pytest.fail)["prompt_nll"] == [3.0, None]
    (tmp_path / RECORDS).write_text(line.replace("null", "NaN"))  # as older files have it
    assert np.isnan(read_records(tmp_path / RECORDS, Record)[0].prompt_nll[1])


def test_a_row_whose_loss_is_not_finite(tmp_path):
    RecordFile(tmp_path, Record).add([record("fixed", 2, "a", float("inf")), record("fixed", 2, "b", 1.0)])
    first, second = read_records(tmp_path / RECORDS, Record)
    assert np.isnan(first.nll)
    assert second.nll == 1.0
    write_json(tmp_path / "r.json", {"cells": [{"nll": (float("nan"), 1.0)}]})
    assert json.loads((tmp_path / "r.json").read_text(), parse_constant=pytest.fail) == {
        "cells": [{"nll": [None, 1.0]}]
    }


def test_an_interrupted_grid_resumes_to_the_same_records(setting, tmp_path, monkeypatch):
    whole = run(setting, tmp_path / "whole")
    assert len(whole) == 7 * 5  # none at K = 0; fixed and uniform at 1 and 2
    adds = RecordFile.add
    calls = []

    def add_thrice(self, records):
        adds(self, records)
        calls.append(len(records))
        if len(calls) == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RecordFile, "add", add_thrice)
        with pytest.raises(SystemExit) as stop:
            run(setting, tmp_path / "parts")
    assert stop.value.code == 130
    path = tmp_path / "parts" / RECORDS
    assert len(read_records(path, Record)) == 6
    path.write_bytes(path.read_bytes()[:-20])
    parts = run(setting, tmp_path / "parts")
    assert parts == whole


def test_methods_can_be_added_to_a_run_but_its_settings_stay(setting, tmp_path):
    whole = run(setting, tmp_path / "whole")
    run(setting, tmp_path / "parts", methods=["none", "fixed"])
    assert run(setting, tmp_path / "parts") == whole
    with pytest.raises(ValueError, match=r"other settings \(batch_size differ\)"):
        run(setting, tmp_path / "parts", batch_size=4)


def test_records_keep_what_the_report_needs(setting, tmp_path):
    records = run(setting, tmp_path / "run").values()
    rows = {
        (r["prompt"], r["answer"]) for r in map(json.loads, Path(setting["data"]["source"]).read_text().splitlines())
    }
    assert {(r["prompt"], r["answer"]) for r in records if r["text"] is not None} == rows
    assert {(r["method"], r["K"]) for r in records if r["text"] is not None} == {("none", 0), ("fixed", 2)}
    assert all(r["prompt"] is None for r in records if r["text"] is None)
    stated = json.loads((tmp_path / "run" / RUN).read_text())
    assert stated["projections"] == [[0, "q"], [0, "v"], [1, "q"], [1, "v"]]


def slow_nll(model_folder: str, lora, row: int, prompt: list[int], answer: list[int]) -> float:
    """Answer NLL of one prompt by a plain model with one row's adapter merged into its weights."""
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    with torch.no_grad():
        for projection, A_BRI, B_BOR in zip(lora.projections, lora.A, lora.B, strict=True):
            model.get_submodule(projection.module).weight += lora.scaling * B_BOR[row] @ A_BRI[row]
        logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
    return F.cross_entropy(logits, torch.tensor(answer)).item()


def test_swapped_answers_with_the_neighbours_adapter(setting, tmp_path):
    torch.manual_seed(3)
    network = ScaleNet(hidden_size=16, projections=4, base_rates=(3.0, 1.0))
    network.std_H.fill_(0.05)  # tiny models' states are small: so that prompts differ
    torch.nn.init.normal_(network.out.weight, std=0.5)
    network.save_pretrained(tmp_path / "network")
    methods = {"methods": ["none", "layerwise", "swapped"], "layerwise": str(tmp_path / "network")}
    found = run(setting, tmp_path / "run", **methods, batch_size=3, generate=[])
    backbone = load_backbone(setting["model"]["name"], dtype="float32", device="cpu")
    data = load_dataset("own", source=setting["data"]["source"])
    rows, _ = encode_examples(backbone, data.examples, chat=False, max_tokens=1024)
    batches = scoring.at_least_two(batches_of(backbone, rows, 3))
    assert sorted(len(batch) for batch in batches) == [3, 4]
    for batch in batches:
        alone = [adapted(backbone, ZeroInit(), [row], network, 2, seed=0).lora for row in batch]
        for b, row in enumerate(batch):
            own, neighbours = (
                slow_nll(setting["model"]["name"], alone[i], 0, row.prompt, row.answer) for i in (b, b - 1)
            )
            assert abs(own - neighbours) > 1e-3
            assert found["layerwise", 2, row.id]["nll"] == pytest.approx(own, abs=1e-4)
            assert found["swapped", 2, row.id]["nll"] == pytest.approx(neighbours, abs=1e-4)
            assert found["swapped", 2, row.id]["rates"] is None
            rates = torch.tensor(found["layerwise", 2, row.id]["rates"])
            assert rates.shape == (2, 4)
            assert rates.std() > 0


def test_a_prompt_that_diverges_is_answered_by_the_base_model(setting, tmp_path):
    backbone = load_backbone(setting["model"]["name"], dtype="float32", device="cpu")
    data = load_dataset("own", source=setting["data"]["source"])
    rows = encode_examples(backbone, data.examples[:2], chat=False, max_tokens=1024)[0]
    start = ZeroInit()(backbone, prompt_batch(backbone, rows), [0, 0])
    broken = start.with_tensors([t.clone().index_fill_(0, torch.tensor([1]), float("nan")) for t in start.tensors])
    nothing_BK, fell_back_B = torch.zeros(2, 0), torch.zeros(2, dtype=torch.bool)
    made = Adaptation(broken, start, nothing_BK, nothing_BK[..., None], fell_back_B, seconds=1.0)
    answers = {e.id: e.answer for e in data.examples}
    records = score(backbone, rows, made, "fixed", 1, answers=answers, generate=False, max_new_tokens=1)
    assert [r.fallback for r in records] == [False, True]
    want = slow_nll(setting["model"]["name"], start, 1, rows[1].prompt, rows[1].answer)
    assert records[1].nll == pytest.approx(want, abs=1e-5)


def test_a_report_of_a_real_run(setting, tmp_path):
    run(setting, tmp_path / "run", methods=["none", "fixed"])
    page = write_report(tmp_path / "run")
    assert not (tmp_path / "run" / "figures" / "fig4.png").exists()  # no layer-wise records
    assert "fixed 5e-2, K = 2" in page.read_text()


def test_no_batch_is_of_one():
    a, b, c, d, e = (Encoded(name, [1], [1]) for name in "abcde")
    assert scoring.at_least_two([[a], [b, c]]) == [[a, b, c]]
    assert scoring.at_least_two([[a, b], [c], [d]]) == [[a, b], [c, d]]
    assert scoring.at_least_two([[a, b], [c, d], [e]]) == [[a, b], [c, d, e]]
    assert scoring.at_least_two([[a], [b], [c], [d], [e]]) == [
        [a, b],
        [c, d, e],
    ]  # long prompts, not all of them at once
    assert scoring.at_least_two([[a]]) == [[a]]


def test_joined_neighbours_pass_through_the_model_apart(setting, tmp_path, monkeypatch):
    """However long a batch has become, no pass is longer than the device likes, and the records are the same."""
    torch.manual_seed(3)
    network = ScaleNet(hidden_size=16, projections=4, base_rates=(3.0, 1.0))
    network.std_H.fill_(0.05)  # tiny models' states are small: so that prompts differ
    torch.nn.init.normal_(network.out.weight, std=0.5)
    network.save_pretrained(tmp_path / "network")
    methods = {"methods": ["none", "layerwise", "swapped"], "layerwise": str(tmp_path / "network"), "steps": [0, 1]}
    together = run(setting, tmp_path / "together", **methods, batch_size=8)
    passes = []
    original = FrozenLM.forward

    def forward(self, batch, *args, **kwargs):
        passes.append(batch.ids_BT.numel())
        return original(self, batch, *args, **kwargs)

    monkeypatch.setattr(FrozenLM, "forward", forward)
    monkeypatch.setattr(scoring, "batch_tokens", lambda _device: 1)
    apart = run(setting, tmp_path / "apart", **methods, batch_size=8)
    data = load_dataset("own", source=setting["data"]["source"])
    tokenizer = load_backbone(setting["model"]["name"], dtype="float32", device="cpu").tokenizer
    assert max(passes) <= max(len(tokenizer(e.prompt)["input_ids"]) for e in data.examples)
    # Which row is the neighbour depends on the batches, all else does not
    for key, record in together.items():
        if key[0] != "swapped":
            assert apart[key]["nll"] == pytest.approx(record["nll"], abs=1e-4)
            assert apart[key]["text"] == record["text"]
