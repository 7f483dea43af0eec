"""Tokens as bytes, names and places in the text: byte-level and SentencePiece-like vocabularies, answers and prompts."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import openai
import pytest
import torch
import transformers as hf
from tokenizers import Tokenizer, decoders, models, normalizers, processors

from ephemera.downloads import DEFAULT_MODEL, home
from ephemera.llm.frozen_lm import FrozenLM
from ephemera.serving.engine import methods
from ephemera.serving.engine.decode_batch import Answer
from ephemera.serving.engine.logprobs import chat_logprobs
from ephemera.serving.engine.messages import Finished, Job, Text
from ephemera.serving.engine.sampling import Sampling
from ephemera.serving.engine.vocabulary import Vocabulary
from ephemera.serving.http.requests import Limits
from serving_fixtures import PROMPTS, live, tiny_methods
from tiny_models import CHAT_TEMPLATE, VOCABULARY, tiny_backbone, tiny_model, tiny_tokenizer

PARROTS = "🦜 🦜 🦜 🦜 日本 日本 🦜 🦜"
TEXTS = (PARROTS, "naïve café", "a\nb A", "The river runs past the old mill", "e\u0301 \u200d👩‍🚀", "  two  spaces ")


def sentencepiece() -> hf.PreTrainedTokenizerFast:
    """As Llama 2's: `▁` for a space, `<0xE2>` for a byte; two tokens each make "A" and a line's end."""
    pieces = ["<pad>", "<s>", "</s>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "\n", *"aehilnrstvA"]
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he"), ("▁", "r"), ("i", "v")]
    pieces += ["".join(pair) for pair in merges]
    pieces += [chr(0x3B1 + i) for i in range(VOCABULARY - len(pieces))]
    bpe = models.BPE({piece: i for i, piece in enumerate(pieces)}, merges, unk_token="<unk>", byte_fallback=True)
    tokenizer = Tokenizer(bpe)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    return hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=CHAT_TEMPLATE, **names)


def default_tokenizer() -> hf.PreTrainedTokenizerBase:
    folder = home() / "models" / DEFAULT_MODEL
    if not (folder / "tokenizer.json").exists():
        pytest.skip("the default model is not in the cache")
    return hf.AutoTokenizer.from_pretrained(folder)


TOKENIZERS = {"byte-level": tiny_tokenizer, "sentencepiece": sentencepiece, "default": default_tokenizer}


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request):
    return TOKENIZERS[request.param]()


@cache
def vocabulary_of(tokenizer) -> Vocabulary:
    return Vocabulary(tokenizer)


def without_first_space(tokenizer, text: str) -> str:
    """SentencePiece begins a text with a space, and its decoder drops it."""
    return text.removeprefix(" ") if "▁" in tokenizer.get_vocab() else text


def ids_of(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("text", TEXTS)
def test_the_bytes_of_tokens_are_the_text(tokenizer, text):
    vocabulary = vocabulary_of(tokenizer)
    found = b"".join(vocabulary.bytes_of(i) or b"?" for i in ids_of(tokenizer, text)).decode()
    assert without_first_space(tokenizer, found) == text


def test_no_two_tokens_share_a_name(tokenizer):
    vocabulary = vocabulary_of(tokenizer)
    names = [vocabulary.name(i) for i in range(len(tokenizer) + 3)]
    assert len(set(names)) == len(names)
    assert names[-1] == f"token_id:{len(tokenizer) + 2}"  # a row of the embedding without a token
    assert vocabulary.bytes_of(len(tokenizer)) is None
    for i in ids_of(tokenizer, "the river"):
        assert names[i].strip() in tokenizer.decode([i])
    assert names[ids_of(tokenizer, "🦜")[-1]].startswith("bytes:\\x")


def test_a_byte_that_is_a_piece_too_has_another_name():
    tokenizer = sentencepiece()
    vocabulary = vocabulary_of(tokenizer)
    byte, piece = tokenizer.convert_tokens_to_ids(["<0x41>", "A"])
    assert vocabulary.bytes_of(byte) == vocabulary.bytes_of(piece) == b"A"
    assert (vocabulary.name(byte), vocabulary.name(piece)) == ("bytes:\\x41", "A")


@pytest.mark.parametrize("text", TEXTS)
def test_offsets_are_places_in_the_text(tokenizer, text):
    """Against what the tokenizer says when it encodes, and what its decoder gives of the tokens before."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids = encoded["input_ids"]
    have = vocabulary_of(tokenizer).offsets(ids, tokenizer.decode(ids))
    if "▁" in tokenizer.get_vocab():
        assert have == [start for start, _ in encoded["offset_mapping"]]
    else:
        assert have == [len(tokenizer.decode(ids[:place]).rstrip("\ufffd")) for place in range(len(ids))]


