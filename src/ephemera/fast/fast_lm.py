"""FastLM: a `FrozenLM` that computes the same at a lower cost. Without this package everything runs, only slower."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Self
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache

from ephemera.batch import ScoredTokens, TokenBatch
from ephemera.fast.cpu_attention import ATTENTION, KeysValues, can_pack, writes_attention_out
from ephemera.fast.decode import decoding, make_room
from ephemera.fast.llama_layer import can_fuse, fused_layers
from ephemera.fast.llama_parts import PassPlan
from ephemera.fast.lora_matmul import FastLoraLinear
from ephemera.fast.packing import Layout
from ephemera.fast.rms_norm import FastNorm, NormPlace, fast_norms
from ephemera.fast.shared_prefix import PrefixCache, Shared, of_scored, within_batch
from ephemera.fast.vocab_loss import HEAD_GRADIENT, block_nll
from ephemera.llm.cached_layers import CachedLayers, some_layers
from ephemera.llm.frozen_lm import Forward, FrozenLM
from ephemera.llm.recompute import recomputed
from ephemera.llm.replaced import Place, overheard, replaced
from ephemera.lora import Adapted, LoraBatch, attach


def _as_loaded(parent: nn.Module, name: str, stand_in: FastNorm) -> bool:
    norm = stand_in.norm
    return getattr(parent, name) is norm and not norm._forward_hooks and not norm._forward_pre_hooks


@dataclass(frozen=True, eq=False)
class FastForward(Forward):
    """`shared`: how the rows' first tokens were run once; None: each row has its own."""

    shared: Shared | None = None


