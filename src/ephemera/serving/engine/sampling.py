"""The next token of one row, from its logits, by its own settings and its own random numbers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

NUCLEUS = 512  # likeliest tokens looked at first: a full sort of 49,152 takes longer than the row's share of a pass


@dataclass(frozen=True)
class Sampling:
    """How a prompt's answers are drawn. `logprobs`: None, or how many alternatives are told with each token."""

    temperature: float = 0.0
    top_p: float = 1.0
    max_tokens: int = 64
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    seed: int | None = None

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    def generator(self, choice: int) -> torch.Generator:
        """The random numbers of one answer; with a seed the same ones each time, whoever else is in the batch."""
        generator = torch.Generator()
        if self.seed is None:
            generator.seed()
        else:
            generator.manual_seed((self.seed + choice) % (1 << 63))
        return generator


def draw(logits_V: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """A token by temperature and top_p (the smallest set of likeliest tokens that holds `top_p`)."""
    if sampling.greedy:
        return int(logits_V.argmax())
    wide_V = logits_V.float().cpu()
    scaled_V = (wide_V - wide_V.max()) / max(sampling.temperature, 1e-5)
    p_V = scaled_V.softmax(-1)
    if sampling.top_p >= 1:
        return int(torch.multinomial(p_V, 1, generator=generator))
    for size in (min(NUCLEUS, len(p_V)), len(p_V)):
        p_N, tokens_N = p_V.topk(size)
        before_N = p_N.cumsum(0) - p_N
        if size == len(p_V) or bool(before_N[-1] + p_N[-1] >= sampling.top_p):
            break
    kept_N = p_N * (before_N < sampling.top_p)
    return int(tokens_N[int(torch.multinomial(kept_N, 1, generator=generator))])
