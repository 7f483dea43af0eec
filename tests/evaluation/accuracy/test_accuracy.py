"""`ephemera benchmark` and the task-LoRA baseline, on a tiny random model and local rows."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from ephemera.config import Benchmark, TrainTaskLora, check_config, load_config
from ephemera.evaluation.accuracy.run import benchmark
from ephemera.evaluation.accuracy.tables import (
    METRICS,
    by_bytes,
    by_repeat,
    by_sum,
    by_text,
    commonest_place,
    summarize,
    vote,
    write_tables,
)
from ephemera.evaluation.shared.records import RECORDS, AnswerRecord, RecordFile, read_records
from ephemera.inits import PeftInit
from ephemera.llm.load import load_backbone
from ephemera.model import AdaptiveLM
from ephemera.tasks import load_dataset
from ephemera.training.task_lora import train_task_lora
from reference import slow_nll
from tiny_models import SENTENCES, save_tiny

WORDS = " ".join(SENTENCES).split()


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder, and rows of a choice task and of a number task."""
    folder = tmp_path_factory.mktemp("material")
    config = save_tiny(folder / "model") / "config.json"
    longer = {**json.loads(config.read_text()), "max_position_embeddings": 1024}
    config.write_text(json.dumps(longer))
    (folder / "snli").mkdir()
    (folder / "gsm8k").mkdir()
    for split in ("train", "validation", "test"):
        snli = [{"premise": WORDS[i], "hypothesis": WORDS[i + 1], "label": i % 3} for i in range(7)]
        gsm8k = [{"question": f"{WORDS[i]} {i}?", "answer": f"It is {i}.\n#### {i}"} for i in range(5)]
        for task, rows in (("snli", snli), ("gsm8k", gsm8k)):
            (folder / task / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def settings(material: Path, output: Path, **more) -> Benchmark:
    values = {
        "output": str(output),
        "models": [{"name": str(material / "model"), "device": "cpu", "lora": {"r": 2}}],
        "variants": [{"name": "Base"}, {"name": "TTA", "rate": "0.5", "steps": 1}],
        "data": {"tasks": [{"task": "snli"}, {"task": "gsm8k"}], "source": str(material / "{task}")},
        "max_new_tokens": 6,
        "batch_size": 4,
    }
    return check_config(Benchmark, {**values, **more})


@pytest.fixture(scope="module")
def finished(material: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return benchmark(settings(material, tmp_path_factory.mktemp("runs") / "run"))


def test_choices_are_scored_by_their_own_tokens(material, finished):
    """Against one plain forward a choice; texts against AdaptiveLM."""
    records = [r for r in read_records(finished / RECORDS, AnswerRecord) if r.variant == "Base" and r.task == "snli"]
    data = load_dataset("snli", source=str(material / "snli"))
    lm = AdaptiveLM(load_backbone(str(material / "model"), device="cpu"))
    examples = {e.id: e for e in data.examples}
    assert len(records) == 7
    for record in records:
        example = examples[record.id]
        prompt = lm.encode(example.prompt)
        want = []
        for choice in example.choices:
            ids = lm.encode_answer(example.prompt, choice)
            want.append(-slow_nll(lm.backbone.model, prompt + ids, first=len(prompt)).item() * len(ids))
        assert record.choice_logprobs == pytest.approx(want, abs=1e-3)
        assert record.gold == ["entailment", "neutral", "contradiction"].index(example.answer)
        assert record.texts == lm.generate(example.prompt, max_new_tokens=6)
        assert record.choice_bytes == [10, 7, 13]


def test_number_tasks_have_no_choices(finished):
    records = [r for r in read_records(finished / RECORDS, AnswerRecord) if r.task == "gsm8k"]
    assert len(records) == 10
    assert all(r.choice_logprobs is None and r.gold is None and r.correct is not None for r in records)


def test_tables_and_a_second_run_adds_only_what_is_new(material, finished, tmp_path):
    before = (finished / RECORDS).read_text()
    table = write_tables(finished).read_text()
    assert "| model | variant | snli |" in table
    assert "difference to Base" in table
    results = json.loads((finished / "results.json").read_text())
    assert {c["n"] for c in results["choices"]} == {7}
    more = settings(material, finished, against=["TTA", "Base"]).model_copy(deep=True)
    more.repeats = 2
    benchmark(more)
    after = (finished / RECORDS).read_text()
    assert after.startswith(before)
    assert len(after.splitlines()) == 2 * len(before.splitlines())
    table = write_tables(finished).read_text()
    assert table.index("generated answers, %: difference to TTA") < table.index(
        "generated answers, %: difference to Base"
    )
    results = json.loads((finished / "results.json").read_text())
    forth, back = (results[f"nll_against_{base}"][0] for base in ("Base", "TTA"))
    assert (forth["variant"], back["variant"]) == ("TTA", "Base")
    assert forth["mean"] == pytest.approx(-back["mean"])


def test_other_settings_in_the_same_folder_are_refused(material, finished):
    with pytest.raises(ValueError, match=r"other settings \(.*batch_size.* differ"):
        benchmark(settings(material, finished, batch_size=2))
    changed = [{"name": "Base"}, {"name": "TTA", "rate": "0.1", "steps": 1}]
    with pytest.raises(ValueError, match=r"variant TTA on gsm8k, variant TTA on snli differ"):
        benchmark(settings(material, finished, variants=changed))


def test_a_variant_can_be_for_some_tasks(material, tmp_path):
    variants = [{"name": "Base"}, {"name": "x", "rate": "0.5", "steps": 1, "tasks": ["snli"]}]
    folder = benchmark(settings(material, tmp_path / "run", variants=variants, scoring=["choices"]))
    records = read_records(folder / RECORDS, AnswerRecord)
    assert {(r.variant, r.task) for r in records} == {("Base", "snli"), ("Base", "gsm8k"), ("x", "snli")}
    with pytest.raises(ValueError, match="variant 'x' names task 'snly'"):
        benchmark(settings(material, tmp_path / "b", variants=[{"name": "x", "tasks": ["snly"]}]))


def test_mistakes_are_named(material, tmp_path):
    with pytest.raises(ValueError, match="has steps but no rate"):
        benchmark(settings(material, tmp_path / "a", variants=[{"name": "x", "steps": 1}]))
    with pytest.raises(ValueError, match="'x' has a rate but takes no steps"):
        benchmark(settings(material, tmp_path / "a", variants=[{"name": "x", "rate": 1}]))
    weighted = {"tasks": [{"task": "snli", "weight": 2}], "source": str(material / "{task}")}
    with pytest.raises(ValueError, match=r"unknown setting 'data\.tasks\.0\.weight'"):
        benchmark(settings(material, tmp_path / "w", data=weighted))
    with pytest.raises(ValueError, match="against names 'Bass', which is no variant's name"):
        benchmark(settings(material, tmp_path / "a", against=["Bass"]))
    with pytest.raises(ValueError, match="same name"):
        benchmark(settings(material, tmp_path / "b", variants=[{"name": "x"}, {"name": "x"}]))
    rows = [{"task_id": "HumanEval/0", "prompt": "def f():\n", "canonical_solution": " return 1\n"}]
    rows[0] |= {"test": "def check(c):\n    assert c() == 1\n", "entry_point": "f"}
    (tmp_path / "test.jsonl").write_text(json.dumps(rows[0]) + "\n")
    data = {"tasks": [{"task": "humaneval"}], "source": str(tmp_path)}
    with pytest.raises(ValueError, match="--allow-code-execution"):
        benchmark(settings(material, tmp_path / "c", data=data))


def test_a_choice_longer_than_the_window_is_named(material, tmp_path):
    """At once, by file, row and field: alone, or after a prompt whose gold answer fits."""
    narrow = save_tiny(tmp_path / "narrow")
    config = json.loads((narrow / "config.json").read_text())
    (narrow / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 160}))
    short = {"question": "why?", "choices": {"text": ["the mill", "a river"], "label": ["A", "B"]}, "answerKey": "A"}
    lm = AdaptiveLM.from_pretrained(str(narrow), device="cpu")
    for count, words in ((80, "after a prompt of"), (170, r"has a choice of \d+ tokens \(")):
        long = {**short, "choices": {"text": ["the mill", " ".join(["mill"] * count)], "label": ["A", "B"]}}
        (tmp_path / "test.jsonl").write_text(json.dumps(short) + "\n" + json.dumps(long) + "\n")
        example = load_dataset("arc-easy", source=str(tmp_path)).examples[1]
        room = 160 - len(lm.encode_answer(example.prompt, "the mill"))
        assert (len(lm.backbone.tokenizer(example.prompt)["input_ids"]) <= room) is (count == 80)
        data = {"tasks": [{"task": "arc-easy"}], "source": str(tmp_path)}
        models = [{"name": str(narrow), "device": "cpu", "lora": {"r": 2}}]
        said = rf"test\.jsonl:2: field 'choices\.text' .*{words}.*the window of .*narrow holds \(160\)"
        with pytest.raises(ValueError, match=said) as error:
            benchmark(settings(material, tmp_path / f"run{count}", data=data, models=models))
        assert "\n" not in str(error.value)
        assert not (tmp_path / f"run{count}" / RECORDS).exists()


