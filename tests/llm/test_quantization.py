"""Quantised bases against plain models with the dequantised weights, adapter merged, one token at a time."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from ephemera import AdaptiveLM, as_generate
from ephemera.config import ModelSettings
from ephemera.llm.frozen_lm import FrozenLM, describe
from ephemera.llm.load import frozen_lm, load_backbone
from ephemera.llm.quantization import QUANTIZATIONS, Quantization, check_gradients, quantised_modules
from ephemera.made_for import MadeFor
from ephemera.rates import FixedRate, PerProjectionRate
from gguf_fixtures import write_gguf
from reference import close, merged_weights, slow_nll
from tiny_models import (
    COMMON,
    CONFIGS,
    left,
    random_ids,
    random_lora,
    save_tiny,
    tiny_backbone,
    tiny_model,
    tiny_tokenizer,
)

FORMS = {"int8": "bitsandbytes", "nf4": "bitsandbytes", "torchao-int8": "torchao"}
EACH = pytest.mark.parametrize("form", FORMS)
LENGTHS = [11, 4, 7]
SIZES = {**COMMON, "hidden_size": 64, "intermediate_size": 128}
WIDE = {
    "llama": lambda: hf.LlamaConfig(**SIZES, num_key_value_heads=2),
    "qwen3": lambda: hf.Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=32, tie_word_embeddings=True),
    "gpt_neox": lambda: hf.GPTNeoXConfig(**SIZES),
}
# The sixteen numbers of QLoRA's appendix E, which a weight's four bits choose from
NF4 = (-1, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0)
NF4 += (0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models as wide as a block of nf4."""
    with pytest.MonkeyPatch.context() as patch:
        for name, config in WIDE.items():
            patch.setitem(CONFIGS, name, config)
        return {name: save_tiny(tmp_path_factory.mktemp(name), name) for name in WIDE}


def quantised(folder: Path, form: str, **options: Any) -> FrozenLM:
    pytest.importorskip(FORMS[form], reason=f"{FORMS[form]} is not installed")
    return load_backbone(str(folder), dtype="float32", device="cpu", quantization=form, **options)


def dequantised(module: nn.Linear, form: str) -> Tensor:
    """The weight [O,I] that a module stands for, from its parts."""
    weight: Any = module.weight
    if form == "torchao-int8":
        return weight.qdata.float() * weight.scale
    if form == "int8":
        state: Any = module.state
        return state.CB.float() * state.SCB[:, None] / 127
    packed = weight.data.flatten()
    places = torch.stack([packed >> 4, packed & 15], 1).flatten().int()
    blocks = torch.tensor(NF4)[places].view(-1, weight.quant_state.blocksize) * weight.quant_state.absmax[:, None]
    return blocks.view(module.out_features, module.in_features)


def plain_twin(backbone: FrozenLM, folder: Path, form: str) -> FrozenLM:
    """The same model with plain float32 weights: those that the quantised ones stand for."""
    model = hf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        for path, module in quantised_modules(backbone.model).items():
            model.get_parameter(f"{path}.weight").copy_(dequantised(module, form))
    return FrozenLM(model, tiny_tokenizer(), name="twin", path=folder, target_modules=backbone.target_modules)


def gradients(backbone: FrozenLM, ids: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor, Tensor]:
    """Each prompt's NLL [B], and its gradient by A and B."""
    batch, lora = left(ids), random_lora(backbone, len(ids)).leaves()
    nll_B = backbone.mean_nll(backbone.forward(batch, lora).hidden_BTD, batch)
    return nll_B.detach(), *torch.autograd.grad(nll_B.sum(), lora.buffers)