def test_offsets_of_a_prompt_are_places_in_it_as_it_was_given():
    """Qwen's tokenizers compose accents first: their tokens decode to a shorter text."""
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    text = "e\u0301e\u0301 the"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "éé the"
    have = vocabulary_of(tokenizer).prompt_offsets(ids, text)
    assert have[:5] == [0, 0, 0, 2, 2]  # BOS, then two bytes of each composed letter
    assert set(have[5:]) <= {4, 5, 6, 7}
    plain = tokenizer("the river")["input_ids"]
    assert vocabulary_of(tokenizer).prompt_offsets(plain, "the river") == vocabulary_of(tokenizer).offsets(
        plain, "the river"
    )


def test_offsets_of_bytes_that_are_no_text():
    """Random tokens: places never fall back, nor leave the text, and a lone bad byte is one character."""
    dice = random.Random(3)
    for tokenizer in (tiny_tokenizer(), sentencepiece()):
        vocabulary = vocabulary_of(tokenizer)
        for _ in range(300):
            ids = [dice.randrange(len(tokenizer)) for _ in range(dice.randrange(1, 12))]
            text = tokenizer.decode(ids, skip_special_tokens=True)
            have = vocabulary.offsets(ids, text)
            assert have == sorted(have)
            assert 0 <= min(have) <= max(have) <= len(text)
        bad, good = tokenizer.convert_tokens_to_ids("<0xE2>"), ids_of(tokenizer, "a")[-1]
        if bad is not None and bad != tokenizer.unk_token_id:
            assert vocabulary.offsets([good, bad, bad, good], "a\ufffd\ufffda") == [0, 1, 2, 3]


@pytest.mark.parametrize("build", [tiny_tokenizer, sentencepiece])
def test_other_decoders_tell_what_they_can(build):
    tokenizer = build()
    ids = ids_of(tokenizer, "the river")
    want = [Vocabulary(tokenizer).bytes_of(i) for i in ids]
    tokenizer.backend_tokenizer.decoder = decoders.Sequence([tokenizer.backend_tokenizer.decoder, decoders.CTC()])
    vocabulary = Vocabulary(tokenizer)
    assert all(have in (raw, None) for have, raw in zip(map(vocabulary.bytes_of, ids), want, strict=True))
    names = [vocabulary.name(i) for i in range(len(tokenizer))]
    assert len(set(names)) == len(names)


def answered(
    tokenizer, ids: list[int], *, prompt: Sequence[int] = (1,), end: int | None = None, **sampling
) -> list[Text]:
    """What an answer tells whose tokens are forced."""
    told: list = []
    more = {key: sampling.pop(key) for key in ("echo", "format") if key in sampling}
    sampling = Sampling(max_tokens=sampling.pop("max_tokens", len(ids)), logprobs=2, **sampling)
    job = Job(list(prompt), methods.Method("m", "none", None, None, 0), 0, told.append, sampling=sampling, **more)
    answer = Answer(job, 0, vocabulary_of(tokenizer), frozenset() if end is None else frozenset([end]))
    answer.begin([])
    for i in ids:
        if answer.reason is None:
            answer.take(torch.nn.functional.one_hot(torch.tensor(i), len(tokenizer)).float(), i)
    answer.close()
    assert isinstance(told.pop(), Finished)
    return told


