"""Runs adaptation on a device that only pretends to compute: torch then knows shapes and devices, but no number.

So whatever asks for a number (and would wait for an accelerator), mixes devices, or moves something from or to the host
while the loop runs, fails (moves within a backward pass in part: torch runs it on a thread of its own). In a process of its own, since a backend cannot be taken back: `PYTHONPATH=tests python tests/guards/pretend.py` prints a JSON
object with, for each case, what went wrong (null: nothing).
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from ephemera.adapt import adapt
from ephemera.early_exit.lens import Lens
from ephemera.inits import ZeroInit
from ephemera.llm.frozen_lm import describe
from ephemera.prompt_loss import PromptLoss
from ephemera.rates import AveragedRate, FixedRate, Rate
from tiny_models import left, random_ids, random_scalenet, tiny_backbone

DEVICE = "pretend"
Case = tuple[str, torch.dtype, Callable[[Any], Rate]]
SCHEDULE = 3


class OnDevice(TorchFunctionMode):
    """Moves tensors to the pretended device, where there is no kernel to do it; with `closed` that is an error."""

    def __init__(self, *, closed: bool):
        super().__init__()
        self.closed = closed

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        to_host = func is torch.Tensor.to and any(str(a) == "cpu" for a in (*args[1:], *kwargs.values()))
        if self.closed and (to_host or func is torch.Tensor.cpu) and args[0].device.type == DEVICE:
            raise AssertionError("a tensor is fetched from the device while the loop runs")
        if func is torch.Tensor.to:
            given = (*args[1:], *kwargs.values())
            like = [a for a in given if isinstance(a, torch.Tensor)]
            devices = [t.device for t in like] + [torch.device(a) for a in given if isinstance(a, str | torch.device)]
            if devices and devices[0].type == DEVICE:
                dtypes = [t.dtype for t in like] + [a for a in given if isinstance(a, torch.dtype)]
                dtype = dtypes[0] if dtypes else args[0].dtype
                if args[0].device.type == DEVICE:
                    return func(args[0], dtype)
                assert not self.closed, "a tensor is moved to the device while the loop runs"
                return torch.empty(args[0].shape, dtype=dtype, device=DEVICE)
        if func in (torch.tensor, torch.as_tensor, torch.Tensor.new_tensor):
            assert not self.closed, "numbers are copied to the device while the loop runs"
        return func(*args, **kwargs)


def move(module: nn.Module) -> None:
    """In place of `module.to`, which writes into the parameters there are."""
    for part in module.modules():
        for name, p in part.named_parameters(recurse=False):
            part.register_parameter(name, nn.Parameter(p.to(DEVICE), requires_grad=False))
        for name, b in part.named_buffers(recurse=False):
            part.register_buffer(name, b.to(DEVICE))


def averaged(backbone: Any) -> Rate:
    return AveragedRate(torch.full((SCHEDULE, SCHEDULE, len(backbone.projections)), 0.1), describe(backbone))


def early(backbone: Any) -> Rate:
    lens = Lens(hidden_size=backbone.hidden_size, exit_layers=[2])
    return FixedRate(0.1, PromptLoss(2, lens, vocabulary=64))


CASES: dict[str, Case] = {
    "fixed": ("llama", torch.float32, lambda _: FixedRate(0.1)),
    "fixed, bfloat16": ("llama", torch.bfloat16, lambda _: FixedRate(0.1)),
    "scalenet": ("llama", torch.float32, lambda backbone: random_scalenet(backbone).float()),
    "averaged": ("llama", torch.float32, averaged),
    "exit": ("llama", torch.float32, early),
    "gpt-neox": ("gpt_neox", torch.float32, lambda _: FixedRate(0.1)),
    "qwen3": ("qwen3", torch.float32, lambda _: FixedRate(0.1)),
    "gemma3": ("gemma3", torch.float32, lambda _: FixedRate(0.1)),
}


def run(case: Case) -> None:
    architecture, dtype, make = case
    backbone = tiny_backbone(architecture, dtype=dtype)
    batch, rate = left(random_ids([9, 6])), make(backbone)
    lora = ZeroInit()(backbone, batch, [0, 0])
    backbone.ready(batch)  # on the host, where there are numbers
    with FakeTensorMode(allow_non_fake_inputs=True):
        with OnDevice(closed=False):
            for module in (backbone.model, rate, rate.objective.lens):
                if isinstance(module, nn.Module):
                    move(module)
            backbone.vocabulary_VD = backbone.embedding.get_parameter("weight")
            rows = [None if p.rows is None else p.rows.to(DEVICE) for p in backbone.projections]
            backbone.projections = tuple(replace(p, rows=r) for p, r in zip(backbone.projections, rows, strict=True))
            lora = replace(lora.to(DEVICE), projections=backbone.projections)
            adapt(backbone, batch.to(DEVICE), lora, rate, 1)  # an averaged rate moves its table once
        with OnDevice(closed=False) as mode:
            moved, forward = batch.to(DEVICE), backbone.forward

            def first(*args: Any, **kwargs: Any) -> Any:
                mode.closed = True  # the loop has begun
                return forward(*args, **kwargs)

            backbone.forward = first
            trace = adapt(backbone, moved, lora, rate, SCHEDULE)
            assert mode.closed
        assert trace.lora.A[0].device.type == DEVICE


def main() -> None:
    _setup_privateuseone_for_python_backend(DEVICE)
    found = {}
    for name, case in CASES.items():
        try:
            run(case)
            found[name] = None
        except Exception:
            found[name] = traceback.format_exc()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
