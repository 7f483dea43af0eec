import itertools
import shutil
import subprocess
import sys
import tempfile
import time
from fractions import Fraction
from pathlib import Path

import pytest

from ephemera.evaluation.shared import execute
from ephemera.evaluation.shared.execute import pass_at_k, run_program
from ephemera.tasks import TASKS, Example, load_dataset

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="generated code is run on Linux alone")


def test_a_program_that_runs_to_its_end_passes():
    outcome = run_program("print('noise')\nassert sum(range(4)) == 6\n")
    assert outcome.passed
    assert outcome.reason == ""
    assert 0 < outcome.seconds < 5


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("assert 1 == 2, 'not so'", "AssertionError: not so"),
        ("def f(:", "SyntaxError: "),
        ("raise KeyboardInterrupt", "KeyboardInterrupt: "),
        ("def f(): f()\nf()", "RecursionError: "),
        ("input()", "EOFError: "),
        ("x = '\ud800'", "UnicodeEncodeError: "),
        ("x = bytearray(2 << 30)", "MemoryError: "),
        ("x = [0]\nwhile True: x += x", "MemoryError: "),
        ("open('big', 'w').write('x' * (17 << 20))", "OSError: [Errno 27]"),
        ("import os, signal\nos.abort()", "was killed by signal 6"),
    ],
)
def test_what_fails_says_why(program, reason):
    outcome = run_program(program)
    assert not outcome.passed
    assert outcome.reason.startswith(reason)


@pytest.mark.parametrize(
    "program",
    [
        "import sys; sys.exit(0)",
        "raise SystemExit",
        "quit()",
        "import os; os._exit(0)",
        "import os; os._exit(7)",
        "import os\nfor fd in range(100):\n    try: os.write(fd, b'passed')\n    except OSError: pass\nos._exit(0)",
        "import sys; print(sys.stdin.read()); sys.stdout.flush(); assert False",
    ],
)
def test_leaving_before_the_tests_does_not_pass(program):
    outcome = run_program(f"{program}\nassert False")
    assert not outcome.passed
    assert outcome.reason


@pytest.mark.parametrize("program", ["while True: pass", "import time; time.sleep(60)"])
def test_endless_programs_are_stopped_in_time(program):
    outcome = run_program(program, timeout_s=1)
    assert not outcome.passed
    assert outcome.reason == "ran out of time (1 s)"
    assert outcome.seconds < 3


def test_cpu_time_has_its_own_limit(monkeypatch):
    real = execute.math.ceil
    monkeypatch.setattr(execute.math, "ceil", lambda value: real(value) - 29)
    outcome = run_program("while True: pass", timeout_s=30)
    assert outcome.reason == "ran out of time (30 s)"
    assert outcome.seconds < 10


def test_memory_is_as_given():
    program = "x = bytearray(600 << 20)"
    assert run_program(program).passed
    assert run_program(program, memory_bytes=512 << 20).reason.startswith("MemoryError")


def test_it_runs_in_a_folder_of_its_own_without_surroundings(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("A_SECRET", "s")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    program = """
import os, sys
assert os.getcwd() != {here!r} and os.listdir() == []
assert 'A_SECRET' not in os.environ
assert __name__ != '__main__' and not any(name.split('.')[0] in ('ephemera', 'torch') for name in sys.modules)
os.mkdir('sub')
with open('sub/a', 'w') as file: file.write('x')
os.rename('sub/a', 'sub/b')
assert open('sub/b').read() == 'x'
"""
    outcome = run_program(program.replace("{here!r}", repr(str(tmp_path))))
    assert outcome.passed, outcome.reason
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "statement",
    [
        "open({path!r}, 'w')",
        "open({path!r}, 'a')",
        "open({path!r}, 'r+')",
        "open('../kept/file', 'w')",
        "os.open({path!r}, os.O_WRONLY | os.O_CREAT)",
        "os.open('w', os.O_WRONLY | os.O_CREAT, dir_fd=os.open({folder!r}, os.O_RDONLY))",
        "pathlib.Path({path!r}).write_text('x')",
        "os.remove({path!r})",
        "os.rename({path!r}, 'mine')",
        "os.link({path!r}, 'mine')",
        "os.truncate({path!r}, 0)",
        "os.chmod({path!r}, 0)",
        "shutil.rmtree({folder!r})",
        "os.symlink('x', {path!r} + '2')",
        "os.mkdir({path!r} + '2')",
        "os.fchmod(os.open({path!r}, os.O_RDONLY), 0)",
        "os.utime(os.open({path!r}, os.O_RDONLY), (1, 1))",
    ],
)
def test_writing_outside_its_folder_is_refused(statement, tmp_path, monkeypatch):
    folder = tmp_path / "kept"
    folder.mkdir()
    (folder / "file").write_text("kept")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # so that ../kept is the folder
    statement = statement.format(path=str(folder / "file"), folder=str(folder))
    outcome = run_program(f"import os, pathlib, shutil\n{statement}")
    assert outcome.reason.startswith("PermissionError: "), outcome
    assert "refused to generated code" in outcome.reason
    assert [p.name for p in folder.iterdir()] == ["file"]
    assert (folder / "file").read_text() == "kept"