def test_pieces_of_a_stream_hold_the_tokens_of_their_text(tokenizer):
    for text in TEXTS:
        ids = ids_of(tokenizer, text)
        pieces = answered(tokenizer, ids)
        entries = [entry for piece in pieces for entry in piece.logprobs]
        whole = "".join(piece.text for piece in pieces)
        assert whole == tokenizer.decode(ids)
        assert [entry.token.name for entry in entries] == [vocabulary_of(tokenizer).name(i) for i in ids]
        assert [entry.offset for entry in entries] == vocabulary_of(tokenizer).offsets(ids, whole)
        end = 0
        for piece in pieces[:-1]:  # the last one has what is left
            end += len(piece.text)
            assert all(end - len(piece.text) <= entry.offset < end for entry in piece.logprobs)
        shown = chat_logprobs(entries)["content"]
        spelled = bytes(byte for token in shown for byte in token["bytes"]).decode()
        assert without_first_space(tokenizer, spelled) == whole
        assert all(len(token["top_logprobs"]) == 2 for token in shown)


def test_tokens_of_a_stop_sequence_are_not_told(tokenizer):
    ids = ids_of(tokenizer, "the 🦜 the river runs")
    for format in ("chat", "plain"):
        pieces = answered(tokenizer, ids, stop=("the river",), format=format)
        assert "".join(piece.text for piece in pieces) == "the 🦜 "
        entries = [entry for piece in pieces for entry in piece.logprobs]
        assert max(entry.offset for entry in entries) < len("the 🦜 ")
        before = len(
            [i for i in range(len(ids)) if "the 🦜 ".startswith(tokenizer.decode(ids[: i + 1]).rstrip("\ufffd"))]
        )
        assert before <= len(entries) <= before + 1  # a token may hold the end of the text and the stop's beginning


def test_the_token_that_ends_an_answer(tokenizer):
    """Completions tell it, as OpenAI's: lm-evaluation-harness drops the last token of a scored text."""
    end = tokenizer.eos_token_id
    ids = [*ids_of(tokenizer, "the 🦜"), end]
    chat, plain = (
        [e for p in answered(tokenizer, ids, end=end, format=f) for e in p.logprobs] for f in ("chat", "plain")
    )
    assert [entry.token.name for entry in plain] == [*(entry.token.name for entry in chat), tokenizer.eos_token]
    assert plain[-1].offset == len("the 🦜")


def test_no_token_at_all_and_the_prompt_before_it(tokenizer):
    assert [(p.text, p.tokens) for p in answered(tokenizer, [], max_tokens=0, echo="the")] == [("the", 0), ("", 0)]
    parts = answered(tokenizer, ids_of(tokenizer, "a a"), echo="the")
    assert [entry.offset for part in parts for entry in part.logprobs][-1] >= len("the")


@pytest.mark.parametrize("text", TEXTS)
def test_an_answer_goes_on_from_an_echo_as_one_text(tokenizer, text):
    """Also where a decoder drops a text's first space: an answer's is not the first of this one."""
    ids = ids_of(tokenizer, f"the {text}")
    cut = len(ids_of(tokenizer, "the"))
    parts = answered(tokenizer, ids[cut:], prompt=ids[:cut], echo="the")
    assert "".join(part.text for part in parts) == f"the {text}"
    want = vocabulary_of(tokenizer).offsets(ids, f"the {text}")[cut:]
    assert [entry.offset for part in parts for entry in part.logprobs] == want


