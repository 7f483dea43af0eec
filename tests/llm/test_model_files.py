"""Model files that are damaged, incomplete or of another model: one line that names them, never other weights."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from ephemera import cli
from ephemera import downloads as store
from ephemera.llm.frozen_lm import FrozenLM
from ephemera.llm.gguf_header import read_header
from ephemera.llm.load import load_backbone
from ephemera.llm.model_files import called
from gguf_fixtures import write_gguf
from reference import close
from tiny_models import save_tiny, tiny_model, tiny_tokenizer

VALUE = "model.layers.1.self_attn.v_proj.weight"
Spoil = Callable[[Path], object]


@pytest.fixture
def folder(llama_folder, tmp_path) -> Path:
    return Path(shutil.copytree(llama_folder, tmp_path / "model"))


def state(folder: Path, **changes: torch.Tensor | None) -> None:
    """Change tensors of the weights, given by their names with _ for a dot before `weight`; None takes one out."""
    tensors = load_file(folder / "model.safetensors")
    for key, tensor in changes.items():
        tensors.pop(key)
        if tensor is not None:
            tensors[key] = tensor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def renamed(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({f"_orig_mod.{key}": t for key, t in tensors.items()}, folder / "model.safetensors")


def extra(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.ones(32)
    save_file(tensors, folder / "model.safetensors")


def broken(number: float) -> Spoil:
    def spoil(folder: Path) -> None:
        value = load_file(folder / "model.safetensors")[VALUE]
        value[3, 5] = number
        state(folder, **{VALUE: value})

    return spoil


def untied(folder: Path) -> None:
    """A model saved with tied weights, and a configuration that says that they are not."""
    state(folder, **{"lm_head.weight": None})


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda f: state(f, **{VALUE: None}), [f"missing: {VALUE}.", "incomplete"]),
        (lambda f: config(f, num_hidden_layers=3), ["missing: model.layers.2.", "and 6 more", "a larger model's"]),
        (lambda f: config(f, num_hidden_layers=1), ["left over: model.layers.1.", "and 6 more", "a smaller model's"]),
        (extra, ["left over: model.layers.0.self_attn.q_proj.bias."]),
        (
            lambda f: state(f, **{VALUE: torch.ones(8, 32)}),
            [f"of another shape: {VALUE} (file [8, 32], configuration [16, 32])", "another model or size"],
        ),
        (lambda f: config(f, intermediate_size=48), ["mlp.down_proj.weight (file [32, 40], configuration [32, 48])"]),
        (renamed, ["missing: ", "left over: _orig_mod.", "torch.compile"]),
        (untied, ["missing: lm_head.weight. ", "set tie_word_embeddings to true"]),
        (broken(float("nan")), [f"NaN or infinity in {VALUE}"]),
        (broken(float("-inf")), [f"NaN or infinity in {VALUE}"]),
        # Finite, but their product is not
        (
            lambda f: state(
                f, **{f"model.layers.1.mlp.{m}_proj.weight": torch.full((40, 32), 1e38) for m in ("up", "gate")}
            ),
            ["logits that are NaN or infinite in torch.float32"],
        ),
    ],
)
def test_weights_that_do_not_fit(spoil, words, folder):
    spoil(folder)
    with pytest.raises(ValueError, match="model") as error:
        load_backbone(str(folder), device="cpu")
    assert "\n" not in str(error.value)
    assert str(folder) in str(error.value)
    for word in words:
        assert word in str(error.value)


def test_what_transformers_itself_leaves_out_is_no_mistake(folder):
    """Old checkpoints hold the rotary frequencies of each layer."""
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(tensors, folder / "model.safetensors")
    ids = torch.tensor([[5, 6, 7]])
    close(
        load_backbone(str(folder), device="cpu").model(ids).logits, tiny_model("llama", dtype=torch.float32)(ids).logits
    )


def tied(folder: Path) -> Path:
    """Weights without a head of their own, because it is the embedding."""
    save_tiny(folder, "qwen3")
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    return folder


def test_a_tied_head_is_not_missing(tmp_path):
    backbone = load_backbone(str(tied(tmp_path / "model")), device="cpu")
    assert backbone.head.get_parameter("weight") is backbone.vocabulary_VD


def test_one_line_and_exit_code_2(folder, monkeypatch, capsys):
    state(folder, **{VALUE: None})
    monkeypatch.setattr("sys.argv", ["ephemera", "answer", "--model", str(folder), "--rate", "0.05", "The mill"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    out, err = capsys.readouterr()
    assert (stopped.value.code, out) == (2, "")
    last = err.strip().splitlines()[-1]
    assert last.startswith("ephemera: the weights of ")
    assert "Traceback" not in err


def tokenizer_json(folder: Path) -> None:
    file = folder / "tokenizer.json"
    made = json.loads(file.read_text())
    made["model"]["type"] = "BPE of a later version"
    file.write_text(json.dumps(made))


def shards(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = {key: f"model-0000{1 + (i > 4)}-of-00002.safetensors" for i, key in enumerate(sorted(tensors))}
    save_file({k: tensors[k] for k, n in names.items() if "00001-of" in n}, folder / "model-00001-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (tokenizer_json, "tokenizer.json .*written by a newer version than tokenizers "),
        (lambda f: (f / "tokenizer.json").write_text('{"model": '), "tokenizer.json .*damaged"),
        (lambda f: (f / "tokenizer_config.json").write_text("[]"), "tokenizer_config.json .*damaged"),
        (lambda f: (f / "tokenizer.json").unlink(), r"the folder has no tokenizer \(tokenizer.json\)"),
        (lambda f: (f / "config.json").unlink(), "the folder has no config.json"),
        (lambda f: (f / "config.json").write_text("[]"), "config.json cannot be used"),
        (lambda f: (f / "config.json").write_text("{"), "config.json cannot be used"),
        (lambda f: config(f, model_type="llama9"), "config.json cannot be used .*llama9"),
        (lambda f: config(f, num_attention_heads=5), "config.json cannot be used .*not a multiple"),
        (lambda f: config(f, hidden_size="32"), "config.json cannot be used .*hidden_size"),
        (
            lambda f: config(f, model_type="mine", auto_map={"AutoConfig": "c.C", "AutoModelForCausalLM": "m.M"}),
            "config.json cannot be used .*custom code.* trust_remote_code",
        ),
        (lambda f: (f / "generation_config.json").write_text("{"), "generation_config.json holds no JSON object"),
        (lambda f: (f / "model.safetensors").write_bytes(b""), "model.safetensors cannot be read"),
        (
            lambda f: (f / "model.safetensors").write_text(
                "version https://git-lfs.github.com/spec/v1\noid sha256:0\n"
            ),
            "model.safetensors is a Git LFS pointer",
        ),
        (lambda f: (f / "model.safetensors").unlink(), "no file named model.safetensors.*Copy all files"),
        (shards, "model-00002-of-00002.safetensors.*Copy all files"),
    ],
)
def test_files_that_cannot_be_read(spoil, words, folder):
    spoil(folder)
    with pytest.raises(ValueError, match=rf"cannot load model .*{words}") as error:
        load_backbone(str(folder), device="cpu")
    assert "\n" not in str(error.value)
    assert str(folder) in str(error.value)


def test_the_default_model_can_be_fetched_again(folder, monkeypatch):
    monkeypatch.setattr("ephemera.llm.load.fetch_default_model", lambda: folder)
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=rf"Or remove {folder}; the next use fetches it again"):
        load_backbone(store.DEFAULT_MODEL)


def test_running_out_of_memory_is_no_mistake_of_the_files(folder, monkeypatch):
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("ephemera.llm.load.AutoModelForCausalLM.from_pretrained", full)
    with pytest.raises(torch.OutOfMemoryError):
        load_backbone(str(folder), device="cpu")


@pytest.mark.parametrize("tokenizer", [False, True])
def test_an_adapter_is_not_a_model(folder, tokenizer, tmp_path):
    adapter = tmp_path / "adapter"
    made = get_peft_model(tiny_model("llama", dtype=torch.float32), LoraConfig(r=2, target_modules=["q_proj"]))
    made.save_pretrained(str(adapter))
    if tokenizer:
        tiny_tokenizer().save_pretrained(adapter)
    with pytest.raises(ValueError, match=rf"it is a PEFT adapter .*--model BASE_MODEL --init {adapter}") as error:
        load_backbone(str(adapter))
    assert "\n" not in str(error.value)
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": "some/base"}))
    with pytest.raises(ValueError, match="--model some/base --init"):
        load_backbone(str(adapter))


# --- GGUF ---


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", dtype=torch.float32)


def load_gguf(path: Path) -> FrozenLM:
    return load_backbone(str(path), device="cpu")


def test_a_gguf_file_is_the_model(model, tmp_path):
    path = write_gguf(tmp_path / "t.gguf", model)
    ids = torch.tensor([[5, 6, 7, 8]])
    close(load_gguf(path).model(ids).logits, model(ids).logits, 1e-6)
    header = read_header(path)
    assert header.settings["general.architecture"] == "llama"
    assert (header.number("llama.block_count"), len(header.tensors)) == (2, len(model.state_dict()))
    assert "blk.1.attn_v.weight" in header.tensors


def test_a_gguf_file_of_llama_3_keeps_its_rotary_factors(model, tmp_path):
    """Those that llama.cpp's converter writes; the model is transformers' own with the configuration that they come from."""
    settings = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    config = copy.deepcopy(model.config)
    config.rope_parameters = {"rope_type": "llama3", "rope_theta": 10_000.0, **settings}
    scaled = hf.LlamaForCausalLM(config).eval()
    scaled.load_state_dict(model.state_dict())
    factors = (model.model.rotary_emb.inv_freq / scaled.model.rotary_emb.inv_freq).numpy()
    assert factors[0] == 1
    assert factors[-1] == 8
    path = write_gguf(tmp_path / "t.gguf", model, more={"rope_freqs.weight": factors})
    ids = torch.arange(3, 43)[None]
    assert (scaled(ids).logits - model(ids).logits).abs().max() > 1e-2
    close(load_gguf(path).model(ids).logits, scaled(ids).logits, 1e-5)


def test_a_gguf_file_with_other_positions(model, tmp_path):
    path = write_gguf(tmp_path / "t.gguf", model, words={"llama.rope.scaling.type": "yarn"})
    with pytest.raises(ValueError, match=r"t.gguf scales its rotary positions \(llama.rope.scaling.type=yarn\)"):
        load_gguf(path)
    path = write_gguf(tmp_path / "long.gguf", model, more={"rope_factors_long.weight": np.ones(4, np.float32)})
    with pytest.raises(ValueError, match=r"long.gguf scales its rotary positions \(rope_factors_long.weight\)"):
        load_gguf(path)


def test_a_gguf_file_without_a_tensor(model, tmp_path):
    path = write_gguf(tmp_path / "t.gguf", model, without=["blk.1.attn_v.weight"])
    with pytest.raises(ValueError, match=rf"t.gguf' do not fit .*missing: {VALUE}"):
        load_gguf(path)


def test_a_gguf_file_of_more_layers_than_it_says(model, tmp_path):
    path = write_gguf(tmp_path / "t.gguf", model, blocks=1)
    with pytest.raises(ValueError, match=r"t.gguf says that it has 1 layers .*tensors of more: blk.1."):
        load_gguf(path)


def test_one_part_of_a_split_gguf(model, tmp_path):
    words = (
        r"m-00001-of-00003.gguf is part 1 of 3 of a split GGUF.*m-00003-of-00003.gguf is not beside it.*--merge m-00001"
    )
    whole = write_gguf(tmp_path / "m-00001-of-00003.gguf", model)
    shutil.copy(whole, tmp_path / "m-00002-of-00003.gguf")
    with pytest.raises(ValueError, match=words):  # by its name
        load_gguf(whole)
    named = write_gguf(tmp_path / "renamed.gguf", model, numbers={"split.no": 1, "split.count": 2})
    with pytest.raises(ValueError, match=r"renamed.gguf is part 2 of 2 of a split GGUF"):  # by its head
        load_gguf(named)


@pytest.mark.parametrize("size", [0, 3, 10, 30, 200, 3000, 70_000, -10])
def test_a_gguf_file_cut_short(model, size, tmp_path):
    path = write_gguf(tmp_path / "t.gguf", model)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"t.gguf cannot be read") as error:
        load_gguf(path)
    assert "\n" not in str(error.value)


def test_files_that_are_no_folder_or_gguf(model, folder, tmp_path):
    with pytest.raises(ValueError, match=r"a single file must be a .gguf file. Give the folder"):
        load_backbone(str(folder / "model.safetensors"))
    path = write_gguf(tmp_path / "T.GGUF", model)
    with pytest.raises(ValueError, match=r"Rename it so that its name ends in .gguf"):
        load_gguf(path)
    (tmp_path / "ggufs").mkdir()
    write_gguf(tmp_path / "ggufs" / "t.gguf", model)
    with pytest.raises(ValueError, match=r"no config.json. Give one of its GGUF files, e.g. .*ggufs/t.gguf"):
        load_backbone(str(tmp_path / "ggufs"))
    (tmp_path / "text.gguf").write_text("no model at all")
    with pytest.raises(ValueError, match=r"text.gguf cannot be read as a GGUF file: it does not begin as one does"):
        load_gguf(tmp_path / "text.gguf")


# --- names ---


def test_what_a_model_is_called(folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert [called(name) for name in (".", "./", "../model", str(folder), f"{folder}/")] == ["model"] * 5
    monkeypatch.chdir(folder.parent)
    assert called("..") == folder.parent.parent.name
    assert [called(name) for name in ("model", "./model")] == ["model"] * 2
    assert [called(name) for name in ("some/model", "smollm2-135m-instruct", "/")] == [
        "some/model",
        "smollm2-135m-instruct",
        "/",
    ]
    (folder.parent / "link").symlink_to(folder)
    assert called("link") == "link"
