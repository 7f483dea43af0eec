"""Reach `answer`: adapters act from the last prompt token on. Against transformers alone, a prompt and a token at a time."""

import copy
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from test_generator import random_generator
from torch import Tensor
from transformers.cache_utils import DynamicCache

from counting import count_layers
from ephemera import Adaptation, AdaptiveLM
from ephemera.adapt import adapt
from ephemera.adaptation import LeftAlone
from ephemera.batch import TokenBatch, pad
from ephemera.fast.fast_lm import FastLM
from ephemera.fast.llama_layer import can_fuse
from ephemera.fast.packing import Layout
from ephemera.fast.shared_prefix import common
from ephemera.inits import PeftInit, ZeroInit
from ephemera.llm.cached_layers import CACHE, cache_of
from ephemera.llm.frozen_lm import FrozenLM
from ephemera.llm.load import load_backbone
from ephemera.llm.prefill import Prefill, prefill
from ephemera.llm.tokenize import encode_answer, encode_prompt
from ephemera.lora import LoraBatch
from ephemera.made_for import MadeFor
from ephemera.model import BATCH_SIZE
from ephemera.prompt_loss import PromptLoss
from ephemera.rates import FixedRate, PerProjectionRate, ScaleNet
from reference import close, merged_weights, slow_nll
from test_prompt_loss import random_lens
from tiny_models import (
    ARCHITECTURES,
    SomeRowsWild,
    left,
    random_ids,
    random_lora,
    random_scalenet,
    save_tiny,
    tiny_backbone,
    tiny_tokenizer,
)

RATE = 0.4
LENGTHS = [11, 4, 1, 8]  # longer than the sliding windows of 6; one token alone, from which nothing is learned
ALIKE = [[7, 8, 9, *ids] for ids in random_ids([3, 1, 2], seed=6)]  # within the windows: packed in every architecture


# --- transformers alone ---


class Slow:
    """One prompt, by transformers' own model and cache: the base model's weights up to the last prompt token, `weights`
    from there on, a token at a time."""

    def __init__(self, backbone: FrozenLM, ids: Sequence[int], weights: dict[str, Tensor]):
        self.model, self.ids, self.weights = backbone.model, list(ids), weights
        before: DynamicCache | None = None
        if len(ids) > 1:
            with torch.no_grad():
                before = cache_of(self.model(input_ids=torch.tensor([self.ids[:-1]]), use_cache=True))
        self.known = {(): self._next(self.ids[-1], before)}  # what followed so far: logits [V], cache

    def _next(self, token: int, cache: DynamicCache | None) -> tuple[Tensor, DynamicCache]:
        if cache is not None:  # one that grows by itself: its layers join tensors and leave the old ones alone
            layers, cache = [copy.copy(layer) for layer in cache.layers], copy.copy(cache)
            cache.layers = layers
        inputs = {"input_ids": torch.tensor([[token]]), CACHE: cache, "use_cache": True}
        out = torch.func.functional_call(self.model, self.weights, (), inputs)
        return out.logits[0, -1], cache_of(out)

    def logits(self, *tokens: int) -> Tensor:
        """[V] after these tokens of an answer."""
        if tokens not in self.known:
            self.logits(*tokens[:-1])
            self.known[tokens] = self._next(tokens[-1], self.known[tokens[:-1]][1])
        return self.known[tokens][0]

    def nll(self, answer: Sequence[int]) -> Tensor:
        """Summed over the answer's tokens."""
        losses = [F.cross_entropy(self.logits(*answer[:n]), torch.tensor(t)) for n, t in enumerate(answer)]
        return torch.stack(losses).sum()

    @torch.no_grad()
    def greedy(self, tokens: int) -> list[int]:
        found: list[int] = []
        for _ in range(tokens):
            found.append(int(self.logits(*found).argmax()))
        return found

    @torch.no_grad()
    def beams(self, tokens: int, width: int) -> list[list[int]]:
        """The `width` likeliest continuations that a beam of that width finds, best first."""
        beams: list[tuple[list[int], float]] = [([], 0.0)]
        for _ in range(tokens):
            longer: list[tuple[list[int], float]] = []
            for found, total in beams:
                logp_V = self.logits(*found).log_softmax(-1)
                longer += [([*found, int(t)], total + logp_V[t].item()) for t in logp_V.topk(width).indices]
            beams = sorted(longer, key=lambda beam: -beam[1])[:width]
        return [found for found, _ in beams]


