"""A step in less memory: each layer keeps its input alone, and is run again in the backward pass.

transformers' own switch has no effect on a model in eval mode, and its reentrant form gives adapters no gradient at all
where the embedding's output needs none. Adapters hang on a module only while a pass runs, so each layer here carries its
own into its second run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ephemera.fast.packing import Packing
from ephemera.lora import LoraBatch, attach


class _Checkpointed(nn.Module):
    """Stands where a decoder layer stood; `around` is what else must hold while it runs, both times."""

    def __init__(
        self,
        layer: nn.Module,
        lora: LoraBatch | None,
        packing: Packing | None,
        around: Callable[[], AbstractContextManager[None]],
    ):
        super().__init__()
        self.layer, self.lora, self.packing, self.around = layer, lora, packing, around

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        # Nothing is drawn at random in eval mode
        return checkpoint(self._run, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)  # pyright: ignore[reportReturnType]

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        with attach(self.layer, self.lora, self.packing), self.around():
            return self.layer(*args, **kwargs)


@contextmanager
def checkpointed(
    decoder: nn.Module,
    prefix: str,
    lora: LoraBatch | None,
    packing: Packing | None = None,
    around: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Iterator[None]:
    """Let every layer of `decoder` run so, with its share of the adapters; restored after.

    `prefix`: path of the decoder's layers in the model, where projections' paths begin ("model.layers").
    """
    layers = decoder.get_submodule("layers")
    assert isinstance(layers, nn.ModuleList)
    wrapped = [
        _Checkpointed(layer, _of_layer(lora, f"{prefix}.{i}."), packing, around) for i, layer in enumerate(layers)
    ]
    try:
        decoder.register_module("layers", nn.ModuleList(wrapped))
        yield
    finally:
        decoder.register_module("layers", layers)


def _of_layer(lora: LoraBatch | None, prefix: str) -> LoraBatch | None:
    """The adapters of one layer, named from there."""
    if lora is None:
        return None
    mine = [m for m, p in enumerate(lora.projections) if p.module.startswith(prefix)]
    if not mine:
        return None
    projections = tuple(
        replace(lora.projections[m], module=lora.projections[m].module.removeprefix(prefix)) for m in mine
    )
    return replace(lora, projections=projections, A=tuple(lora.A[m] for m in mine), B=tuple(lora.B[m] for m in mine))
