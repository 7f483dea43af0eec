"""Losses over the hardest tokens and without a template's words, against slow ones; steps that stop early."""

import pytest
import torch
import torch.nn.functional as F

from ephemera.adapt import adapt
from ephemera.encoding import encode_prompt
from ephemera.head import Head
from ephemera.objective import TokenBatch, pad
from ephemera.rates import AveragedRate, FixedRate
from ephemera.readout import Objective, load_objective
from ephemera.subset import own_tokens
from tiny import close, left, merged_weights, random_ids, random_lora, random_scalenet

LENGTHS = [11, 4, 8]
TEMPLATE = "Question: {} Answer:"
PROMPTS = ["Question: who wrote the book? Answer:", "Question: the sea Answer: the mill Answer:"]


def slow_steps(backbone, ids, start, counted, rate=0.3, steps=2):
    """One prompt alone; `counted` picks the places that count from every token's NLL."""
    lora = start
    for _ in range(steps):
        leaves = lora.leaves()
        weights = merged_weights(backbone, leaves, 0)
        logits = torch.func.functional_call(backbone.model, weights, (), {"input_ids": torch.tensor([ids])}).logits[0]
        nll = F.cross_entropy(logits[:-1], torch.tensor(ids[1:]), reduction="none")
        grads = torch.autograd.grad(nll[counted(nll.tolist())].mean(), leaves.tensors)
        lora = lora.with_tensors([t.detach() - rate * g for t, g in zip(lora.tensors, grads, strict=True)])
    return lora


