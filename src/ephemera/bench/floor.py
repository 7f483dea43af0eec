"""What the arithmetic allows: operations that no adaptation can do without, at this machine's own speed.

Counted: the matrix products of K forward passes and of K backward passes through the activations. Left
out, so that this is a lower bound: padding, the adapters' own products, norms, softmax, everything
element by element. Each distinct product is timed alone, its weight warm in the cache.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from statistics import median

import torch
import torch.nn.functional as F
from torch import nn

from ephemera.batch import pad
from ephemera.bench.contenders import initial_lora
from ephemera.bench.timing import timed
from ephemera.llm.frozen_lm import FrozenLM
from ephemera.lora import attach

Shape = tuple[int, int, int]  # tokens, in features, out features
CALLS = 5  # timed calls of each product in a round
DEVICE_CALLS = 50


@dataclass(frozen=True)
class Work:
    """Matrix products of one forward and one activation-backward pass over some prompts, unpadded."""

    forward: Counter[Shape]
    backward: Counter[Shape]
    attention_flops: int

    @property
    def linear_flops(self) -> int:
        return sum(2 * prod(shape) * times for way in (self.forward, self.backward) for shape, times in way.items())

    @property
    def flops(self) -> int:
        return self.linear_flops + self.attention_flops


def count(backbone: FrozenLM, prompts: Sequence[Sequence[int]]) -> Work:
    """Count the products of one step, asking autograd which backward ones are needed.

    A linear layer's input gradient is needed only where something below it is adapted. Attention is
    causal: token t meets t + 1 keys. Its two products have four in the backward pass, three in the
    first layer, whose keys hang on no adapter.
    """
    tokens = sum(len(ids) for ids in prompts)
    forward, backward = Counter[Shape](), Counter[Shape]()

    def note(module: nn.Module, inputs: tuple[torch.Tensor, ...], _output: torch.Tensor) -> None:
        assert isinstance(module, nn.Linear)
        shape = (tokens, module.in_features, module.out_features)
        forward[shape] += 1
        backward[shape] += inputs[0].requires_grad

    linears = [m for m in backbone.decoder.modules() if isinstance(m, nn.Linear)]
    handles = [m.register_forward_hook(note) for m in linears]
    probe = [prompts[0][:2]]
    lora = initial_lora(backbone, probe).leaves()
    try:
        with attach(backbone.model, lora), torch.enable_grad():
            backbone.decoder(input_ids=pad(probe).ids_BT.to(backbone.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    assert isinstance(backbone.head, nn.Linear)
    # A prompt's last token predicts nothing
    head = (tokens - len(prompts), backbone.head.in_features, backbone.head.out_features)
    forward[head] += 1
    backward[head] += 1
    pairs = sum(len(ids) * (len(ids) + 1) // 2 for ids in prompts)
    queries = [(p.out_features, 2 + (3 if p.layer == 0 else 4)) for p in backbone.projections if p.kind == "q"]
    attention = sum(2 * pairs * width * products for width, products in queries)
    return Work(+forward, +backward, attention)


class Floor:
    """Times the products of some work in rounds, so that they can take turns with what they are compared to."""

    def __init__(self, work: Work, steps: int, dtype: torch.dtype, device: torch.device | str = "cpu"):
        self.work, self.steps, self.device = work, steps, torch.device(device)
        self._products: list[tuple[int, Callable[[], torch.Tensor]]] = []
        for way, counts in (("forward", work.forward), ("backward", work.backward)):
            for (tokens, inputs, outputs), times in sorted(counts.items()):
                width = inputs if way == "forward" else outputs
                weight_OI, x = (torch.randn(shape).to(device, dtype) for shape in ((outputs, inputs), (tokens, width)))
                product = partial(F.linear if way == "forward" else torch.mm, x, weight_OI)
                self._products.append((times, product))

    @torch.no_grad()
    def seconds(self) -> float:
        """K steps' worth of products in this round; attention at the mean speed of the linear layers."""
        linear = sum(times * self._seconds(product) for times, product in self._products)
        return self.steps * linear * self.work.flops / self.work.linear_flops

    def _seconds(self, call: Callable[[], torch.Tensor]) -> float:
        call()
        if self.device.type != "cpu":  # one wait for many: a wait takes longer than a product there
            return timed(lambda: [call() for _ in range(DEVICE_CALLS)]) / DEVICE_CALLS
        return median(timed(call) for _ in range(CALLS))
