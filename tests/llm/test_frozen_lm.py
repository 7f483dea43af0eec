import copy
import shutil
import warnings

import pytest
import torch
from tokenizers import processors
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel

from ephemera.batch import TokenBatch, pad
from ephemera.llm import load as load_module
from ephemera.llm.cached_layers import CACHE
from ephemera.llm.frozen_lm import describe
from ephemera.llm.load import load_backbone
from ephemera.llm.projections import find_projections
from ephemera.llm.tokenize import encode_answer, encode_prompt
from reference import close, slow_nll, slow_representation
from tiny_models import ARCHITECTURES, VOCABULARY, random_ids, random_lora, tiny_backbone, tiny_model, tiny_tokenizer

# (query, key, value) output features; o has 32 in every one of them
WIDTHS = {
    "llama": (32, 16, 16),
    "mistral": (32, 16, 16),
    "qwen2": (32, 16, 16),
    "qwen3": (48, 24, 24),  # head_dim * heads is more than the hidden size
    "gemma3": (48, 24, 24),
    "olmo2": (32, 16, 16),
    "phi": (32, 16, 16),
    "phi3": (32, 16, 16),
    "gpt_neox": (32, 32, 32),
}
MODULES = {
    **dict.fromkeys(ARCHITECTURES, "model.layers.{}.self_attn.{}_proj"),
    "phi3": "model.layers.{}.self_attn.qkv_proj[{}]",
    "gpt_neox": "gpt_neox.layers.{}.attention.query_key_value[{}]",
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_projections_of_each_architecture(architecture):
    model = tiny_model(architecture)
    qv = find_projections(model)
    assert [p.name for p in qv] == [MODULES[architecture].format(layer, kind) for layer in (0, 1) for kind in "qv"]
    q, k, v = WIDTHS[architecture]
    assert [(p.kind, p.layer, p.in_features, p.out_features) for p in qv] == [
        (kind, layer, 32, width) for layer in (0, 1) for kind, width in (("q", q), ("v", v))
    ]
    attention = find_projections(model, "attention")
    assert [(p.kind, p.in_features, p.out_features) for p in attention] == 2 * [
        *(("q", 32, q), ("k", 32, k), ("v", 32, v)),
        ("o", q, 32),
    ]
    for projection in attention:
        module = model.get_submodule(projection.module)
        assert module.weight.shape == (projection.module_out_features, projection.in_features)


def test_named_modules_are_taken_as_they_are():
    neox = find_projections(tiny_model("gpt_neox"), ["query_key_value"])
    assert [(p.name, p.out_features, p.rows) for p in neox] == [
        (f"gpt_neox.layers.{layer}.attention.query_key_value", 96, None) for layer in (0, 1)
    ]
    llama = find_projections(tiny_model("llama"), ["up_proj", "q_proj"])
    assert [p.name.rpartition(".")[2] for p in llama] == ["up_proj", "q_proj"] * 2
    assert [p.out_features for p in find_projections(tiny_model("llama"), "down_proj")] == [32, 32]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_all_linear_modules_of_the_layers(architecture):
    model = tiny_model(architecture)
    want = {name for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and ".layers." in name}
    have = [p.module for p in find_projections(model, "all-linear")]
    assert set(have) == want
    assert len(have) == len(want)


def test_no_module_found_names_what_there_is():
    with pytest.raises(ValueError, match=r"target_modules='qkv_projj' in LlamaForCausalLM.*down_proj.*q_proj"):
        find_projections(tiny_model("llama"), "qkv_projj")
    # GPT-2 has no linear module at all: its Conv1D is another thing
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=1, n_head=2))
    with pytest.raises(ValueError, match=r"found no modules.*\(none\)"):
        find_projections(gpt2)


