"""The halves' signals: to first order a step on one half lowers the other's loss by what their gradients agree on."""

import torch
from benchmarks.gate_candidates import candidates, halves_of, shared_ends

from ephemera.rates import FixedRate
from reference import close
from tiny_models import left, random_ids


def test_what_all_prompts_share():
    assert shared_ends([[1, 2, 3, 4, 9], [1, 2, 7, 9], [1, 2, 3, 5, 9]]) == (2, 1)


def test_each_half_holds_its_tokens():
    batch = left([[1, 2, 10, 11, 12, 13, 14, 9], [1, 2, 20, 21, 9]])
    early, late = halves_of(batch, 2, 1)
    assert early.targets_N.tolist() == [10, 11, 20]
    assert late.targets_N.tolist() == [12, 13, 14, 21]
    assert early.counts_B.tolist() == [2, 1]


def test_agreement_is_what_a_small_step_gains(llama):
    ids, rate = random_ids([12, 9, 15]), 1e-4
    told_BC = candidates(llama, FixedRate(rate), ids, (1, 1), 0)
    agreement_B, rated_B, drop_B = told_BC.unbind(1)
    close(drop_B, rated_B, 1e-3 * rated_B.abs().max().item())
    assert (drop_B.abs() > 1e-9).all()
    assert torch.equal(agreement_B.sign(), rated_B.sign())
    assert (agreement_B.abs() <= 1).all()
    for row, prompt in enumerate(ids):  # its neighbours do not matter
        close(candidates(llama, FixedRate(rate), [prompt], (1, 1), 0)[0], told_BC[row], 1e-8)
