"""The frozen language model: loading, its projections in any architecture, its hidden states."""

from __future__ import annotations

import copy
import hashlib
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache, DynamicCache

from ephemera.beginnings import Beginnings, Shared
from ephemera.checkpoint import checkpointed
from ephemera.depth import FINAL_NORMS, Lower, some_layers
from ephemera.errors import nearest, unknown
from ephemera.head import HEAD_GRADIENT, Head
from ephemera.llama import Pass, can_write_out, written_out
from ephemera.lora import LoraBatch, attach
from ephemera.norms import write_out_norms
from ephemera.objective import TokenBatch
from ephemera.packed import Packing, can_pack, packed, writes_out
from ephemera.precision import DTYPES, multiplies_bfloat16
from ephemera.projections import count_layers, find_projections
from ephemera.store import DEFAULT_MODEL, fetch_default_model

SLOW_BFLOAT16 = "this CPU has no instructions for bfloat16 products: they will take tens of times as long as float32's."


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


class Backbone:
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
        """`checkpoint`: passes that a gradient is taken of keep each layer's input alone (checkpoint.py).

        `packs`: whether passes without a cache may leave out padding, with attention of ephemera's own (packed.py).
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
        self.beginnings: Beginnings | None = None  # that many prompts are known to have, for who serves those
        self.writes_out = packs  # passes on a CPU through layers of a known kind: see llama.py
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
    ) -> Backbone:
        """The same model (not a copy of it) with adapters on other projections."""
        return Backbone(
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
            if isinstance(special, int):
                return special
        return 0

    def forward(
        self,
        batch: TokenBatch,
        lora: LoraBatch | None = None,
        *,
        cache: Cache | None = None,
        past_mask_BT: Tensor | None = None,
        embedded: bool = False,
        lower: Lower | None = None,
        stop: int | None = None,
        twice_differentiable: bool = False,
    ) -> Forward:
        """One pass through the decoder, without the vocabulary head.

        Without a cache padded places are not computed, where the architecture is one that can be packed (packed.py).

        With a `cache` of earlier tokens, `past_mask_BT` says which of those are real. With `lower` the layers that it
        holds are not run again, and an empty `cache` gets its keys and values. The pass ends after `stop` layers.
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
            return self._forward_packed(batch, lora, embedded=embedded, lower=lower, stop=stop)
        again = self.checkpoint and cache is None and torch.is_grad_enabled() and not twice_differentiable
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
        return Forward(output.last_hidden_state, kept[0] if embedded else None, output.past_key_values)

    def _forward_packed(
        self, batch: TokenBatch, lora: LoraBatch | None, *, embedded: bool, lower: Lower | None, stop: int | None
    ) -> Forward:
        packing = batch.packing
        kept: list[Tensor] = []
        if lower is not None:
            lower = replace(lower, hidden_BTD=batch.real(lower.hidden_BTD)[None])
        again = self.checkpoint and torch.is_grad_enabled()
        written = self.writes_out and not self.checkpoint and writes_out(packing, self.dtype)
        written = written and can_write_out(self.decoder, lora)
        about = self._about(batch, lora, lower, stop) if written else None
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
            )
        embedded_BTD = batch.back(kept[0][0]) if embedded else None
        hidden_BTD = batch.back(output.last_hidden_state[0])
        return Forward(hidden_BTD, embedded_BTD, None, None if about is None else about.shared)

    def _about(self, batch: TokenBatch, lora: LoraBatch | None, lower: Lower | None, stop: int | None) -> Pass:
        """What the written-out layers of a pass have in common; rows share their beginning while no adapter does anything."""
        flat = lora is None or not any(bool(B_BOR.any()) for B_BOR in lora.B)
        shared = None
        if flat and lower is None:
            shared = batch.shared
            if self.beginnings is not None and lora is not None:
                key = (stop, tuple(p.name for p in lora.projections))
                last = HEAD_GRADIENT if stop is None else (stop - 1, "silu")
                shared = self.beginnings.meet(key, batch.real(batch.ids_BT), batch.packing, last, shared)
        return Pass(batch.packing, 1.0 if lora is None else lora.scaling, shared or Shared(), flat)

    def _checkpointed(self, lora: LoraBatch | None, packing: Packing | None = None) -> AbstractContextManager[None]:
        prefix = f"{self.model.base_model_prefix}.layers"
        around = nullcontext if packing is None else lambda: packed(self.decoder)
        return checkpointed(self.decoder, prefix, lora, packing, around)

    def new_cache(self) -> DynamicCache:
        cache = DynamicCache(config=self.model.config)
        cache.activate_past_recording()  # so that sliding-window layers can give back the last token
        return cache

    @torch.no_grad()
    def lower(self, batch: TokenBatch) -> Lower | None:
        """The layers below the lowest adapted one, run once; None where there are none, or the model cannot be cut."""
        layers = min(p.layer for p in self.projections)
        if layers == 0 or self.final_norm is None:
            return None
        cache = self.new_cache()
        return Lower(batch.ids_BT, layers, self.forward(batch, cache=cache, stop=layers).hidden_BTD, cache)

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
            batch = TokenBatch(ids_BT, torch.ones_like(ids_BT).bool())
            # The plain pass: a packed one rounds differently in bfloat16
            have = self.logits(self.forward(batch, twice_differentiable=True).hidden_BTD)
        if not torch.allclose(want.float(), have.float(), atol=1e-2, rtol=1e-2):
            raise ValueError(
                f"{self.name} ({self.model.config.model_type}) makes its logits in a way ephemera does not know: "
                "its own forward pass and head(final hidden state) differ. Please report the model's name."
            )


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


