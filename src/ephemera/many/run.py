"""A run over a file, on this machine or on Ray."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ephemera.config import Run
from ephemera.llm import processes
from ephemera.llm.load import find_device
from ephemera.many.output import Output
from ephemera.many.progress import Progress
from ephemera.many.ray_engine import check_ray, run_on_ray
from ephemera.many.rows import Source
from ephemera.many.worker import Worker, load

UNCHANGING = {"input", "output", "engine", "ray"}  # settings that change no answer


def run(settings: Run) -> Path:
    """Every row of the input as a line of the output; goes on where an earlier run stopped. Ctrl-C keeps what is finished.

    ValueError if the output belongs to another input or to other settings.
    """
    if not settings.input or not settings.output:
        raise ValueError("--input and --output are needed: a file of prompts, and the file of their answers.")
    if settings.engine == "ray":
        if settings.model.cut:
            raise ValueError(
                f"model.parallel={settings.model.parallel} is for --engine local, started by torchrun; Ray's actors hold whole "
                "models. Leave out one of them."
            )
        check_ray(Path(settings.input))
    source, path = Source(Path(settings.input), settings.window), Path(settings.output)
    if path.exists() and path.samefile(source.path):
        raise ValueError(f"--output {path} is the input; give another file.")
    with _place(path, settings) as own, Output(own.path, source, identity(settings)) as output:
        settings = own.settings
        if settings.model.cut:
            processes.check_same("outputs", (output.window, sorted(output.known)), find_device(settings.model.device))
        progress = Progress(source.rows, output.rows)
        if output.rows and not output.finished:
            print(f"{path}: going on after {output.rows:,} of {source.rows:,} rows.", file=sys.stderr)
        try:
            if not output.finished:
                ENGINES[settings.engine](settings, source, output, progress)
        except KeyboardInterrupt:
            progress.close()
            kept = f"stopped: {output.rows:,} of {source.rows:,} rows are finished"
            print(f"\n{kept}; run the same command again to go on.", file=sys.stderr)
            raise SystemExit(130) from None
        finally:
            source.close()
        progress.close()
        print(f"{path}: {source.rows:,} rows, {output.errors:,} with an error.", file=sys.stderr)
    return path


@dataclass(frozen=True)
class Place:
    """Where a process writes, and its settings."""

    path: Path
    settings: Run


@contextmanager
def _place(path: Path, settings: Run) -> Iterator[Place]:
    """The output itself. If processes hold parts of the model, all of them run every row: only the first one's count, and
    the others write to copies that go at the end."""
    if not settings.model.cut:
        yield Place(path, settings)
        return
    processes.join(settings.model.parallel, find_device(settings.model.device))
    with nullcontext() if processes.rank() == 0 else TemporaryDirectory() as scratch:
        own = Place(path, settings)
        if scratch is not None:
            for file in path.parent.glob(f"{path.name}*"):
                shutil.copy(file, scratch)
            elsewhere = settings.model_copy(update={"adapters": f"{scratch}/adapters"})
            own = Place(Path(scratch) / path.name, elsewhere)
        processes.gathered(None)  # copied before the first one changes anything
        yield own


def identity(settings: Run) -> dict[str, Any]:
    """What an answer follows from, by name."""
    values = settings.model_dump(mode="json", exclude=UNCHANGING)
    model = values.pop("model")
    for key in ("device", "parallel", "max_memory", "offload_folder"):  # where, not what
        del model[key]
    values["adapters"] = str(settings.adapters_folder) if settings.task == "adapt" else None
    return {**values, **{f"model.{key}": value for key, value in model.items()}}


def run_here(settings: Run, source: Source, output: Output, progress: Progress) -> None:
    worker = Worker(settings, load(settings))
    for n in range(output.window, source.windows):
        for made in worker.window(source.read(n), source.kind, output.known):
            output.keep(made)
            progress.at(output.rows)
        output.finish()


ENGINES = {"local": run_here, "ray": run_on_ray}
