"""One row's adapter as a zip of PEFT's files."""

from __future__ import annotations

import io
import tempfile
import zipfile
from pathlib import Path

from ephemera.lora import LoraBatch
from ephemera.peft_export import export_peft


def zipped(lora: LoraBatch, row: int, *, base_model: str, last_token: int | None = None) -> bytes:
    """`last_token`: as in `export_peft`."""
    packed = io.BytesIO()
    with tempfile.TemporaryDirectory() as scratch:
        folder = export_peft(lora, row, Path(scratch) / "adapter", base_model=base_model, last_token=last_token)
        with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
            for path in sorted(folder.iterdir()):
                archive.write(path, path.name)
    return packed.getvalue()
