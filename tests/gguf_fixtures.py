"""A tiny Llama as a GGUF file, as llama.cpp's converter writes one."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path

import gguf
import numpy as np
import transformers as hf
from torch import Tensor

from tiny_models import trained_tokenizer

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def write_gguf(
    path: Path,
    model: hf.PreTrainedModel,
    *,
    without: Collection[str] = (),
    blocks: int | None = None,
    numbers: Mapping[str, int] | None = None,
    words: Mapping[str, str] | None = None,
    more: Mapping[str, np.ndarray] | None = None,
) -> Path:
    """`without`: tensors left out; `blocks`: how many layers its head claims; `numbers`, `words`: further settings;
    `more`: further tensors."""
    config, out = model.config, gguf.GGUFWriter(str(path), "llama")
    out.add_name("tiny")
    out.add_block_count(config.num_hidden_layers if blocks is None else blocks)
    out.add_context_length(config.max_position_embeddings)
    out.add_embedding_length(config.hidden_size)
    out.add_feed_forward_length(config.intermediate_size)
    out.add_head_count(config.num_attention_heads)
    out.add_head_count_kv(config.num_key_value_heads)
    out.add_layer_norm_rms_eps(config.rms_norm_eps)
    out.add_rope_freq_base(10_000.0)
    out.add_vocab_size(config.vocab_size)
    for key, number in (numbers or {}).items():
        out.add_uint16(key, number)
    for key, word in (words or {}).items():
        out.add_string(key, word)
    tokenizer = json.loads(trained_tokenizer().to_str())["model"]
    tokens = sorted(tokenizer["vocab"], key=tokenizer["vocab"].__getitem__)
    out.add_tokenizer_model("gpt2")
    out.add_tokenizer_pre("smollm")
    out.add_token_list(tokens)
    out.add_token_types([gguf.TokenType.CONTROL if i < 3 else gguf.TokenType.NORMAL for i in range(len(tokens))])
    out.add_token_merges([" ".join(pair) for pair in tokenizer["merges"]])
    out.add_bos_token_id(1)
    out.add_eos_token_id(2)
    out.add_pad_token_id(0)
    for key, tensor in model.state_dict().items():
        name = _name(key)
        if name not in without:
            out.add_tensor(name, _rotary(key, tensor, config).float().contiguous().numpy())
    for name, array in (more or {}).items():
        out.add_tensor(name, array)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return path


def _name(key: str) -> str:
    module = key.removesuffix(".weight")
    if module in NAMES:
        return f"{NAMES[module]}.weight"
    _, _, layer, kind = module.split(".", 3)
    return f"blk.{layer}.{NAMES[kind]}.weight"


def _rotary(key: str, tensor: Tensor, config: hf.PreTrainedConfig) -> Tensor:
    """llama.cpp keeps the two halves of a head's rotary pairs side by side."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(key.split(".")[-2])
    if heads is None:
        return tensor
    return tensor.view(heads, 2, -1, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
