"""lm-evaluation-harness's own client of OpenAI's completions, unchanged, against the server."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness: pip install 'ephemera[lm-eval]'")
pytest.importorskip("tenacity", reason="its API models need tenacity: pip install 'lm-eval[api]'")

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.tasks import TaskManager

from serving_fixtures import PROMPTS, solo
from tiny_models import save_tiny


@pytest.fixture(scope="module")
def harness(served, tmp_path_factory):
    """lm-evaluation-harness's own client of the server, as its command line makes it."""
    folder = save_tiny(tmp_path_factory.mktemp("tiny"))

    def make(**more):
        words = {"model": "tiny-llama", "base_url": f"{served[0]}/v1/completions", "tokenizer": folder, **more}
        words |= {"max_length": 90, "max_gen_toks": 6, "tokenizer_backend": "huggingface", "max_retries": 1}
        return get_model("local-completions").create_from_arg_string(",".join(f"{k}={v}" for k, v in words.items()))

    return make


PAIRS = [
    ("Question: who wrote the first book about the river?", " a miller's daughter"),
    ("The mill", " runs past the winter of 1820."),
    ("", "down to the old sea"),
    ("The river", " 🦜"),
]


def wanted(backbone, context: str, answer: str) -> tuple[float, bool]:
    """The sum over the answer's tokens by the model alone, one token at a time."""
    encode = backbone.tokenizer
    before = encode(context, add_special_tokens=False)["input_ids"] or [encode.bos_token_id]
    whole = encode(context + answer, add_special_tokens=False)["input_ids"]
    ids = before + (whole[len(before) :] if context else whole)
    total, greedy = 0.0, True
    with torch.no_grad():
        for t in range(len(before), len(ids)):
            logp_V = backbone.model(input_ids=torch.tensor([ids[:t]])).logits[0, -1].log_softmax(-1)
            total += float(logp_V[ids[t]])
            greedy = greedy and int(logp_V.argmax()) == ids[t]
    return total, greedy


@pytest.mark.parametrize("more", [{}, {"batch_size": 3}, {"num_concurrent": 2}, {"tokenized_requests": "False"}])
def test_lm_eval_scores_unchanged(served, harness, more):
    _, backbone, _, engine = served
    pairs = PAIRS
    if more.get("tokenized_requests"):  # as text the server adds BOS, so the harness has to count it
        pairs, more = PAIRS[:2], {**more, "add_bos_token": "True"}
    requests = [Instance(request_type="loglikelihood", doc={}, arguments=p, idx=i) for i, p in enumerate(pairs)]
    want = [wanted(backbone, *pair) for pair in pairs]
    ends = engine.batch.end_tokens
    try:
        for engine.batch.end_tokens in (ends, frozenset(range(320))):  # also where the next token ends the answer
            have = harness(**more).loglikelihood(requests, disable_tqdm=True)
            if "add_bos_token" not in more:
                assert [logp for logp, _ in have] == pytest.approx([logp for logp, _ in want], abs=1e-4)
                assert [greedy for _, greedy in have] == [greedy for _, greedy in want]
            assert len(have) == len(pairs)
    finally:
        engine.batch.end_tokens = ends


def test_lm_eval_knows_a_greedy_answer_and_generates_unchanged(served, harness):
    _, backbone, known, _ = served
    ids = backbone.tokenizer(PROMPTS[0], add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        new = backbone.model.generate(input_ids=torch.tensor([ids]), max_new_tokens=4, do_sample=False)[0, len(ids) :]
    lm = harness()
    (_, greedy), (_, other) = lm._loglikelihood_tokens(
        [((None, None), ids, new.tolist()), ((None, None), ids, [*new[:3].tolist(), (int(new[3]) + 1) % 320])]
    )
    assert (greedy, other) == (True, False)
    until = {"until": ["\n\n", "Question:", "</s>", "Q:", "###"], "max_gen_toks": 6, "do_sample": False}
    for model, name in (("tiny-llama", "none"), ("tiny-llama:fixed", "fixed")):
        asked = [Instance(request_type="generate_until", doc={}, arguments=(f"<s>{PROMPTS[1]}", until), idx=0)]
        made = harness(model=model).generate_until(asked, disable_tqdm=True)
        assert made == [solo(backbone, known[name], PROMPTS[1], steps=2 if known[name].rate else 0, tokens=6)]


def test_a_whole_evaluation_of_lm_eval(served, tmp_path):
    """As its command line runs it: the library's own evaluation of the same model gives the same."""
    url, _, _, _ = served
    folder = save_tiny(tmp_path / "tiny")
    docs = [
        {"question": "who wrote the first book?", "choices": ["a miller's daughter", "the sea"], "gold": 0},
        {"question": "where does the river run?", "choices": ["in the winter", "down to the sea"], "gold": 1},
    ]
    (tmp_path / "docs.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    files = {"data_files": {"test": str(tmp_path / "docs.jsonl")}, "cache_dir": str(tmp_path / "cache")}
    task = {
        "task": "tiny_choice",
        "dataset_path": "json",
        "dataset_kwargs": files,
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "gold",
    }

    def scores(model: str, args: str) -> list[float]:
        manager = TaskManager(include_defaults=False)
        found = simple_evaluate(
            model=model, model_args=args, tasks=[task], device="cpu", bootstrap_iters=0, task_manager=manager
        )
        return [float(r[0][0]) for sample in found["samples"]["tiny_choice"] for r in sample["resps"]]

    at = f"model=tiny-llama,base_url={url}/v1/completions,tokenizer={folder},max_length=90"
    have = scores("local-completions", f"{at},add_bos_token=True")
    want = scores("hf", f"pretrained={folder},dtype=float32,add_bos_token=True")
    assert have == pytest.approx(want, abs=1e-3)
    assert len(set(have)) == 4