@pytest.mark.parametrize("name", ["mkfifo", "mknod"])
def test_special_files_cannot_be_made(name, tmp_path):
    for module in ("os", "posix"):
        outcome = run_program(f"import {module}; {module}.{name}({str(tmp_path / 'x')!r})")
        assert outcome.reason.startswith("AttributeError: "), outcome
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "statement",
    [
        "import socket; socket.socket()",
        "import socket; socket.getaddrinfo('localhost', 80)",
        "import _socket; _socket.socket()",
        "import socket; socket.create_connection(('127.0.0.1', 9))",
        "import os; os.fork()",
        "import os; os.system('true')",
        "import os; os.posix_spawn('/bin/true', ['true'], {})",
        "import os; os.execv('/bin/true', ['true'])",
        "import subprocess; subprocess.run(['true'])",
        "import multiprocessing as m; m.Process(target=print).start()",
        "import os; os.kill(os.getppid(), 0)",
        "import ctypes; ctypes.CDLL(None).fork()",
        "import gc; gc.get_objects()",
        "import resource; resource.setrlimit(resource.RLIMIT_CPU, (1, 1))",
        "import sqlite3; sqlite3.connect('a')",
    ],
)
def test_the_network_and_other_processes_are_refused(statement):
    outcome = run_program(statement)
    assert not outcome.passed
    assert outcome.reason.startswith("PermissionError: ")
    assert "refused to generated code" in outcome.reason


def test_it_sees_no_network_where_the_kernel_permits():
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-Un", "true"], check=False).returncode:
        # Then the audit hook alone refuses sockets, which the test above sees on every machine
        pytest.skip("this machine makes no network namespace for an unprivileged process")
    outcome = run_program(
        "names = [line.split(':')[0].strip() for line in open('/proc/self/net/dev') if ':' in line]\n"
        "assert names == ['lo'], names"
    )
    assert outcome.passed, outcome.reason


def test_what_it_started_dies_with_it(tmp_path):
    # _posixsubprocess goes round the hook; as root, round the limit on processes too.
    mark = tmp_path / "alive"
    program = f"""
import _posixsubprocess, os
late = [b'/bin/sh', b'-c', b'sleep 1; echo x > {mark}']
r, w = os.pipe()
_posixsubprocess.fork_exec(late, [b'/bin/sh'], True, (), None, None, -1, -1, -1, -1, -1, -1, r, w, False, False, -1,
                           None, None, None, -1, None, False)
while True: pass
"""
    run_program(program, timeout_s=0.5)
    time.sleep(1.5)
    assert not mark.exists()


def test_common_libraries_work_under_the_limits():
    program = """
import asyncio, collections, dataclasses, functools, heapq, itertools, math, re, subprocess, typing
@dataclasses.dataclass
class A:
    x: int = 1
assert A().x == 1
Pair = collections.namedtuple('Pair', 'a b')
class Triple(typing.NamedTuple):
    a: int
import numpy
assert numpy.ones(3).sum() == 3
"""
    outcome = run_program(program)
    assert outcome.passed, outcome.reason


def test_other_systems_are_refused(monkeypatch):
    monkeypatch.setattr(execute.sys, "platform", "darwin")
    with pytest.raises(ValueError, match="only Linux sets; this is darwin"):
        run_program("x = 1")


@pytest.mark.parametrize("n", [1, 2, 5, 7])
def test_pass_at_k_is_the_share_of_draws_with_a_passing_one(n):
    for c, k in itertools.product(range(n + 1), range(1, n + 1)):
        draws = list(itertools.combinations([True] * c + [False] * (n - c), k))
        assert pass_at_k(n, c, k) == pytest.approx(float(Fraction(sum(map(any, draws)), len(draws))), abs=1e-15)


@pytest.mark.parametrize(("n", "c", "k"), [(5, 6, 1), (5, -1, 1), (5, 2, 0), (5, 2, 6)])
def test_pass_at_k_of_impossible_counts(n, c, k):
    with pytest.raises(ValueError, match=f"got n={n}, c={c}, k={k}"):
        pass_at_k(n, c, k)


def test_pass_at_k_of_many_samples():
    assert pass_at_k(1000, 10, 1) == pytest.approx(0.01)
    assert pass_at_k(10_000, 1, 5000) == pytest.approx(0.5)


# Programs made of generated texts

