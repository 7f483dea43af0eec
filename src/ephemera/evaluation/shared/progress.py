"""What a long evaluation says while it runs, on stderr, and when it is stopped."""

from __future__ import annotations

from rich.console import Console

STOPPED = "stopped: {n} records are kept in {folder}; the same command goes on from there."


def console() -> Console:
    return Console(stderr=True)