def record(variant: str, i: int, **more) -> AnswerRecord:
    return AnswerRecord(model="m", variant=variant, task="snli", repeat=0, id=str(i), nll=1.0, seconds=0.1, **more)


def test_metrics_by_hand():
    short = record("a", 0, choice_logprobs=[-2.0, -3.0], choice_bytes=[2, 30], gold=1)
    assert (by_sum(short), by_bytes(short)) == (0.0, 1.0)
    said = record("a", 1, correct=[True, True, False], picked=["neutral", "neutral", None])
    assert by_text(said) == pytest.approx(2 / 3)
    assert vote(said) == 1.0
    assert vote(record("a", 2, correct=[False, False, True], picked=["no", "no", "neutral"])) == 0.0
    assert vote(record("a", 2, correct=[False, False, True], picked=[None, None, "neutral"])) == 1.0
    assert vote(record("a", 2, correct=[False], picked=["no"])) is None
    lost = record("a", 3, choice_logprobs=[float("nan"), -1.0], choice_bytes=[1, 1], gold=0)
    assert (by_sum(lost), by_bytes(lost)) == (0.0, 0.0)
    assert summarize([short, said], by_sum)[("m", "a")]["snli"].n == 1
    assert set(METRICS) == {"generated", "any", "choices", "choices_per_byte", "vote", "nll"}


