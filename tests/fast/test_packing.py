"""Batches without padding: equal to the padded pass of transformers, in values and gradients."""

import pytest
import torch
import torch.nn.functional as F

from ephemera.batch import pad
from ephemera.fast import cpu_attention, fast_lm
from ephemera.fast import llama_layer as llama_module
from ephemera.fast.cpu_attention import attention, can_pack
from ephemera.fast.packing import Packing
from ephemera.inits import ZeroInit
from ephemera.llm.load import load_backbone
from tiny_models import ARCHITECTURES, random_lora, tiny_backbone

LENGTHS = (3, 7, 1, 5)


def slow_attention(q, k, v, lengths, scaling):
    """Prompt by prompt, head by head, place by place."""
    out = torch.zeros(q.shape[2], q.shape[1], q.shape[3], dtype=q.dtype)
    share = q.shape[1] // k.shape[1]
    start = 0
    for length in lengths:
        for h in range(q.shape[1]):
            for t in range(length):
                seen = slice(start, start + t + 1)
                weights = F.softmax(k[0, h // share, seen] @ q[0, h, start + t] * scaling, 0)
                out[start + t, h] = weights @ v[0, h // share, seen]
        start += length
    return out[None]


@pytest.mark.parametrize("block", [2, 3, 32])
@pytest.mark.parametrize("kept", [0, 1 << 30])
@pytest.mark.parametrize("lengths", [LENGTHS, (4, 4)])
def test_attention_and_its_gradient(monkeypatch, lengths, kept, block):
    monkeypatch.setattr(cpu_attention, "KEPT_BYTES", kept)
    monkeypatch.setattr(cpu_attention, "OTHER_BLOCK", block)
    N = sum(lengths)
    q, k, v = (torch.randn(1, N, h, 4, dtype=torch.float64).transpose(1, 2).requires_grad_() for h in (6, 2, 2))
    packing = Packing(lengths)
    y, _ = attention(torch.nn.Module(), q, k, v, None, packing=packing, scaling=0.3)
    want = slow_attention(q, k, v, lengths, 0.3)
    torch.testing.assert_close(y, want)
    dy = torch.randn_like(y)
    for got, wanted in zip(
        torch.autograd.grad(y, (q, k, v), dy), torch.autograd.grad(want, (q, k, v), dy), strict=True
    ):
        torch.testing.assert_close(got, wanted)


def test_blocks_cover_every_place_once_and_skip_later_keys():
    packing = Packing((7, 5))
    assert packing.spans(32) == [(0, 7)]
    assert packing.spans(4) == [(0, 7)]  # at least four places each
    assert packing.spans(2) == [(0, 2), (2, 4), (4, 7)]


def test_queries_meet_no_key_after_their_block(monkeypatch):
    monkeypatch.setattr(cpu_attention, "OTHER_BLOCK", 2)
    seen = []
    probabilities = cpu_attention._probabilities
    monkeypatch.setattr(
        cpu_attention, "_probabilities", lambda *args: seen.append(tuple((p := probabilities(*args)).shape)) or p
    )
    q, k, v = (torch.randn(1, 12, h, 4).transpose(1, 2) for h in (6, 2, 2))
    attention(torch.nn.Module(), q, k, v, None, packing=Packing((7, 5)))
    assert seen == [(4, 6, 2), (4, 6, 4), (4, 9, 7)]


def test_the_fused_kernel_gives_the_same(monkeypatch):
    q, k, v = (torch.randn(1, sum(LENGTHS), h, 4).transpose(1, 2) for h in (6, 2, 2))
    packing = Packing(LENGTHS)
    ours, _ = attention(torch.nn.Module(), q, k, v, None, packing=packing)
    monkeypatch.setattr(cpu_attention, "FUSED_FROM", 1)
    fused, _ = attention(torch.nn.Module(), q, k, v, None, packing=packing)
    torch.testing.assert_close(ours, fused)


def test_a_moved_packing_keeps_nothing_of_the_other_device():
    packing = Packing((7, 5))
    assert packing.later_TT.device.type == "cpu"
    assert packing.to(torch.device("meta")).later_TT.device.type == "meta"


def test_packing_there_and_back():
    packing = Packing(LENGTHS)
    x = torch.arange(2.0 * sum(LENGTHS)).view(-1, 2)
    rows = packing.rows_or_zero(x)
    assert rows.shape == (4, 7, 2)
    assert rows[2, 1:].abs().sum() == 0
    assert torch.equal(rows[1], x[3:10])
    assert torch.equal(packing.tokens(packing.rows(x)), x)
    assert packing.positions_1N[0].tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 5, 6, 0, 0, 1, 2, 3, 4]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_packed_and_padded_passes_agree(monkeypatch, architecture, side, fused):
    """`twice_differentiable` takes transformers' own attention over padded rows: hidden states, losses, gradients.

    `fused`: as on an accelerator, and for long prompts in float32.
    """
    monkeypatch.setattr(cpu_attention, "OTHER_BLOCK", 2)  # several blocks of these short prompts
    if fused:
        for module in (cpu_attention, fast_lm):
            monkeypatch.setattr(module, "writes_attention_out", lambda *_args: False)
    backbone = tiny_backbone(architecture)
    if getattr(backbone.decoder.config, "sliding_window", None):
        backbone.decoder.config.sliding_window = max(LENGTHS)  # longer prompts are not packed
    assert can_pack(backbone.decoder.config, max(LENGTHS))
    batch = pad([list(range(2, 2 + n)) for n in LENGTHS], side=side)
    lora = ZeroInit()(backbone, batch, [0] * len(LENGTHS))
    lora = lora.with_tensors([t + 0.05 * torch.randn_like(t) for t in lora.tensors])
    found = []
    for plain in (False, True):
        leaves = lora.leaves()
        out = backbone.forward(batch, leaves, embedded=True, twice_differentiable=plain)
        nll_B = backbone.mean_nll(out.hidden_BTD, batch)
        grads = torch.autograd.grad(nll_B.sum(), leaves.tensors)
        found.append((nll_B, out.representation_BH(batch), *grads))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("fuses", [False, True])
def test_the_model_is_as_before_after_an_error(llama, fuses, monkeypatch):
    llama.fuses_layers = fuses
    modules = dict(llama.model.named_modules())
    before = llama.decoder.config._attn_implementation
    batch = pad([[1, 2, 3], [1, 2]])

    def broken(*_args):
        raise RuntimeError("broken")

    for module in (cpu_attention, llama_module):  # each has its own name for it
        monkeypatch.setattr(module, "attend", broken)
    with pytest.raises(RuntimeError, match="broken"):
        llama.forward(batch, random_lora(llama, 2))
    assert llama.decoder.config._attn_implementation == before
    assert dict(llama.model.named_modules()) == modules


def test_an_attention_that_was_asked_for_is_taken(llama_folder):
    seen = []
    for asked in (None, "eager"):
        backbone = load_backbone(str(llama_folder), attn_implementation=asked)
        with torch.no_grad():
            handle = backbone.embedding.register_forward_hook(lambda _m, _args, y: seen.append(y.shape))
            backbone.forward(pad([[1, 2, 3], [1, 2]]))
            handle.remove()
    assert [tuple(shape[:2]) for shape in seen] == [(1, 5), (2, 3)]


def test_prompts_past_a_sliding_window_are_not_packed():
    config = tiny_backbone("mistral").decoder.config
    config.sliding_window = 4
    assert can_pack(config, 4)
    assert not can_pack(config, 5)
    config.model_type = "unheard-of"
    assert not can_pack(config, 2)
