"""One row's adapter as PEFT writes it, for anything that reads PEFT adapters."""

from __future__ import annotations

from pathlib import Path

from peft import LoraConfig
from safetensors.torch import save_file

from ephemera.lora import LoraBatch


def export_peft(lora: LoraBatch, row: int, folder: Path, *, base_model: str) -> Path:
    """Write adapter_config.json and adapter_model.safetensors; returns the folder."""
    factors, r, lora_alpha = lora.peft_factors(row)
    config = LoraConfig(
        r=r,
        lora_alpha=lora_alpha,  # pyright: ignore[reportArgumentType]
        target_modules=sorted(factors),
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
        base_model_name_or_path=base_model,
        inference_mode=True,
    )
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(str(folder))
    save_file(lora.peft_state_dict(row), folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder
