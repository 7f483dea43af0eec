"""One row's adapter as PEFT writes it, for anything that reads PEFT adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from ephemera.lora import LoraBatch
from ephemera.saving import json_text, whole_folder

CONFIG = "adapter_config.json"
ACTIVATED = "adapter_config.alora.json"
CARD = """# An adapter for {whom}

Made by ephemera for {whom} of {base_model}, with reach `answer`: the adapter acts from the prompt's last token on, over
what the base model's own keys and values say of the prompt.

PEFT reads `{config}`, and then applies the adapter to every token of the prompt too. That gives other answers than here.

PEFT's activated LoRA (aLoRA) applies it as here. `{activated}` names the prompt's last token, {token}, as the
invocation token:

```python
import json

from peft import LoraConfig, PeftModel

with open("{folder}/{activated}") as file:
    config = LoraConfig(**json.load(file))
model = PeftModel.from_pretrained(model, "{folder}", config=config)
model.generate(**prompt)
```

`generate` looks for that token in the prompt, so it begins at the right place. A forward pass over prompt and answer together
takes the token's last place in both. Where the answer may hold it too, say where to begin: `model(..., alora_offsets=[n])`
with n = 1 + the answer's tokens. PEFT cannot merge an activated LoRA into the weights.
"""


def export_peft(
    lora: LoraBatch, row: int, folder: Path, *, base_model: str, last_token: int | None = None, prompts: int = 1
) -> Path:
    """Write adapter_config.json and adapter_model.safetensors, whole or not at all; returns the folder.

    `last_token`: the prompt's, where the adapter acts from there on (reach `answer`); a configuration for PEFT's activated
    LoRA, and a card that explains it, are written then. `prompts`: how many made the adapter together, for that card.
    """
    factors, r, lora_alpha = lora.peft_factors(row)
    settings: dict[str, Any] = {
        "peft_type": "LORA",
        "r": r,
        "lora_alpha": lora_alpha,
        "target_modules": sorted(factors),
        "lora_dropout": 0.0,
        "bias": "none",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
    }
    with whole_folder(folder) as scratch:
        if last_token is not None:
            activated = {**settings, "alora_invocation_tokens": [last_token]}
            (scratch / ACTIVATED).write_text(json_text(activated, indent=2), encoding="utf-8")
            words = {"config": CONFIG, "activated": ACTIVATED, "folder": folder.name, "token": last_token}
            words["whom"] = "one prompt" if prompts == 1 else f"{prompts} prompts together"
            (scratch / "README.md").write_text(CARD.format(base_model=base_model, **words), encoding="utf-8")
        (scratch / CONFIG).write_text(json_text(settings, indent=2), encoding="utf-8")
        save_file(lora.peft_state_dict(row), scratch / "adapter_model.safetensors", metadata={"format": "pt"})
    if last_token is None and (folder / ACTIVATED).exists():  # of an earlier export of another adapter
        (folder / ACTIVATED).unlink()
        (folder / "README.md").unlink(missing_ok=True)
    return folder