def find_device(given: torch.device | str | None) -> torch.device:
    """The device asked for, else CUDA where there is one; ValueError where torch has no such device here."""
    try:
        device = torch.device(given or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=device).item()  # meta has no numbers
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"device {str(given)!r} cannot be used here: {str(error).splitlines()[0]}. Give cpu, or cuda on a machine that has it."
        ) from error
    return device


def load_backbone(
    name: str,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    target_modules: str | Sequence[str] = "qv",
    layers: str | Sequence[int] = "all",
    only: Sequence[str] | None = None,
    checkpoint: bool = False,
    **kwargs: Any,
) -> Backbone:
    """A hub id, a local folder, a GGUF file, or `smollm2-135m-instruct` from the package index.

    `dtype` defaults to float32 on a CPU and bfloat16 on an accelerator; `device` to CUDA where there
    is one. Adapters sit on `target_modules` of `layers` (of these on `only`, by name). Further arguments go to
    transformers (`quantization_config`, `attn_implementation`, ...).
    """
    device = find_device(device)
    if isinstance(dtype, str) and dtype not in DTYPES:
        raise unknown("dtype", dtype, DTYPES)
    dtype = DTYPES[dtype] if isinstance(dtype, str) else dtype
    dtype = dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)
    if dtype == torch.bfloat16 and device.type == "cpu" and not multiplies_bfloat16():
        warnings.warn(SLOW_BFLOAT16, stacklevel=2)
    path, kwargs = _resolve(name), dict(kwargs)
    packs = kwargs.get("attn_implementation") is None  # who asks for an attention gets it in every pass
    if packs:
        kwargs.pop("attn_implementation", None)
        if device.type == "cpu" and dtype == torch.bfloat16:
            kwargs["attn_implementation"] = "eager"  # the fused kernel's bfloat16 backward is slow there
    source = str(path) if path.exists() else name
    if path.suffix == ".gguf":
        source, kwargs["gguf_file"] = str(path.parent), path.name
    tokenizer_kwargs = {key: kwargs[key] for key in ("gguf_file", "revision") if key in kwargs}
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **tokenizer_kwargs)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, **kwargs)
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(
            f"cannot load model {name!r}: {str(error).splitlines()[0]} Give a hub id, a folder with config.json and "
            f"safetensors, a .gguf file, or {DEFAULT_MODEL!r} (fetched from the package index). "
            f"{nearest(name, [DEFAULT_MODEL])}".rstrip()
        ) from error
    if "quantization_config" not in kwargs or "gguf_file" in kwargs:
        model = model.to(device)  # pyright: ignore[reportArgumentType]
    return Backbone(
        model,
        tokenizer,
        name=name,
        path=path,
        target_modules=target_modules,
        layers=layers,
        only=only,
        packs=packs,
        checkpoint=checkpoint,
    )


def _resolve(name: str) -> Path:
    if name == DEFAULT_MODEL:
        return fetch_default_model()
    path = Path(name).expanduser()
    looks_local = path.suffix == ".gguf" or name.startswith((".", "/", "~"))
    if looks_local and not path.exists():
        raise ValueError(f"cannot load model {name!r}: there is no such file or folder.")
    return path


def describe(backbone: Backbone) -> dict[str, Any]:
    """What a trained network remembers of the model it was trained for."""
    return {
        "name": backbone.name,
        "model_type": backbone.model.config.model_type,
        "hidden_size": backbone.hidden_size,
        "target_modules": backbone.target_modules,
        "layers": backbone.adapted_layers,
        "projections": [p.name for p in backbone.projections],
        "fingerprint": backbone.fingerprint(),
    }
