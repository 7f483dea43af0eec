"""The one place where a model that is not ours is changed: attributes for as long as a block runs, and outputs overheard."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

Place = tuple[Any, str, Any]  # whose attribute, its name, what it is meanwhile


@contextmanager
def replaced(places: Iterable[Place]) -> Iterator[None]:
    """Give objects other attributes (a module its children, a configuration its values); whatever happens, all come back."""
    before: list[Place] = []
    try:
        for owner, name, value in places:
            before.append((owner, name, getattr(owner, name)))
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in reversed(before):
            setattr(owner, name, value)


def settle(places: Iterable[Place]) -> None:
    """The same for good: modes of a model that is loaded to be frozen, as `eval()` sets them."""
    for owner, name, value in places:
        setattr(owner, name, value)


@contextmanager
def overheard(module: nn.Module, into: list[Tensor] | None) -> Iterator[None]:
    """Collect what `module` returns; None: nothing."""
    if into is None:
        yield
        return

    def take(_module: nn.Module, _args: Any, output: Any) -> None:
        into.append(output)

    handle = module.register_forward_hook(take)
    try:
        yield
    finally:
        handle.remove()


def child(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    """The module that holds the one at `path`, and its name there."""
    parent, _, name = path.rpartition(".")
    return model.get_submodule(parent), name