def slow_rows(backbone: FrozenLM, prompts: Sequence[Sequence[int]], lora: LoraBatch) -> list[Slow]:
    """With one row's adapter each, merged into the weights."""
    exact = lora.with_tensors([t.to(backbone.dtype) for t in lora.tensors])
    with torch.no_grad():
        return [Slow(backbone, ids, merged_weights(backbone, exact, b)) for b, ids in enumerate(prompts)]


def slow_steps(backbone: FrozenLM, ids: Sequence[int], lora: LoraBatch, steps: int) -> LoraBatch:
    for _ in range(steps if len(ids) > 1 else 0):
        leaves = lora.leaves()
        nll = slow_nll(backbone.model, ids, weights=merged_weights(backbone, leaves, 0))
        grads = torch.autograd.grad(nll, leaves.tensors)
        lora = lora.with_tensors([t - RATE * g for t, g in zip(lora.tensors, grads, strict=True)])
    return lora


@torch.no_grad()
def check_read(backbone: FrozenLM, prompts: Sequence[list[int]], lora: LoraBatch, read: Prefill, tolerance=1e-9):
    """Scores, choices, the base model's last state and a greedy answer: each prompt by itself."""
    B, slow = len(prompts), slow_rows(backbone, prompts, lora)
    assert read.base_BD is not None
    for b, ids in enumerate(prompts):
        states_TD = backbone.decoder(input_ids=torch.tensor([ids])).last_hidden_state[0]
        close(read.base_BD[b], states_TD[-1], tolerance)
        close(backbone.logits(read.hidden_BTD[b, -1]), slow[b].logits(), tolerance)
    answers = random_ids([3, 1, 4, 2, 2][:B], seed=5)
    want = [slow[b].nll(answer) / len(answer) for b, answer in enumerate(answers)]
    close(read.answer_nll(answers), torch.stack(want), tolerance)
    greedy = [row.greedy(3) for row in slow]
    rows = [1, 0, 1, B - 1, 1, 0]
    choices = [*random_ids([2, 3, 1, 2], seed=7), greedy[1], [*greedy[0][:2], (greedy[0][2] + 1) % 300]]
    logp_N, is_greedy_N = read.score(choices, rows)
    close(logp_N, -torch.stack([slow[b].nll(answer) for b, answer in zip(rows, choices, strict=True)]), 10 * tolerance)
    assert is_greedy_N.tolist() == [False] * 4 + [True, False]
    assert read.generate(max_new_tokens=3, eos_token_id=-1) == greedy


def adapted(
    backbone: FrozenLM, prompts: Sequence[list[int]], steps: int = 1, rate: FixedRate | None = None
) -> Adaptation:
    batch = left(prompts)
    start = ZeroInit(r=2)(backbone, batch, [0] * len(prompts))
    return adapt(backbone, batch, start, rate or FixedRate(RATE), steps, keep_reading=True)


def read_after(backbone: FrozenLM, prompts: Sequence[list[int]], trace: Adaptation) -> Prefill:
    reading = trace.reading
    return prefill(backbone, left(prompts), trace.lora, trace.initial_lora, reach="answer", cached=reading)


# --- steps and reading ---

# For tests that change nothing about it: not even by output_hidden_states, which leaves transformers' hooks on the layers
kept_backbone = cache(tiny_backbone)
WRITTEN_OUT = ("llama", "mistral", "qwen2", "qwen3")


def common_beginning(batch: TokenBatch) -> int:
    layout = Layout(batch)
    return common(layout.real(batch.ids_BT), layout.packing)


