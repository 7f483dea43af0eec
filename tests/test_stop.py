"""Steps that stop early."""

import pytest
import torch

from ephemera.adapt import adapt
from ephemera.objective import TokenBatch
from ephemera.rates import AveragedRate, FixedRate
from ephemera.readout import Objective
from tiny import close, left, random_ids, random_lora, random_scalenet

LENGTHS = [11, 4, 8]


class Falling:
    """Row r's rates fall below a tenth of the base rate at step `stops[r]`."""

    max_steps = None
    uses_representation = "no"
    reach = "all"
    gate = None
    trains = "both"
    made_for = None
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
