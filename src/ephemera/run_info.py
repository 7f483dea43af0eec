"""What a result was made with: versions, commit, command, memory."""

from __future__ import annotations

import platform
import resource
import shlex
import subprocess
import sys
from pathlib import Path

import torch
import transformers

import ephemera


def versions() -> dict[str, str]:
    return {
        "ephemera": ephemera.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def commit() -> str | None:
    """The checkout's commit, where there is one."""
    here = Path(__file__).parent
    result = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True, check=False
    )
    return result.stdout.strip() or None


def command() -> str:
    """How this process was started."""
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


def peak_memory() -> int:
    """Peak bytes: of the device where there is one, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
