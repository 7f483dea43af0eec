"""The loop on a device that is not the host: nothing waits for it, nothing is left behind (see pretend.py)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ephemera.adapt import adapt
from ephemera.batch import pad
from ephemera.fast.packing import Layout
from ephemera.inits import ZeroInit
from ephemera.llm.load import load_backbone
from ephemera.prompt_loss import PromptLoss
from ephemera.rates import FixedRate
from tiny_models import random_ids

PRETEND = Path(__file__).with_name("pretend.py")
CASES = (*("fixed", "fixed, bfloat16", "scalenet", "averaged", "exit", "gpt-neox", "qwen3", "gemma3"),)


@pytest.fixture(scope="module")
def found() -> dict[str, str | None]:
    done = subprocess.run(
        [sys.executable, str(PRETEND)],
        env={**os.environ, "PYTHONPATH": str(PRETEND.parents[1])},
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def test_every_case_is_run(found):
    assert sorted(found) == sorted(CASES)


@pytest.mark.parametrize("case", CASES)
def test_the_loop_never_waits_for_the_device(found, case):
    assert found[case] is None, found[case]


def test_a_batch_that_began_on_a_device_knows_the_same():
    """`meta` has no numbers: what is known of lengths comes from the twin on the host."""
    batch = pad(random_ids([4, 7]))
    moved = batch.to("meta")
    assert moved.on_host is batch
    assert moved.padded
    assert Layout(batch).to(moved.device).packing.lengths == moved.lengths == (4, 7)
    assert Layout(batch).to(moved.device).packing.position_of_N.device.type == "meta"
    assert moved.scored.rows_N.shape == batch.scored.rows_N.shape
    assert FixedRate(0.1).rates_BM(None, 1, 1, like=torch.empty(2, 1, device="meta"), projections=3).is_meta


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here: adapters made on one are not compared")
@pytest.mark.parametrize("spec", ["0.3", "exit"])
def test_a_gpu_makes_the_same_adapters(llama_folder, spec):
    prompts, found = random_ids([12, 9, 30]), {}
    for device in ("cpu", "cuda"):
        backbone = load_backbone(str(llama_folder), dtype="float32", device=device)
        rate = FixedRate(0.3) if spec == "0.3" else FixedRate(0.3, PromptLoss(2, vocabulary=64))
        batch = pad(prompts, side="left").to(backbone.device)
        trace = adapt(backbone, batch, ZeroInit()(backbone, batch, [0] * 3), rate, 3)
        found[device] = trace.lora.to("cpu").tensors
        torch.cuda.synchronize()
    for have, want in zip(found["cuda"], found["cpu"], strict=True):
        assert (have - want).abs().max() <= 1e-4 * want.abs().max()


@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no CUDA device here: whether a step waits for it is not seen"
)
def test_cuda_itself_sees_no_wait(llama_folder):
    backbone = load_backbone(str(llama_folder), dtype="float32", device="cuda")
    batch = pad(random_ids([12, 9]), side="left").to("cuda")
    lora = ZeroInit()(backbone, batch, [0, 0])
    adapt(backbone, pad(random_ids([12, 9]), side="left").to("cuda"), lora, FixedRate(0.3), 1)  # CUDA's own first time
    batch.ready()  # as the loop does before its first step
    torch.cuda.set_sync_debug_mode("error")
    try:
        adapt(backbone, batch, lora, FixedRate(0.3), 2)
    finally:
        torch.cuda.set_sync_debug_mode("default")