def test_a_variant_that_always_chooses_one_place_shows():
    same = [record("a", i, choice_logprobs=[-3.0, -1.0], choice_bytes=[1, 1], gold=i % 2) for i in range(4)]
    mixed = [record("b", i, choice_logprobs=[-float(i), -1.5], choice_bytes=[1, 1], gold=i % 2) for i in range(4)]
    lost = record("b", 5, choice_logprobs=[float("nan"), -1.5], choice_bytes=[1, 1], gold=0)
    shares = commonest_place([*same, *mixed, lost, record("b", 6)])
    assert shares == {("m", "a"): {"snli": 1.0}, ("m", "(right answers)"): {"snli": 0.5}, ("m", "b"): {"snli": 0.5}}


def test_repeats_of_a_row_count_once():
    rows = [record("a", 0, texts=["x"], correct=[True]) for _ in range(3)]
    rows = [r.model_copy(update={"repeat": i}) for i, r in enumerate(rows)]
    assert summarize(rows, by_text)[("m", "a")]["snli"].n == 1


def test_repeats_draw_anew_and_their_spread_is_shown(material, tmp_path):
    more = {"repeats": 3, "temperature": 1.0, "samples": 2, "scoring": ["generate"]}
    data = {"tasks": [{"task": "gsm8k"}], "source": str(material / "{task}")}
    config = settings(material, tmp_path / "run", data=data, variants=[{"name": "Base"}], **more)
    folder = benchmark(config)
    records = read_records(folder / RECORDS, AnswerRecord)
    texts = [[r.texts for r in records if r.repeat == repeat] for repeat in range(3)]
    assert len(texts[0]) == 5
    assert texts[0] != texts[1] != texts[2] != texts[0]
    ids = [r.id for r in records if r.repeat == 0]
    assert len({str(t) for t in texts[0]}) == len(ids)  # rows of one batch, and batches, draw on their own
    # A run that was stopped in its second repeat draws the same again
    (folder / RECORDS).write_text("".join(r.model_dump_json(exclude_none=True) + "\n" for r in records[:5]))
    benchmark(config)
    assert [r.texts for r in read_records(folder / RECORDS, AnswerRecord)] == [r.texts for r in records]
    # What was right is the judge's; here the spread is what counts
    for record in records:
        record.correct = [record.repeat > 0, record.repeat > 1]
    assert by_repeat(records, by_text) == {(records[0].model, "Base"): {"gsm8k": [0.0, 0.5, 1.0]}}
    assert by_repeat(records[:-1], by_text)[(records[0].model, "Base")]["gsm8k"] == [0.0, 0.5]
    (folder / RECORDS).write_text("".join(r.model_dump_json(exclude_none=True) + "\n" for r in records))
    page = write_tables(folder).read_text()
    assert "from repeat to repeat" in page
    assert "50.0 [0.0, 100.0]" in page.split("from repeat to repeat")[1]
    assert json.loads((folder / "results.json").read_text())["generated_by_repeat"][0]["means"] == [0.0, 0.5, 1.0]


