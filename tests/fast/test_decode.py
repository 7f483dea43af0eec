"""Decoding with prepared factors, merged weights and growing caches, against the plain ways of doing each."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers.cache_utils import DynamicCache, DynamicLayer

from ephemera.fast.decode import DecodeLinear, GrowingLayer, decoding, make_room, mergeable, merged, prepared
from ephemera.llm.cached_layers import CACHE
from ephemera.llm.frozen_lm import FrozenLM
from ephemera.llm.prefill import prefill
from ephemera.llm.replaced import replaced
from ephemera.lora import LoraBatch, attach
from reference import close, merged_model
from tiny_models import left, random_ids, random_lora, tiny_backbone

FUSED_AND_WHOLE = ("llama", "phi", "gpt_neox", "phi3", "gemma3")


def modules_and_weights(model: nn.Module) -> list[tuple[str, int, int]]:
    weights = {id(m): id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)}
    return [(path, id(module), weights.get(id(module), 0)) for path, module in model.named_modules()]


@pytest.mark.parametrize("architecture", FUSED_AND_WHOLE)
@torch.no_grad()
def test_prepared_factors_give_the_states_of_attached_adapters(architecture: str):
    backbone = tiny_backbone(architecture)
    lora, ids_BT = random_lora(backbone, 3), torch.tensor(random_ids([6, 6, 6]))
    with attach(backbone.model, lora):
        want = backbone.model(ids_BT).logits
    with replaced(prepared(backbone.model, lora)):
        have = backbone.model(ids_BT).logits
    close(have, want)
    assert (backbone.model(ids_BT).logits - want).abs().max() > 0.1


@pytest.mark.parametrize("architecture", FUSED_AND_WHOLE)
@torch.no_grad()
def test_a_single_row_is_merged_into_the_weights(architecture: str):
    backbone = tiny_backbone(architecture)
    lora, ids_BT = random_lora(backbone, 1), torch.tensor(random_ids([6]))
    want = merged_model(backbone, lora)(ids_BT).logits
    before = modules_and_weights(backbone.model)
    assert mergeable(backbone.model, lora)
    with replaced(decoding(backbone.model, lora)):
        assert not any(isinstance(m, DecodeLinear) for m in backbone.model.modules())
        close(backbone.model(ids_BT).logits, want)
    assert modules_and_weights(backbone.model) == before  # the very tensors, not a sum that was taken back


def test_what_would_lose_by_merging_stays_in_factors(llama: FrozenLM):
    assert not mergeable(llama.model, random_lora(llama, 2))
    lora = random_lora(llama, 1)
    low = tiny_backbone("llama", dtype=torch.bfloat16)
    wide = random_lora(low, 1).with_tensors([t.float() for t in random_lora(low, 1).tensors])
    assert not mergeable(low.model, wide)
    with replaced(decoding(low.model, wide)):
        assert sum(isinstance(m, DecodeLinear) for m in low.model.modules()) == len(low.projections)
    llama.model.get_submodule(lora.projections[0].module).__class__ = type("OtherLinear", (nn.Linear,), {})
    assert not mergeable(llama.model, lora)


@torch.no_grad()
def test_bfloat16_factors_are_as_near_to_float32_as_attached_ones():
    low, wide = (tiny_backbone("llama", dtype=dtype) for dtype in (torch.bfloat16, torch.float32))
    wide.model.load_state_dict({k: t.float() for k, t in low.model.state_dict().items()})
    lora = random_lora(wide, 2)
    ids_BT = torch.tensor(random_ids([7, 7]))
    with attach(wide.model, lora):
        want = wide.model(ids_BT).logits
    with attach(low.model, lora):
        attached = (low.model(ids_BT).logits - want).abs().mean()
    with replaced(prepared(low.model, lora)):
        have = (low.model(ids_BT).logits - want).abs().mean()
    assert have < 1.2 * attached
    assert attached < 0.1 * want.abs().mean()


def test_adapters_that_do_nothing_are_left_out(llama: FrozenLM):
    lora = random_lora(llama, 2)
    silent = LoraBatch.of(
        lora.projections, lora.A, tuple(torch.zeros_like(b) for b in lora.B), r=lora.r, lora_alpha=lora.lora_alpha
    )
    before = modules_and_weights(llama.model)
    for nothing in (None, silent):
        with replaced(decoding(llama.model, nothing)):
            assert modules_and_weights(llama.model) == before


@pytest.mark.parametrize("rows", [1, 2])
def test_an_error_leaves_the_model_as_it_was(llama: FrozenLM, rows: int):
    before = modules_and_weights(llama.model)
    inside = []

    def fail() -> None:
        inside.append(modules_and_weights(llama.model))
        raise RuntimeError("out of ideas")

    with pytest.raises(RuntimeError, match="out of ideas"), replaced(decoding(llama.model, random_lora(llama, rows))):
        fail()
    assert inside != [before]
    assert modules_and_weights(llama.model) == before


def test_an_error_while_merging_leaves_the_model_as_it_was(llama: FrozenLM):
    lora = random_lora(llama, 1)
    last = lora.projections[-1]
    shorter = (*lora.projections[:-1], replace(last, module_out_features=last.module_out_features - 1))
    broken = replace(lora, projections=shorter, B_BN=lora.B_BN[:, : -lora.r])  # the last pair does not fit
    before = modules_and_weights(llama.model)
    with pytest.raises(RuntimeError), replaced(merged(llama.model, broken)):
        pass
    assert modules_and_weights(llama.model) == before


def test_a_growing_layer_holds_what_a_dynamic_one_does_and_copies_nothing():
    torch.manual_seed(0)
    plain = DynamicLayer()
    plain.update(torch.randn(3, 2, 5, 4), torch.randn(3, 2, 5, 4))
    growing = GrowingLayer.of(plain, room=3)
    places = set()
    for new in (1, 1, 1, 2, 1):  # the fourth outgrows the room
        k, v = torch.randn(3, 2, new, 4), torch.randn(3, 2, new, 4)
        for have, want in zip(growing.update(k, v), plain.update(k, v), strict=True):
            assert torch.equal(have, want)
        assert growing.get_seq_length() == plain.get_seq_length()
        places.add(growing.keys_buffer.data_ptr())
    assert len(places) == 2
    for layer in (plain, growing):
        layer.crop(-2)
    for step in ("write after the crop", "after other rows", "after a repeat"):
        if step == "after other rows":
            for layer in (plain, growing):
                layer.reorder_cache(torch.tensor([2, 0, 0]))
        if step == "after a repeat":
            for layer in (plain, growing):
                layer.batch_repeat_interleave(2)
        rows = growing.keys.shape[0]
        k, v = torch.randn(rows, 2, 1, 4), torch.randn(rows, 2, 1, 4)
        for have, want in zip(growing.update(k, v), plain.update(k, v), strict=True):
            assert torch.equal(have, want)


def test_sliding_layers_stay_as_they_are():
    backbone = tiny_backbone("gemma3")
    read = prefill(backbone, left(random_ids([9, 5])), None)
    before = [type(layer) for layer in read.cache.layers]
    make_room(read.cache, 8)
    assert [type(layer) for layer in read.cache.layers] == [GrowingLayer if t is DynamicLayer else t for t in before]
    assert GrowingLayer in {type(layer) for layer in read.cache.layers} != {GrowingLayer}


@pytest.mark.parametrize("architecture", FUSED_AND_WHOLE)
@pytest.mark.parametrize("rows", [1, 3])
def test_tokens_are_those_of_transformers_generate_under_attached_adapters(architecture: str, rows: int):
    backbone = tiny_backbone(architecture)
    lora, batch = random_lora(backbone, rows), left(random_ids([9, 4, 6][:rows]))
    settings = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    with attach(backbone.model, lora):
        ids = backbone.model.generate(  # pyright: ignore[reportCallIssue]
            input_ids=batch.ids_BT, attention_mask=batch.mask_BT.long(), **{CACHE: DynamicCache()}, **settings
        )
    want = ids[:, batch.ids_BT.shape[1] :].tolist()
    assert prefill(backbone, batch, lora).generate(**settings) == want
    assert prefill(backbone, batch, None).generate(**settings) != want