@pytest.mark.parametrize(("prompts", "steps"), [(random_ids(LENGTHS), 1), (ALIKE, 3)], ids=["long", "alike"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_adapters_act_from_the_last_prompt_token_on(architecture, prompts, steps):
    backbone = kept_backbone(architecture)
    assert can_fuse(backbone.decoder) == (architecture in WRITTEN_OUT)
    trace = adapted(backbone, prompts, steps)
    assert trace.reading is not None
    assert (common_beginning(left(prompts)) > 0) == (prompts is ALIKE)
    for b, ids in enumerate(prompts):
        close(trace.lora.rows([b]).tensors, slow_steps(backbone, ids, trace.initial_lora.rows([b]), steps).tensors)
    check_read(backbone, prompts, trace.lora, read_after(backbone, prompts, trace))
    whole = prefill(backbone, left(prompts), trace.lora)  # the papers' reach is another
    with torch.no_grad():
        differ_B = (whole.hidden_BTD[:, -1] - read_after(backbone, prompts, trace).hidden_BTD[:, -1]).abs().amax(1)
    assert [bool(x > 1e-4) for x in differ_B] == [len(ids) > 1 for ids in prompts]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_the_first_step_keeps_is_the_base_models_own_pass(architecture, side):
    backbone, prompts = kept_backbone(architecture), random_ids(LENGTHS) if side == "left" else ALIKE
    check_kept(backbone, prompts, pad(prompts, side=side))


@pytest.mark.parametrize("architecture", ["llama", "mistral", "gemma3", "phi"])
def test_it_does_so_with_long_prompts_on_the_right_too(architecture):
    prompts = random_ids(LENGTHS)
    check_kept(kept_backbone(architecture), prompts, pad(prompts, side="right"))


def check_kept(backbone: FrozenLM, prompts: Sequence[list[int]], batch: TokenBatch) -> None:
    assert can_fuse(backbone.decoder) == (backbone.name.removeprefix("tiny-") in WRITTEN_OUT)
    start = ZeroInit(r=2)(backbone, batch, [0] * len(prompts))
    have = adapt(backbone, batch, start, FixedRate(RATE), 2, keep_reading=True)
    plain = adapt(backbone, batch, start, FixedRate(RATE), 2)
    assert plain.reading is None
    close(have.lora.tensors, plain.lora.tensors)
    close(have.prompt_nll_BK, plain.prompt_nll_BK)
    check_reading(backbone, prompts, batch, have)


@torch.no_grad()
def check_reading(backbone: FrozenLM, prompts: Sequence[list[int]], batch: TokenBatch, trace: Adaptation) -> None:
    reading = trace.reading
    assert reading is not None
    assert reading.layers == backbone.layers == len(reading.cache.layers)
    assert torch.equal(reading.ids_BT, batch.ids_BT)
    for b, ids in enumerate(prompts):
        out = backbone.decoder(input_ids=torch.tensor([ids]), use_cache=True)
        close(reading.hidden_BTD[b, batch.mask_BT[b]], out.last_hidden_state[0])
        for have, want in zip(reading.cache.layers, cache_of(out).layers, strict=True):
            n = want.keys.shape[2]  # transformers keeps what a window needs
            close(have.keys[b][:, batch.mask_BT[b]][:, -n:], want.keys[0])
            close(have.values[b][:, batch.mask_BT[b]][:, -n:], want.values[0])
            assert not have.keys.requires_grad


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "phi3"])
def test_prompts_that_a_server_knows_the_beginning_of(architecture):
    """The second pass takes the beginning from the first; it leaves the same keys and values."""
    backbone = tiny_backbone(architecture)
    backbone = backbone.with_prefixes([ALIKE[0][:3]])
    for prompts in (ALIKE[:1], ALIKE, random_ids([5, 2], seed=9)):
        trace = adapted(backbone, prompts)
        check_reading(backbone, prompts, left(prompts), trace)
        if len(prompts) == 3:
            check_read(backbone, prompts, trace.lora, read_after(backbone, prompts, trace))


@pytest.mark.parametrize(("architecture", "steps"), [("llama", 1), ("mistral", 3), ("gemma3", 1), ("gpt_neox", 3)])
def test_adapters_on_upper_layers(architecture, steps, monkeypatch):
    backbone = tiny_backbone(architecture, depth=3, layers="last-1")
    prompts = random_ids(LENGTHS)
    counts = count_layers(backbone, monkeypatch)
    trace = adapted(backbone, prompts, steps)
    assert trace.reading is not None
    assert counts == {0: 1, 1: 1, 2: steps}
    read = read_after(backbone, prompts, trace)
    assert counts == {0: 2, 1: 2, 2: steps + 1}  # the last token alone
    check_reading(backbone, prompts, left(prompts), trace)
    check_read(backbone, prompts, trace.lora, read)


