"""Fixed-seed adapters, rates, losses and texts are what they were: to the bit on the machine that pinned them.

`PYTHONPATH=tests python tests/guards/test_bits.py` pins them anew. Say in the commit why they changed. On another processor, torch version or thread
count the numbers are compared up to rounding.
"""

from __future__ import annotations

import hashlib
import json
import platform
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ephemera import AdaptiveLM, load_rate
from ephemera.downloads import DEFAULT_MODEL, home
from tiny_models import ARCHITECTURES, random_scalenet, tiny_backbone

PINNED = Path(__file__).with_suffix(".json")
PROMPTS = (
    "The river runs past the old mill.",
    "who wrote it?",
    "Give a short answer of the following question. The sea",
)
ANSWERS = (" and down to the sea", " a miller", " in the winter")
CHAT = ("What is the capital of Norway?", "Name three primary colours.", "Write a short poem about the sea.")
TINY = [f"{name} {reach}" for name in ARCHITECTURES for reach in ("all", "answer")]
REAL = ["universal", "universal-plain", "scalenet-nq-open"]


def machine() -> str:
    wanted = ("model name", "cpu family", "model\t", "stepping", "cache size")
    lines = _lines("/proc/cpuinfo")
    known = [next((x.partition(":")[2].strip() for x in lines if x.startswith(key)), "?") for key in wanted]
    return ", ".join(
        [platform.machine(), *known, torch.backends.cpu.get_cpu_capability(), f"torch {torch.__version__}"]
    )


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def lm_of(case: str) -> AdaptiveLM:
    if case in REAL:
        chat = case == "universal"
        return AdaptiveLM.from_pretrained("smollm2-135m-instruct", rate=load_rate(case), dtype="float32", chat=chat)
    architecture, reach = case.split()
    backbone = tiny_backbone(architecture)
    return AdaptiveLM(backbone, rate=random_scalenet(backbone), reach="all" if reach == "all" else "answer")


def pin(case: str) -> dict[str, Any]:
    """A digest of everything, and a few numbers of it."""
    lm, prompts, answers = lm_of(case), PROMPTS, ANSWERS
    if case in REAL:
        prompts, answers = CHAT, ("Oslo", "Red, blue and yellow", "The sea is wide")
    adaptation = lm.adapt(prompts, steps=2 if case in TINY else None, seed=5)
    nll_B = lm.answer_nll(prompts, answers, adaptation=adaptation)
    texts = lm.generate(prompts, adaptation=adaptation, max_new_tokens=12)
    tensors = [adaptation.rates_BKM, adaptation.prompt_nll_BK, nll_B]
    for row in range(len(prompts)):
        state = adaptation.lora.peft_state_dict(row)
        tensors += [state[name] for name in sorted(state)]
    digest = hashlib.sha256(json.dumps(texts).encode())
    for tensor in tensors:
        digest.update(tensor.detach().contiguous().cpu().numpy().tobytes())
    norms = [tensor.double().norm().item() for tensor in tensors]
    return {
        "digest": digest.hexdigest(),
        "texts": texts,
        "numbers": [*adaptation.prompt_nll_BK.flatten().tolist(), *nll_B.tolist(), *norms[3:15]],
    }


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("case", [*TINY, *(pytest.param(name, marks=pytest.mark.default_model) for name in REAL)])
def test_results_are_the_pinned_ones(case: str, one_thread: None):
    if case in REAL and not (home() / "models" / DEFAULT_MODEL).exists():
        pytest.skip("the default model is not fetched yet (`ephemera doctor`)")
    pinned = json.loads(PINNED.read_text())
    want, have = pinned["cases"][case], pin(case)
    assert have["texts"] == want["texts"]
    tolerance = 1e-9 if case in TINY else 1e-3
    assert have["numbers"] == pytest.approx(want["numbers"], rel=tolerance, abs=tolerance)
    if machine() == pinned["machine"]:
        assert have["digest"] == want["digest"]


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.manual_seed(0)
    PINNED.write_text(
        json.dumps({"machine": machine(), "cases": {case: pin(case) for case in [*TINY, *REAL]}}, indent=1)
    )
    print(f"pinned {len(TINY) + len(REAL)} cases on {machine()}", file=sys.stderr)
