"""The wheel and the sdist: what they hold, and that the wheel works by itself."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

import ephemera

ROOT = Path(__file__).parents[1]
MOST_MB = 16  # of the wheel, and of the sdist


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "--directory", str(folder)],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    return folder


def test_one_version():
    stated = {
        "pyproject.toml": r'^version = "(.+)"$',
        "CITATION.cff": r"^version: (.+)$",
    }
    for name, pattern in stated.items():
        found = re.search(pattern, (ROOT / name).read_text(), re.MULTILINE)
        assert found is not None, name
        assert found[1] == ephemera.__version__, name


def test_what_the_wheel_holds(built):
    (path,) = built.glob("*.whl")
    names = set(zipfile.ZipFile(path).namelist())
    tracked = {str(p.relative_to(ROOT / "src")) for p in (ROOT / "src" / "ephemera").rglob("*.py")}
    assert tracked <= names
    networks = [p for p in (ROOT / "src" / "ephemera" / "pretrained").rglob("*") if p.is_file()]
    assert {str(p.relative_to(ROOT / "src")) for p in networks} <= names
    assert "ephemera/examples/prompts.jsonl" in names
    assert any(name.startswith("ephemera/reproduce/recipes/") for name in names)
    assert not any(name.startswith(("tests/", "benchmarks/", "docs/")) for name in names)
    assert path.stat().st_size < MOST_MB * 1e6


def test_what_the_sdist_holds(built):
    (path,) = built.glob("*.tar.gz")
    assert path.stat().st_size < MOST_MB * 1e6
    with tarfile.open(path) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    assert {"pyproject.toml", "LICENSE", "README.md", "CITATION.cff", "constraints.txt", "Makefile"} <= names
    assert {"src/ephemera/model.py", "tests/test_package.py", "configs/universal.yaml"} <= names


def test_the_wheel_answers_in_an_environment_of_its_own(built, llama_folder, tmp_path):
    """Beside this environment's other packages, from an empty folder: nothing of the checkout is read."""
    (wheel,) = built.glob("*.whl")
    home = tmp_path / "env"
    venv.create(home)
    python = home / "bin" / "python"
    install = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "install",
        "--quiet",
        "--no-index",
        "--no-deps",
        str(wheel),
    ]
    subprocess.run(install, check=True, capture_output=True)
    code = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
    own = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.strip()
    (Path(own) / "others.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    work = tmp_path / "empty"
    work.mkdir()
    asked = [
        "answer",
        "--model",
        str(llama_folder),
        "--rate",
        "0.1",
        "--json",
        "--max-new-tokens",
        "4",
        "The mill runs",
    ]
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [home / "bin" / "ephemera", *asked], cwd=work, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert (answer["prompt"], answer["steps"]) == ("The mill runs", 1)
    where = subprocess.run(
        [python, "-c", "import ephemera; print(ephemera.__file__)"],
        cwd=work,
        env=env,
        check=True,
        capture_output=True,
        text=True,
    )
    assert where.stdout.startswith(own)
