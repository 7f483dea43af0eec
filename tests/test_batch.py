import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ephemera.batch import TokenBatch, length_batches, pad, scored_tokens
from ephemera.fast import vocab_loss as head_module
from ephemera.fast.vocab_loss import block_nll
from ephemera.llm.head import Head, token_nll
from reference import close
from tiny_models import random_ids

D, V = 6, 11


def mean_nll(hidden, batch, head, *, tokens=None, twice_differentiable=False):
    tokens = tokens or batch.scored
    nll = token_nll if twice_differentiable else block_nll
    return tokens.means(nll(tokens.states(hidden), head, tokens.targets_N))


@pytest.fixture(params=[(1, 1), (3, 4), (7, 11), (512, 2048)])
def block(request, monkeypatch) -> tuple[int, int]:
    """Tokens and words at a time."""
    monkeypatch.setattr(head_module, "CPU_BLOCK", request.param)
    return request.param


def example(side: str, lengths=(15, 1, 18, 9)):  # more tokens than any block of work
    sequences = [[i % V for i in ids] for ids in random_ids(lengths)]
    batch = pad(sequences, side=side, pad_id=3)
    torch.manual_seed(1)
    hidden = torch.randn(*batch.ids_BT.shape, D, dtype=torch.float64, requires_grad=True)
    head = Head(nn.Linear(D, V, dtype=torch.float64))
    return sequences, batch, hidden, head


def slow(sequences, batch: TokenBatch, hidden, head, first=1) -> torch.Tensor:
    losses = []
    for b, ids in enumerate(sequences):
        places = batch.mask_BT[b].nonzero()[:, 0]
        terms = [
            F.cross_entropy(head(hidden[b, places[t - 1]])[None], torch.tensor([ids[t]]))
            for t in range(first, len(ids))
        ]
        losses.append(torch.stack(terms).mean() if terms else hidden.new_zeros(()))
    return torch.stack(losses)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("twice", [False, True])
def test_mean_nll_and_its_gradient(block, side, twice):
    sequences, batch, hidden, head = example(side)
    have = mean_nll(hidden, batch, head, twice_differentiable=twice)
    want = slow(sequences, batch, hidden, head)
    close(have, want)
    assert have[1] == 0
    weights = torch.tensor([1.0, 2.0, -0.5, 3.0], dtype=torch.float64)
    close(
        torch.autograd.grad(have @ weights, hidden)[0],
        torch.autograd.grad(want @ weights, hidden)[0],
    )


def test_without_gradient(block):
    sequences, batch, hidden, head = example("left")
    close(mean_nll(hidden.detach(), batch, head), slow(sequences, batch, hidden, head))


@pytest.mark.parametrize("twice", [False, True])
def test_one_token_rows_give_zero_not_nan(twice):
    _, batch, hidden, head = example("left", lengths=(1, 1))
    nll = mean_nll(hidden, batch, head, twice_differentiable=twice)
    assert nll.tolist() == [0, 0]
    (gradient,) = torch.autograd.grad(nll.sum(), hidden)
    assert not gradient.any()


def test_scored_tokens_alone_count():
    sequences, batch, hidden, head = example("left", lengths=(6, 4))
    T = batch.ids_BT.shape[1]
    scored = (torch.arange(T) >= T - 3).expand(2, T)
    have = mean_nll(hidden, batch, head, tokens=scored_tokens(batch, scored))
    for b, ids in enumerate(sequences):
        close(have[b], slow([ids], pad([ids], side="left"), hidden[b : b + 1, T - len(ids) :], head, len(ids) - 3)[0])
    # The first token has nothing before it, even where it is marked
    everything = torch.ones_like(batch.mask_BT)
    close(
        mean_nll(hidden, batch, head, tokens=scored_tokens(batch, everything & batch.mask_BT)),
        mean_nll(hidden, batch, head),
    )


def test_the_head_gets_no_gradient():
    _, batch, hidden, head = example("left")
    mean_nll(hidden, batch, head).sum().backward()
    assert hidden.grad is not None
    assert head.module.get_parameter("weight").grad is None
    assert head.module.get_parameter("bias").grad is None