@EACH
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gpt_neox"])
@pytest.mark.parametrize("fast", [True, False], ids=["fast", "reference"])
def test_gradients_are_those_of_the_dequantised_weights(folders, form: str, architecture: str, fast: bool):
    folder, ids = folders[architecture], random_ids(LENGTHS)
    backbone = quantised(folder, form, fast=fast)
    assert backbone.quantization == form
    with torch.no_grad():
        backbone.forward(left(ids))  # as before a step of a server: bitsandbytes would repack for inference
    twin = plain_twin(backbone, folder, form)
    nll_B, *have = gradients(backbone, ids)
    lora = random_lora(twin, len(ids)).leaves()
    want_B = torch.stack([slow_nll(twin.model, ids[b], weights=merged_weights(twin, lora, b)) for b in range(len(ids))])
    want = torch.autograd.grad(want_B.sum(), lora.buffers)
    close(nll_B, want_B.detach(), 1e-4)
    for a, b in zip(have, want, strict=True):
        assert (a - b).norm() < 2e-4 * b.norm()


@EACH
def test_one_row_decodes_without_being_merged(folders, form: str):
    folder = folders["llama"]
    backbone = quantised(folder, form)
    twin = plain_twin(backbone, folder, form)
    before = {path: module.weight for path, module in quantised_modules(backbone.model).items()}
    options: dict[str, Any] = {"steps": 2, "rate": 0.2, "max_new_tokens": 12}
    assert AdaptiveLM(backbone).generate("The river", **options) == AdaptiveLM(twin).generate("The river", **options)
    assert all(module.weight is before[path] for path, module in quantised_modules(backbone.model).items())


@EACH
def test_networks_of_the_unquantised_model_are_taken_with_a_warning(folders, form: str):
    whole = load_backbone(str(folders["llama"]), dtype="float32", device="cpu")
    backbone = quantised(folders["llama"], form)
    assert backbone.fingerprint() == whole.fingerprint()
    assert describe(backbone) == {**describe(whole), "quantization": form}
    many = {"projections": len(whole.projections), "made_for": MadeFor(("own",))}
    with pytest.warns(UserWarning, match=f"on unquantised weights of .*; the model at hand has {form} weights"):
        PerProjectionRate(base_rates=[0.1], trained_for=describe(whole), **many).check(backbone)
    with pytest.warns(UserWarning, match=f"on {form} weights of .*; the model at hand has unquantised weights"):
        PerProjectionRate(base_rates=[0.1], trained_for=describe(backbone), **many).check(whole)
    other = {**describe(whole), "fingerprint": "0123456789abcdef"}
    with pytest.raises(ValueError, match="was trained for"):
        PerProjectionRate(base_rates=[0.1], trained_for=other, **many).check(backbone)


@EACH
def test_models_that_come_quantised(folders, form: str, tmp_path: Path):
    backbone = quantised(folders["llama"], form)
    backbone.model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    again = load_backbone(str(tmp_path), dtype="float32", device="cpu")
    assert again.quantization == form
    for have, want in zip(gradients(again, random_ids(LENGTHS)), gradients(backbone, random_ids(LENGTHS)), strict=True):
        close(have, want, 1e-5)
    with pytest.raises(ValueError, match=rf"quantised by its own files, by {FORMS[form]}: leave out one"):
        load_backbone(str(tmp_path), quantization="nf4")


@EACH
def test_inside_transformers_the_model_is_left_as_it_was(folders, form: str):
    backbone = quantised(folders["llama"], form)
    want = AdaptiveLM(backbone).generate("The river runs", rate=0.2, steps=1, max_new_tokens=8)
    model, tokenizer = backbone.model, backbone.tokenizer
    for module in quantised_modules(model).values():  # as transformers loads them
        module.training = False
    before = {path: (m.training, m.weight.dtype) for path, m in quantised_modules(model).items()}
    inputs = tokenizer(["The river runs"], return_tensors="pt")
    ids = model.generate(**inputs, custom_generate=as_generate(0.2, steps=1), do_sample=False, max_new_tokens=8)
    assert tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True) == want
    assert {path: (m.training, m.weight.dtype) for path, m in quantised_modules(model).items()} == before


def test_dynamic_int8_is_refused(folders):
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    config = hf.TorchAoConfig(quantization.Int8DynamicActivationInt8WeightConfig())
    with pytest.raises(ValueError, match=r"\(Int8DynamicActivationInt8WeightConfig\), and no gradient passes through"):
        load_backbone(str(folders["llama"]), dtype="float32", device="cpu", quantization_config=config)


def test_repacked_4_bit_weights_are_refused(folders):
    model = quantised(folders["llama"], "nf4").model
    state: Any = next(iter(quantised_modules(model).values())).weight
    state.quant_state.packing_format_for_cpu = True
    with pytest.raises(ValueError, match=r"has repacked the 4 bit weights of .*q_proj for inference"):
        frozen_lm(model, tiny_tokenizer(), name="tiny", path=folders["llama"])


class Eighths(nn.Linear):
    """A linear map whose weights are whole eighths, kept in 8 bit."""

    straight = True  # whether gradients pass

    def __init__(self, linear: nn.Linear):
        super().__init__(linear.in_features, linear.out_features, bias=False)
        self.weight = nn.Parameter((8 * linear.weight).round().clamp(-127, 127).to(torch.int8), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return (x if self.straight else x.detach()) @ (self.weight.to(x.dtype) / 8).T


def eighths(straight: bool) -> hf.PreTrainedModel:
    model = tiny_model("llama", dtype=torch.float32)
    for layer in model.get_submodule("model.layers").children():
        down = layer.get_submodule("mlp.down_proj")
        assert isinstance(down, nn.Linear)
        layer.get_submodule("mlp").down_proj = Eighths(down)
        layer.get_submodule("mlp.down_proj").straight = straight
    return model


def test_four_bits_of_odd_widths_are_refused(llama_folder: Path):
    with pytest.raises(ValueError, match="wrongly on a CPU: it has 32 inputs, no multiple of the block of 64"):
        quantised(llama_folder, "nf4")


def test_a_probe_tells_maps_without_gradient():
    model, state = eighths(True), torch.get_rng_state()
    check_gradients(model, "tiny")
    assert torch.equal(state, torch.get_rng_state())
    with pytest.raises(
        ValueError, match=r"tiny cannot be adapted: .*\(Parameter\), and no gradient .* model.layers.0.mlp.down"
    ):
        check_gradients(eighths(False), "tiny")


def test_unquantised_models_are_what_they_were():
    backbone = tiny_backbone("llama")
    assert (backbone.quantization, backbone.route) == ("none", tiny_backbone("llama").route)
    assert "quantization" not in describe(backbone)


@pytest.mark.parametrize(
    ("form", "package", "extra"), [("int8", "bitsandbytes", "bnb"), ("torchao-int8", "torchao", "torchao")]
)
def test_a_missing_package_is_named(llama_folder: Path, monkeypatch, form: str, package: str, extra: str):
    monkeypatch.setitem(sys.modules, package, None)
    line = rf"^{package} is not installed. Get it by: pip install 'ephemera\[{extra}\]'$"
    with pytest.raises(ModuleNotFoundError, match=line):
        load_backbone(str(llama_folder), quantization=form)


def test_what_does_not_go_together(llama_folder: Path, tmp_path: Path):
    write_gguf(tmp_path / "tiny.gguf", tiny_model("llama", dtype=torch.float32))
    with pytest.raises(ValueError, match="quantization='int8' does not go with the GGUF file"):
        load_backbone(str(tmp_path / "tiny.gguf"), quantization="int8")
    with pytest.raises(
        ValueError, match=r"unknown quantization 'int4'. Did you mean 'int8'\? Known: none, int8, nf4, torchao-int8"
    ):
        load_backbone(str(llama_folder), quantization="int4")
    with pytest.raises(ValueError, match="is quantised by quantization_config: leave out one"):
        load_backbone(
            str(llama_folder), quantization="nf4", quantization_config=hf.BitsAndBytesConfig(load_in_8bit=True)
        )


def test_settings_know_every_form():
    allowed = ModelSettings.model_fields["quantization"].annotation
    assert get_args(allowed) == QUANTIZATIONS == get_args(Quantization)
    assert ModelSettings(quantization="nf4").loading["quantization"] == "nf4"


def test_fixed_rates_need_no_warning(folders, recwarn: pytest.WarningsRecorder):
    FixedRate(0.1).check(tiny_backbone("llama"))
    assert not recwarn.list
