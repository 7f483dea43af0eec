"""`ephemera run --engine ray` on a local Ray against one process; workers are killed in the middle."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from ephemera.config import Run, check_config
from ephemera.many.output import Output
from ephemera.many.run import run

try:
    import ray  # pyright: ignore[reportMissingImports]
except ModuleNotFoundError:
    ray = None


@pytest.fixture(scope="module", autouse=True)
def local_ray():
    """Two cores of Ray; it imports what these tests import."""
    if ray is None:
        pytest.skip("Ray is not installed")
    ray.init(num_cpus=2, log_to_driver=False, logging_level="error", include_dashboard=False)
    yield
    ray.shutdown()


def settings(llama_folder: Path, source: Path, output: Path, **values: Any) -> Run:
    model = {"name": str(llama_folder), "dtype": "float32", "device": "cpu"}
    common = {"model": model, "rate": 0.1, "max_new_tokens": 4, "window": 5}
    return check_config(Run, {"input": str(source), "output": str(output), **common, **values})


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "in.jsonl"
    rows = [{"prompt": f"The river runs {'past ' * (i % 7)}mill {i}"} for i in range(101)]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"no": "prompt"}]))
    return path


def workers() -> list[int]:
    """Ray's actors below this process."""
    parents = {int(p.name): stat(p) for p in Path("/proc").iterdir() if p.name.isdigit()}
    found = []
    for pid, (_, name) in parents.items():
        above = pid
        while above in parents and above != os.getpid():
            above = parents[above][0]
        if above == os.getpid() and name.startswith("ray::MapWorker"):
            found.append(pid)
    return found


def stat(process: Path) -> tuple[int, str]:
    """The parent of a process, and its command line."""
    try:
        parent = int((process / "stat").read_text().rpartition(")")[2].split()[1])
        return parent, (process / "cmdline").read_text()
    except (OSError, ValueError):
        return 0, ""


def test_killed_workers_lose_and_double_nothing(source, llama_folder, tmp_path, monkeypatch):
    expected = run(settings(llama_folder, source, tmp_path / "local.jsonl")).read_bytes()
    killed: list[int] = []
    real = Output.finish

    def finish(self: Output, *made: Any) -> None:
        real(self, *made)
        if self.window in (2, 5):  # both, so that one of them is at work
            for pid in workers():
                os.kill(pid, signal.SIGKILL)
                killed.append(pid)

    monkeypatch.setattr(Output, "finish", finish)
    config = settings(llama_folder, source, tmp_path / "ray.jsonl", engine="ray", ray={"workers": 2})
    assert run(config).read_bytes() == expected
    assert len(set(killed)) >= 2
    assert len(expected.splitlines()) == 102


def test_a_run_that_began_here_goes_on_on_ray(source, llama_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a relative folder is this process's, not a worker's
    expected = run(settings(llama_folder, source, tmp_path / "local.jsonl", task="adapt", adapters="kept"))
    path = tmp_path / "out.jsonl"
    real = Output.finish

    def finish(self: Output, *made: Any) -> None:
        real(self, *made)
        if self.window == 18:
            raise KeyboardInterrupt

    common = {"task": "adapt", "adapters": "kept"}
    with monkeypatch.context() as patch:
        patch.setattr(Output, "finish", finish)
        with pytest.raises(SystemExit):
            run(settings(llama_folder, source, path, **common))
    run(settings(llama_folder, source, path, engine="ray", **common))
    assert path.read_bytes() == expected.read_bytes()
    assert (tmp_path / "kept" / "00000" / "00000101" / "adapter_model.safetensors").exists()


def test_a_worker_that_cannot_load_the_model_is_one_line(source, llama_folder, tmp_path):
    config = settings(llama_folder, source, tmp_path / "out.jsonl", engine="ray", model={"name": "./nowhere"})
    with pytest.raises(ValueError, match=r"Ray stopped the run: .*no such file or folder.*0 finished rows are kept"):
        run(config)
