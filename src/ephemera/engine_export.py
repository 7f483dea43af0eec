"""Every row's adapter for an inference engine (vLLM, SGLang): a PEFT folder each, and a manifest; or one zip with both."""

from __future__ import annotations

import hashlib
import os
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ephemera.lora import LoraBatch
from ephemera.messages import unknown
from ephemera.peft_export import CONFIG
from ephemera.saving import json_text, reason, save_tensors, whole_folder

MANIFEST = "manifest.json"
WEIGHTS = "adapter_model.safetensors"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def export_all(
    lora: LoraBatch, output: Path, rows: Sequence[dict[str, Any]], *, base_model: str, dtype: str = "float32"
) -> Path:
    """Write `NAME/adapter_config.json`, `NAME/adapter_model.safetensors` of every row, and manifest.json.

    `output`: a new folder, or a name that ends in .zip. `rows`: what the manifest says of each row. `base_model`: a name, not a
    path. alpha / r is folded into B, so that the scaling is 1. A name holds a digest of the tensors: an engine keeps
    adapters by name, and no two adapters share one. ValueError where something does not fit.
    """
    if dtype not in DTYPES:
        raise unknown("dtype of adapters", dtype, DTYPES)
    if os.path.isabs(base_model) or base_model.startswith((".", "~")):
        raise ValueError(
            f"base_model is the path {base_model!r}; other machines do not have it. Give the model's name."
        )
    if output.exists() and (output.is_file() or any(output.iterdir())):
        raise ValueError(
            f"{output} exists already, and adapters of another run may be in it. Give a new name, or remove it."
        )
    if output.suffix != ".zip":
        with whole_folder(output) as scratch:
            _fill(scratch, lora, rows, base_model, dtype)
        return output
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=output.parent) as scratch:
            folder, packed = Path(scratch) / "all", Path(scratch) / "all.zip"
            folder.mkdir()
            _fill(folder, lora, rows, base_model, dtype)
            with zipfile.ZipFile(packed, "w") as archive:
                for path in sorted(p for p in folder.rglob("*") if p.is_file()):
                    archive.write(path, path.relative_to(folder))
            packed.replace(output)
    except OSError as error:
        raise ValueError(
            f"cannot write {output}: {reason(error)}. Free some disk space, or give another name."
        ) from error
    return output


def folded(lora: LoraBatch, row: int, dtype: torch.dtype) -> tuple[dict[str, Tensor], int]:
    """One row's tensors by PEFT's names, with alpha / r in B, each a tensor of its own; and their rank."""
    factors, r, lora_alpha = lora.peft_factors(row)
    state = {}
    for module, (A_RI, B_OR) in factors.items():
        pair = {"A": A_RI, "B": B_OR * (lora_alpha / r)}
        for letter, tensor in pair.items():
            state[f"base_model.model.{module}.lora_{letter}.weight"] = (
                tensor.detach().to("cpu", dtype, copy=True).contiguous()
            )
    return state, r


def _fill(folder: Path, lora: LoraBatch, rows: Sequence[dict[str, Any]], base_model: str, dtype: str) -> None:
    listed, r = [], None
    for row, facts in enumerate(rows):
        state, r = folded(lora, row, DTYPES[dtype])
        digest = hashlib.sha256()
        for key in sorted(state):
            digest.update(key.encode())
            digest.update(state[key].view(torch.uint8).numpy().tobytes())
        name = f"row-{row:05d}-{digest.hexdigest()[:12]}"
        settings = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "r": r,
            "lora_alpha": r,
            "target_modules": sorted({key.split(".")[-3] for key in state}),  # engines compare last names
            "lora_dropout": 0.0,
            "bias": "none",
            "base_model_name_or_path": base_model,
            "inference_mode": True,
        }
        (folder / name).mkdir()
        (folder / name / CONFIG).write_text(json_text(settings, indent=2), encoding="utf-8")
        save_tensors(state, folder / name / WEIGHTS, {"format": "pt"})
        listed.append({"name": name, "row": row, **facts})
    manifest = {"base_model": base_model, "dtype": dtype, "r": r, "scaling": 1.0, "adapters": listed}
    (folder / MANIFEST).write_text(json_text(manifest, indent=1, ensure_ascii=False), encoding="utf-8")
