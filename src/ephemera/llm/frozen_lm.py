"""The frozen language model: its projections in any architecture, its forward pass, its hidden states."""

from __future__ import annotations

import copy
import hashlib
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from ephemera.batch import TokenBatch
from ephemera.fast.llama_layer import Pass, can_write_out, written_out
from ephemera.fast.packing import KeysValues, Packing, can_pack, packed, writes_out
from ephemera.fast.recompute import checkpointed
from ephemera.fast.rms_norm import write_out_norms
from ephemera.fast.shared_prefix import PrefixCache, Shared
from ephemera.fast.vocab_loss import HEAD_GRADIENT, Head
from ephemera.llm.cached_layers import FINAL_NORMS, CachedLayers, some_layers
from ephemera.llm.model_files import called
from ephemera.llm.projections import count_layers, find_projections
from ephemera.llm.tokenize import without_row
from ephemera.llm.weights import check_logits
from ephemera.lora import LoraBatch, attach


@dataclass(frozen=True, eq=False)
class Forward:
    """What one forward pass over a batch leaves behind."""

    hidden_BTD: Tensor  # H(L): the last hidden state, after the final norm; or H(E), without it, where it stopped
    embedded_BTD: Tensor | None  # H(0): the embedding's output, where it was asked for
    cache: Cache | None
    shared: Shared | None = None  # how the rows' first tokens were run once, or not at all; None: each row has its own

    def representation_BH(self, batch: TokenBatch) -> Tensor:
        """h(x) of LDTTA Eq. 15: masked means of H(0) and H(L), joined: [B,2D] float32, detached.

        Of a pass that stopped at layer E: of H(0) and H(E), which is there anyway.
        """
        assert self.embedded_BTD is not None
        weights_B1T = (batch.mask_BT / batch.lengths_B[:, None])[:, None, :]
        halves = [h.detach().float() for h in (self.embedded_BTD, self.hidden_BTD)]
        return torch.cat([torch.bmm(weights_B1T.float(), h)[:, 0] for h in halves], dim=1)