@pytest.mark.parametrize("architecture", ["gpt_neox", "phi3"])
def test_fused_rows_are_what_they_are_called(architecture):
    """Against the module's own split: what the attention gets as query, key and value."""
    model = tiny_model(architecture)
    projections = {p.kind: p for p in find_projections(model, "attention") if p.layer == 0 and p.kind != "o"}
    assert sorted(torch.cat([p.rows for p in projections.values()]).tolist()) == list(range(sum(WIDTHS[architecture])))
    ids = torch.tensor(random_ids([5]))

    def parts(model):
        cache, seen = DynamicCache(), {}
        attention = model.get_submodule(projections["q"].module.rpartition(".")[0])
        out = attention.register_forward_hook(lambda _m, _a, result: seen.update(out=result[0]))
        model(input_ids=ids, **{CACHE: cache})
        out.remove()
        return {"k": cache.layers[0].keys, "v": cache.layers[0].values, "out": seen["out"]}

    before = parts(model)
    for kind, projection in projections.items():
        changed = copy.deepcopy(model)
        with torch.no_grad():
            changed.get_submodule(projection.module).weight[projection.rows] += 0.3
        after = parts(changed)
        moved = {part for part in before if not torch.allclose(before[part], after[part])}
        # Keys and values stand in the cache; a query moves the output alone
        assert moved == {"q": {"out"}, "k": {"k", "out"}, "v": {"v", "out"}}[kind]
        if kind != "q":  # and every head of it moves
            heads = (before[kind] - after[kind]).abs().amax(dim=(0, 2))
            assert (heads > 1e-6).all()