class FastLM(FrozenLM):
    """On any device: no padding, hand-written LoRA products and norms, the vocabulary loss in blocks, decoding with
    prepared adapters. On a CPU: attention and the layers of Llama's kin written out, shared prefixes run once."""

    adapted = FastLoraLinear

    def __init__(self, *args: Any, packs: bool = True, recompute: bool = False, **kwargs: Any):
        """`packs`: passes without a cache may leave out padding. `recompute`: passes that a gradient is taken of keep only
        each layer's input, and run the layer again (llm/recompute.py)."""
        self.packs = packs
        self.recompute = recompute
        self.fuses_layers = packs
        self.prefix_cache: PrefixCache | None = None
        self._layouts: WeakKeyDictionary[TokenBatch, Layout] = WeakKeyDictionary()
        super().__init__(*args, **kwargs)
        self.norms = fast_norms(self.model)
        if recompute and self.final_norm is None:
            raise ValueError(
                f"checkpoint: ephemera does not know the layers of a {self.model.config.model_type}; leave it off."
            )

    def with_prefixes(self, prefixes: Sequence[Sequence[int]]) -> Self:
        other = copy.copy(self)
        other.prefix_cache = PrefixCache(prefixes)
        return other

    @property
    def route(self) -> str:
        if self.quantization == "none":
            return "the fast path"
        return "the fast path, but transformers' own layers, whose weights are quantised"

    def layout(self, batch: TokenBatch) -> Layout:
        """Made on the host, once for each batch."""
        if batch not in self._layouts:
            host = batch.on_host
            self._layouts[batch] = Layout(batch) if host is batch else self.layout(host).to(batch.device)
        return self._layouts[batch]

    def ready(self, batch: TokenBatch) -> None:
        super().ready(batch)
        if self._can_pack(batch):
            self.layout(batch)

    def forward(
        self,
        batch: TokenBatch,
        lora: LoraBatch | None = None,
        *,
        cache: Cache | None = None,
        past_mask_BT: Tensor | None = None,
        embedded: bool = False,
        lower: CachedLayers | None = None,
        stop: int | None = None,
        keep: bool = False,
        twice_differentiable: bool = False,
    ) -> Forward:
        """As `FrozenLM.forward`. A pass with a cache, or that is differentiated twice, runs transformers' layers as they are."""
        plain = cache is not None or twice_differentiable
        if not plain and self._can_pack(batch):
            return self._forward_packed(batch, lora, embedded=embedded, lower=lower, stop=stop, keep=keep)
        again = self.recompute and not plain and torch.is_grad_enabled()
        with self._recomputed(lora, self.adapted) if again else nullcontext(), replaced(self._norms()):
            return super().forward(
                batch,
                None if again else lora,
                cache=cache,
                past_mask_BT=past_mask_BT,
                embedded=embedded,
                lower=lower,
                stop=stop,
                keep=keep and not again,  # a layer that runs twice would write twice
                twice_differentiable=twice_differentiable,
            )

    def mean_nll(
        self,
        hidden_BTD: Tensor,
        batch: TokenBatch,
        *,
        tokens: ScoredTokens | None = None,
        out: Forward | None = None,
        twice_differentiable: bool = False,
    ) -> Tensor:
        if twice_differentiable:
            return super().mean_nll(hidden_BTD, batch, tokens=tokens)
        shared = out.shared if tokens is None and isinstance(out, FastForward) else None
        if shared is not None and out is not None and hidden_BTD is not out.hidden_BTD:
            shared = replace(shared, kept=None, record=None)  # at an exit the loss is another than the one kept
        tokens = tokens or batch.scored
        repeated = None if shared is None else of_scored(shared, tokens, batch)
        return tokens.means(block_nll(tokens.states(hidden_BTD), self.logits, tokens.targets_N, repeated))

    def token_nll(self, h_ND: Tensor, targets_N: Tensor) -> Tensor:
        return block_nll(h_ND, self.logits, targets_N)

    def norm(self, h: Tensor) -> Tensor:
        with replaced(self._norms()):
            return super().norm(h)

    def decoding(self, lora: LoraBatch | None, *, merge: bool = True) -> Callable[[], AbstractContextManager[None]]:
        return partial(replaced, [*self._norms(), *decoding(self.model, lora, merge=merge)])

    def make_room(self, cache: Cache, tokens: int | None) -> None:
        make_room(cache, tokens)

    def _can_pack(self, batch: TokenBatch) -> bool:
        return self.packs and can_pack(self.decoder.config, batch.ids_BT.shape[1])

    def _norms(self) -> list[NormPlace]:
        """Stand-ins of the norms that are as they were at load, with no hooks on them."""
        return [place for place in self.norms if _as_loaded(*place)]

    def _forward_packed(
        self,
        batch: TokenBatch,
        lora: LoraBatch | None,
        *,
        embedded: bool,
        lower: CachedLayers | None,
        stop: int | None,
        keep: bool,
    ) -> FastForward:
        layout = self.layout(batch)
        states: list[Tensor] = []
        cached: KeysValues | None = {} if keep else None
        below = None if lower is None else replace(lower, hidden_BTD=layout.real(lower.hidden_BTD)[None])
        again = self.recompute and torch.is_grad_enabled()
        fuses = self.fuses_layers and not self.recompute and writes_attention_out(layout.packing, self.dtype)
        fuses = fuses and can_fuse(self.decoder, lora)
        plan = self._plan(layout, batch, lora, lower, stop, cached) if fuses else None
        adapted: Adapted = partial(FastLoraLinear, packing=layout.packing)
        packed: list[Place] = [(self.decoder.config, "_attn_implementation", ATTENTION)]
        with (
            self._recomputed(lora, adapted, packed) if again else nullcontext(),
            replaced(self._norms()),
            attach(self.model, None if again or fuses else lora, adapted),
            nullcontext() if plan is None else fused_layers(self.decoder, self._prefix, lora, plan),
            overheard(self.embedding, states if embedded else None),
            some_layers(self.decoder, self.final_norm or "", lower=below, stop=stop),
            replaced(packed),
        ):
            output = self.decoder(
                input_ids=layout.real(batch.ids_BT)[None],
                position_ids=layout.packing.positions_1N,
                use_cache=False,
                packing=layout.packing,
                cached=cached,
            )
        return FastForward(
            layout.back(output.last_hidden_state[0]),
            layout.back(states[0][0]) if embedded else None,
            None if cached is None else self._cache_of(layout, cached, lower),
            None if plan is None else plan.shared,
        )

    @property
    def _prefix(self) -> str:
        return f"{self.model.base_model_prefix}.layers"

    def _recomputed(
        self,
        lora: LoraBatch | None,
        adapted: Adapted,
        places: Sequence[Place] = (),
    ) -> AbstractContextManager[None]:
        """The second run comes when the pass is over: it brings the stand-ins of the norms, and `places`, itself."""
        norms = self._norms()
        return recomputed(self.decoder, self._prefix, lora, adapted, lambda: replaced([*norms, *places]))

    def _cache_of(self, layout: Layout, cached: KeysValues, lower: CachedLayers | None) -> DynamicCache:
        """A cache of a batch's tokens, zero at padding, from what the layers of a packed pass have left."""
        cache = self.new_cache()
        for layer in range(0 if lower is None else lower.layers, 1 + max(cached)):
            k_BGTC, v_BGTC = (layout.back(x_NGC).transpose(1, 2) for x_NGC in cached[layer])
            cache.update(k_BGTC, v_BGTC, layer)
        if lower is not None:
            cache.layers[: lower.layers] = [copy.copy(layer) for layer in lower.cache.layers[: lower.layers]]
        return cache

    def _plan(
        self,
        layout: Layout,
        batch: TokenBatch,
        lora: LoraBatch | None,
        lower: CachedLayers | None,
        stop: int | None,
        cached: KeysValues | None,
    ) -> PassPlan:
        """Rows share their beginning while no adapter does anything."""
        adapters_are_zero = lora is None or not bool(lora.B_BN.any())
        shared, packing = None, layout.packing
        if adapters_are_zero and lower is None:
            ids_N = layout.real(batch.ids_BT)
            shared = within_batch(ids_N, packing)
            if self.prefix_cache is not None and lora is not None:
                key = (stop, tuple(p.name for p in lora.projections))
                last = HEAD_GRADIENT if stop is None else (stop - 1, "silu")
                shared = self.prefix_cache.meet(key, ids_N, packing, last, shared)
        return PassPlan(packing, 1.0 if lora is None else lora.scaling, shared or Shared(), adapters_are_zero, cached)
