"""`as_generate` inside transformers' own generate: the texts of AdaptiveLM, and a model that is left as it was."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers as hf

import ephemera
from ephemera import AdaptiveLM
from ephemera.inits import ZeroInit
from ephemera.llm.load import load_backbone
from tiny_models import save_tiny

PROMPTS = ["The river runs past the old mill.", "who wrote it?"]
EXAMPLE = Path(__file__).parents[1] / "examples" / "custom_generate"
INIT = ZeroInit(init_std=0.3)


@pytest.fixture(scope="module", params=["llama", "gemma3", "gpt_neox"])
def folder(request, tmp_path_factory) -> Path:
    return save_tiny(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture
def loaded(folder):
    """The model and inputs as a user of transformers has them."""
    model = hf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = hf.AutoTokenizer.from_pretrained(folder, padding_side="left")
    return model, tokenizer, tokenizer(PROMPTS, return_tensors="pt", padding=True)


def said(tokenizer, ids, inputs) -> list[str]:
    return tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def of_adaptive_lm(folder, reach: str, rate: float, steps: int) -> list[str]:
    lm = AdaptiveLM(load_backbone(str(folder), dtype="float32", device="cpu"), rate=rate, init=INIT, reach=reach)
    return lm.generate(PROMPTS, steps=steps, max_new_tokens=12)


@pytest.mark.parametrize(("reach", "steps"), [("all", 1), ("answer", 1), ("all", 2), ("answer", 2), ("all", 0)])
def test_texts_are_those_of_adaptive_lm(folder, loaded, reach, steps):
    model, tokenizer, inputs = loaded
    want = of_adaptive_lm(folder, reach, 2.0, steps)
    decode = ephemera.as_generate(2.0, init=INIT, steps=steps, reach=reach)
    ids = model.generate(**inputs, custom_generate=decode, do_sample=False, max_new_tokens=12)
    assert said(tokenizer, ids, inputs) == want
    if steps:
        plain = model.generate(**inputs, do_sample=False, max_new_tokens=12)
        assert said(tokenizer, plain, inputs) != want  # the steps say something


def test_one_prompt_without_padding_and_a_pipeline(folder, loaded):
    model, tokenizer, _ = loaded
    want = of_adaptive_lm(folder, "answer", 2.0, 1)[0]
    decode = ephemera.as_generate(2.0, init=INIT, steps=1, reach="answer")
    one = tokenizer(PROMPTS[:1], return_tensors="pt")
    assert said(tokenizer, model.generate(**one, custom_generate=decode, do_sample=False, max_new_tokens=12), one) == [
        want
    ]
    pipe = hf.pipeline("text-generation", model=model, tokenizer=tokenizer)
    out = pipe(PROMPTS[0], custom_generate=decode, do_sample=False, max_new_tokens=12, return_full_text=False)
    assert out[0]["generated_text"] == want


def test_beams_and_repeats(folder, loaded):
    """Each repeat decodes with its row's adapter: beams as AdaptiveLM's, samples that begin alike where one token leads."""
    model, tokenizer, inputs = loaded
    decode = ephemera.as_generate(2.0, init=INIT, steps=1)
    lm = AdaptiveLM(load_backbone(str(folder), dtype="float32", device="cpu"), rate=2.0, init=INIT)
    want = lm.generate(PROMPTS, steps=1, max_new_tokens=6, num_beams=2)
    ids = model.generate(**inputs, custom_generate=decode, do_sample=False, num_beams=2, max_new_tokens=6)
    assert said(tokenizer, ids, inputs) == want
    sampled = model.generate(
        **inputs, custom_generate=decode, do_sample=True, top_k=1, num_return_sequences=2, max_new_tokens=6
    )
    greedy = model.generate(**inputs, custom_generate=decode, do_sample=False, max_new_tokens=6)
    assert said(tokenizer, sampled, inputs) == [t for t in said(tokenizer, greedy, inputs) for _ in range(2)]


def test_the_model_is_left_as_it_was(loaded):
    model, _, inputs = loaded
    model.train()
    model.get_input_embeddings().weight.requires_grad_(False)
    before = {name: (p.requires_grad, p.clone()) for name, p in model.named_parameters()}
    modules = {name: (module.training, module.forward) for name, module in model.named_modules()}
    model.generate(**inputs, custom_generate=ephemera.as_generate(2.0, init=INIT, steps=1), max_new_tokens=3)
    with pytest.raises(ValueError, match="steps is -1"):
        model.generate(**inputs, custom_generate=ephemera.as_generate(2.0, init=INIT, steps=-1), max_new_tokens=3)
    for name, p in model.named_parameters():
        assert (p.requires_grad, True) == (before[name][0], torch.equal(p, before[name][1]))
    assert {name: (module.training, module.forward) for name, module in model.named_modules()} == modules


def test_a_rate_for_another_model_is_refused(loaded):
    model, _, inputs = loaded
    with pytest.raises(ValueError, match=r"was trained for|found no modules for target_modules"):
        model.generate(**inputs, custom_generate=ephemera.as_generate("universal"), max_new_tokens=3)


def test_the_folder_for_a_hub(folder, loaded):
    model, tokenizer, inputs = loaded
    where = {"custom_generate": str(EXAMPLE), "trust_remote_code": True}
    ids = model.generate(**inputs, **where, rate=2.0, steps=1, do_sample=False, max_new_tokens=12)
    decode = ephemera.as_generate(2.0, steps=1)
    want = model.generate(**inputs, custom_generate=decode, do_sample=False, max_new_tokens=12)
    assert said(tokenizer, ids, inputs) == said(tokenizer, want, inputs)
    with pytest.raises(ValueError, match="give rate="):
        model.generate(**inputs, **where, max_new_tokens=3)
