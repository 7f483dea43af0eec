"""PEFT adapters as a start: PEFT's own logits, or a refusal by name. Nothing of an adapter is left out silently."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from ephemera.inits import PeftInit, load_init
from ephemera.inits.peft import HARMLESS, not_plain
from ephemera.model import AdaptiveLM
from tiny_models import save_tiny, tiny_backbone, tiny_model

IDS = torch.tensor([[9, 41, 77, 5, 120, 33]])
OUTPUT = "base_model.model.model.layers.1.self_attn.v_proj.lora_{}.weight"


def peft_adapter(folder: Path, **settings: Any) -> Path:
    """A saved LoRA of random weights on the tiny Llama."""
    values: dict[str, Any] = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"], **settings}
    model = get_peft_model(tiny_model("llama", dtype=torch.float32), LoraConfig(task_type="CAUSAL_LM", **values))
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(str(folder))
    return folder


def edit(folder: Path, **changes: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def tensors(folder: Path, changes: dict[str, Tensor | None]) -> None:
    file = folder / "adapter_model.safetensors"
    state = {**load_file(file), **changes}
    save_file({key: t for key, t in state.items() if t is not None}, file)


def pefts_logits(folder: Path) -> Tensor:
    """As PEFT itself reads the folder."""
    model = PeftModel.from_pretrained(tiny_model("llama", dtype=torch.float32), str(folder)).eval()
    return model(input_ids=IDS).logits


def our_logits(lm: AdaptiveLM) -> Tensor:
    from ephemera.batch import pad

    batch = pad(IDS.tolist())
    return lm.backbone.logits(lm.backbone.forward(batch, lm.init(lm.backbone, batch, [0])).hidden_BTD)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"layers_to_transform": [1]},
        {"target_modules": r"model\.layers\.0\..*\.(q|o)_proj"},
        {"target_modules": "all-linear"},
        {"target_modules": ["q_proj", "v_proj", "k_proj"], "exclude_modules": ["k_proj"]},
        {"target_modules": ["layers.1.self_attn.v_proj"]},
        {"lora_dropout": 0.3, "init_lora_weights": "gaussian"},
        {"init_lora_weights": "orthogonal"},
        {"fan_in_fan_out": False, "lora_alpha": 7},
    ],
)
def test_what_is_read_computes_as_peft_does(settings, tmp_path):
    save_tiny(tmp_path / "model")
    adapter = peft_adapter(tmp_path / "adapter", **settings)
    lm = AdaptiveLM.from_pretrained(str(tmp_path / "model"), init=adapter, device="cpu")
    torch.testing.assert_close(our_logits(lm), pefts_logits(adapter), atol=1e-4, rtol=1e-4)
    plain = tiny_model("llama", dtype=torch.float32)(IDS).logits
    assert (our_logits(lm) - plain).abs().max() > 1e-2


def test_activated_lora_is_refused(tmp_path):
    """PEFT applies it after the invocation only, so its logits are not those of an adapter everywhere."""
    adapter = peft_adapter(tmp_path / "adapter")
    everywhere = pefts_logits(adapter)
    for tokens in ([33], []):
        edit(adapter, alora_invocation_tokens=tokens)
        with pytest.raises(
            ValueError, match=r"not a plain LoRA \(alora_invocation_tokens\).*applies it from those tokens"
        ):
            load_init(adapter)
    edit(adapter, alora_invocation_tokens=[33])
    assert (pefts_logits(adapter) - everywhere)[0, 0].abs().max() > 1e-3


REFUSED = {
    "rank_pattern": {"q_proj": 2},
    "alpha_pattern": {"q_proj": 2},
    "use_rslora": True,
    "use_dora": True,
    "bias": "lora_only",
    "modules_to_save": ["lm_head"],
    "trainable_token_indices": [3],
    "alora_invocation_tokens": [5],
    "use_qalora": True,
    "layer_replication": [[0, 2], [1, 2]],
    "lora_bias": True,
    "target_parameters": ["q_proj.weight"],
    "megatron_config": {"hidden_size": 32},
    "velora_config": {},
    "monteclora_config": {"num_samples": 8},
    "use_bdlora": {"nblocks": 2},
    "arrow_config": {"top_k": 2},
    "kasa_config": {},
    "init_lora_weights": "pissa_niter_4",
    "a_key_of_next_year": {"strength": 2},
    "use_next_years_method": True,
}


@pytest.mark.parametrize("key", REFUSED)
def test_every_setting_that_is_more_than_lora_is_refused_by_name(key, tmp_path):
    adapter = peft_adapter(tmp_path / "adapter")
    edit(adapter, **{key: REFUSED[key]})
    with pytest.raises(ValueError, match=rf"adapter in {adapter} is not a plain LoRA \({key}") as error:
        load_init(adapter)
    assert "\n" not in str(error.value)


def test_every_key_of_the_installed_peft_is_known():
    """A plain configuration passes, and each key is either harmless or refused once it is set."""
    plain = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]).to_dict()
    assert not_plain({**plain, "peft_type": "LORA"}) == []
    keys = {field.name for field in dataclasses.fields(LoraConfig)}
    assert keys - HARMLESS <= set(REFUSED)
    assert not_plain({"peft_type": "LORA", "a_key_of_next_year": None, "another": False}) == []
    assert not_plain({"peft_type": "IA3"}) == ["peft_type=IA3"]
    for start in ("pissa", "olora", "loftq", "corda", "eva", "lora_ga", "mica"):
        assert not_plain({"peft_type": "LORA", "init_lora_weights": start}) == [f"init_lora_weights={start}"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            dict.fromkeys(OUTPUT.format(m) for m in "AB"),
            r"lacks model.layers.1.self_attn.v_proj: .*names other modules",
        ),
        ({OUTPUT.format("A"): None}, "no whole pair of rank 4 .* for model.layers.1.self_attn.v_proj"),
        ({OUTPUT.format("B"): None}, "no whole pair of rank 4 .* for model.layers.1.self_attn.v_proj"),
        ({OUTPUT.format("A"): torch.ones(32)}, "no whole pair of rank 4"),
        ({OUTPUT.format("A"): torch.ones(2, 32)}, "no whole pair of rank 4"),
        ({OUTPUT.format("B"): torch.full((16, 4), float("nan"))}, "holds NaN or infinity in .*v_proj.lora_B"),
        ({OUTPUT.format("magnitude_vector"): torch.ones(16)}, "holds more than LoRA factors"),
        ({"base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(4, 320)}, "holds more than LoRA factors"),
    ],
)
def test_no_tensor_is_missing_or_left_over(changes, words, tmp_path):
    adapter = peft_adapter(tmp_path / "adapter")
    tensors(adapter, changes)
    with pytest.raises(ValueError, match=f"adapter in {adapter}.*{words}"):
        AdaptiveLM(tiny_backbone(dtype=torch.float32), init=adapter)


def test_an_empty_adapter(tmp_path):
    adapter = peft_adapter(tmp_path / "adapter")
    save_file({}, adapter / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"is empty: adapter_model.safetensors holds no tensors"):
        load_init(adapter)


def test_tensors_that_peft_would_leave_out(tmp_path):
    """Of modules that the configuration does not name."""
    adapter = peft_adapter(tmp_path / "adapter")
    edit(adapter, target_modules=["q_proj"])
    with pytest.raises(
        ValueError, match=r"holds model.layers.0.self_attn.v_proj, model.layers.1.self_attn.v_proj besides"
    ):
        AdaptiveLM(tiny_backbone(dtype=torch.float32), init=adapter)


def test_files_of_another_kind(tmp_path):
    adapter = peft_adapter(tmp_path / "adapter")
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"no readable PEFT adapter .*Save its adapter_model.bin again as safetensors"):
        PeftInit.load(adapter)
    for r in (0, "four", None):
        adapter = peft_adapter(tmp_path / f"r-{r}")
        edit(adapter, r=r)
        with pytest.raises(ValueError, match=f"{adapter}"):
            PeftInit.load(adapter)