def test_second_derivative():
    _, batch, hidden, head = example("left", lengths=(3, 2))
    assert torch.autograd.gradgradcheck(lambda h: mean_nll(h, batch, head, twice_differentiable=True), hidden)


def test_nll_is_float32_for_a_bfloat16_model():
    h, head = torch.randn(4, D).bfloat16().requires_grad_(), Head(nn.Linear(D, V).bfloat16())
    nll = block_nll(h, head, torch.tensor([1, 2, 3, 4]))
    assert nll.dtype == torch.float32
    want = F.cross_entropy(head(h).float(), torch.tensor([1, 2, 3, 4]), reduction="none")
    torch.testing.assert_close(nll, want)
    (gradient,) = torch.autograd.grad(nll.sum(), h)
    assert gradient.dtype == torch.bfloat16


def test_a_capped_head(block):
    """Gemma 2's soft cap is part of the logits, and of their gradient."""
    linear = nn.Linear(D, V, dtype=torch.float64)
    h = (4 * torch.randn(5, D, dtype=torch.float64)).requires_grad_()
    targets = torch.tensor([3, 4, 5, 6, 10])
    want = F.cross_entropy(2 * torch.tanh(linear(h) / 2), targets, reduction="none")
    have = block_nll(h, Head(linear, 2.0), targets)
    close(have, want)
    close(torch.autograd.grad(have.sum(), h)[0], torch.autograd.grad(want.sum(), h)[0])


def test_a_head_that_is_more_than_linear():
    module = nn.Sequential(nn.Linear(D, V, dtype=torch.float64), nn.Tanh())
    h = torch.randn(5, D, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([3, 4, 5, 6, 10])
    want, have = F.cross_entropy(module(h), targets, reduction="none"), block_nll(h, Head(module), targets)
    close(have, want)
    close(torch.autograd.grad(have.sum(), h)[0], torch.autograd.grad(want.sum(), h)[0])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so_and_in_its_row(bad):
    head = Head(nn.Linear(D, V))
    h = torch.randn(3, D)
    h[1, 2] = bad
    nll = block_nll(h, head, torch.tensor([1, 2, 3]))
    assert nll.isfinite().tolist() == [True, False, True]


def test_logits_far_apart_and_of_any_size(monkeypatch):
    """The highest logit comes in the last block, 2,000 above the first; neither end overflows."""
    linear = nn.Linear(1, 6, bias=False)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([-1000.0, -999, 0, 1, 998, 1000])[:, None])
    monkeypatch.setattr(head_module, "CPU_BLOCK", (8, 2))
    nll = block_nll(torch.ones(3, 1), Head(linear), torch.tensor([5, 4, 0]))
    more = math.log1p(math.exp(-2))
    torch.testing.assert_close(nll, torch.tensor([more, 2 + more, 2000 + more]), atol=1e-4, rtol=0)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_and_positions(side):
    batch = pad([[5, 6, 7], [8]], side=side, pad_id=9)
    ids = {"left": [[5, 6, 7], [9, 9, 8]], "right": [[5, 6, 7], [8, 9, 9]]}[side]
    assert batch.ids_BT.tolist() == ids
    assert batch.lengths_B.tolist() == [3, 1]
    assert batch.padded
    assert batch.position_ids_BT[0].tolist() == [0, 1, 2]
    assert batch.position_ids_BT[1, 2 if side == "left" else 0] == 0
    assert not pad([[1, 2], [3, 4]]).padded


@pytest.mark.parametrize("max_tokens", [None, 30, 64])
def test_length_batches_cover_all_rows_within_limits(max_tokens):
    lengths = [3 + i * 11 % 28 for i in range(53)]
    made = length_batches(lengths, batch_size=6, max_tokens=max_tokens)
    assert sorted(i for batch in made for i in batch) == list(range(53))
    for batch in made:
        assert len(batch) <= 6
        padded = len(batch) * max(lengths[i] for i in batch)
        assert max_tokens is None or padded <= max_tokens or len(batch) == 1
    longest = [max(lengths[i] for i in batch) for batch in made]
    assert longest == sorted(longest)


def test_a_row_longer_than_the_limit_goes_alone():
    assert length_batches([100, 2, 3], batch_size=4, max_tokens=10) == [[1, 2], [0]]
    assert length_batches([], batch_size=4) == []
