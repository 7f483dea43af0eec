"""Tiny random models of each architecture, and random adapters, networks and prompts for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn

from ephemera.batch import TokenBatch, pad
from ephemera.fast.fast_lm import FastLM
from ephemera.gate import SIGNALS, Gate
from ephemera.inits import LoraGenerator
from ephemera.llm.frozen_lm import FrozenLM, describe
from ephemera.llm.load import uses_fast
from ephemera.lora import LoraBatch
from ephemera.made_for import Reach
from ephemera.prompt_loss import PROMPT
from ephemera.rates import ScaleNet

SENTENCES = (
    "The river runs past the old mill and down to the sea.",
    "Question: who wrote the first book about the river?",
    "Answer: a miller's daughter wrote it in the winter of 1820.",
    "Give a short answer of the following question.",
)
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
VOCABULARY = 320

# Two layers, grouped query attention where there is any, sizes that differ so that a transposed one shows.
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 96,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GROUPED = {**COMMON, "num_key_value_heads": 2}
CONFIGS: dict[str, Callable[[], hf.PreTrainedConfig]] = {
    "llama": lambda: hf.LlamaConfig(**GROUPED),
    "mistral": lambda: hf.MistralConfig(**GROUPED, sliding_window=6),
    "qwen2": lambda: hf.Qwen2Config(**GROUPED),
    "qwen3": lambda: hf.Qwen3Config(**GROUPED, head_dim=12, tie_word_embeddings=True),
    "gemma3": lambda: hf.Gemma3TextConfig(
        **GROUPED, head_dim=12, sliding_window=6, layer_types=["sliding_attention", "full_attention"]
    ),
    "olmo2": lambda: hf.Olmo2Config(**GROUPED),
    "phi": lambda: hf.PhiConfig(**GROUPED),
    "phi3": lambda: hf.Phi3Config(**GROUPED, sliding_window=None),
    "gpt_neox": lambda: hf.GPTNeoXConfig(**COMMON),
}
ARCHITECTURES = tuple(CONFIGS)


@cache
def trained_tokenizer() -> Tokenizer:
    """Byte-level BPE that merges across a space, and puts one BOS before every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES * 4, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def tiny_tokenizer() -> hf.PreTrainedTokenizerFast:
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(trained_tokenizer().to_str()),
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        chat_template=CHAT_TEMPLATE,
    )


class ExactNorm(nn.Module):
    """RMSNorm in the dtype of its input: transformers' own goes through float32, also in a float64 model."""

    def __init__(self, norm: nn.Module):
        super().__init__()
        # Gemma's weight counts from one
        self.weight = norm.weight.detach() + 1 if "Gemma" in type(norm).__name__ else norm.weight.detach()
        self.variance_epsilon = norm.eps if "Gemma" in type(norm).__name__ else norm.variance_epsilon

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * (x.square().mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()


def make_exact(model: nn.Module) -> None:
    for path, module in list(model.named_modules()):
        if type(module).__name__.endswith("RMSNorm"):
            parent, _, child = path.rpartition(".")
            setattr(model.get_submodule(parent), child, ExactNorm(module))


def tiny_model(
    architecture: str,
    *,
    dtype: torch.dtype = torch.float64,
    attention: str = "sdpa",
    seed: int = 0,
    depth: int = 2,
) -> hf.PreTrainedModel:
    """Random weights large enough to matter; no bias is zero and no norm is one, as that would hide bugs.

    Exact in float64 with "sdpa" alone: transformers' eager attention takes its softmax in float32.
    """
    torch.manual_seed(seed)
    config = CONFIGS[architecture]()
    config.num_hidden_layers = depth
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[i % 2] for i in range(depth)]
    model = hf.AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(0, 1.5 * weight.shape[1] ** -0.5)
            else:
                weight.add_(0.2 * torch.randn_like(weight))
    model = model.to(dtype).eval()
    if dtype == torch.float64:
        make_exact(model)
    return model