@pytest.mark.parametrize(
    ("architecture", "layers", "exit_layer"),
    [
        *[("llama", "first-1", 1), ("llama", "first-1", 2), ("llama", [1], 2), ("mistral", "first-1", 1)],
        *[("gemma3", "first-1", 2), ("gemma3", [1], 2), ("phi", "first-1", 1)],
    ],
)
def test_an_early_exit_leaves_the_lower_part_which_is_finished(architecture, layers, exit_layer, monkeypatch):
    backbone = tiny_backbone(architecture, depth=3, layers=layers)
    prompts = random_ids(LENGTHS)
    objective = PromptLoss(exit_layer=exit_layer, lens=random_lens(backbone, layers=(exit_layer,)))
    counts = count_layers(backbone, monkeypatch)
    trace = adapted(backbone, prompts, rate=FixedRate(RATE, objective))
    assert trace.reading is not None
    assert trace.reading.layers == exit_layer
    assert counts == dict.fromkeys(range(exit_layer), 1)
    read = read_after(backbone, prompts, trace)
    assert counts == {0: 2, 1: 2, 2: 2}  # once over the prompt, once over its last token
    check_read(backbone, prompts, trace.lora, read)


def test_an_exit_at_the_top():
    backbone = tiny_backbone("llama")
    prompts = random_ids(LENGTHS)
    trace = adapted(backbone, prompts, rate=FixedRate(RATE, PromptLoss(exit_layer=2)))
    check_read(backbone, prompts, trace.lora, read_after(backbone, prompts, trace))


@pytest.mark.parametrize(("prompts", "keeps"), [(random_ids(LENGTHS), False), (ALIKE, True)], ids=["long", "alike"])
@pytest.mark.parametrize("architecture", ["mistral", "gemma3"])
def test_with_checkpoints(architecture, prompts, keeps):
    """A layer that runs twice writes no cache: where a pass is not packed the prompt is read anew."""
    plain = kept_backbone(architecture)
    backbone = FastLM(plain.model, tiny_tokenizer(), name="tiny", path=Path("tiny"), recompute=True)
    trace, want = adapted(backbone, prompts, 2), adapted(plain, prompts, 2)
    assert (trace.reading is not None) == keeps
    close(trace.lora.tensors, want.lora.tensors)
    check_read(backbone, prompts, trace.lora, read_after(backbone, prompts, trace))


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_a_model_that_was_loaded_with_its_own_attention(architecture, tmp_path):
    save_tiny(tmp_path, architecture)
    backbone = load_backbone(str(tmp_path), attn_implementation="eager", device="cpu")  # no padding in float64 with it
    assert not backbone.packs
    for prompts in (random_ids(LENGTHS), ALIKE):
        trace = adapted(backbone, prompts, 2)
        assert trace.reading is not None
        assert not trace.fallback_B.any()
        for b, ids in enumerate(prompts):
            want = slow_steps(backbone, ids, trace.initial_lora.rows([b]), 2)
            close(trace.lora.rows([b]).tensors, want.tensors, 1e-5)
        check_read(backbone, prompts, trace.lora, read_after(backbone, prompts, trace), 1e-4)


@pytest.mark.parametrize(("architecture", "targets"), [("llama", "qv"), ("gemma3", "qv"), ("gpt_neox", "attention")])
def test_a_generated_start(architecture, targets):
    backbone = kept_backbone(architecture, target_modules=targets)
    prompts, generator = random_ids(LENGTHS), random_generator(backbone)
    start = generator(backbone, left(prompts), [0] * len(prompts))
    for steps in (0, 2):
        trace = adapt(backbone, left(prompts), start, FixedRate(RATE), steps)
        assert trace.reading is None
        check_read(backbone, prompts, trace.lora, read_after(backbone, prompts, trace))


def random_peft(backbone: FrozenLM, r: int = 3) -> PeftInit:
    generator = torch.Generator().manual_seed(9)

    def draw(*shape: int) -> Tensor:
        return 0.3 * torch.randn(*shape, generator=generator)

    factors = {p.module: (draw(r, p.in_features), draw(p.out_features, r)) for p in backbone.projections}
    return PeftInit(factors, r, 5.0, "qv", Path("adapter"))