class FrozenLM:
    """A frozen causal language model, its tokenizer and the projections that adapters sit on.

    `name` is what the user called the model, `path` the local folder it was read from.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        name: str,
        path: Path,
        target_modules: str | Sequence[str] = "qv",
        layers: str | Sequence[int] = "all",
        only: Sequence[str] | None = None,
        packs: bool = True,
        checkpoint: bool = False,
    ):
        """`checkpoint`: passes that a gradient is taken of keep each layer's input alone (fast/recompute.py).

        `packs`: whether passes without a cache may leave out padding, with attention of ephemera's own (fast/packing.py).
        """
        self.model = model.eval().requires_grad_(False)
        self.packs = packs
        self.checkpoint = checkpoint
        write_out_norms(self.model)
        self.tokenizer = tokenizer
        self.name = name
        self.path = path
        self.lock = threading.RLock()  # adapters are attached to the one model: callers take turns
        self.target_modules = target_modules
        self.adapted_layers = layers
        self.projections = find_projections(model, target_modules, layers, only)
        self.layers = count_layers(model)
        self.decoder: nn.Module = model.get_submodule(model.base_model_prefix)
        self.final_norm: str | None = FINAL_NORMS.get(model.config.model_type)
        head = model.get_output_embeddings()
        embedding = model.get_input_embeddings()
        if not isinstance(head, nn.Module) or not isinstance(embedding, nn.Module):
            raise ValueError(f"{name} has no vocabulary head: ephemera needs a causal language model.")
        self.head, self.embedding = head, embedding
        self.logits = Head(head, getattr(model.config.get_text_config(), "final_logit_softcapping", None))
        self.vocabulary_VD: Tensor = embedding.get_parameter("weight")
        self.hidden_size: int = self.vocabulary_VD.shape[1]
        self.max_length: int = getattr(model.config.get_text_config(), "max_position_embeddings", 1 << 30)
        self.beginnings: PrefixCache | None = None  # that many prompts are known to have, for who serves those
        self.writes_out = packs  # passes on a CPU through layers of a known kind: see fast/llama_layer.py
        self._check_head()
        if checkpoint and self.final_norm is None:
            raise ValueError(
                f"checkpoint: ephemera does not know the layers of a {model.config.model_type}; leave it off."
            )

    def with_adapters_on(
        self,
        target_modules: str | Sequence[str],
        layers: str | Sequence[int] = "all",
        only: Sequence[str] | None = None,
    ) -> FrozenLM:
        """The same model (not a copy of it) with adapters on other projections."""
        return FrozenLM(
            self.model,
            self.tokenizer,
            name=self.name,
            path=self.path,
            target_modules=target_modules,
            layers=layers,
            only=only,
            packs=self.packs,
            checkpoint=self.checkpoint,
        )

    @property
    def device(self) -> torch.device:
        return self.vocabulary_VD.device

    @property
    def dtype(self) -> torch.dtype:
        return self.vocabulary_VD.dtype

    @property
    def pad_id(self) -> int:
        for special in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id):
            if isinstance(special, int) and special < len(self.vocabulary_VD):  # one may be added without a row
                return special
        return 0

    def check_ids(self, ids: list[int]) -> list[int]:
        """The ids as they are; ValueError for one without a row in the embedding."""
        if max(ids, default=0) >= len(self.vocabulary_VD):
            raise ValueError(without_row(self.tokenizer, max(ids), self.name, len(self.vocabulary_VD)))
        return ids

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
        """One pass through the decoder, without the vocabulary head.

        Without a cache padded places are not computed, where the architecture is one that can be packed (fast/packing.py).

        With a `cache` of earlier tokens, `past_mask_BT` says which of those are real. With `lower` the layers that it
        holds are not run again, and an empty `cache` gets its keys and values. The pass ends after `stop` layers.
        `keep`: the pass leaves a cache of its tokens, detached; `Forward.cache` is None where it cannot.
        """
        assert lower is None or lower.ids_BT.shape == batch.ids_BT.shape, "kept from other prompts"
        kept: list[Tensor] = []
        inputs: dict[str, Any] = {"input_ids": batch.ids_BT, "use_cache": cache is not None}
        if past_mask_BT is not None:
            mask_BT = torch.cat([past_mask_BT, batch.mask_BT], 1)
            full = TokenBatch(mask_BT.long(), mask_BT)
            inputs["position_ids"] = full.position_ids_BT[:, past_mask_BT.shape[1] :]
            inputs["attention_mask"] = mask_BT.long()
        elif batch.padded:
            inputs["attention_mask"] = batch.mask_BT.long()
            inputs["position_ids"] = batch.position_ids_BT
        if cache is not None:
            inputs["past_key_values"] = cache
        elif self.packs and not twice_differentiable and can_pack(self.decoder.config, batch.ids_BT.shape[1]):
            return self._forward_packed(batch, lora, embedded=embedded, lower=lower, stop=stop, keep=keep)
        again = self.checkpoint and cache is None and torch.is_grad_enabled() and not twice_differentiable
        if keep and cache is None and not again:  # a layer that runs twice would write twice
            cache = self.new_cache()
            inputs |= {"past_key_values": cache, "use_cache": True}
        twice = twice_differentiable and torch.is_grad_enabled()  # fused attention has no second derivative
        with (
            attach(self.model, None if again else lora),  # before layers are left out: it finds modules by their paths
            sdpa_kernel(SDPBackend.MATH) if twice else nullcontext(),
            self._checkpointed(lora) if again else nullcontext(),
            _outputs_of(self.embedding, kept if embedded else None),
            some_layers(self.decoder, self.final_norm or "", lower=lower, stop=stop),
        ):
            output = self.decoder(**inputs)
        if lower is not None and isinstance(cache, DynamicCache):
            cache.layers[: lower.layers] = [copy.copy(layer) for layer in lower.cache.layers[: lower.layers]]
        if keep and cache is not None:
            _detach(cache)
        return Forward(output.last_hidden_state, kept[0] if embedded else None, output.past_key_values)

    def _forward_packed(
        self,
        batch: TokenBatch,
        lora: LoraBatch | None,
        *,
        embedded: bool,
        lower: CachedLayers | None,
        stop: int | None,
        keep: bool,
    ) -> Forward:
        packing = batch.packing
        kept: list[Tensor] = []
        keys_values: KeysValues | None = {} if keep else None
        below = lower
        if lower is not None:
            lower = replace(lower, hidden_BTD=batch.real(lower.hidden_BTD)[None])
        again = self.checkpoint and torch.is_grad_enabled()
        written = self.writes_out and not self.checkpoint and writes_out(packing, self.dtype)
        written = written and can_write_out(self.decoder, lora)
        about = self._about(batch, lora, lower, stop, keys_values) if written else None
        prefix = f"{self.model.base_model_prefix}.layers"
        with (
            attach(self.model, None if again or written else lora, packing),
            self._checkpointed(lora, packing) if again else nullcontext(),
            nullcontext() if about is None else written_out(self.decoder, prefix, lora, about),
            _outputs_of(self.embedding, kept if embedded else None),
            some_layers(self.decoder, self.final_norm or "", lower=lower, stop=stop),
            packed(self.decoder),
        ):
            output = self.decoder(
                input_ids=batch.real(batch.ids_BT)[None],
                position_ids=packing.positions_1N,
                use_cache=False,
                packing=packing,
                kept=keys_values,
            )
        embedded_BTD = batch.back(kept[0][0]) if embedded else None
        hidden_BTD = batch.back(output.last_hidden_state[0])
        cache = None if keys_values is None else self._cache_of(batch, keys_values, below)
        return Forward(hidden_BTD, embedded_BTD, cache, None if about is None else about.shared)

    def _cache_of(self, batch: TokenBatch, keys_values: KeysValues, lower: CachedLayers | None) -> DynamicCache:
        """A cache of a batch's tokens, zero at padding, from what the layers of a packed pass have left."""
        cache = self.new_cache()
        for layer in range(0 if lower is None else lower.layers, 1 + max(keys_values)):
            k_BGTC, v_BGTC = (batch.back(x_NGC).transpose(1, 2) for x_NGC in keys_values[layer])
            cache.update(k_BGTC, v_BGTC, layer)
        if lower is not None:
            cache.layers[: lower.layers] = [copy.copy(layer) for layer in lower.cache.layers[: lower.layers]]
        return cache

    def _about(
        self,
        batch: TokenBatch,
        lora: LoraBatch | None,
        lower: CachedLayers | None,
        stop: int | None,
        keys_values: KeysValues | None,
    ) -> Pass:
        """What the written-out layers of a pass have in common; rows share their beginning while no adapter does anything."""
        flat = lora is None or not any(bool(B_BOR.any()) for B_BOR in lora.B)
        shared = None
        if flat and lower is None:
            shared = batch.shared
            if self.beginnings is not None and lora is not None:
                key = (stop, tuple(p.name for p in lora.projections))
                last = HEAD_GRADIENT if stop is None else (stop - 1, "silu")
                shared = self.beginnings.meet(key, batch.real(batch.ids_BT), batch.packing, last, shared)
        return Pass(batch.packing, 1.0 if lora is None else lora.scaling, shared or Shared(), flat, keys_values)

    def _checkpointed(self, lora: LoraBatch | None, packing: Packing | None = None) -> AbstractContextManager[None]:
        prefix = f"{self.model.base_model_prefix}.layers"
        around = nullcontext if packing is None else lambda: packed(self.decoder)
        return checkpointed(self.decoder, prefix, lora, packing, around)

    def new_cache(self) -> DynamicCache:
        cache = DynamicCache(config=self.model.config)
        cache.activate_past_recording()  # so that sliding-window layers can give back the last token
        return cache

    @torch.no_grad()
    def lower(self, batch: TokenBatch) -> CachedLayers | None:
        """The layers below the lowest adapted one, run once; None where there are none, or the model cannot be cut."""
        layers = min(p.layer for p in self.projections)
        if layers == 0 or self.final_norm is None:
            return None
        cache = self.new_cache()
        return CachedLayers(batch.ids_BT, layers, self.forward(batch, cache=cache, stop=layers).hidden_BTD, cache)

    @torch.no_grad()
    def states(self, batch: TokenBatch, exit_layers: Sequence[int]) -> tuple[Tensor, dict[int, Tensor]]:
        """The last hidden state [B,T,D], after the final norm, and those after each of `exit_layers` layers."""
        kept: list[list[Tensor]] = [[] for _ in exit_layers]
        layers = self.decoder.get_submodule("layers")
        with ExitStack() as hooks:
            for layer, into in zip(exit_layers, kept, strict=True):
                hooks.enter_context(_outputs_of(layers.get_submodule(str(layer - 1)), into))
            hidden_BTD = self.forward(batch, twice_differentiable=True).hidden_BTD  # not packed: hooks see rows
        return hidden_BTD, {layer: outputs[0] for layer, outputs in zip(exit_layers, kept, strict=True)}

    def fingerprint(self) -> str:
        """Tells backbones apart whatever they are called: shapes, and some weights as bfloat16."""
        digest = hashlib.sha256()
        for key, parameter in sorted(self.model.named_parameters()):
            digest.update(f"{key}{tuple(parameter.shape)}".encode())
        for weight in (self.vocabulary_VD[:64, :16], *_norm_weights(self.model)):
            digest.update(weight.detach().to(torch.bfloat16).cpu().view(torch.int16).numpy().tobytes())
        return digest.hexdigest()[:16]

    def _check_head(self) -> None:
        """Some architectures scale logits in ways of their own; better an error than wrong losses."""
        ids_BT = torch.arange(1, 4, device=self.device)[None] % self.vocabulary_VD.shape[0]
        with torch.no_grad():
            want = self.model(input_ids=ids_BT).logits
            check_logits(f"{self.name} ({self.model.config.model_type})", want)
            batch = TokenBatch(ids_BT, torch.ones_like(ids_BT).bool())
            # The plain pass: a packed one rounds differently in bfloat16
            have = self.logits(self.forward(batch, twice_differentiable=True).hidden_BTD)
        if not torch.allclose(want.float(), have.float(), atol=1e-2, rtol=1e-2):
            raise ValueError(
                f"{self.name} ({self.model.config.model_type}) makes its logits in a way ephemera does not know: "
                "its own forward pass and head(final hidden state) differ. Please report the model's name."
            )


def _detach(cache: Cache) -> None:
    for layer in cache.layers:
        if isinstance(layer, DynamicLayer) and layer.keys is not None and layer.values is not None:
            layer.keys, layer.values = layer.keys.detach(), layer.values.detach()


@contextmanager
def _outputs_of(module: nn.Module, kept: list[Any] | None) -> Iterator[None]:
    if kept is None:
        yield
        return
    handle = module.register_forward_hook(lambda _module, _args, output: kept.append(output))
    try:
        yield
    finally:
        handle.remove()


def _norm_weights(model: nn.Module) -> Sequence[Tensor]:
    norms = [p for name, p in model.named_parameters() if p.ndim == 1 and "norm" in name.lower()]
    return norms[:1] + norms[-1:]


def describe(backbone: FrozenLM) -> dict[str, Any]:
    """What a trained network remembers of the model it was trained for."""
    return {
        "name": called(backbone.name),
        "model_type": backbone.model.config.model_type,
        "hidden_size": backbone.hidden_size,
        "target_modules": backbone.target_modules,
        "layers": backbone.adapted_layers,
        "projections": [p.name for p in backbone.projections],
        "fingerprint": backbone.fingerprint(),
    }
