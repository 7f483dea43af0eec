"""The processes that `torchrun` started: the group that they form, and what they must agree on.

Every process makes the same calls in the same order. Where a choice depends on a process's own rows, all of them make it
together: else one waits for the others for ever, or FSDP takes one layer's weights for another's.
"""

from __future__ import annotations

import atexit
import hashlib
import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

BACKENDS = {"cpu": "gloo", "cuda": "nccl", "xpu": "xccl"}
TIMEOUT = timedelta(minutes=30)  # loading a large model at different speeds
T = TypeVar("T")
LOST = ("Connection closed by peer", "Connection reset", "NCCL error", "timed out", "Timed out", "Broken pipe")


def started() -> int:
    """How many processes `torchrun` started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this is the process that writes: the first of those that `torchrun` started, or the only one."""
    return started() == 1 or os.environ.get("RANK", "0") == "0"


def join(mode: str, device: torch.device) -> torch.device:
    """Form the group of processes, if it is not formed yet, and return this one's device.

    ValueError for fewer than two processes, and for a device that has no way to talk to the others.
    """
    if started() < 2 and not dist.is_initialized():
        raise ValueError(
            f"parallel={mode!r} needs at least 2 processes; this is the only one. Start it by "
            "torchrun --nproc-per-node 2 -m ephemera ..., with one process for each device."
        )
    if device.type not in BACKENDS:
        raise ValueError(
            f"parallel={mode!r} on device {device.type!r}: processes can talk to each other on {', '.join(BACKENDS)}. "
            "Give one of these devices, or leave out parallel."
        )
    if device.type != "cpu":
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if local >= torch.accelerator.device_count():
            raise ValueError(
                f"{local + 1} or more processes on this machine, but it has {torch.accelerator.device_count()} devices. "
                "Give --nproc-per-node that number at most."
            )
        device = torch.device(device.type, local)
        torch.accelerator.set_device_index(local)
    if not dist.is_initialized():
        dist.init_process_group(BACKENDS[device.type], timeout=TIMEOUT)
        atexit.register(leave)
    return device


def leave() -> None:
    """Leave the group, so that torch does not warn at the end."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def anywhere(flag: bool, device: torch.device) -> bool:
    """Whether `flag` is true on any process."""
    if size() == 1:
        return flag
    found = torch.tensor([int(flag)], device=device)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return bool(found.item())


def check_same(what: str, value: Any, device: torch.device) -> None:
    """ValueError on every process unless all of them have the same `value`, by its `repr`; `what` names it."""
    if size() == 1:
        return
    own = int.from_bytes(hashlib.sha256(repr(value).encode()).digest()[:7], "big")
    ends = torch.tensor([own, -own], device=device)
    dist.all_reduce(ends, op=dist.ReduceOp.MAX)
    most, least = ends.tolist()
    if most != -least:
        raise ValueError(
            f"the processes were given different {what}. All of them must make the same calls with the same arguments: "
            "start every process by the same command, on the same files."
        )


def gathered(value: Any) -> list[Any]:
    """Every process's value, in their order: plain Python values, and small."""
    if size() == 1:
        return [value]
    values: list[Any] = [None] * size()
    dist.all_gather_object(values, value)
    return values


def dealt(groups: Sequence[T]) -> list[T]:
    """Every n-th of some groups: this process's."""
    return list(groups[rank() :: size()])


def of_all(values: Sequence[T]) -> list[T]:
    """What every process made of the groups `dealt` to it, in the groups' order. Tensors in it lie on the host."""
    parts = gathered(list(values))
    return [parts[i % len(parts)][i // len(parts)] for i in range(sum(map(len, parts)))]


def from_first(value: Any) -> Any:
    """The first process's value, on every process."""
    if size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def by_first(make: Callable[[], T]) -> T:
    """What the first process makes, on every process; a ValueError of its is raised on all of them."""
    if size() == 1:
        return make()
    made, error = None, None
    if rank() == 0:
        try:
            made = make()
        except ValueError as raised:
            error = str(raised)
    made, error = from_first((made, error))
    if error is not None:
        raise ValueError(error)
    return made


def all_rows(own: Tensor, counts: Sequence[int]) -> Tensor:
    """Every process's first rows, one process after the other: `counts[r]` of process r's `own` [b,...]."""
    if size() == 1:
        return own[: counts[0]]
    most = max(1, *counts)
    padded = own.new_zeros(most, *own.shape[1:])
    padded[: min(most, len(own))] = own[:most]
    as_bytes = padded.to(torch.uint8) if padded.dtype == torch.bool else padded.contiguous()
    parts = [torch.empty_like(as_bytes) for _ in counts]
    dist.all_gather(parts, as_bytes)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)]).to(own.dtype)


def lost_process(error: BaseException) -> str | None:
    """One line if the error says that another process is gone; None for any other error."""
    if size() == 1 or not any(words in str(error) for words in LOST):
        return None
    return (
        "another process ended before its work was done, so this one ends too. The line of the one "
        "that ended first says why; finished results were kept."
    )
