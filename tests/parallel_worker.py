"""One of several processes: adapts, scores and answers with a model that they share, and writes what came out.

The tests run the same in one process, and compare.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ephemera import AdaptiveLM
from ephemera.llm import processes
from ephemera.llm.frozen_lm import FrozenLM
from ephemera.made_for import MadeFor
from ephemera.prompt_loss import PromptLoss
from ephemera.rates import FixedRate, ScaleNet
from tiny_models import VOCABULARY, length_gate, random_scalenet

PROMPTS = [
    "The river runs past the old mill.",
    "who",
    "Give a short answer of the following question. The sea",
    "Answer: a miller",
    "a book about the winter",
]
ANSWERS = [" and down to the sea", " a", " in", " w", " of 1820."]
UNEVEN = [" river", " and down to the sea"]
STOPS = list(range(3, VOCABULARY, 3))  # a third of the tokens end an answer, so that rows end at different ones


def found(folder: Path, *, parallel: str, reach: str = "all", prompts: int = 5, **options: Any) -> dict[str, Any]:
    """Losses, rates, adapters, answers' NLL and texts of some prompts under a random network."""
    given: dict[str, Any] = {"lora": {"target_modules": "all-linear"}, "rate": "none", **options}
    lm = AdaptiveLM.from_pretrained(str(folder), dtype="float64", parallel=parallel, **given)
    lm.reach = "all" if reach == "all" else "answer"
    lm.rate = random_scalenet(lm.backbone)
    texts, answers = PROMPTS[:prompts], ANSWERS[:prompts]
    made = lm.adapt(texts, steps=2)
    left_B = lm.prompt_nll(texts, made)
    lm.rate = random_rate(lm.backbone)
    gated = lm.adapt(texts) if reach == "answer" else None
    common = lm.adapt(texts, steps=1, rate=FixedRate(0.1, objective=PromptLoss(vocabulary=40)))
    return {
        "class": type(lm.backbone).__name__,
        "fingerprint": lm.backbone.fingerprint(),
        "nll": made.prompt_nll_BK.tolist(),
        "rates": made.rates_BKM.tolist(),
        "A": made.lora.A_BN.tolist(),
        "B": made.lora.B_BN.tolist(),
        "answer nll": lm.answer_nll(texts, answers, adaptation=made).tolist(),
        "base nll": lm.answer_nll(texts, answers).tolist(),
        "left": None if left_B is None else left_B.tolist(),
        "common words": [common.prompt_nll_BK.tolist(), common.lora.B_BN.sum(1, keepdim=True).tolist()],
        "gated": None if gated is None else [x.tolist() for x in (gated.share_B, gated.kl_B, gated.lora.B_BN[:, 0])],
        "texts": lm.generate(texts, adaptation=made, max_new_tokens=8, eos_token_id=STOPS),
    }


def uneven(lm: AdaptiveLM) -> list[float]:
    """NLL of an answer of one token, which needs no pass of its own, and of one that does: a process has one of them each."""
    made = lm.adapt(PROMPTS[:2], steps=1)
    assert len(lm.encode_answer(PROMPTS[0], UNEVEN[0])) == 1 < len(lm.encode_answer(PROMPTS[1], UNEVEN[1]))
    return lm.answer_nll(PROMPTS[:2], UNEVEN, adaptation=made).tolist()


def random_rate(backbone: FrozenLM) -> ScaleNet:
    """One bold step with reach answer, and a gate that shrinks some rows more often than others."""
    rule = random_scalenet(backbone)
    rule.made_for = MadeFor(("own",), "plain", "answer", 1)
    rule.gate = length_gate(backbone, 0.6, tau=1e-4, by_length=-0.5, tokens=3.0)
    return rule


def launch(
    *args: Sequence[str], script: str = __file__, folders: Sequence[Path] | None = None
) -> list[subprocess.Popen[str]]:
    """A process for each list of arguments, as torchrun starts them: of a script, or of a module. `folders`: where each runs."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    common |= {"WORLD_SIZE": str(len(args)), "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))}
    program = [sys.executable, script] if script.endswith(".py") else [sys.executable, "-m", script]
    return [
        subprocess.Popen(
            [*program, *own],
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=None if folders is None else folders[rank],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, own in enumerate(args)
    ]


def ended(started: list[subprocess.Popen[str]], *, timeout: float = 120) -> list[tuple[int, str, str]]:
    """Exit code, stdout and stderr of each; none is left running."""
    try:
        said = [process.communicate(timeout=timeout) for process in started]
    finally:
        for process in started:
            process.kill()
    return [(process.returncode, *texts) for process, texts in zip(started, said, strict=True)]


def all_results(folder: Path, out: Path) -> None:
    results: dict[str, Any] = {}
    for mode in ("tensor", "fsdp"):
        for model in sorted(folder.iterdir()):
            for reach in ("all", "answer"):
                results[f"{mode} {model.name} {reach}"] = found(model, parallel=mode, reach=reach)
    results["fsdp llama one row"] = found(folder / "llama", parallel="fsdp", prompts=1)
    lm = AdaptiveLM.from_pretrained(str(folder / "llama"), parallel="fsdp", rate=0.1)
    results["uneven answers"] = uneven(lm)
    try:
        lm.generate(PROMPTS[: 2 + processes.rank()], steps=1)
    except ValueError as error:
        results["different prompts"] = str(error)
    (out / f"{processes.rank()}.json").write_text(json.dumps(results))


def dies(folder: Path) -> None:
    """The second process ends before its work is done."""
    lm = AdaptiveLM.from_pretrained(str(folder / "llama"), parallel="fsdp", rate=0.1)
    if processes.rank() == 1:
        os._exit(3)
    try:
        lm.generate(PROMPTS, steps=1)
    except RuntimeError as error:
        print(processes.lost_process(error) or error)


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "dies":
        dies(Path(sys.argv[2]))
    else:
        all_results(Path(sys.argv[2]), Path(sys.argv[3]))
        processes.leave()