@pytest.mark.parametrize("layers", ["all", "last-1"])
def test_a_start_that_peft_trained(layers):
    backbone = tiny_backbone("llama", layers=layers)
    prompts = random_ids(LENGTHS)
    start = random_peft(backbone)(backbone, left(prompts), [0] * len(prompts))
    trace = adapt(backbone, left(prompts), start, FixedRate(RATE), 2)
    assert (trace.reading is not None) == (layers == "last-1")
    check_read(backbone, prompts, trace.lora, read_after(backbone, prompts, trace))


def test_no_adapter_at_all(llama):
    read = prefill(llama, left(random_ids([6, 4])), None, reach="answer")
    want = prefill(llama, left(random_ids([6, 4])), None)
    close(read.answer_nll(random_ids([3, 1])), want.answer_nll(random_ids([3, 1])), 0)


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_a_row_that_cannot_be_read_starts_over(architecture):
    backbone = kept_backbone(architecture)
    prompts, start = random_ids([8, 7]), random_lora(backbone, 2)
    tensors = [t.clone() for t in start.tensors]
    tensors[-1][1] = 1e308  # finite, but no sum of it is
    wild = start.with_tensors(tensors)
    read = prefill(backbone, left(prompts), wild, start, reach="answer")
    assert read.fallback_B.tolist() == [False, True]
    check_read(backbone, prompts, start, read)
    assert prefill(backbone, left(prompts), wild, reach="answer").fallback_B.tolist() == [False, True]


@pytest.mark.parametrize("architecture", ["llama", "mistral", "gemma3"])
def test_scoring_and_generating_leave_the_reading_as_it_was(architecture):
    backbone, prompts = kept_backbone(architecture), random_ids(LENGTHS)
    trace = adapted(backbone, prompts)
    for _ in range(2):
        check_read(backbone, prompts, trace.lora, read_after(backbone, prompts, trace))
    check_reading(backbone, prompts, left(prompts), trace)


@pytest.mark.parametrize(("architecture", "beams"), [("llama", 2), ("gemma3", 2), ("mistral", 1), ("gpt_neox", 1)])
def test_repeated_rows_each_have_their_adapter_and_reading(architecture, beams):
    backbone, prompts = kept_backbone(architecture), random_ids(LENGTHS)
    trace = adapted(backbone, prompts)
    slow = slow_rows(backbone, prompts, trace.lora)
    chosen = {"max_new_tokens": 4, "eos_token_id": -1, "num_return_sequences": 2}
    if beams == 1:
        have = read_after(backbone, prompts, trace).generate(do_sample=True, top_k=1, **chosen)
        want = [row.greedy(4) for row in slow for _ in range(2)]
    else:
        have = read_after(backbone, prompts, trace).generate(num_beams=2, **chosen)
        want = [found for row in slow for found in row.beams(4, 2)]
    assert have == want
    if beams == 2:  # the best alone
        best = read_after(backbone, prompts, trace).generate(num_beams=2, max_new_tokens=4, eos_token_id=-1)
        assert best == want[::2]
        assert best != [row.greedy(4) for row in slow]


# --- AdaptiveLM ---

PROMPTS = ["Question: who wrote the first book about the river?\n\nAnswer:", "The mill", "down to the old sea of 1820."]
ANSWERS = ["a miller's daughter", "runs", "in the winter it"]
MADE = MadeFor(("squad", "xsum"), "plain", "answer", steps=2)


def network_for(backbone: FrozenLM, kind: str = "scalenet", made_for: MadeFor = MADE) -> ScaleNet | PerProjectionRate:
    if kind == "scalenet":
        return random_scalenet(backbone, made_for=made_for)
    network = PerProjectionRate(projections=len(backbone.projections), base_rates=(0.4, 0.2), made_for=made_for)
    with torch.no_grad():
        network.log_rates_KM.add_(0.5 * torch.randn_like(network.log_rates_KM))
    return network.double()


