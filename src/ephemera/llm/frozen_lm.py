"""The frozen language model: its projections in any architecture, its forward pass, its loss, its hidden states.

This is the reference: transformers' own layers, plain cross-entropy. fast/fast_lm.py does the same at a lower cost.
"""

from __future__ import annotations

import copy
import hashlib
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from ephemera.batch import ScoredTokens, TokenBatch
from ephemera.llm.architectures import architecture_of
from ephemera.llm.cached_layers import CACHE, CachedLayers, cache_of, some_layers
from ephemera.llm.head import Head, token_nll
from ephemera.llm.model_files import called
from ephemera.llm.projections import count_layers, find_projections
from ephemera.llm.quantization import check_gradients, exact_places, quantised_modules, quantization_of
from ephemera.llm.replaced import overheard, settle
from ephemera.llm.share import Parallel, Share
from ephemera.llm.tokenize import without_row
from ephemera.llm.weights import check_logits, first_rows
from ephemera.lora import Adapted, LoraBatch, LoraLinear, attach


@dataclass(frozen=True, eq=False)
class Forward:
    """What one forward pass over a batch leaves behind."""

    hidden_BTD: Tensor  # H(L): the last hidden state, after the final norm; or H(E), without it, if it stopped there
    embedded_BTD: Tensor | None  # H(0): the embedding's output, if it was asked for
    cache: Cache | None

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

    adapted: Adapted = LoraLinear  # the module that stands in for an adapted one
    parallel: Parallel = "none"  # how the model is laid over devices and processes (llm/parallel)

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
    ):
        self.model = model.eval().requires_grad_(False)
        settle(exact_places(model))
        self.quantization = quantization_of(model)
        self.tokenizer = tokenizer
        self.name = name
        self.path = path
        self.lock = threading.RLock()  # adapters are attached to the one model: callers take turns
        self.target_modules = target_modules
        self.adapted_layers = layers
        self.projections = find_projections(model, target_modules, layers, only)
        self.layers = count_layers(model)
        self.decoder: nn.Module = model.get_submodule(model.base_model_prefix)
        self.architecture = architecture_of(model.config)
        head = model.get_output_embeddings()
        embedding = model.get_input_embeddings()
        if not isinstance(head, nn.Module) or not isinstance(embedding, nn.Module):
            raise ValueError(f"{name} has no vocabulary head: ephemera needs a causal language model.")
        self.head, self.embedding = head, embedding
        self.logits = Head(head, getattr(model.config.get_text_config(), "final_logit_softcapping", None))
        self.vocabulary_VD: Tensor = embedding.get_parameter("weight")
        self.hidden_size: int = self.vocabulary_VD.shape[1]
        self.max_length: int = getattr(model.config.get_text_config(), "max_position_embeddings", 1 << 30)
        check_gradients(model, name)
        self._check_head()

    def with_adapters_on(
        self,
        target_modules: str | Sequence[str],
        layers: str | Sequence[int] = "all",
        only: Sequence[str] | None = None,
    ) -> Self:
        """The same model (not a copy of it) with adapters on other projections."""
        other = copy.copy(self)
        other.target_modules, other.adapted_layers = target_modules, layers
        other.projections = find_projections(self.model, target_modules, layers, only)
        return other

    @property
    def final_norm(self) -> str | None:
        """The name of the decoder's last norm; None if the architecture is not known: it cannot be stopped early."""
        return None if self.architecture is None else self.architecture.final_norm

    @property
    def device(self) -> torch.device:
        return self.vocabulary_VD.device

    @property
    def dtype(self) -> torch.dtype:
        return self.vocabulary_VD.dtype

    @property
    def route(self) -> str:
        """Which code computes its passes, in words."""
        return "the reference path"

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

    def with_prefixes(self, prefixes: Sequence[Sequence[int]]) -> Self:
        """The model for prompts that begin with one of these token sequences, as a chat template's own words."""
        return self

    def ready(self, batch: TokenBatch) -> None:
        """Compute what passes need to know of the tokens' positions: from then on no pass waits for the device."""
        _ = batch.padded, batch.scored, batch.lengths_B

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
        """One pass through the decoder with these adapters on it, without the vocabulary head.

        With a `cache` of earlier tokens, `past_mask_BT` says which of those are real. With `lower` the layers that it
        holds are not run again, and an empty `cache` gets its keys and values. The pass ends after `stop` layers.
        `keep`: the pass leaves a cache of its tokens, detached; `Forward.cache` is None if it cannot.
        """
        assert lower is None or lower.ids_BT.shape == batch.ids_BT.shape, "kept from other prompts"
        if keep and cache is None:
            cache = self.new_cache()
        states: list[Tensor] = []
        twice = twice_differentiable and torch.is_grad_enabled()  # fused attention has no second derivative
        with (
            attach(self.model, lora, self.adapted),  # before layers are left out: it finds modules by their paths
            sdpa_kernel(SDPBackend.MATH) if twice else nullcontext(),
            overheard(self.embedding, states if embedded else None),
            some_layers(self.decoder, self.final_norm or "", lower=lower, stop=stop),
        ):
            output = self.decoder(**_inputs(batch, cache, past_mask_BT))
        if lower is not None and isinstance(cache, DynamicCache):
            cache.layers[: lower.layers] = [copy.copy(layer) for layer in lower.cache.layers[: lower.layers]]
        if keep and cache is not None:
            _detach(cache)
        return Forward(output.last_hidden_state, states[0] if embedded else None, cache_of(output))

    def token_nll(self, h_ND: Tensor, targets_N: Tensor) -> Tensor:
        """NLL [N] in nats of each target given its hidden state, in float32 (float64 for a float64 model)."""
        return token_nll(h_ND, self.logits, targets_N)

    def mean_nll(
        self,
        hidden_BTD: Tensor,
        batch: TokenBatch,
        *,
        tokens: ScoredTokens | None = None,
        out: Forward | None = None,
        twice_differentiable: bool = False,
    ) -> Tensor:
        """Mean NLL [B] of each row's scored tokens (default: all) given the tokens before them; 0 if there is none.

        Rows do not touch each other: a batch's loss is the sum of these, so a prompt's step does not depend on its
        neighbours (LDTTA Eq. 7, 9). `out`: the pass that the states come from.
        """
        tokens = tokens or batch.scored
        return tokens.means(token_nll(tokens.states(hidden_BTD), self.logits, tokens.targets_N))

    def norm(self, h: Tensor) -> Tensor:
        """The decoder's final norm."""
        assert self.final_norm is not None
        return self.decoder.get_submodule(self.final_norm)(h)

    def decoding(self, lora: LoraBatch | None, *, merge: bool = True) -> Callable[[], AbstractContextManager[None]]:
        """How the model decodes with these adapters, one token a row: a context, to be entered as often as needed.

        `merge`: a single row's adapter may go into the weights."""
        return partial(attach, self.model, lora, self.adapted)

    def make_room(self, cache: Cache, tokens: int | None) -> None:
        """A filled cache is about to take so many tokens more (None: not known)."""

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
                hooks.enter_context(overheard(layers.get_submodule(str(layer - 1)), into))
            hidden_BTD = FrozenLM.forward(self, batch).hidden_BTD  # rows as they stand
        return hidden_BTD, {layer: outputs[0] for layer, outputs in zip(exit_layers, kept, strict=True)}

    def fingerprint(self) -> str:
        """Tells backbones apart whatever they are called: shapes, and some weights as bfloat16.

        A quantised model has its original's: quantised weights count by the shape that they stand for, and neither the
        embedding nor the norms are quantised.
        """
        digest = hashlib.sha256()
        original = {
            f"{path}.weight": (m.out_features, m.in_features) for path, m in quantised_modules(self.model).items()
        }
        for key, parameter in sorted(self.named_weights().items()):
            digest.update(f"{key}{original.get(key, tuple(parameter.shape))}".encode())
        vocabulary = next(
            key for key, p in self.model.named_parameters() if p is self.embedding.get_parameter("weight")
        )
        for weight in (self.weight(vocabulary, 64)[:, :16], *map(self.weight, _norm_weights(self.model))):
            digest.update(weight.to(torch.bfloat16).cpu().view(torch.int16).numpy().tobytes())
        return digest.hexdigest()[:16]

    def named_weights(self) -> dict[str, Tensor]:
        """Every weight by its first name; it may be a part only, or lie elsewhere: `weight` gives it whole."""
        return dict(self.model.named_parameters())

    def weight(self, name: str, rows: int | None = None) -> Tensor:
        """A weight, or its first rows, whole, wherever it lies. With a sharded model every process calls it."""
        return first_rows(self.model.get_parameter(name).detach(), rows)

    @property
    def plain_head(self) -> bool:
        """Whether the head's weight can be read as a plain tensor; else the head is only to be called."""
        return self.logits.plain

    def anywhere(self, flag: bool) -> bool:
        """Whether `flag` is true here, or on any process that the model is spread over: they choose together."""
        return flag

    def check_same(self, what: str, value: object) -> None:
        """ValueError unless every process that the model is spread over was given the same; `what` names it."""

    def share(self, rows: Sequence[int]) -> Share:
        """Which of a batch's rows this process takes: all of them, unless each takes its own."""
        return Share.whole(rows)

    def generation(self, *, sampled: bool) -> dict[str, Any]:
        """What transformers' `generate` has to be told besides; `sampled`: it will draw tokens at random."""
        return {}

    def _check_head(self) -> None:
        """Some architectures scale logits in ways of their own; better an error than wrong losses."""
        ids_BT = torch.arange(1, 4, device=self.device)[None] % self.vocabulary_VD.shape[0]
        with torch.no_grad():
            want = self.model(input_ids=ids_BT).logits
            check_logits(f"{self.name} ({self.model.config.model_type})", want)
            batch = TokenBatch(ids_BT, torch.ones_like(ids_BT).bool())
            have = self.logits(FrozenLM.forward(self, batch).hidden_BTD)
        if not torch.allclose(want.float(), have.float(), atol=1e-2, rtol=1e-2):
            raise ValueError(
                f"{self.name} ({self.model.config.model_type}) makes its logits in a way ephemera does not know: "
                "its own forward pass and head(final hidden state) differ. Please report the model's name."
            )


def _inputs(batch: TokenBatch, cache: Cache | None, past_mask_BT: Tensor | None) -> dict[str, Any]:
    """What transformers' decoder is called with; positions count real tokens only."""
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
        inputs[CACHE] = cache
    return inputs


def _detach(cache: Cache) -> None:
    for layer in cache.layers:
        if isinstance(layer, DynamicLayer) and layer.keys is not None and layer.values is not None:
            layer.keys, layer.values = layer.keys.detach(), layer.values.detach()


def _norm_weights(model: nn.Module) -> Sequence[str]:
    norms = [name for name, p in model.named_parameters() if p.ndim == 1 and "norm" in name.lower()]
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
        **({} if backbone.quantization == "none" else {"quantization": backbone.quantization}),
    }
