"""A step in less memory: each layer keeps its input alone, and is run again in the backward pass.

transformers' own switch has no effect on a model in eval mode, and its reentrant form gives adapters no gradient at all
where the embedding's output needs none. Adapters hang on a module only while a pass runs, so each layer here carries its
own into its second run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ephemera.llm.replaced import replaced
from ephemera.lora import Adapted, LoraBatch, Pair, attach_pairs


class _Recomputed(nn.Module):
    """Stands where a decoder layer stood; `around` is what else must hold while it runs, both times."""

    def __init__(
        self,
        layer: nn.Module,
        pairs: Sequence[Pair],
        scaling: float,
        adapted: Adapted,
        around: Callable[[], AbstractContextManager[None]],
    ):
        super().__init__()
        self.layer, self.pairs, self.scaling, self.adapted, self.around = layer, pairs, scaling, adapted, around

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        # Nothing is drawn at random in eval mode
        return checkpoint(self._run, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)  # pyright: ignore[reportReturnType]

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        with attach_pairs(self.layer, self.pairs, self.scaling, self.adapted), self.around():
            return self.layer(*args, **kwargs)


def recomputed(
    decoder: nn.Module,
    prefix: str,
    lora: LoraBatch | None,
    adapted: Adapted,
    around: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> AbstractContextManager[None]:
    """Let every layer of `decoder` run so, with its share of the adapters; restored after.

    `prefix`: path of the decoder's layers in the model, where projections' paths begin ("model.layers").
    """
    layers = decoder.get_submodule("layers")
    assert isinstance(layers, nn.ModuleList)
    scaling = 1.0 if lora is None else lora.scaling
    wrapped = [
        _Recomputed(layer, _of_layer(lora, f"{prefix}.{i}."), scaling, adapted, around)
        for i, layer in enumerate(layers)
    ]
    return replaced([(decoder, "layers", nn.ModuleList(wrapped))])


def _of_layer(lora: LoraBatch | None, prefix: str) -> list[Pair]:
    """The adapters of one layer, named from there."""
    return [
        (replace(projection, module=projection.module.removeprefix(prefix)), A_BRI, B_BOR)
        for projection, A_BRI, B_BOR in ([] if lora is None else lora.pairs)
        if projection.module.startswith(prefix)
    ]