def check_lm(lm: AdaptiveLM, adaptation: Adaptation, prompts: Sequence[str] = tuple(PROMPTS)) -> None:
    answers = [ANSWERS[i % 3] for i in range(len(prompts))]
    tokenizer = lm.backbone.tokenizer
    slow = slow_rows(lm.backbone, [encode_prompt(tokenizer, prompt) for prompt in prompts], adaptation.lora)
    nll = lm.answer_nll(prompts, answers, adaptation)
    texts = lm.generate(prompts, adaptation=adaptation, max_new_tokens=4, eos_token_id=-1)
    for b, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        tokens = encode_answer(tokenizer, prompt, answer)
        close(nll[b], slow[b].nll(tokens).detach() / len(tokens), 1e-5)  # given in float32
        assert texts[b] == tokenizer.decode(slow[b].greedy(4), skip_special_tokens=True)


@pytest.mark.parametrize("kind", ["scalenet", "per-projection"])
@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt_neox"])
def test_a_network_made_for_the_answer(architecture, kind):
    backbone = kept_backbone(architecture)
    lm = AdaptiveLM(backbone, rate=network_for(backbone, kind), init=ZeroInit(r=2))
    adaptation = lm.adapt(PROMPTS)
    assert (adaptation.reach, adaptation.notes) == ("answer", (None,) * 3)
    assert adaptation.rates_BKM.shape == (3, 2, 4)  # as many steps as it was validated at
    check_lm(lm, adaptation)
    assert lm.generate(PROMPTS, max_new_tokens=4) == lm.generate(PROMPTS, adaptation=adaptation, max_new_tokens=4)
    base = lm.answer_nll(PROMPTS, ANSWERS)
    assert (lm.answer_nll(PROMPTS, ANSWERS, adaptation) - base).abs().min() > 1e-4
    close(lm.answer_nll(PROMPTS, ANSWERS, lm.adapt(PROMPTS, steps=0)), base, 1e-6)


def test_the_reach_can_be_chosen_and_a_note_says_what_the_network_is_for(llama):
    network = network_for(llama)
    said = "this network was trained on plain prompts of squad, xsum, with 2 steps"
    for reach, note in (("answer", None), ("all", said), (None, None)):
        lm = AdaptiveLM(llama, rate=network, init=ZeroInit(r=2), reach=reach)
        adaptation = lm.adapt(PROMPTS, steps=1)
        assert adaptation.reach == (reach or "answer")
        assert adaptation.notes == (note,) * 3
        assert bool(adaptation.cached) == (reach != "all")
        assert lm.adapt(PROMPTS, steps=0).notes == (None,) * 3
    whole = AdaptiveLM(llama, rate=network, init=ZeroInit(r=2), reach="all")
    papers = AdaptiveLM(llama, rate=random_scalenet(llama), init=ZeroInit(r=2))
    wanted = papers.answer_nll(PROMPTS, ANSWERS, papers.adapt(PROMPTS, steps=1))
    close(whole.answer_nll(PROMPTS, ANSWERS, whole.adapt(PROMPTS, steps=1)), wanted, 1e-6)
    with pytest.raises(ValueError, match=r"unknown reach 'answers'. Did you mean 'answer'\?"):
        AdaptiveLM(llama, reach="answers")  # pyright: ignore[reportArgumentType]


def test_a_chat_with_a_network_for_plain_prompts_is_noted(llama):
    lm = AdaptiveLM(llama, rate=network_for(llama), init=ZeroInit(r=2), chat=True)
    assert lm.adapt(PROMPTS, steps=1).notes == (MADE.words,) * 3
    made = MadeFor(("squad",), "chat", "answer")
    lm = AdaptiveLM(llama, rate=network_for(llama, made_for=made), init=ZeroInit(r=2), chat=True)
    assert lm.adapt(PROMPTS).notes == (None,) * 3


def test_one_token_and_diverged_prompts_keep_their_own_notes(llama):
    llama.tokenizer.backend_tokenizer.post_processor = None  # no BOS: "a" is one token
    prompts = ["a", *PROMPTS]
    lm = AdaptiveLM(llama, rate=network_for(llama), init=ZeroInit(r=2))
    adaptation = lm.adapt(prompts)
    assert adaptation.notes == (LeftAlone.ONE_TOKEN.words(), None, None, None)
    check_lm(lm, adaptation, prompts)
    alone = lm.adapt("a")
    check_lm(lm, alone, ["a"])
    lm = AdaptiveLM(llama, rate=SomeRowsWild({1: float("nan")}), init=ZeroInit(r=2), reach="answer")
    adaptation = lm.adapt(PROMPTS, steps=2)  # the second row by length is the third prompt
    assert adaptation.notes == (None, None, LeftAlone.NOT_FINITE.words())
    check_lm(lm, adaptation)


