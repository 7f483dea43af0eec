"""Generated code, run with its tests in a process of its own; and pass@k.

What holds, on Linux: the program runs in another process with an empty environment, is killed with its
process group after `timeout_s`, and cannot take more than `memory_bytes` of address space, `timeout_s` of
CPU time (rounded up) or write a file above 16 MiB; its folder is deleted afterwards. It has no network where
the kernel lets an unprivileged process make a network namespace. Where it runs as an ordinary user it cannot
start processes or threads.

What guards against accidents only: an audit hook inside the process refuses sockets, new processes, signals,
ctypes, and writing or deleting outside the program's folder. Code written to get around it can (C extensions,
patches of the standard library, the interpreter's own frames, where the mark of success is found as well),
and reading files is not refused. This is no sandbox: run a model that you don't trust in a container or a
virtual machine, with nothing of value in it.
"""

from __future__ import annotations

import builtins
import contextlib
import json
import math
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

FILE_BYTES = 16 << 20
CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
REFUSED = (
    *("socket.", "ctypes.", "subprocess.", "pty.", "signal.", "syslog.", "sqlite3.", "gc.get_", "resource."),
    *("os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "os.kill", "os.setxattr", "os.removexattr"),
    *("sys.addaudithook", "sys._current_frames"),
)
# Events whose first arguments are paths that change, and how many of them are.
CHANGED_PATHS = {
    **dict.fromkeys(("os.chflags", "os.chmod", "os.chown", "os.mkdir", "os.remove", "os.rmdir", "os.truncate"), 1),
    **dict.fromkeys(("os.utime", "os.chroot"), 1),
    **dict.fromkeys(("os.link", "os.rename", "os.symlink"), 2),
}


@dataclass(frozen=True)
class Outcome:
    """`reason` says why a program didn't pass; `seconds` is its time by the wall clock."""

    passed: bool
    reason: str
    seconds: float


def run_program(program: str, *, timeout_s: float = 5, memory_bytes: int = 1 << 30) -> Outcome:
    """Did the program run to its end without an error? The module's docstring says what it cannot do.

    An exit before the end is a failure, whatever its status: only a random mark, written after the last
    line, passes. The program is no `__main__` and reads no input. ValueError on other systems than Linux.
    """
    if sys.platform != "linux":
        raise ValueError(f"generated code is run under limits that only Linux sets; this is {sys.platform}.")
    mark = secrets.token_hex(16)
    given = {"program": program, "mark": mark, "cpu_s": math.ceil(timeout_s), "memory_bytes": memory_bytes}
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as report:
        process = subprocess.Popen(
            [sys.executable, "-I", "-B", __file__],
            stdin=subprocess.PIPE,
            stdout=report,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={},
            start_new_session=True,
        )
        late = False
        try:
            process.communicate(json.dumps(given).encode(), timeout=timeout_s)
        except subprocess.TimeoutExpired:
            late = True
        finally:
            with contextlib.suppress(ProcessLookupError):  # kill what it left behind too
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        seconds = time.monotonic() - started
        report.seek(0)
        said = report.read(1000).decode(errors="replace")
    if late or process.returncode == -signal.SIGXCPU:
        return Outcome(False, f"ran out of time ({timeout_s:g} s)", seconds)
    if said == mark:
        return Outcome(True, "", seconds)
    if process.returncode < 0:
        said = f"was killed by signal {-process.returncode}"
    return Outcome(False, said or f"exited with status {process.returncode} before its end", seconds)


def pass_at_k(n: int, c: int, k: int) -> float:
    """The chance that one of k programs passes, from n samples of which c do: 1 - C(n-c, k) / C(n, k).

    Unbiased over samples (Chen et al. 2021, Eq. 1). ValueError unless 0 <= c <= n and 1 <= k <= n.
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass@k takes 0 <= c <= n and 1 <= k <= n; got n={n}, c={c}, k={k}.")
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def _child() -> None:
    """Read the program, limit this process, run it, and say how it ended on what was standard output."""
    given = json.loads(sys.stdin.buffer.read())
    report, nothing = os.dup(1), os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(nothing, standard)
    finish = _finish(report, given.pop("mark"))
    program = given.pop("program")
    _limit(**given)
    for unseen in ("mkfifo", "mknod"):  # the hook is not told of these
        delattr(os, unseen)
        delattr(sys.modules["posix"], unseen)
    sys.addaudithook(_guard(os.getcwd()))
    namespace = sys.modules["program"] = type(sys)("program")
    try:
        builtins.exec(compile(program, "program", "exec"), namespace.__dict__)
    except BaseException as error:
        finish(error)
    finish(None)


def _finish(report: int, mark: str) -> Callable[[BaseException | None], None]:
    write, leave = os.write, os._exit  # before the program can replace them

    def finish(error: BaseException | None) -> None:
        if isinstance(error, SystemExit):
            write(report, b"exited before its end")
        elif error is not None:
            write(report, f"{type(error).__name__}: {error}"[:300].encode(errors="replace"))
        else:
            write(report, mark.encode())
        leave(0)

    return finish


def _limit(cpu_s: int, memory_bytes: int) -> None:
    import ctypes
    import resource

    unshare = ctypes.CDLL(None).unshare
    if unshare(CLONE_NEWUSER | CLONE_NEWNET):  # not everywhere permitted: best effort
        unshare(CLONE_NEWNET)
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_s, cpu_s + 1))
    for kind, most in (
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_FSIZE, FILE_BYTES),
        (resource.RLIMIT_NPROC, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (most, most))


def _guard(folder: str) -> Callable[[str, tuple[Any, ...]], None]:
    """An audit hook that refuses what the module's docstring says."""
    realpath, fsdecode, isdir = os.path.realpath, os.fsdecode, os.path.isdir

    def outside(path: Any) -> bool:
        path = realpath(f"/proc/self/fd/{path}" if isinstance(path, int) else fsdecode(path))
        return path != folder and not path.startswith(f"{folder}/")

    def guard(event: str, args: tuple[Any, ...]) -> None:
        if event.startswith(REFUSED):
            raise PermissionError(f"{event} is refused to generated code")
        if event == "open":
            path, mode, flags = args
            # A file that is open already was looked at then; a folder's descriptor would make other paths relative to it.
            if not isinstance(path, int) and outside(path) and (flags & WRITES or (mode is None and isdir(path))):
                raise PermissionError(f"writing outside its folder is refused to generated code: {path}")
        elif event in CHANGED_PATHS and any(outside(path) for path in args[: CHANGED_PATHS[event]]):
            raise PermissionError(f"{event} outside its folder is refused to generated code")

    return guard


if __name__ == "__main__":
    _child()
