import re
import threading
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from ephemera import Adaptation, AdaptiveLM, FixedRate, ZeroInit
from ephemera.adaptation import LeftAlone
from ephemera.llm.frozen_lm import FrozenLM
from ephemera.llm.prefill import prefill
from ephemera.llm.tokenize import encode_answer, encode_prompt
from ephemera.lora import LoraLinear
from ephemera.model import BATCH_SIZE
from reference import close, merged_model, slow_nll
from tiny_models import (
    ARCHITECTURES,
    SomeRowsWild,
    left,
    random_ids,
    random_lora,
    random_scalenet,
    save_tiny,
    tiny_backbone,
    tiny_model,
)

# Different lengths, and longer than the sliding windows of the tiny models
PROMPTS = ["Question: who wrote the first book about the river?\n\nAnswer:", "The mill", "down to the old sea of 1820."]
ANSWERS = ["a miller's daughter", "runs", "in the winter it"]
RATE = 0.3


def tiny_lm(architecture: str = "llama", **settings) -> AdaptiveLM:
    return AdaptiveLM(tiny_backbone(architecture), rate=RATE, init=ZeroInit(r=2), **settings)


@pytest.fixture
def lm() -> AdaptiveLM:
    return tiny_lm()


def oracle(lm: AdaptiveLM, adaptation: Adaptation | None, row: int):
    return merged_model(lm.backbone, adaptation.lora if adaptation else None, row)


def oracle_text(lm: AdaptiveLM, adaptation: Adaptation | None, row: int, prompt: str, **kwargs) -> str:
    """transformers' own generate on one unpadded prompt, with the adapter merged into the weights."""
    ids = torch.tensor([encode_prompt(lm.backbone.tokenizer, prompt)])
    new = oracle(lm, adaptation, row).generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), pad_token_id=0, do_sample=False, **kwargs
    )
    return lm.backbone.tokenizer.decode(new[0, ids.shape[1] :], skip_special_tokens=True)


def clean(backbone: FrozenLM) -> bool:
    return not any(isinstance(m, LoraLinear) for m in backbone.model.modules())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("steps", [0, 2])
def test_answer_nll_is_the_merged_models(architecture, steps):
    lm = tiny_lm(architecture)
    adaptation = lm.adapt(PROMPTS, steps=steps)
    nll = lm.answer_nll(PROMPTS, ANSWERS, adaptation)
    for row, (prompt, answer) in enumerate(zip(PROMPTS, ANSWERS, strict=True)):
        ids = encode_prompt(lm.backbone.tokenizer, prompt)
        whole = ids + encode_answer(lm.backbone.tokenizer, prompt, answer)
        close(nll[row], slow_nll(oracle(lm, adaptation, row), whole, first=len(ids)), 1e-5)
    if not steps:
        close(nll, lm.answer_nll(PROMPTS, ANSWERS), 0)
    else:
        assert (nll - lm.answer_nll(PROMPTS, ANSWERS)).abs().min() > 1e-4


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("steps", [0, 2])
def test_generate_is_the_merged_models(architecture, steps):
    lm = tiny_lm(architecture)
    adaptation = lm.adapt(PROMPTS, steps=steps)
    have = lm.generate(PROMPTS, steps=steps, max_new_tokens=10)
    assert have == [oracle_text(lm, adaptation, row, p, max_new_tokens=10) for row, p in enumerate(PROMPTS)]
    assert have == lm.generate(PROMPTS, adaptation=adaptation, max_new_tokens=10)
    assert clean(lm.backbone)


def test_adapters_change_the_answer(lm):
    assert lm.generate(PROMPTS, steps=3, max_new_tokens=10) != lm.generate(PROMPTS, steps=0, max_new_tokens=10)