@pytest.fixture(scope="module", params=["byte-level", "sentencepiece"])
def asked(request):
    """(client, backbone) of a running server."""
    if request.param == "byte-level":
        backbone = tiny_backbone("llama")
    else:
        model = tiny_model("llama")
        backbone = FrozenLM(model, sentencepiece(), name="tiny-llama", path=Path("tiny-llama"), target_modules="qv")
    running = live(backbone, tiny_methods(backbone), limits=Limits(90, 8, 8, 60))
    with running as (url, _), openai.OpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0) as client:
        yield client, backbone


def test_as_many_distinct_tokens_as_asked_for(asked):
    client, _ = asked
    old = client.completions.create(model="tiny-llama", prompt=PARROTS, max_tokens=8, seed=1, logprobs=5, echo=True)
    choice = old.choices[0]
    told = choice.logprobs
    assert choice.text.startswith(PARROTS)
    assert [len(top) for top in told.top_logprobs[1:]] == [5] * (len(told.tokens) - 1)
    assert told.text_offset == sorted(told.text_offset)
    assert max(told.text_offset) <= len(choice.text)
    assert (told.token_logprobs[0], told.top_logprobs[0]) == (None, None)
    for token, logprob, top in list(zip(told.tokens, told.token_logprobs, told.top_logprobs, strict=True))[1:]:
        assert top.get(token, logprob) == logprob
        assert (token in top) == (logprob >= min(top.values()))
    chat = [{"role": "user", "content": PARROTS}]
    new = client.chat.completions.create(
        model="tiny-llama", messages=chat, max_tokens=8, seed=1, logprobs=True, top_logprobs=20
    )
    for entry in new.choices[0].logprobs.content:
        assert len({other.token for other in entry.top_logprobs}) == 20
        assert entry.bytes is not None


def test_streamed_logprobs_are_the_same(asked):
    client, _ = asked
    ask = {"model": "tiny-llama:fixed", "prompt": PARROTS, "max_tokens": 8, "seed": 4, "logprobs": 3}
    whole = client.completions.create(**ask).choices[0]
    parts = [chunk.choices[0] for chunk in client.completions.create(**ask, stream=True)]
    assert "".join(part.text for part in parts) == whole.text
    for key in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        assert [x for part in parts for x in getattr(part.logprobs, key)] == getattr(whole.logprobs, key)


@pytest.mark.parametrize("given", ["text", "ids", "batch"])
def test_a_prompts_own_logprobs_are_the_models(asked, given):
    client, backbone = asked
    texts = PROMPTS[:3] if given == "batch" else PROMPTS[:1]
    rows = [backbone.tokenizer(text)["input_ids"] for text in texts]
    prompt = {"text": texts[0], "ids": rows[0], "batch": rows}[given]
    ask = {"model": "tiny-llama", "prompt": prompt, "max_tokens": 0, "logprobs": 1, "echo": True}
    made = client.completions.create(**ask)
    assert made.usage.completion_tokens == 0
    for choice, ids in zip(made.choices, rows, strict=True):
        with torch.no_grad():
            logp_TV = backbone.model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        want = [float(logp_TV[t - 1, ids[t]]) for t in range(1, len(ids))]
        assert choice.logprobs.token_logprobs[1:] == pytest.approx(want, abs=1e-5)
        best = [max(top.values()) for top in choice.logprobs.top_logprobs[1:]]
        assert best == pytest.approx(logp_TV[:-1].max(-1).values.tolist(), abs=1e-5)
        assert choice.text == (texts[0] if given == "text" else backbone.tokenizer.decode(ids))
        assert (choice.text[:3] == "<s>") == (given != "text")
        assert choice.finish_reason == "length"


def test_what_nobody_can_compute_is_refused(asked):
    client, _ = asked
    with pytest.raises(openai.BadRequestError, match="adapts to the prompt") as refused:
        client.completions.create(model="tiny-llama:fixed", prompt="the river", echo=True, logprobs=1)
    assert refused.value.param == "echo"
    echoed = client.completions.create(model="tiny-llama:fixed", prompt="the river", echo=True, max_tokens=2)
    assert echoed.choices[0].text.startswith("the river")