ADD = Example(
    "id",
    'from typing import List\n\nONE = 1\n\ndef add(a: int, b: int) -> int:\n    """The sum."""\n',
    "    return a + b\n",
    tests="def check(candidate):\n    assert candidate(1, 2) == 3\n\ncheck(add)\n",
)
PASSING = {
    "continuation": "    return a + b\n",
    "over several lines": "    c = a\n\n    c += b\n    return c",
    "first line stripped": "c = a\n    return c + b",
    "first line after the prompt's own space": "     c = a\n    return c + b",
    "stripped, then a block": "if a:\n        return a + b\n    return b",
    "no indentation at all": "c = a\nif c:\n    c += b\nreturn c\n",
    "a function after": "    return a + b\n\n\ndef other(c):\n    raise NameError\n\nother(1)",
    "a class after": "    return a + b\n\nclass Other:\n    x = nothing\n",
    "prints after": "    return a + b\n\nprint(add(1))\n",
    "a main block after": "    return a + b\n\nif __name__ == '__main__':\n    raise ValueError\n",
    "the function again, otherwise": "    return a + b\n\ndef add(a, b):\n    return 0\n",
    "prose after": "    return a + b\n\nThis function adds: it's simple.",
    "a word after": "    return a + b\n\nDone",
    "cut off later": "    return a + b\n\n\ndef other(",
    "a text at the margin": '    text = """\ndef no():\n"""\n    return a + b',
    "the whole function": "def add(a, b):\n    return a + b\n",
    "the whole function with imports": "import math\n\ndef add(a, b):\n    return math.floor(a + b)\n",
    "with the prompt's names": "def add(a: List, b) -> int:\n    return a + b * ONE\n",
    "with a constant before": "TWO = 2\n\ndef add(a, b):\n    return a + b + TWO - 2",
    "with trials": "def add(a, b):\n    return a + b\n\nprint(add(1))\nassert add(1, 1) == 3\nadd\n",
    "prose before": "Here is the function:\n\ndef add(a, b):\n    return a + b\n\nIt adds: that's all.",
    "fenced": "Sure!\n\n```python\ndef add(a, b):\n    return a + b\n```\n\nIt adds.",
    "fenced continuation": "```python\n    return a + b\n```",
    "fenced, not closed": "Here you are:\n```python\ndef add(a, b):\n    return a + b\n",
    "fence closed alone": "    return a + b\n```\nIt adds.",
    "whole, fence closed alone": "def add(a, b):\n    return a + b\n```\nIt adds.",
    "two fences": "Run\n```\npip install it\n```\nthen\n```py\ndef add(a, b):\n    return a + b\n```\n```\nadd(1)\n```",
    "windows line breaks": "\r\n    c = a\r\n    return c + b\r\n\r\ndef add(a, b):\r\n    return 0\r\n",
    "tabs": "\tc = a\n\treturn c + b",
}


@pytest.mark.parametrize("text", PASSING.values(), ids=PASSING)
def test_humaneval_programs_that_should_pass(text):
    judge = TASKS["humaneval"].program
    assert judge is not None
    outcome = run_program(judge(text, ADD))
    assert outcome.passed, (outcome.reason, judge(text, ADD))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "    return a - b\n",
        "    pass\n",
        "I can't.",
        "def add(a, b):\n    return a - b\n",
        "    return a - b\n\ndef add(a, b):\n    return a + b\n",  # the completion counts, not what comes after it
        "    import sys\n    sys.exit(0)\n",
        "def add(a, b):\n    return a + b\n\ndef check(candidate):\n    return\n\nadd = None",
    ],
)
def test_humaneval_programs_that_should_fail(text):
    judge = TASKS["humaneval"].program
    assert judge is not None
    assert not run_program(judge(text, ADD)).passed


MBPP = Example("id", "Add.", "", tests="one = One()\nassert add(one.x, 2) == 3\n")
CLASS = "class One:\n    x = 1\n\n"


@pytest.mark.parametrize(
    ("text", "passes"),
    [
        (CLASS + "def add(a, b):\n    return a + b", True),
        (f"Here:\n```python\n{CLASS}def add(a, b):\n    return a + b\n```", True),
        ("N = 0\n" + CLASS + "def add(a, b):\n    return a + b + N\n\nWrite a function: no.", True),
        (CLASS + "@staticmethod\ndef add(a, b):\n    return a + b\n\nprint(1 / 0)", True),
        (CLASS + "add = lambda a, b: a + b", True),
        (CLASS + "def add(a, b):\n    return a - b", False),
        ("", False),
        (CLASS + "def add(a, b):\n    return a + ", False),
        ("import sys\nsys.exit(0)", False),
    ],
)
def test_mbpp_programs(text, passes):
    judge = TASKS["mbpp"].program
    assert judge is not None
    outcome = run_program(judge(text, MBPP))
    assert outcome.passed == passes, (outcome.reason, judge(text, MBPP))


@pytest.mark.shared_data
@pytest.mark.parametrize("name", ["humaneval", "mbpp"])
def test_the_reference_solutions_pass(name, shared_data: Path):
    judge = TASKS[name].program
    assert judge is not None
    examples = load_dataset(name, source=str(shared_data / name)).examples[:20]
    for example in examples:
        outcome = run_program(judge(example.answer, example), timeout_s=20)
        assert outcome.passed, (outcome.reason, judge(example.answer, example))
        fenced = judge(f"Here it is:\n```python\n{example.answer}\n```\nIt works.", example)
        assert fenced.split() == judge(example.answer, example).split()
    for example in examples[:5]:
        assert not run_program(judge("    return 0.123", example), timeout_s=20).passed