def test_records_are_kept_by_key(tmp_path):
    file = RecordFile(tmp_path, AnswerRecord)
    file.add([record("a", 0), record("a", 0), record("b", 0)])
    assert len(RecordFile(tmp_path, AnswerRecord).records) == 2


@pytest.fixture(scope="module")
def task_lora(material: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    overrides = [
        f"output={tmp_path_factory.mktemp('lora') / 'run'}",
        f"model.name={material / 'model'}",
        "model.device=cpu",
        *(f"{split}.source={material}/{{task}}" for split in ("train", "validation")),
        *(f"{split}.tasks=[{{task: snli}}]" for split in ("train", "validation")),
        *("optimizer.samples=40", "optimizer.learning_rate=0.05", "validate_every=5"),
    ]
    return train_task_lora(load_config(TrainTaskLora, None, overrides))


def test_the_baseline_learns_and_saves_what_peft_reads(material, task_lora):
    metrics = [json.loads(line) for line in (task_lora.parent / "metrics.jsonl").read_text().splitlines()]
    validation = [m["validation_nll"] for m in metrics if "validation_nll" in m]
    assert validation[-1] < validation[0]
    base = AutoModelForCausalLM.from_pretrained(material / "model")
    peft = PeftModel.from_pretrained(base, task_lora)
    lm = AdaptiveLM.from_pretrained(str(material / "model"), init=task_lora, device="cpu")
    prompt, answer = "the mill", "burned"
    ids = lm.encode(prompt) + lm.encode_answer(prompt, answer)
    with torch.no_grad():
        logits = peft(torch.tensor([ids])).logits[0].log_softmax(-1)
    count = len(lm.encode_answer(prompt, answer))
    want = -torch.stack([logits[len(ids) - count + i - 1, ids[len(ids) - count + i]] for i in range(count)]).mean()
    have = lm.answer_nll([prompt], [answer], lm.adapt([prompt], steps=0))
    assert have.item() == pytest.approx(want.item(), abs=1e-5)
    assert abs(have.item() - lm.answer_nll([prompt], [answer]).item()) > 1e-3


def test_the_benchmark_reads_the_baseline(material, task_lora, tmp_path):
    variants = [{"name": "Base"}, {"name": "LoRA", "init": str(task_lora)}]
    data = {"tasks": [{"task": "snli"}], "source": str(material / "{task}")}
    folder = benchmark(settings(material, tmp_path / "run", variants=variants, data=data, scoring=["choices"]))
    means = summarize(read_records(folder / RECORDS, AnswerRecord), lambda r: r.nll)
    model = str(material / "model")
    assert means[(model, "LoRA")]["snli"].mean < means[(model, "Base")]["snli"].mean


def test_an_exported_adapter_is_an_init(material, tmp_path):
    lm = AdaptiveLM.from_pretrained(str(material / "model"), rate=0.5, device="cpu")
    prompts = ["the mill burned", "a quiet mill"]
    adaptation = lm.adapt(prompts, steps=1)
    adaptation.export_peft(tmp_path / "adapter", row=1)
    again = AdaptiveLM.from_pretrained(str(material / "model"), init=tmp_path / "adapter", device="cpu")
    want = lm.answer_nll(prompts, ["x", "y"], adaptation)[1].item()
    have = again.answer_nll(prompts, ["x", "y"], again.adapt(prompts, steps=0))[1].item()
    assert have == pytest.approx(want, abs=1e-5)


def test_a_task_listed_twice(material, tmp_path):
    overrides = [f"output={tmp_path}", f"model.name={material / 'model'}", "model.device=cpu"]
    twice = "train.tasks=[{task: snli}, {task: snli}]"
    with pytest.raises(ValueError, match="task 'snli' is listed twice"):
        train_task_lora(load_config(TrainTaskLora, None, [*overrides, twice, f"train.source={material}/{{task}}"]))


@pytest.mark.parametrize("spoil", ["rank", "missing", "list", "pissa"])
def test_damaged_peft_folders_are_one_clear_error(task_lora, tmp_path, spoil):
    folder = tmp_path / "adapter"
    shutil.copytree(task_lora, folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    state = load_file(folder / "adapter_model.safetensors")
    if spoil == "rank":
        config["r"] = 8
    elif spoil == "missing":
        del state[next(key for key in state if "lora_B" in key)]
    elif spoil == "pissa":
        config["init_lora_weights"] = "pissa_niter_4"
    (folder / "adapter_config.json").write_text("[]" if spoil == "list" else json.dumps(config))
    save_file(state, folder / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=str(folder)):
        PeftInit.load(folder)


def test_a_network_trained_anew_is_another_variant(material, task_lora, tmp_path):
    adapter = tmp_path / "adapter"
    shutil.copytree(task_lora, adapter)
    variants = [{"name": "LoRA", "init": str(adapter)}]
    data = {"tasks": [{"task": "snli"}], "source": str(material / "{task}")}
    config = settings(material, tmp_path / "run", variants=variants, data=data, scoring=["choices"])
    benchmark(config)
    benchmark(config)
    state = load_file(adapter / "adapter_model.safetensors")
    save_file({key: 2 * t for key, t in state.items()}, adapter / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="variant LoRA on snli differ"):
        benchmark(config)


def test_notes_do_not_call_a_generated_start_unadapted(material, task_lora):
    model = str(material / "model")
    notes = []
    for init in ("zero", task_lora):
        lm = AdaptiveLM.from_pretrained(model, init=init, rate=0.5, device="cpu")
        lm.backbone.tokenizer.backend_tokenizer.post_processor = None  # no BOS: "a" is one token
        notes += lm.adapt(["a"], steps=1).notes
    assert notes == [
        f"one-token prompt: nothing to learn from, answered {how}" for how in ("unadapted", "from its start")
    ]
    diverged = AdaptiveLM.from_pretrained(model, init=task_lora, rate=1e38, device="cpu").adapt(["the mill"], steps=2)
    assert diverged.notes == ("non-finite loss or update: answered from its start",)
    assert diverged.fallback_B.tolist() == [True]