def tiny_backbone(
    architecture: str = "llama",
    *,
    target_modules: str | Sequence[str] = "qv",
    dtype: torch.dtype = torch.float64,
    attention: str = "sdpa",
    seed: int = 0,
    depth: int = 2,
    layers: str | Sequence[int] = "all",
    **settings: Any,
) -> FrozenLM:
    model = tiny_model(architecture, dtype=dtype, attention=attention, seed=seed, depth=depth)
    path = Path(f"tiny-{architecture}")
    make = FastLM if uses_fast() else FrozenLM
    where: dict[str, Any] = {"target_modules": target_modules, "layers": layers, **settings}
    return make(model, tiny_tokenizer(), name=path.name, path=path, **where)


def save_tiny(folder: Path, architecture: str = "llama", *, seed: int = 0) -> Path:
    """A folder that from_pretrained opens: weights, config, tokenizer."""
    tiny_model(architecture, dtype=torch.float32, seed=seed).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def random_lora(backbone: FrozenLM, rows: int, *, r: int = 3, lora_alpha: float = 5.0, seed: int = 1) -> LoraBatch:
    """Neither A nor B is zero."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return 0.3 * torch.randn(*shape, generator=generator, dtype=torch.float64).to(backbone.dtype)

    return LoraBatch.of(
        backbone.projections,
        A=tuple(draw(rows, r, p.in_features) for p in backbone.projections),
        B=tuple(draw(rows, p.out_features, r) for p in backbone.projections),
        r=r,
        lora_alpha=lora_alpha,
    )


def random_scalenet(backbone: FrozenLM, **settings) -> ScaleNet:
    """A float64 network whose rates differ by prompt, step and projection."""
    torch.manual_seed(3)
    network = ScaleNet(
        hidden_size=backbone.hidden_size,
        projections=len(backbone.projections),
        base_rates=(0.3, 0.2, 0.1, 0.1, 0.1),
        mlp_size=16,
        **settings,
    )
    with torch.no_grad():
        for weight in network.parameters():
            weight.normal_(0, 0.3)
    return network.double()


class SomeRowsWild:
    """0.1, but a wild rate for the rows named."""

    max_steps = None
    uses_representation = "no"
    reach = "all"
    gate = None
    trains = "both"
    made_for = None
    objective = PROMPT

    def __init__(self, wild: dict[int, float]):
        self.wild = wild

    def rates_BM(self, h_BH: Tensor | None, k: int, K: int, *, like: Tensor, projections: int) -> Tensor:
        rates = like.new_full((like.shape[0], projections), 0.1)
        for row, rate in self.wild.items():
            rates[row] = rate
        return rates

    def check(self, backbone: FrozenLM) -> None: ...


def length_gate(
    backbone: FrozenLM,
    threshold: float,
    *,
    tau: float = 1e9,
    by_length: float = 0.0,
    tokens: float = 20.0,
    state_size: int | None = None,
) -> Gate:
    """Risk 1/2 for every prompt at every share; with `by_length` it grows with the prompt, and is 1/2 at so many tokens.
    `state_size`: of h; default: ScaleNet's."""
    weight_F = torch.zeros(len(SIGNALS)).index_fill(0, torch.tensor(SIGNALS.index("prompt tokens")), by_length)
    mean_F = torch.zeros_like(weight_F)
    mean_F[SIGNALS.index("prompt tokens")] = torch.tensor(tokens).log()
    zero_H = torch.zeros(state_size or 2 * backbone.hidden_size)
    state = {"weight_F": weight_F, "mean_F": mean_F, "std_F": torch.ones_like(weight_F)}
    state |= {"weight_H": zero_H, "mean_H": zero_H.clone(), "std_H": torch.ones_like(zero_H)}
    return Gate(tau, threshold, 1.0, {**state, "bias": torch.zeros(()), "slope": torch.zeros(())}, {})


def generator_of(folder: Path, backbone: FrozenLM, reach: Reach = "answer") -> Path:
    """The folder of an untrained generator that changes answers."""
    torch.manual_seed(3)
    made = LoraGenerator(
        projections=backbone.projections,
        state_size=backbone.hidden_size,
        hidden_size=8,
        trained_for=describe(backbone),
        reach=reach,
    )
    for weight in made.parameters():
        weight.data.add_(torch.randn_like(weight) * 0.1)
    made.save_pretrained(folder)
    return folder


def random_ids(lengths: Sequence[int], *, seed: int = 2) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]


def left(sequences: Sequence[Sequence[int]]) -> TokenBatch:
    return pad(sequences, side="left")