def test_fused_query_rows_against_a_slow_attention():
    """GPT-NeoX: queries computed from the rows named q reproduce the attention's own weights."""
    model = tiny_model("gpt_neox", attention="eager", dtype=torch.float32)
    projections = {p.kind: p for p in find_projections(model, "attention") if p.layer == 0}
    ids = torch.tensor(random_ids([1]))  # at position 0 the rotation is the identity
    ids = ids.expand(1, 2)
    output = model(input_ids=ids, output_attentions=True, output_hidden_states=True)
    x = model.gpt_neox.layers[0].input_layernorm(output.hidden_states[0])[0]
    fused = model.gpt_neox.layers[0].attention.query_key_value
    q, k = ((x @ fused.weight[projections[kind].rows].T + fused.bias[projections[kind].rows]) for kind in "qk")
    # Rotary embeddings turn the first quarter of each head; the rest is compared through the scores' change
    heads, size = 4, 8
    cos, sin = model.gpt_neox.rotary_emb(x[None], torch.arange(2)[None])
    turned = cos.shape[-1]

    def rotate(t):
        t = t.view(2, heads, size).transpose(0, 1)
        part, rest = t[..., :turned], t[..., turned:]
        half = torch.cat([-part[..., turned // 2 :], part[..., : turned // 2]], -1)
        return torch.cat([part * cos[0] + half * sin[0], rest], -1)

    scores = rotate(q) @ rotate(k).mT / size**0.5
    scores = scores.masked_fill(torch.ones(2, 2).triu(1).bool(), float("-inf"))
    torch.testing.assert_close(scores.softmax(-1), output.attentions[0][0], atol=1e-5, rtol=1e-4)


def test_an_unknown_fused_order_is_an_error():
    model = tiny_model("gpt_neox")
    model.config.model_type = "bloom"
    with pytest.raises(ValueError, match=r"bloom fuses query, key and value .*target_modules=\['query_key_value'\]"):
        find_projections(model)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("adapted", [False, True])
def test_padding_side_changes_nothing(architecture, adapted):
    backbone = tiny_backbone(architecture)
    prompts = random_ids([11, 4, 8])
    lora = random_lora(backbone, 3) if adapted else None
    for side in ("left", "right"):
        batch = pad(prompts, side=side, pad_id=7)
        hidden = backbone.forward(batch, lora).hidden_BTD
        for b, ids in enumerate(prompts):
            row = lora.rows([b]) if lora else None
            alone = backbone.forward(TokenBatch(torch.tensor([ids]), torch.ones(1, len(ids)).bool()), row).hidden_BTD[0]
            close(hidden[b][batch.mask_BT[b]], alone)
            if not adapted:
                close(backbone.mean_nll(hidden, batch)[b], slow_nll(backbone.model, ids))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_padding_in_float32(architecture, attention):
    backbone = tiny_backbone(architecture, dtype=torch.float32, attention=attention)
    prompts = random_ids([11, 4])
    for side in ("left", "right"):
        batch = pad(prompts, side=side)
        nll = backbone.mean_nll(backbone.forward(batch).hidden_BTD, batch)
        close(nll, torch.stack([slow_nll(backbone.model, ids) for ids in prompts]), 1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_representation_against_a_slow_loop(architecture, side):
    backbone = tiny_backbone(architecture)
    prompts = random_ids([9, 3, 6])
    batch = pad(prompts, side=side)
    h = backbone.forward(batch, embedded=True).representation_BH(batch)
    assert h.shape == (3, 64)
    assert h.dtype == torch.float32
    assert not h.requires_grad
    for b, ids in enumerate(prompts):
        close(h[b], slow_representation(backbone.model, ids), 1e-5)
    assert not backbone.embedding._forward_hooks


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_cache_continues_a_padded_prompt(architecture):
    backbone = tiny_backbone(architecture)
    whole = random_ids([12, 6])
    batch = pad([ids[:-3] for ids in whole], side="left")
    cache = DynamicCache(config=backbone.model.config)
    backbone.forward(batch, cache=cache)
    fed = pad([ids[-3:] for ids in whole])
    rest = backbone.forward(fed, cache=cache, past_mask_BT=batch.mask_BT).hidden_BTD
    for b, ids in enumerate(whole):
        close(rest[b], backbone.forward(pad([ids])).hidden_BTD[0, -3:])


def test_the_backbone_is_frozen_and_in_eval_mode(llama):
    assert not llama.model.training
    assert not any(p.requires_grad for p in llama.model.parameters())
    assert (llama.layers, llama.hidden_size, llama.max_length, llama.pad_id) == (2, 32, 96, 0)


def test_logits_made_in_an_unknown_way_are_an_error(monkeypatch):
    model = tiny_model("llama")
    forward = model.forward

    def scaled(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits = output.logits * 0.5
        return output

    monkeypatch.setattr(model, "forward", scaled)
    with pytest.raises(ValueError, match="makes its logits in a way ephemera does not know"):
        type(tiny_backbone())(model, tiny_tokenizer(), name="odd", path=tiny_backbone().path)


def test_fingerprints_tell_models_apart():
    first = tiny_backbone("llama", dtype=torch.float32)
    assert first.fingerprint() == tiny_backbone("llama", dtype=torch.float32).fingerprint()
    # One network serves every precision of a model
    assert first.fingerprint() == tiny_backbone("llama", dtype=torch.bfloat16).fingerprint()
    assert first.fingerprint() != tiny_backbone("llama", dtype=torch.float32, seed=1).fingerprint()
    assert describe(first)["projections"] == [p.name for p in first.projections]


# --- text to tokens ---


def test_exactly_one_bos():
    tokenizer = tiny_tokenizer()
    assert encode_prompt(tokenizer, "The river").count(1) == 1
    chat = encode_prompt(tokenizer, "The river", chat=True)  # the template has one of its own
    assert chat.count(1) == 1
    assert chat[0] == 1
    assert tokenizer.decode(chat) == "<s><|user|>\nThe river\n<|assistant|>\n"


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize(
    ("prompt", "answer", "joint"),
    [
        ("Answer:", "the mill", " the mill"),
        ("Answer: ", "the mill", "the mill"),
        ("Answer:\n", "the mill", "the mill"),
        ("Answer:", " the mill", " the mill"),
        ("Answer:", "\nthe mill", "\nthe mill"),
        ("The ri", "ver", " ver"),
    ],
)
def test_answers_continue_prompts(prompt, answer, joint, chat):
    tokenizer = tiny_tokenizer()
    ids = encode_prompt(tokenizer, prompt, chat=chat)
    more = encode_answer(tokenizer, prompt, answer, chat=chat)
    assert more
    assert 1 not in more
    assert 2 not in more  # no end token
    if chat:  # the assistant's turn begins after a line break
        joint = answer
    assert tokenizer.decode(ids + more).endswith(("" if chat else prompt) + joint)
    assert tokenizer.decode(more) == joint


def test_prompt_ids_stay_a_strict_prefix():
    """Where joined text would merge across the border, the answer is tokenised alone."""
    tokenizer = tiny_tokenizer()
    prompt, answer = "down to the ", "river"
    ids = encode_prompt(tokenizer, prompt)
    joined = encode_prompt(tokenizer, prompt + answer)
    assert joined[: len(ids)] != ids  # " river" is one token
    more = encode_answer(tokenizer, prompt, answer)
    assert more == tokenizer(answer, add_special_tokens=False)["input_ids"]
    # And where nothing merges, the two are the joined text's own tokens
    ids = encode_prompt(tokenizer, "down to the")
    assert ids + encode_answer(tokenizer, "down to the", answer) == joined


def test_a_tokenizer_without_bos():
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    ids = encode_prompt(tokenizer, "The river")
    assert 1 not in ids
    assert ids + encode_answer(tokenizer, "The river", "runs") == encode_prompt(tokenizer, "The river runs")


def test_a_model_without_a_chat_template():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template; use the plain prompt format"):
        encode_prompt(tokenizer, "The river", chat=True)


# --- loading ---


def test_unknown_dtype(llama_folder):
    with pytest.raises(ValueError, match=r"unknown dtype 'bfloat'. Did you mean 'bfloat16'\? Known: float32, bfloat16"):
        load_backbone(str(llama_folder), dtype="bfloat")


def test_dtype_device_and_attention(llama_folder):
    backbone = load_backbone(str(llama_folder), device="cpu")
    assert backbone.dtype == torch.float32
    assert backbone.path == llama_folder
    assert load_backbone(str(llama_folder), dtype=torch.float64).dtype == torch.float64
    low = load_backbone(str(llama_folder), dtype="bfloat16", device="cpu")
    assert low.model.config._attn_implementation == "eager"
    asked = load_backbone(str(llama_folder), dtype="bfloat16", device="cpu", attn_implementation="sdpa")
    assert asked.model.config._attn_implementation == "sdpa"


def test_a_model_that_is_not_there(tmp_path):
    for name in (str(tmp_path / "nothing"), "./nothing.gguf"):
        with pytest.raises(ValueError, match="there is no such file or folder"):
            load_backbone(name)
    with pytest.raises(ValueError, match=r"cannot load model 'smollm2-135m-instrukt'.*Did you mean 'smollm2-135m-ins"):
        load_backbone("smollm2-135m-instrukt")
    with pytest.raises(ValueError, match="cannot load model"):
        load_backbone(str(tmp_path))  # a folder without a model


def test_truncated_weights(llama_folder, tmp_path):
    shutil.copytree(llama_folder, tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match="cannot load model"):
        load_backbone(str(tmp_path / "model"))


@pytest.mark.parametrize("device", ["tpu9", "cuda:99", "meta"])
def test_a_device_that_is_not_there_is_named(device, llama_folder):
    with pytest.raises(ValueError, match=f"device '{device}' cannot be used here: .* Give cpu, or cuda"):
        load_backbone(str(llama_folder), device=device)


@pytest.mark.parametrize("native", [True, False])
def test_bfloat16_on_a_cpu_without_it_is_said(llama_folder, monkeypatch, native):
    monkeypatch.setattr(load_module, "multiplies_bfloat16", lambda: native)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        load_backbone(str(llama_folder), dtype="bfloat16", device="cpu")
        load_backbone(str(llama_folder), dtype="float32", device="cpu")
    assert sum("no instructions for bfloat16" in str(w.message) for w in said) == (not native)
