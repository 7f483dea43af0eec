"""One row's adapter as a zip of PEFT's two files."""

from __future__ import annotations

import io
import tempfile
import zipfile
from pathlib import Path

from ephemera.export import export_peft
from ephemera.lora import LoraBatch


def zipped(lora: LoraBatch, row: int, *, base_model: str) -> bytes:
    packed = io.BytesIO()
    with tempfile.TemporaryDirectory() as scratch:
        folder = export_peft(lora, row, Path(scratch), base_model=base_model)
        with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
            for name in ("adapter_config.json", "adapter_model.safetensors"):
                archive.write(folder / name, name)
    return packed.getvalue()
