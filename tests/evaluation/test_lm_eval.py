"""The lm-evaluation-harness model against lm-eval's own HFLM, and against adapters merged into plain weights."""

import json
import runpy
import sys
import tomllib
from functools import partial
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch
import yaml

pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness: pip install 'ephemera[lm-eval]'")

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from ephemera import AdaptiveLM
from ephemera.evaluation import lm_eval as harness
from ephemera.evaluation.contexts import Contexts
from ephemera.evaluation.lm_eval import EphemeraLM
from ephemera.llm.prefill import prefill
from reference import close, merged_model
from tiny_models import ARCHITECTURES, left, random_ids, random_lora, tiny_backbone

RATE, STEPS = 0.3, 2
LONG = "The river runs past the old mill and down to the sea. " * 12  # longer than the tiny model's window of 96
PAIRS = [
    ("Question: who wrote the first book about the river?\n\nAnswer:", " a miller's daughter"),
    ("Question: who wrote the first book about the river?\n\nAnswer:", " the sea"),
    ("Question: who wrote the first book about the river?\n\nAnswer:", " 1"),
    ("The mill ", "runs"),  # trailing space: lm-eval gives it to the continuation
    ("The mill", " runs past the winter of 1820."),
    ("The mill", "er"),  # merges across the border
    ("", "down to the old sea"),
    (" \n", "The river"),  # blank: a lone BOS
    ("<s><|user|>\nThe mill\n<|assistant|>\n", "runs down"),  # as a chat template writes it
    (LONG, " runs"),
    (LONG, " runs past the old mill and down to the sea"),
]


def ask(kind: str, arguments: list[tuple]) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=a, idx=i) for i, a in enumerate(arguments)]


@pytest.fixture(scope="module")
def hflm(llama_folder):
    return HFLM(str(llama_folder), device="cpu", dtype="float32", batch_size=3)


@pytest.fixture(scope="module")
def base(llama_folder):
    return EphemeraLM(str(llama_folder), batch_size="auto")


@pytest.fixture(scope="module")
def adaptive(llama_folder):
    return EphemeraLM(str(llama_folder), rate=RATE, steps=STEPS, batch_size=2)


def same(have: list[tuple[float, bool]], want: list[tuple[float, bool]], tolerance: float = 1e-4) -> None:
    assert [greedy for _, greedy in have] == [greedy for _, greedy in want]
    assert [logp for logp, _ in have] == pytest.approx([logp for logp, _ in want], abs=tolerance)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_scores_are_sums_of_answer_nll_and_greedy_is_what_generate_gives(architecture):
    backbone = tiny_backbone(architecture)
    prompts, rows = random_ids([9, 4, 12]), [2, 0, 2, 1]
    lora = random_lora(backbone, 3)
    read = prefill(backbone, left(prompts), lora)
    own = random_ids([3, 1, 2], seed=5)
    logp, greedy = read.score(own)
    close(logp, -read.answer_nll(own) * torch.tensor([3, 1, 2]))
    best = prefill(backbone, left(prompts), lora).generate(max_new_tokens=3, min_new_tokens=3)
    wrong = [*best[2][:2], 3 + (best[2][2] == 3)]
    answers = [best[2], best[0][:1], wrong, best[1][:2]]
    logp, greedy = read.score(answers, rows)
    assert greedy.tolist() == [True, True, False, True]
    for n, row in enumerate(rows):  # each row alone, in a prefill of its own
        alone = prefill(backbone, left([prompts[row]]), lora.rows([row]))
        close(logp[n], -alone.answer_nll([answers[n]])[0] * len(answers[n]))
    once, nll, again = read.score(own)[0], read.answer_nll(own), read.score(own)[0]
    close(again, once, 0)  # the cache is as it was
    close(once, -nll * torch.tensor([3, 1, 2]), 1e-12)  # two ways through the vocabulary


def test_without_steps_the_numbers_are_hflms(hflm, base):
    pieces = [base.tokenizer.decode([i]) for i in range(3, 300)]
    pairs = PAIRS + [("The river runs", piece) for piece in pieces if piece.strip()]
    want = hflm.loglikelihood(ask("loglikelihood", pairs), disable_tqdm=True)
    have = base.loglikelihood(ask("loglikelihood", pairs), disable_tqdm=True)
    same(have, want)
    assert any(greedy for _, greedy in have)


def test_a_continuation_that_merges_into_its_context_is_read_alone(base, monkeypatch):
    """There HFLM ends in an assertion."""
    monkeypatch.setattr(base.tokenizer, "encode", lambda text, add_special_tokens: [1] * 3 if "x" in text else [5])
    assert base._encode_pair("x", "y") == ([1] * 3, [5])
    assert base._encode_pair("  ", "y")[0] == [5]


def test_perplexity_is_hflms_or_refused(hflm, base, adaptive):
    texts = ask("loglikelihood_rolling", [(LONG,), ("The mill",)])
    want = hflm.loglikelihood_rolling(texts, disable_tqdm=True)
    assert base.loglikelihood_rolling(texts) == pytest.approx(want, abs=1e-3)
    with pytest.raises(ValueError, match="no context to adapt to"):
        adaptive.loglikelihood_rolling(texts)


def test_greedy_text_is_hflms(hflm, base):
    def alone(requests: list[tuple]) -> list[str]:
        """In a batch HFLM lets its first text decide for all whether they get a BOS, so two for some chat prompts."""
        return [hflm.generate_until(ask("generate_until", [r]), disable_tqdm=True)[0] for r in requests]

    contexts = [PAIRS[0][0], "The mill ", "The mill ", LONG, PAIRS[8][0]]
    plain = [(c, {"until": [], "max_gen_toks": 12}) for c in contexts]
    texts = alone(plain)
    assert base.generate_until(ask("generate_until", plain), disable_tqdm=True) == texts
    stops = [text[len(text) // 2 :][:2] for text in texts]
    assert all(stops)
    stopped = [(c, {"until": [s], "max_gen_toks": 12}) for c, s in zip(contexts, stops, strict=True)]
    stopped += [("The mill", {"until": "\n", "max_gen_toks": 3, "do_sample": False, "temperature": 0.0})]
    have = base.generate_until(ask("generate_until", stopped), disable_tqdm=True)
    assert have == alone(stopped)
    assert all(len(h) < len(t) for h, t in zip(have, texts, strict=False))


def test_with_steps_scores_are_those_of_merged_adapters(llama_folder, hflm, adaptive):
    pairs = [pair for i, pair in enumerate(PAIRS) if pair[0].strip() and "<s>" not in pair[0] and i < 9]
    have = adaptive.loglikelihood(ask("loglikelihood", pairs))
    lm = AdaptiveLM.from_pretrained(str(llama_folder), rate=RATE)
    for (context, continuation), (logp, greedy) in zip(pairs, have, strict=True):
        adaptation = lm.adapt(context.rstrip(), steps=STEPS)
        context_ids, ids = hflm._encode_pair(context, continuation)
        with torch.no_grad():
            model = merged_model(lm.backbone, adaptation.lora)
            logits = model(torch.tensor([context_ids + ids])).logits[0, len(context_ids) - 1 : -1]
        want = logits.log_softmax(-1)[torch.arange(len(ids)), ids].sum()
        assert logp == pytest.approx(float(want), abs=1e-3)
        assert greedy == (logits.argmax(-1).tolist() == ids)
    base = hflm.loglikelihood(ask("loglikelihood", pairs), disable_tqdm=True)
    assert all(abs(h[0] - b[0]) > 1e-3 for h, b in zip(have, base, strict=True))


def test_an_adapter_from_peft_is_a_start(llama_folder, tmp_path, adaptive):
    """One context's own adapter, saved, then taken as every context's: that context's scores stay."""
    context = PAIRS[0][0]
    lm = AdaptiveLM.from_pretrained(str(llama_folder), rate=RATE)
    folder = lm.adapt(context, steps=STEPS).export_peft(tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    config["target_modules"] = ["q_proj", "v_proj"]  # as PEFT's training writes them
    (folder / "adapter_config.json").write_text(json.dumps(config))
    fixed = EphemeraLM(str(llama_folder), init=str(folder), steps=0)
    requests = ask("loglikelihood", PAIRS[:3])
    same(fixed.loglikelihood(requests), adaptive.loglikelihood(requests), 1e-3)
    texts = ask("loglikelihood_rolling", [("The mill runs",)])
    assert fixed.loglikelihood_rolling(texts) != pytest.approx(
        EphemeraLM(str(llama_folder)).loglikelihood_rolling(texts)
    )


def test_with_steps_texts_are_adaptive_lms(llama_folder, adaptive):
    contexts = [PAIRS[0][0], "The mill", "down to the old sea of 1820."]
    requests = ask("generate_until", [(c, {"until": [], "max_gen_toks": 8}) for c in contexts * 2])
    lm = AdaptiveLM.from_pretrained(str(llama_folder), rate=RATE)
    want = [t.split("</s>")[0] for t in lm.generate(contexts, steps=STEPS, max_new_tokens=8)]
    assert adaptive.generate_until(requests) == want * 2
    assert want != lm.generate(contexts, steps=0, max_new_tokens=8)


def test_with_reach_answer_scores_and_texts_are_adaptive_lms(llama_folder, adaptive):
    """Choices that share a context, as they do in a task; their tokens are those of `AdaptiveLM` here."""
    reached = EphemeraLM(str(llama_folder), rate=60.0, steps=1, reach="answer", batch_size=2)
    pairs = [pair for pair in PAIRS[:5] if not pair[0].endswith(" ")]
    lm = AdaptiveLM.from_pretrained(str(llama_folder), rate=60.0, reach="answer")
    contexts, continuations = zip(*pairs, strict=True)
    nll_B = lm.answer_nll(contexts, [c.strip() for c in continuations], lm.adapt(contexts, steps=1))
    lengths = [len(lm.encode_answer(a, b.strip())) for a, b in pairs]
    have = [logp for logp, _ in reached.loglikelihood(ask("loglikelihood", pairs))]
    assert have == pytest.approx([-nll * n for nll, n in zip(nll_B.tolist(), lengths, strict=True)], abs=1e-3)
    everywhere = EphemeraLM(str(llama_folder), rate=60.0, steps=1).loglikelihood(ask("loglikelihood", pairs))
    assert all(abs(h - logp) > 1e-3 for h, (logp, _) in zip(have, everywhere, strict=True))
    requests = ask("generate_until", [(c, {"until": [], "max_gen_toks": 8}) for c in contexts[-2:]])
    want = [t.split("</s>")[0] for t in lm.generate(contexts[-2:], steps=1, max_new_tokens=8)]
    assert reached.generate_until(requests) == want
    assert reached.get_model_info()["ephemera"]["reach"] == "answer"
    assert adaptive.get_model_info()["ephemera"]["reach"] == "all"


def test_adapters_do_not_depend_on_continuations_and_contexts_share_them(adaptive, monkeypatch):
    made: dict[tuple[int, ...], list[torch.Tensor]] = {}
    real = Contexts.adapt

    def noted(self, contexts):
        adapters = real(self, contexts)
        for row, context in enumerate(contexts):
            assert context not in made, "adapted twice"
            made[context] = [t[row] for t in adapters[0].tensors]
        return adapters

    monkeypatch.setattr(Contexts, "adapt", noted)
    contexts = [PAIRS[0][0], "The mill", LONG.strip(), ""]
    rounds = []
    for continuations in (
        [" runs", " the sea"],
        [" a miller's daughter wrote it in the winter of 1820.", " 1", " who"],
    ):
        made.clear()
        adaptive.loglikelihood(ask("loglikelihood", [(c, x) for x in continuations for c in contexts]))
        rounds.append(dict(made))
    assert len(rounds[0]) == len(contexts)
    assert rounds[0].keys() == rounds[1].keys()
    for context, tensors in rounds[0].items():
        for one, other in zip(tensors, rounds[1][context], strict=True):
            assert torch.equal(one, other)
    made.clear()
    adaptive.generate_until(ask("generate_until", [(c, {"max_gen_toks": 2}) for c in contexts[:3]]))
    for context, tensors in made.items():  # other batches, so up to rounding
        close(tensors, rounds[0][context], 1e-4)


def test_batches_change_nothing(llama_folder, adaptive):
    requests = ask("loglikelihood", PAIRS)
    for size in (1, 16, "auto"):
        other = EphemeraLM(str(llama_folder), rate=RATE, steps=STEPS, batch_size=size)
        same(other.loglikelihood(requests), adaptive.loglikelihood(requests), 1e-3)


@pytest.fixture
def task(tmp_path) -> dict:
    """A multiple-choice task of local data."""
    docs = [
        {"question": "Who wrote the book?", "choices": ["the miller", "the sea", "a daughter"], "gold": 2},
        {"question": "Where does the river run?", "choices": ["to the sea", "up", "1820"], "gold": 0},
        {"question": "Who wrote the river?", "choices": ["winter", "a mill", "the book"], "gold": 1},
    ]
    (tmp_path / "docs.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    return {
        "task": "tiny_choice",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "docs.jsonl")}, "cache_dir": str(tmp_path / "cache")},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "gold",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }


@pytest.mark.parametrize("chat", [False, True])
def test_a_whole_evaluation(llama_folder, task, chat):
    def evaluate(model: str, args: str):
        found = simple_evaluate(
            model=model,
            model_args=f"pretrained={llama_folder},{args}",
            tasks=[task],
            device="cpu",
            batch_size=2,
            apply_chat_template=chat,
            bootstrap_iters=0,
            task_manager=TaskManager(include_defaults=False),
        )
        assert found is not None
        scores = [float(r[0][0]) for sample in found["samples"]["tiny_choice"] for r in sample["resps"]]
        return found["results"]["tiny_choice"], scores, found["config"]

    want, scores, _ = evaluate("hf", "dtype=float32")
    have, same_scores, _ = evaluate("ephemera", "steps=0")
    assert {k: have[k] for k in ("acc,none", "acc_norm,none")} == {k: want[k] for k in ("acc,none", "acc_norm,none")}
    assert same_scores == pytest.approx(scores, abs=1e-4)
    _, adapted, config = evaluate("ephemera", f"rate={RATE},steps=1,batch_size=8")
    assert len(adapted) == len(scores) == 9
    assert adapted != pytest.approx(scores, abs=1e-3)
    assert config["ephemera"]["steps"] == 1
    assert config["ephemera"]["rate"] == RATE


def test_the_command_line(llama_folder, task, tmp_path, monkeypatch, capsys):
    (tmp_path / "tiny_choice.yaml").write_text(yaml.safe_dump(task))
    words = ["--model", "ephemera", "--model_args", f"pretrained={llama_folder},rate=0.3,steps=1"]
    words += ["--tasks", "tiny_choice", "--include_path", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["lm_eval", *words])
    monkeypatch.setattr("lm_eval.tasks.TaskManager", partial(TaskManager, include_defaults=False))  # reads 14,000 files
    harness.main()
    assert "tiny_choice" in capsys.readouterr().out

    def mistaken():
        EphemeraLM(str(llama_folder), stepps=1)

    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", mistaken)
    with pytest.raises(SystemExit) as stop:
        harness.main()
    assert stop.value.code == 2
    assert "Did you mean 'steps'?" in capsys.readouterr().err


def test_mistakes_are_named(llama_folder, base):
    def make(**settings):
        return EphemeraLM(str(llama_folder), **settings)

    for settings, message in (
        ({"ratee": 1}, "unknown model argument 'ratee'. Did you mean 'rate'?"),
        ({"steps": 1}, "steps without a rate"),
        ({"steps": "two", "rate": 1}, "steps is 'two'"),
        ({"batch_size": "auto:4"}, "batch_size is 'auto:4'"),
        ({"max_length": 97}, "window is 96"),
        ({"dtype": "flot32"}, "Did you mean 'float32'?"),
        ({"reach": "al"}, "unknown reach 'al'. Did you mean 'all'?"),
    ):
        with pytest.raises(ValueError, match=message.replace("?", r"\?")):
            make(**settings)
    with pytest.raises(ValueError, match="pretrained="):
        get_model("ephemera").create_from_arg_string("steps=1")
    for gen_kwargs in ({"max_gen_toks": 96}, {"max_length": 9}, {"num_return_sequences": 2}):
        with pytest.raises(ValueError, match="max_gen_toks"):
            base.generate_until(ask("generate_until", [("The mill", gen_kwargs)]))
    assert make(rate=RATE).contexts.steps == 1
    assert make().contexts.steps == 0


def test_the_entry_point_names_the_model():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    target = project["entry-points"]["lm_eval.models"]["ephemera"]
    assert EntryPoint("ephemera", target, "lm_eval.models").load() is EphemeraLM
    assert get_model("ephemera") is EphemeraLM


def test_run_as_a_program_there_is_one_model_class(monkeypatch):
    # Where lm-eval knows the entry point already, a second class under its name (__main__'s) would be refused.
    models = []
    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", lambda: models.append(get_model("ephemera")))
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("ephemera.evaluation.lm_eval", run_name="__main__")
    assert stop.value.code == 0
    assert models == [EphemeraLM]


def test_without_lm_eval_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    monkeypatch.delitem(sys.modules, "ephemera.evaluation.lm_eval")
    with pytest.raises(SystemExit, match=r"ephemera\[lm-eval\]"):
        runpy.run_module("ephemera.evaluation.lm_eval", run_name="__main__")
