"""A run on Ray: actors that hold the model answer whole windows; this process writes them in order."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ephemera.config import Run
from ephemera.many.progress import Progress
from ephemera.many.rows import Source, Window, opened, read_window
from ephemera.many.worker import Made, Worker, load

if TYPE_CHECKING:
    from ephemera.many.output import Output


class Actor:
    """Holds a model; answers one window at a time, which it reads from the input file itself."""

    def __init__(self, settings: dict[str, Any], kind: str, root: str):
        self.settings, self.kind = Run.model_validate(settings), kind
        self.path = Path(root) / self.settings.input
        self.worker = Worker(self.settings, load(self.settings), Path(root))

    def __call__(self, windows: dict[str, Any]) -> dict[str, Any]:
        numbers: list[list[int]] = []
        lines: list[list[str]] = []
        with opened(self.path) as file:
            for where in zip(windows["offset"], windows["number"], windows["rows"], strict=True):
                made: Made = {}
                for batch in self.worker.window(read_window(file, Window(*map(int, where))), self.kind, {}):
                    made |= batch
                numbers.append(sorted(made))
                lines.append([made[number] for number in sorted(made)])
        return {"window": windows["window"], "numbers": numbers, "lines": lines}


def check_ray(path: Path) -> None:
    """ModuleNotFoundError without Ray; ValueError for a file that cannot be read at several places."""
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # Ray's own notices stay in its log files
    import ray.data  # pyright: ignore[reportMissingImports]  # noqa: F401

    if path.suffix.lower() == ".gz":
        raise ValueError(f"--engine ray reads {path} at several places, and .gz has none; unpack it first.")


def run_on_ray(settings: Run, source: Source, output: Output, progress: Progress) -> None:
    """Windows come back in order, and each is written once: Ray runs the window of a killed actor again.

    Every node must see the input, the model and the folder of adapters under the same paths.
    """
    import ray  # pyright: ignore[reportMissingImports]
    import ray.data  # pyright: ignore[reportMissingImports]

    begun = not ray.is_initialized()
    if begun:  # RAY_ADDRESS names a cluster; without one, Ray starts on this machine
        ray.init(log_to_driver=False, logging_level="error")
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # what fails comes back as one line
    try:
        for made in _windows(settings, source, output.window):
            output.finish(made)
            progress.at(output.rows)
    except (ray.exceptions.RayError, ray.data.exceptions.UserCodeException) as error:
        raise ValueError(f"Ray stopped the run: {_cause(error)} {output.rows:,} finished rows are kept.") from error
    finally:
        if begun:
            with contextlib.suppress(Exception):
                ray.shutdown()


def _windows(settings: Run, source: Source, first: int) -> Iterator[Made]:
    """The lines of each window, in order. A block is a window, so Ray holds a few of them at a time."""
    import ray.data  # pyright: ignore[reportMissingImports]

    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    items = [{"window": n, **asdict(source.window(n))} for n in range(first, source.windows)]
    done = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        Actor,  # pyright: ignore[reportArgumentType]
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=settings.ray.workers),
        num_cpus=settings.ray.cpus,
        num_gpus=settings.ray.gpus or None,
        fn_constructor_kwargs={"settings": settings.model_dump(), "kind": source.kind, "root": os.getcwd()},
    )
    for expected, row in enumerate(done.iter_rows(), first):
        assert row["window"] == expected, "Ray gave the windows out of order"
        yield dict(zip(map(int, row["numbers"]), row["lines"], strict=True))


def _cause(error: Exception) -> str:
    """The last line of Ray's traceback: the exception in the actor."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1].removeprefix("ValueError: ") if lines else f"{type(error).__name__}."
