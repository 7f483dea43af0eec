"""Training on several processes: each holds the whole model and the whole network, and takes its own rows.

What the first process resumed, searched or standardised by goes to all of them: they need no shared folder.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ephemera.llm import processes

MOMENTS = ("step", "exp_avg", "exp_avg_sq")


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
