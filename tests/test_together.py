"""One adapter for several prompts, against autograd through transformers' own model with merged weights."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from ephemera.batch import pad
from ephemera.inits import ZeroInit
from ephemera.model import AdaptiveLM
from ephemera.rates import FixedRate
from ephemera.together import adapt_together, shared_adapter
from reference import close, merged_weights, slow_nll, slow_representation
from serving_fixtures import tiny_generator
from tiny_models import SomeRowsWild, random_ids, random_lora, random_scalenet, save_tiny, tiny_backbone

PROMPTS = ["Question: who wrote the book?\n\nAnswer:", "Question: where is the mill?\n\nAnswer:", "The sea.\n\nAnswer:"]
OTHERS = ["Question: what runs past the old mill?\n\nAnswer:", "The winter of 1820.\n\nAnswer:"]
ANSWERS = [" the river", " a daughter"]


def slow_together(backbone, prompts, lora, rate, steps):
    """The mean of the prompts' losses is differentiated as one number, by one LoRA."""
    M = len(lora.projections)
    for k in range(1, steps + 1):
        leaves = lora.with_tensors([t.detach().clone().requires_grad_() for t in lora.tensors])
        weights = merged_weights(backbone, leaves, 0)
        losses = torch.stack([slow_nll(backbone.model, ids, weights=weights) for ids in prompts])
        grads = torch.autograd.grad(losses.mean(), leaves.tensors)
        rates = [
            rate.rates_BM(slow_representation(backbone.model, ids, weights).detach()[None].float(), k, steps,
                          like=losses.detach()[:1], projections=M)[0]
            for ids in prompts
        ]  # fmt: skip
        r = torch.stack(rates).mean(0).detach()
        moved = [t.detach() - r[i % M] * g for i, (t, g) in enumerate(zip(lora.tensors, grads, strict=True))]
        lora = lora.with_tensors(moved)
    return lora, losses.detach(), r


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt_neox"])
def test_fixed_steps_equal_a_slow_loop_exactly(architecture):
    backbone = tiny_backbone(architecture)
    prompts, start = random_ids([9, 5, 7]), random_lora(backbone, 1)
    batches = [pad(prompts[:2]), pad(prompts[2:])]
    lora, nlls, _ = adapt_together(backbone, batches, start, FixedRate(0.5), 3)
    want, losses, _ = slow_together(backbone, prompts, start, FixedRate(0.5), 3)
    close(lora.tensors, want.tensors)
    close(torch.cat(nlls)[:, -1], losses)


def test_predicted_rates_are_averaged_over_prompts():
    backbone = tiny_backbone("llama")
    prompts, start, network = random_ids([9, 5, 7]), random_lora(backbone, 1), random_scalenet(backbone)
    lora, _, rates_KM = adapt_together(backbone, [pad(prompts)], start, network, 2)
    want, _, rates = slow_together(backbone, prompts, start, network, 2)
    close(rates_KM[-1], rates, 1e-5)  # h(x) is float32
    close(lora.tensors, want.tensors, 1e-5)


def test_batches_do_not_matter_and_one_prompt_is_adapt():
    backbone = tiny_backbone("llama")
    lm = AdaptiveLM(backbone, rate=2.0)
    shared, alone = lm.adapt_together(PROMPTS[:1], steps=2), lm.adapt(PROMPTS[:1], steps=2)
    close(shared.lora.tensors, alone.lora.tensors)
    prompts, start = random_ids([9, 5, 7]), random_lora(backbone, 1)
    once = adapt_together(backbone, [pad(prompts)], start, FixedRate(0.5), 2)[0]
    each = adapt_together(backbone, [pad([ids]) for ids in prompts], start, FixedRate(0.5), 2)[0]
    close(once.tensors, each.tensors)


@pytest.fixture
def folder(tmp_path):
    return save_tiny(tmp_path / "model")


def test_peft_and_init_open_the_export_with_the_same_logits(folder, tmp_path):
    lm = AdaptiveLM.from_pretrained(str(folder), rate=20.0, device="cpu")
    shared = lm.adapt_together(PROMPTS, steps=2)
    exported = shared.export_peft(tmp_path / "adapter")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), str(exported)).eval()
    as_init = AdaptiveLM.from_pretrained(str(folder), init=exported, device="cpu")
    base = lm.answer_nll(OTHERS, ANSWERS)
    for start, lm_ in ((shared, lm), (None, as_init)):
        made = lm_.adapt(OTHERS, steps=0, init=start)
        ours = lm_.answer_nll(OTHERS, ANSWERS, made)
        assert (ours - base).abs().min() > 1e-3
        for row, (prompt, answer) in enumerate(zip(OTHERS, ANSWERS, strict=True)):
            ids, new = lm.encode(prompt), lm.encode_answer(prompt, answer)
            logits = model(input_ids=torch.tensor([[*ids, *new]])).logits[0, len(ids) - 1 : -1]
            close(torch.nn.functional.cross_entropy(logits, torch.tensor(new)).detach(), ours[row], 1e-4)


def test_reach_answer_exports_where_prompts_end_alike(folder, tmp_path):
    lm = AdaptiveLM.from_pretrained(str(folder), rate=20.0, reach="answer", device="cpu")
    made = lm.adapt_together(PROMPTS).export_peft(tmp_path / "adapter")
    assert "3 prompts together" in (made / "README.md").read_text()
    assert (made / "adapter_config.alora.json").exists()
    with pytest.raises(ValueError, match=r'prompts end with different tokens.*reach="all"'):
        lm.adapt_together([*PROMPTS, "The mill"]).export_peft(tmp_path / "other")


def test_mistakes_are_one_line(llama):
    lm = AdaptiveLM(llama)
    for call, words in (
        (lambda: lm.adapt_together(PROMPTS, steps=0), "steps is 0: a shared adapter needs 1 or more"),
        (lambda: lm.adapt_together([], rate=1.0), "no prompts"),
        (
            lambda: lm.adapt_together(PROMPTS, rate=SomeRowsWild({0: float("inf")}), steps=1),
            "is not finite, at a mean rate of",
        ),
        (lambda: AdaptiveLM(tiny_backbone("gpt_neox"), init=lm.adapt_together(PROMPTS, rate=1.0)), "use the model and"),
    ):
        with pytest.raises(ValueError, match=words) as error:
            call()
        assert "\n" not in str(error.value)


def test_a_prompt_of_one_token_and_a_generated_start_are_refused():
    backbone = tiny_backbone("llama")
    how = {"rate": FixedRate(1.0), "steps": 1, "seed": 0, "reach": "all"}
    with pytest.raises(ValueError, match="prompt 2 of 2 has 1 token, so there is nothing to learn from"):
        shared_adapter(backbone, [[5, 6], [7]], [[0, 1]], ZeroInit(), **how)
    generator = tiny_generator(backbone)
    with pytest.raises(ValueError, match="init is generated, which makes another start for each prompt"):
        shared_adapter(backbone, [[5, 6]], [[0]], generator, **how)