@pytest.mark.parametrize("start", ["generator", "peft"])
def test_other_starts_read_the_prompt_without_adapters_first(start, llama):
    init = random_generator(llama) if start == "generator" else random_peft(llama)
    lm = AdaptiveLM(llama, rate=0.2, init=init, reach="answer")
    for steps in (0, 2):
        check_lm(lm, lm.adapt(PROMPTS, steps=steps))


def test_more_prompts_than_one_batch_keep_their_order(llama):
    lm = AdaptiveLM(llama, rate=0.3, init=ZeroInit(r=2), reach="answer")
    prompts = [f"{PROMPTS[i % 3]} {'river ' * (i % 5)}{i}" for i in range(BATCH_SIZE + 3)]
    adaptation = lm.adapt(prompts, steps=1)
    assert len(adaptation.cached) == 2
    check_lm(lm, adaptation, prompts)


def test_an_answers_room_cuts_a_prompt_after_its_steps(llama):
    lm = AdaptiveLM(llama, rate=0.3, init=ZeroInit(r=2), reach="answer", truncate="left")
    long, answer = f"{'river ' * 200}mill", "sea"
    adaptation = lm.adapt([long, "The mill"], steps=1)
    ids, wanted = lm.encode(long, reserve=len(lm.encode_answer(long, answer))), lm.encode_answer(long, answer)
    assert len(ids) < 96
    nll = slow_rows(llama, [ids], adaptation.lora)[0].nll(wanted).detach() / len(wanted)
    close(lm.answer_nll([long, "The mill"], [answer, answer], adaptation)[0], nll, 1e-5)


@pytest.mark.parametrize(("reach", "passes"), [("answer", 0), ("all", 1)])
@pytest.mark.parametrize("steps", [0, 1, 2])
def test_the_prompt_is_read_once_more_only_if_adapters_act_on_it(llama, reach, passes, steps):
    lm = AdaptiveLM(llama, rate=0.3, init=ZeroInit(r=2), reach=reach)
    T = len(lm.encode(PROMPTS[0]))
    widths: list[int] = []
    llama.decoder.register_forward_pre_hook(
        lambda _m, _args, kwargs: widths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    lm.generate(PROMPTS[0], steps=steps, max_new_tokens=4, eos_token_id=-1)
    last = [] if reach == "all" else [1]  # the last prompt token, with adapters
    assert widths == [T] * max(1, steps + passes) + last + [1] * 4
    adaptation = lm.adapt(PROMPTS[0], steps=steps)
    widths.clear()
    for _ in range(2):
        lm.answer_nll(PROMPTS[0], "runs", adaptation)
    once = [1] if reach == "answer" else [T]
    answer = len(lm.encode_answer(PROMPTS[0], "runs")) - 1
    assert widths == (once + [answer] * (answer > 0)) * 2


def test_layers_run_once_over_the_prompt_with_one_step(llama, monkeypatch):
    lm = AdaptiveLM(llama, rate=network_for(llama), init=ZeroInit(r=2))
    counts = count_layers(llama, monkeypatch)
    lm.adapt(PROMPTS, steps=1)
    assert counts == {0: 1, 1: 1}
    lm.generate(PROMPTS, adaptation=lm.adapt(PROMPTS, steps=1), max_new_tokens=1)
    assert counts == {0: 4, 1: 4}  # the second adaptation, its last token, and the same within transformers' generate


def test_models_share_no_adapter_after(llama):
    lm = AdaptiveLM(llama, rate=0.3, init=ZeroInit(r=2), reach="answer")
    base = lm.answer_nll(PROMPTS, ANSWERS)
    first = lm.generate(PROMPTS, steps=2, max_new_tokens=4)
    lm.generate(PROMPTS[2], steps=1, max_new_tokens=4)
    assert lm.generate(PROMPTS, steps=2, max_new_tokens=4) == first
    close(lm.answer_nll(PROMPTS, ANSWERS), base, 0)
    close(base, AdaptiveLM(tiny_backbone("llama")).answer_nll(PROMPTS, ANSWERS), 0)
