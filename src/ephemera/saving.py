"""Files that appear whole or not at all, readable by whom the umask lets read, and JSON without NaN."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

if TYPE_CHECKING:
    from torch import Tensor


def finite(value: Any) -> Any:
    """The value for JSON, which has no NaN and no infinity: null stands for both."""
    if isinstance(value, Mapping):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def json_text(value: Any, **options: Any) -> str:
    """`json.dumps` with null for numbers that are not finite."""
    return json.dumps(finite(value), allow_nan=False, **options)


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """A safetensors file with the umask's mode; the library writes for the owner only.

    OSError where it cannot be written; no half of it is left.
    """
    from safetensors.torch import save_file  # here, because torch is slow to import

    path.unlink(missing_ok=True)
    path.touch()
    mode = stat.S_IMODE(path.stat().st_mode)
    try:
        save_file(dict(tensors), path, metadata)
    except (OSError, SafetensorError) as error:
        path.unlink(missing_ok=True)
        raise OSError(f"cannot write {path}: {reason(error)}") from error
    path.chmod(mode)


def follow_umask(folder: Path) -> None:
    """Give a folder and all in it the modes that new ones get here. Temporary folders are for their owner only."""
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        file, inner = Path(scratch) / "file", Path(scratch) / "folder"
        file.touch()
        inner.mkdir()
        modes = {False: stat.S_IMODE(file.stat().st_mode), True: stat.S_IMODE(inner.stat().st_mode)}
    for path in (folder, *folder.rglob("*")):
        path.chmod(modes[path.is_dir()])


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill beside `folder`; at the end its files are moved there. After an error nothing is left.

    Files of other names that `folder` holds stay. ValueError where the files cannot be written, e.g. on a full disk.
    """
    new = [parent for parent in folder.parents if not parent.exists()]
    scratch: Path | None = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        # Inside a folder that is there: it may be a disk of its own, and files move within one disk only
        beside = folder if folder.is_dir() else folder.parent
        scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=beside))
        yield scratch
        follow_umask(scratch)
        if beside is folder:
            for path in sorted(scratch.iterdir(), reverse=True):  # tensors before the .json that speaks of them
                os.replace(path, folder / path.name)
        else:
            scratch.rename(folder)
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"cannot write {folder}: {reason(error)}. Nothing of it was kept. Free some disk space, check the "
            "permissions, or give another folder."
        ) from error
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)
        if not folder.exists():
            for parent in new:
                with contextlib.suppress(OSError):
                    parent.rmdir()


def unreadable(folder: Path) -> str | None:
    """The first file or folder in `folder` that cannot be read, with the reason; None if all can."""
    for path in (folder, *sorted(folder.rglob("*"))):
        try:
            if path.is_dir():
                next(path.iterdir(), None)
            else:
                path.open("rb").close()
        except OSError as error:
            return f"{path} ({reason(error)})"
    return None


def reason(error: Exception) -> str:
    """Why a file could not be written or read, in one line."""
    text = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
    line = text.strip().splitlines()[0]
    return re.sub(r"^.*I/O error: | \(os error \d+\)$", "", line).rstrip(".")  # safetensors' words around the system's
