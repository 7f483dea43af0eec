"""Training on several processes: each holds the whole model and the whole network, and takes its own rows.

What the first process resumed, searched or standardised by goes to all of them: they need no shared folder.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ephemera.llm import processes

T = TypeVar("T")
MOMENTS = ("step", "exp_avg", "exp_avg_sq")


def own(groups: Sequence[T]) -> list[T]:
    """Every n-th of some groups of rows: this process's."""
    return list(groups[processes.rank() :: processes.size()])


def of_all(values: Sequence[T]) -> list[T]:
    """What every process made of its `own` groups, in the groups' order. Tensors in it lie on the host."""
    parts = processes.gathered(list(values))
    return [parts[i % len(parts)][i // len(parts)] for i in range(sum(map(len, parts)))]


@torch.no_grad()
def as_the_first(network: nn.Module, optimizer: torch.optim.Optimizer, done: int) -> int:
    """Give every process the first one's weights, the optimiser's state, and the number of steps that are done."""
    if processes.size() == 1:
        return done
    for tensor in network.state_dict().values():
        dist.broadcast(tensor, src=0)  # the state's tensors are the network's own
    names = dict(network.named_parameters())
    moved = processes.from_first([name for name, parameter in names.items() if parameter in optimizer.state])
    for name in moved:
        optimizer.state[names[name]] = dict(zip(MOMENTS, _moments(names[name], optimizer), strict=True))
    return processes.from_first(done)


def _moments(parameter: nn.Parameter, optimizer: torch.optim.Optimizer) -> Iterable[Tensor]:
    held = optimizer.state.get(parameter, {})
    steps = processes.from_first(float(held["step"]) if held else None)
    yield torch.tensor(steps)
    for key in MOMENTS[1:]:
        moment = held.get(key, torch.zeros_like(parameter))
        dist.broadcast(moment, src=0)
        yield moment