def highest(percent: int):
    def places(nll: list[float]) -> list[int]:
        return sorted(range(len(nll)), key=lambda i: -nll[i])[: -(-len(nll) * percent // 100)]

    return places


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("percent", [50, 1, 100])
def test_steps_on_the_hardest_tokens_equal_a_slow_loop(llama, percent, side):
    prompts, start = random_ids(LENGTHS), random_lora(llama, 3)
    objective = Objective(tokens=f"hardest-{percent}%")
    trace = adapt(llama, pad(prompts, side=side), start, FixedRate(0.3, objective), 2)
    for row, ids in enumerate(prompts):
        want = slow_steps(llama, ids, start.rows([row]), highest(percent))
        close(trace.lora.rows([row]).tensors, want.tensors)
        alone = adapt(llama, left([ids]), start.rows([row]), FixedRate(0.3, objective), 2)
        close(trace.lora.rows([row]).tensors, alone.lora.tensors)


def test_a_one_token_prompt_and_a_softcapped_head(llama):
    prompts, start = random_ids([1, 7]), random_lora(llama, 2)
    rate = FixedRate(0.3, Objective(tokens="hardest-50%"))
    close(adapt(llama, left(prompts), start, rate, 1).lora.rows([0]).tensors, start.rows([0]).tensors, 0)
    llama.logits = Head(llama.head, 3.0)  # all of the hardest are all
    every = adapt(llama, left(prompts), start, FixedRate(0.3, Objective(tokens="hardest-100%")), 2)
    close(every.lora.tensors, adapt(llama, left(prompts), start, FixedRate(0.3), 2).lora.tensors)


def test_words_and_second_order_choose_the_same_tokens(llama):
    batch, start = left(random_ids(LENGTHS)), random_lora(llama, 3)
    want = adapt(llama, batch, start, FixedRate(0.3, Objective(tokens="hardest-50%")), 2)
    words = adapt(llama, batch, start, FixedRate(0.3, Objective(tokens="hardest-50%", vocabulary=320)), 2)
    close(words.lora.tensors, want.lora.tensors)
    exact = adapt(llama, batch, start, FixedRate(0.3, Objective(tokens="hardest-50%")), 2, second_order=True)
    close([t.detach() for t in exact.lora.tensors], want.lora.tensors)


def words_of(llama, prompt: str) -> str:
    ids = encode_prompt(llama.tokenizer, prompt)
    own = own_tokens(ids, TEMPLATE, llama.tokenizer)
    return llama.tokenizer.decode([i for i, mine in zip(ids, own, strict=True) if mine]).strip()


def test_own_words_are_what_stands_in_the_holes(llama):
    assert words_of(llama, PROMPTS[0]) == "who wrote the book?"
    assert words_of(llama, PROMPTS[1]) == "the sea Answer: the mill"  # the last hole ends where the words come last
    assert words_of(llama, "Question: café où 🙂? Answer:") == "café où 🙂?"  # characters of several tokens
    assert words_of(llama, "Question:  Answer:") == ""
    two = own_tokens(encode_prompt(llama.tokenizer, "the river is the sea"), "the {} is the {}", llama.tokenizer)
    assert [two[0], two[-1]] == [False, True]


def test_steps_without_the_template_equal_a_slow_loop_and_rows_do_not_touch(llama):
    ids = [encode_prompt(llama.tokenizer, p) for p in PROMPTS]
    start, rate = random_lora(llama, 2), FixedRate(0.3, Objective(template=TEMPLATE))
    trace = adapt(llama, left(ids), start, rate, 2)
    for row, prompt in enumerate(ids):
        own = own_tokens(prompt, TEMPLATE, llama.tokenizer)
        assert 0 < sum(own) < len(own)
        want = slow_steps(
            llama, prompt, start.rows([row]), lambda nll, own=own: [i for i in range(len(nll)) if own[i + 1]]
        )
        close(trace.lora.rows([row]).tensors, want.tensors)


def test_what_does_not_fit_is_refused_and_settings_are_kept(llama, tmp_path):
    ids = encode_prompt(llama.tokenizer, "Give a short answer.")
    with pytest.raises(ValueError, match=r"does not fit the objective's template 'Question: \{\} Answer:'"):
        adapt(llama, left([ids]), random_lora(llama, 1), FixedRate(0.3, Objective(template=TEMPLATE)), 1)
    for template in ("Question:", "{}", "a {}{} b", " "):
        with pytest.raises(ValueError, match="give the words that all prompts share"):
            Objective(template=template)
    for tokens in ("hardest-0%", "hardest-50", "hardest-101%"):
        with pytest.raises(ValueError, match='is unknown; it is "all"'):
            Objective(tokens=tokens)
    objective = Objective(tokens="hardest-50%", template=TEMPLATE)
    assert load_objective(objective.describe(), tmp_path).describe() == objective.describe()
    old = {"exit_layer": None, "lens": None, "tokens": "last-8", "vocabulary": None}
    assert load_objective(old, tmp_path).template is None


class Falling:
    """Row r's rates fall below a tenth of the base rate at step `stops[r]`."""

    max_steps = None
    uses_representation = "no"
    reach = "all"
    gate = None
    trains = "both"
    made_for = None
    normalize = "none"
    objective = Objective()
    base_rate = 0.3

    def __init__(self, stops):
        self.stops = stops

    def rates_BM(self, h_BH, k, K, *, like, projections):
        return like.new_tensor([[0.3 if k < stop else 0.02] * projections for stop in self.stops])

    def check(self, backbone): ...


def test_rows_that_have_stopped_stay_and_the_loop_ends(llama):
    prompts, start = random_ids(LENGTHS), random_lora(llama, 3)
    passes = []
    llama.decoder.register_forward_hook(lambda *_: passes.append(1))
    trace = adapt(llama, left(prompts), start, Falling([2, 4, 1]), 5, stop_below=0.1)
    assert trace.steps_B.tolist() == [1, 3, 0]
    assert len(passes) == 4  # the fourth showed that nobody goes on
    assert trace.prompt_nll_BK.isfinite().sum(1).tolist() == [1, 3, 0]
    assert not trace.fallback_B.any()
    assert (trace.rates_BKM != 0).all(2).sum(1).tolist() == [1, 3, 0]
    for row, (ids, steps) in enumerate(zip(prompts, (1, 3, 0), strict=True)):
        want = adapt(llama, left([ids]), start.rows([row]), FixedRate(0.3), steps)
        close(trace.lora.rows([row]).tensors, want.lora.tensors)
        close(trace.prompt_nll_BK[row, :steps], want.prompt_nll_BK[0])


def test_a_network_stops_a_row_alone_as_in_a_batch(llama):
    network = random_scalenet(llama)
    network.base_rates = (0.3, 0.3, 1e-6, 1e-6, 1e-6)
    prompts, start = random_ids(LENGTHS), random_lora(llama, 3)
    together = adapt(llama, left(prompts), start, network, 5, stop_below=1e-3)
    assert together.steps_B.tolist() == [2, 2, 2]
    for row, ids in enumerate(prompts):
        alone = adapt(llama, left([ids]), start.rows([row]), network, 5, stop_below=1e-3)
        close(together.lora.rows([row]).tensors, alone.lora.tensors, 1e-6)
    everything = adapt(llama, left(prompts), start, network, 5)
    assert everything.steps_B.tolist() == [5, 5, 5]


def test_base_rates_and_wrong_shares(llama):
    table = torch.tensor([[[2.0, 1.0], [0.0, 0.0]], [[3.0, 1.0], [9.0, 1.0]]])
    assert AveragedRate(table, {}).base_rate == 3.0
    assert FixedRate(0.5).base_rate == 0.5
    batch: TokenBatch = left(random_ids([4]))
    for share in (-1.0, float("nan")):
        with pytest.raises(ValueError, match="stop_below="):
            adapt(llama, batch, random_lora(llama, 1), FixedRate(0.5), 1, stop_below=share)
