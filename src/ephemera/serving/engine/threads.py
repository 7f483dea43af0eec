"""The engine's thread should be the only one whose products run in parallel."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def in_passing_thread(work: Callable[[], T]) -> T:
    """What `work` gives, or raises, from a thread that ends with it.

    On a CPU OpenMP keeps a pool of workers for each thread that ever computed in parallel, and small products are four
    times slower on a thread that is not the only one with a pool (measured, docs/log.md). A thread that ends takes its pool
    with it.
    """
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="ephemera-load") as pool:
        return pool.submit(work).result()
