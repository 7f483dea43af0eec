"""Pieces of an answer's text: whole characters, nothing of a stop sequence, and together the whole text."""

from __future__ import annotations

import random

import pytest
import torch

from ephemera.serving.engine.logprobs import logprob_entry
from ephemera.serving.engine.sampling import Sampling, draw
from ephemera.serving.engine.text import Detokenizer, Stop
from ephemera.serving.engine.vocabulary import Vocabulary
from tiny_models import VOCABULARY, tiny_tokenizer


@pytest.mark.parametrize("text", ["plain text", "naïve café", "日本語 and 🦊🦊 mixed", "e\u0301 combining"])
def test_characters_come_whole(text):
    tokenizer = tiny_tokenizer()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    detokenizer = Detokenizer(tokenizer)
    pieces = [detokenizer.push(i) for i in ids]
    assert "\ufffd" not in "".join(pieces)
    assert "".join(pieces) + detokenizer.finish() == text
    assert len(ids) == len(text) or "" in pieces or text == "plain text"  # bytes of one character are held back


def test_pieces_join_to_what_the_tokenizer_says():
    """Random ids, most of them bytes that are no character."""
    tokenizer, dice = tiny_tokenizer(), random.Random(0)
    for _ in range(200):
        ids = [dice.randrange(VOCABULARY) for _ in range(dice.randrange(1, 30))]
        detokenizer = Detokenizer(tokenizer)
        text = "".join(detokenizer.push(i) for i in ids) + detokenizer.finish()
        assert text == tokenizer.decode(ids, skip_special_tokens=True)


def slow_stop(text: str, sequences: list[str]) -> str:
    places = [text.find(s) for s in sequences if s in text]
    return text[: min(places)] if places else text


def test_stop_sequences_over_pieces():
    dice = random.Random(1)
    for _ in range(2000):
        text = "".join(dice.choice("ab\n") for _ in range(dice.randrange(20)))
        sequences = ["".join(dice.choice("ab\n") for _ in range(dice.randrange(1, 4))) for _ in range(2)]
        stop, shown, stopped, at = Stop(sequences), "", False, 0
        while at < len(text) and not stopped:
            size = dice.randrange(1, 4)
            piece, stopped = stop.push(text[at : at + size])
            at += size
            shown += piece
            assert not any(s in shown for s in sequences)
        if not stopped:
            shown += stop.finish()
        # what is shown ends before the first sequence that is complete when it is looked at
        assert text.startswith(shown)
        assert stopped == any(s in text for s in sequences)
        if not stopped:
            assert shown == text
        else:
            assert any(text[len(shown) :].startswith(s) for s in sequences)


def test_draws_follow_the_distribution():
    logits_V = torch.tensor([2.0, 1.0, 0.0, -1.0, -9.0])
    generator = torch.Generator().manual_seed(0)
    sampling = Sampling(temperature=0.7)
    counts = torch.zeros(5)
    for _ in range(4000):
        counts[draw(logits_V, sampling, generator)] += 1
    torch.testing.assert_close(counts / 4000, (logits_V / 0.7).softmax(0), atol=0.03, rtol=0)


@pytest.mark.parametrize("size", [5, 2000])
def test_top_p_keeps_the_smallest_likely_set(size):
    torch.manual_seed(0)
    logits_V = torch.randn(size) * 0.01  # flat: a nucleus wider than what is looked at first
    p_V = logits_V.softmax(0).sort(descending=True)
    keep = int((p_V.values.cumsum(0) < 0.6).sum()) + 1
    allowed = set(p_V.indices[:keep].tolist())
    generator = torch.Generator().manual_seed(0)
    drawn = {draw(logits_V, Sampling(temperature=1.0, top_p=0.6), generator) for _ in range(600)}
    assert drawn <= allowed
    assert size > 5 or drawn == allowed
    assert draw(logits_V, Sampling(temperature=1.0, top_p=1e-9), generator) == int(logits_V.argmax())


def test_logprobs_are_the_models_own():
    logits_V = torch.randn(VOCABULARY)
    vocabulary = Vocabulary(tiny_tokenizer())
    entry = logprob_entry(logits_V, 40, 3, vocabulary)
    want = logits_V.log_softmax(0)
    assert entry.token.logprob == pytest.approx(float(want[40]))
    assert [t.logprob for t in entry.top] == pytest.approx(want.topk(3).values.tolist())
    assert logprob_entry(logits_V, 40, 0, vocabulary).top == []


def test_seeds():
    drawn = [Sampling(temperature=1.0, seed=7).generator(choice).initial_seed() for choice in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert Sampling(temperature=1.0, seed=-(1 << 63)).generator(1) is not None
    assert Sampling().generator(0).initial_seed() != Sampling().generator(0).initial_seed()
