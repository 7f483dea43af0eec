"""A model's files: what can be told of them before transformers reads them, and which one it could not read."""

from __future__ import annotations

import json
import os
from pathlib import Path

import tokenizers
import transformers
from safetensors import SafetensorError, safe_open

from ephemera.llm.gguf_header import check_whole, is_gguf, read_header

ADAPTER = "adapter_config.json"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
GENERATION = "generation_config.json"  # which tokens end an answer; transformers leaves it out if it is damaged
INDEX = "model.safetensors.index.json"
POINTER = b"version https://git-lfs"
OTHER_TOKENIZERS = ("tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "tekken.json")


def called(name: str) -> str:
    """What a model is called: the last part of a path that is there (of `.`, the folder's own name), else its name."""
    path = Path(name).expanduser()
    return Path(os.path.abspath(path)).name or name if path.exists() else name


def check_files(path: Path) -> str | None:
    """The GGUF file's name, or None for a folder; ValueError where neither can be a model."""
    if path.is_file():
        if path.suffix == ".gguf":
            check_whole(path, read_header(path))
            return path.name
        fix = "Rename it so that its name ends in .gguf." if is_gguf(path) else "Give the folder that it lies in."
        raise ValueError(f"cannot load model {str(path)!r}: a single file must be a .gguf file. {fix}")
    if (path / ADAPTER).exists():
        raise ValueError(adapter_not_model(str(path), _base(path / ADAPTER)))
    if not (path / "config.json").exists():
        ggufs = sorted(file.name for file in path.glob("*.gguf"))
        hint = f"Give one of its GGUF files, e.g. {path / ggufs[0]}." if ggufs else "Give a folder with a whole model."
        raise ValueError(f"cannot load model {str(path)!r}: the folder has no config.json. {hint}")
    if (broken := _not_json(path, (GENERATION,))) is not None:
        raise ValueError(
            f"cannot load model {str(path)!r}: {broken} holds no JSON object. Copy it again, or remove it."
        )
    return None


def adapter_not_model(name: str, base: str | None) -> str:
    return (
        f"cannot load model {name!r}: it is a PEFT adapter ({ADAPTER}), not a model. Give the model that it was trained "
        f"for and the adapter as a start: --model {base or 'BASE_MODEL'} --init {name} (init={name!r} in Python). "
        f"If the folder also holds a whole model that is meant, remove {ADAPTER}."
    )


def _base(file: Path) -> str | None:
    try:
        base = json.loads(file.read_text()).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError):
        return None
    return base if isinstance(base, str) and base else None


def reason(error: BaseException) -> str:
    """One line: what an error of another library says, with its kind where the words alone say little."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = " ".join(lines[: 2 if lines and lines[0].endswith(":") else 1])
    if isinstance(error, OSError | SafetensorError) or (type(error) in (ValueError, Exception) and said):
        return said.rstrip(".") or type(error).__name__
    return f"{type(error).__name__}: {said}".rstrip(".: ")


def unreadable_tokenizer(path: Path, error: BaseException) -> str:
    """Which file of a tokenizer cannot be read, why, and what to do."""
    if path.is_dir() and not any((path / file).exists() for file in (TOKENIZER[0], *OTHER_TOKENIZERS)):
        return (
            f"the folder has no tokenizer ({TOKENIZER[0]}). Copy {TOKENIZER[0]} and {TOKENIZER[1]} there from the model "
            "that it was made from."
        )
    if path.is_file():
        return unreadable_weights(path, error)
    file = _not_json(path, TOKENIZER) or path / TOKENIZER[0]
    return (
        f"its tokenizer cannot be read from {file} ({reason(error)}). Likely the file is damaged, or written by a newer "
        f"version than tokenizers {tokenizers.__version__} and transformers {transformers.__version__}. Copy it again, "
        "or update both packages."
    )


def unreadable_config(path: Path, error: BaseException) -> str:
    """The same of a model's configuration."""
    code = "custom code" in str(error)
    fix = (
        " Ephemera runs no model's own code; in Python, from_pretrained(..., trust_remote_code=...) decides."
        if code
        else ""
    )
    return f"{path / 'config.json'} cannot be used ({reason(error)}).{fix}"


def unreadable_weights(path: Path, error: BaseException) -> str:
    """The same of a model's weights."""
    file = path if path.is_file() else _not_json(path, (INDEX,)) or _not_safetensors(path)
    if file is None:
        fix = "" if isinstance(error, ImportError) else " Copy all files of the model again."
        return f"{reason(error)}.{fix}"
    with file.open("rb") as opened:
        if opened.read(len(POINTER)) == POINTER:
            return f"{file} is a Git LFS pointer, not the weights; run `git lfs pull` in its folder."
    return f"{file} cannot be read ({reason(error)}). Likely it is damaged or incomplete; copy it again."


def _not_json(folder: Path, names: tuple[str, ...]) -> Path | None:
    """The first of some files that holds no JSON object."""
    for file in (folder / name for name in names):
        try:
            if file.exists() and not isinstance(json.loads(file.read_text()), dict):
                return file
        except (OSError, ValueError):
            return file
    return None


def _not_safetensors(folder: Path) -> Path | None:
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt"):
                continue
        except (OSError, SafetensorError):
            return file
    return None