@pytest.mark.parametrize("repeats", [{"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}])
def test_beams_each_have_their_rows_adapter(lm, repeats):
    adaptation = lm.adapt(PROMPTS, steps=2)
    have = lm.generate(PROMPTS, adaptation=adaptation, max_new_tokens=6, **repeats)
    want = []
    for row, prompt in enumerate(PROMPTS):
        ids = torch.tensor([lm.encode(prompt)])
        new = oracle(lm, adaptation, row).generate(input_ids=ids, max_new_tokens=6, do_sample=False, **repeats)
        want += lm.backbone.tokenizer.batch_decode(new[:, ids.shape[1] :], skip_special_tokens=True)
    assert have == want


def test_samples_come_in_the_prompts_order(lm):
    adaptation = lm.adapt(PROMPTS, steps=2)
    have = lm.generate(
        PROMPTS, adaptation=adaptation, max_new_tokens=6, do_sample=True, top_k=1, num_return_sequences=2
    )
    greedy = lm.generate(PROMPTS, adaptation=adaptation, max_new_tokens=6)
    assert have == [text for text in greedy for _ in range(2)]


def test_more_prompts_than_one_batch_keep_their_order(lm):
    prompts = [f"{PROMPTS[i % 3]} {'river ' * (i % 5)}{i}" for i in range(BATCH_SIZE + 5)]
    adaptation = lm.adapt(prompts, steps=2)
    texts = lm.generate(prompts, adaptation=adaptation, max_new_tokens=4)
    nll = lm.answer_nll(prompts, ["mill"] * len(prompts), adaptation)
    for row in (0, 7, len(prompts) - 1):
        alone = lm.adapt(prompts[row], steps=2)
        close(adaptation.lora.rows([row]).tensors, alone.lora.tensors)
        close(adaptation.prompt_nll_BK[row], alone.prompt_nll_BK[0])
        assert texts[row] == lm.generate(prompts[row], adaptation=alone, max_new_tokens=4)[0]
        close(nll[row], lm.answer_nll(prompts[row], "mill", alone)[0], 1e-6)


def test_the_prompt_is_read_once_after_the_last_step(lm):
    widths = []
    lm.backbone.decoder.register_forward_pre_hook(
        lambda _m, _args, kwargs: widths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    T = len(lm.encode(PROMPTS[0]))
    lm.generate(PROMPTS[0], steps=2, max_new_tokens=4, eos_token_id=-1)
    assert widths == [T, T, T, 1, 1, 1, 1]  # two steps, the prefill, then one token at a time


@pytest.mark.parametrize("architecture", ["llama", "mistral", "gemma3"])
def test_scoring_leaves_the_prefill_as_it_was(architecture):
    backbone = tiny_backbone(architecture)
    prompts, lora = random_ids([12, 4]), random_lora(backbone, 2)
    read = prefill(backbone, left(prompts), lora)
    first = read.answer_nll(random_ids([3, 1]))
    close(read.answer_nll(random_ids([3, 1])), first, 0)
    want = torch.stack([slow_nll(merged_model(backbone, lora, b), prompts[b]) for b in range(2)])
    close(read.prompt_nll(), want)
    assert read.generate(max_new_tokens=5) == prefill(backbone, left(prompts), lora).generate(max_new_tokens=5)


def test_a_row_that_cannot_be_read_starts_over(llama):
    prompts, start = random_ids([6, 4]), random_lora(llama, 2)
    tensors = [t.clone() for t in start.tensors]
    tensors[-1][1] = 1e308  # finite, but no sum of it is
    read = prefill(llama, left(prompts), start.with_tensors(tensors), start)
    assert read.fallback_B.tolist() == [False, True]
    close(read.hidden_BTD[:, -1], prefill(llama, left(prompts), start).hidden_BTD[:, -1])


def test_two_prompts_in_a_row_do_not_leak(lm):
    base = lm.answer_nll(PROMPTS, ANSWERS)
    first = lm.generate(PROMPTS[0], steps=2, max_new_tokens=6)
    second = lm.generate(PROMPTS[2], steps=2, max_new_tokens=6)
    assert lm.generate(PROMPTS[0], steps=2, max_new_tokens=6) == first
    assert tiny_lm().generate(PROMPTS[2], steps=2, max_new_tokens=6) == second
    close(lm.answer_nll(PROMPTS, ANSWERS), base, 0)


def test_an_error_midway_leaves_the_model_as_it_was(lm, monkeypatch):
    base = lm.answer_nll(PROMPTS, ANSWERS)

    def fail(*_args, **_kwargs):
        raise RuntimeError("stop")

    handle = lm.backbone.model.get_submodule("model.layers.1").register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="stop"):
        lm.adapt(PROMPTS, steps=2)
    handle.remove()
    adaptation = lm.adapt(PROMPTS, steps=1)
    with monkeypatch.context() as patch:
        patch.setattr(lm.backbone.model, "generate", fail)
        with pytest.raises(RuntimeError, match="stop"):
            lm.generate(PROMPTS, adaptation=adaptation)
    assert clean(lm.backbone)
    close(lm.answer_nll(PROMPTS, ANSWERS), base, 0)


def test_concurrent_calls_do_not_leak(lm):
    prompts = [*PROMPTS, "the winter"]
    alone = [lm.generate(p, steps=2, max_new_tokens=5) for p in prompts]
    nll = [lm.answer_nll(p, "mill") for p in prompts]
    wrong: list[object] = []

    def work(i: int) -> None:
        try:
            for _ in range(3):
                if lm.generate(prompts[i], steps=2, max_new_tokens=5) != alone[i]:
                    wrong.append(prompts[i])
                if not torch.equal(lm.answer_nll(prompts[i], "mill"), nll[i]):
                    wrong.append(nll[i])
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert clean(lm.backbone)


def test_an_adaptation_says_how_it_came_about(lm):
    adaptation = lm.adapt(PROMPTS, steps=3, seed=4)
    assert adaptation.prompt_nll_BK.shape == (3, 3)
    assert adaptation.rates_BKM.shape == (3, 3, 4)
    assert (adaptation.rates_BKM == RATE).all()
    assert adaptation.notes == (None, None, None)
    assert adaptation.prompts == tuple(PROMPTS)
    assert adaptation.seconds > 0
    assert not torch.equal(adaptation.initial_lora.A[0], lm.adapt(PROMPTS, steps=0, seed=5).initial_lora.A[0])


def test_one_token_prompts_are_noted(lm):
    lm.backbone.tokenizer.backend_tokenizer.post_processor = None  # no BOS: "a" is one token
    adaptation = lm.adapt(["a", PROMPTS[0]], steps=2)
    assert adaptation.notes == (LeftAlone.ONE_TOKEN.words(), None)
    assert not adaptation.fallback_B.any()
    base = lm.answer_nll(["a", PROMPTS[0]], ["mill", "mill"])
    nll = lm.answer_nll(["a", PROMPTS[0]], ["mill", "mill"], adaptation)
    close(nll[0], base[0], 1e-6)
    assert nll[1] != base[1]
    assert lm.adapt("a", steps=0).notes == (None,)
    assert lm.generate("a", steps=2, max_new_tokens=4) == [oracle_text(lm, None, 0, "a", max_new_tokens=4)]


def test_a_diverged_prompt_is_answered_unadapted(lm):
    # Batches are sorted by length: the second row there is the third prompt
    adaptation = lm.adapt(PROMPTS, steps=2, rate=SomeRowsWild({1: float("nan")}))
    assert adaptation.notes == (None, None, LeftAlone.NOT_FINITE.words())
    assert adaptation.fallback_B.tolist() == [False, False, True]
    base, nll = lm.answer_nll(PROMPTS, ANSWERS), lm.answer_nll(PROMPTS, ANSWERS, adaptation)
    close(nll[2], base[2], 1e-6)
    assert (nll[:2] != base[:2]).all()


def test_a_local_folder(llama_folder):
    lm = AdaptiveLM.from_pretrained(str(llama_folder), rate=0.5, device="cpu", lora={"r": 2, "lora_alpha": 3})
    assert lm.path == llama_folder
    assert lm.backbone.dtype == torch.float32
    assert lm.init == ZeroInit(r=2, lora_alpha=3)
    plain = AutoModelForCausalLM.from_pretrained(llama_folder)
    ids = lm.encode(PROMPTS[0])
    whole = ids + lm.encode_answer(PROMPTS[0], ANSWERS[0])
    close(lm.answer_nll(PROMPTS[0], ANSWERS[0])[0], slow_nll(plain, whole, first=len(ids)), 1e-4)
    new = plain.generate(input_ids=torch.tensor([ids]), max_new_tokens=8, do_sample=False, pad_token_id=0)
    want = lm.backbone.tokenizer.decode(new[0, len(ids) :], skip_special_tokens=True)
    assert lm.generate(PROMPTS[0], steps=0, max_new_tokens=8) == [want]
    assert AdaptiveLM.from_pretrained(str(llama_folder), dtype="bfloat16").backbone.dtype == torch.bfloat16


def test_a_network_from_a_folder(lm, tmp_path):
    network = random_scalenet(lm.backbone).float()
    network.save_pretrained(tmp_path / "network")
    have = lm.adapt(PROMPTS, steps=2, rate=tmp_path / "network")
    close(have.rates_BKM, lm.adapt(PROMPTS, steps=2, rate=network).rates_BKM, 0)
    assert have.rates_BKM.std() > 0


@pytest.mark.parametrize("architecture", ["llama", "gpt_neox", "phi3"])
@pytest.mark.parametrize("targets", ["qv", "attention"])
def test_peft_opens_an_export_with_the_same_logits(architecture, targets, tmp_path):
    save_tiny(tmp_path / "model", architecture)
    lm = AdaptiveLM.from_pretrained(
        str(tmp_path / "model"), rate=1.0, lora={"r": 2, "target_modules": targets}, device="cpu"
    )
    adaptation = lm.adapt(PROMPTS, steps=2)
    ids = torch.tensor([lm.encode(PROMPTS[2])])
    folder = adaptation.export_peft(tmp_path / "adapter", row=2)
    assert {p.name for p in Path(folder).iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    unadapted = base(ids).logits.detach()
    peft = PeftModel.from_pretrained(base, str(folder)).eval()
    have = peft(input_ids=ids).logits
    want = lm.backbone.logits(lm.backbone.forward(left(ids.tolist()), adaptation.lora.rows([2])).hidden_BTD)
    torch.testing.assert_close(have, want, atol=1e-5, rtol=1e-5)
    assert (have - unadapted).abs().max() > 1e-2


def test_peft_factors_of_random_fused_adapters(tmp_path):
    """With B and A of every projection non-zero, each must land on its own rows."""
    backbone = tiny_backbone("gpt_neox", target_modules="attention", dtype=torch.float32)
    lora = random_lora(backbone, 2)
    adaptation = Adaptation(lora, lora, torch.zeros(2, 0), torch.zeros(2, 0, 8), torch.zeros(2).bool())
    adaptation.export_peft(tmp_path, row=1)
    peft = PeftModel.from_pretrained(tiny_model("gpt_neox", dtype=torch.float32), str(tmp_path)).eval()
    batch = left(random_ids([9]))
    want = backbone.logits(backbone.forward(batch, lora.rows([1])).hidden_BTD)
    torch.testing.assert_close(peft(input_ids=batch.ids_BT).logits, want, atol=1e-4, rtol=1e-4)


# --- mistakes ---


@pytest.mark.parametrize("prompt", ["", "  \n"])
def test_an_empty_prompt(lm, prompt):
    for call in (lm.encode, lambda p: lm.adapt([p], steps=1), lambda p: lm.answer_nll([p], ["a"])):
        with pytest.raises(ValueError, match="the prompt is empty"):
            call(prompt)
    with pytest.raises(ValueError, match="no prompts"):
        lm.adapt([], steps=1)


def test_an_empty_answer(lm):
    with pytest.raises(ValueError, match="is empty; there is nothing to score"):
        lm.answer_nll(PROMPTS[0], " ")
    with pytest.raises(ValueError, match="3 prompts but 2 answers"):
        lm.answer_nll(PROMPTS, ANSWERS[:2])


def test_too_long_a_prompt(lm):
    long = "river " * 200
    tokens = len(encode_prompt(lm.backbone.tokenizer, long))
    with pytest.raises(ValueError, match=rf"the prompt has {tokens} tokens; tiny-llama takes 96\. .*truncate left"):
        lm.adapt(long, steps=1)
    with pytest.raises(ValueError, match=r"takes 90 \(its window of 96 less 6 for the answer\)"):
        lm.generate("a" * 91, steps=0, max_new_tokens=6)


def test_a_long_prompt_cut_at_its_beginning():
    lm = tiny_lm(truncate="left")
    long = f"{'river ' * 200}mill"
    ids = encode_prompt(lm.backbone.tokenizer, long)
    assert lm.encode(long) == [1, *ids[-95:]]  # BOS stays
    assert lm.encode(long, reserve=6) == [1, *ids[-89:]]
    assert len(lm.generate(long, steps=1, max_new_tokens=6)) == 1
    assert lm.answer_nll(long, "sea").isfinite().all()


@pytest.mark.parametrize("truncate", [None, "left"])
@pytest.mark.parametrize("new", [96, 200])
def test_an_answer_as_long_as_the_window(truncate, new):
    with pytest.raises(ValueError, match="window is 96"):
        tiny_lm(truncate=truncate).generate("river", steps=0, max_new_tokens=new)


def test_steps_and_rates(lm):
    with pytest.raises(ValueError, match="steps is -1; it must be 0 or more"):
        lm.adapt(PROMPTS, steps=-1)
    with pytest.raises(ValueError, match=re.escape("steps is 6, but this rate was trained for at most 5 (Kmax)")):
        lm.adapt(PROMPTS, steps=6, rate=random_scalenet(lm.backbone))
    without = AdaptiveLM(lm.backbone)
    with pytest.raises(ValueError, match="steps without a rate"):
        without.adapt(PROMPTS, steps=1)
    assert without.generate(PROMPTS[0], max_new_tokens=3) == lm.generate(PROMPTS[0], steps=0, max_new_tokens=3)
    with pytest.raises(ValueError, match="steps or adaptation, not both"):
        lm.generate(PROMPTS[0], steps=1, adaptation=lm.adapt(PROMPTS[0], steps=1))


def test_one_step_by_default_where_there_is_a_rate(lm):
    assert lm.adapt(PROMPTS).prompt_nll_BK.shape == (len(PROMPTS), 1)
    assert lm.generate(PROMPTS, max_new_tokens=6) == lm.generate(PROMPTS, steps=1, max_new_tokens=6)


def test_another_prompts_adaptation(lm):
    adaptation = lm.adapt(PROMPTS[:2], steps=1)
    with pytest.raises(ValueError, match=r"made for other prompts.*holds 2, given were 3"):
        lm.answer_nll(PROMPTS, ANSWERS, adaptation)
    with pytest.raises(ValueError, match="same order"):
        lm.generate(PROMPTS[1::-1], adaptation=adaptation)


def test_unknown_settings(llama_folder):
    with pytest.raises(ValueError, match=r"unknown lora setting 'lora_alfa'. Did you mean 'lora_alpha'\?"):
        AdaptiveLM.from_pretrained(str(llama_folder), lora={"lora_alfa": 3})
    with pytest.raises(ValueError, match="give one"):
        AdaptiveLM.from_pretrained(str(llama_folder), lora={"r": 3}, init=ZeroInit())
    with pytest.raises(ValueError, match=r"unknown dtype 'float23'. Did you mean 'float32'\?"):
        AdaptiveLM.from_pretrained(str(llama_folder), dtype="float23")
    with pytest.raises(ValueError, match="init is a function; give an Init"):
        AdaptiveLM.from_pretrained(str(llama_folder), init=lambda backbone, batch, seeds: None)  # pyright: ignore[reportArgumentType]


def test_a_rate_for_another_model(lm, llama_folder):
    network = random_scalenet(tiny_backbone("qwen3", target_modules="attention"))
    with pytest.raises(ValueError, match="is for hidden size 32 and 8 projections; tiny-llama has 32 and 4"):
        lm.adapt(PROMPTS, steps=1, rate=network)
    assert AdaptiveLM(lm.backbone, rate=FixedRate(0.1)).rate == FixedRate(0.1)


def test_chat(lm):
    chat = AdaptiveLM(lm.backbone, chat=True)
    ids = chat.encode("The mill")
    text = lm.backbone.tokenizer.decode(ids)
    assert text == "<s><|user|>\nThe mill\n<|assistant|>\n"
    assert ids.count(1) == 1
    assert lm.backbone.tokenizer.decode(chat.encode_answer("The mill", "runs")) == "runs"
    lm.backbone.tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        chat.encode("The mill")
