"""What loads when: nothing heavy at the door, and what only some commands need is an extra."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import ephemera
from ephemera.messages import EXTRAS

SRC = Path(ephemera.__file__).parents[1]
HEAVY = {
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "datasets",
    "matplotlib",
    "rouge_score",
    "fastapi",
    "lm_eval",
    "ray",
    "sklearn",
}
MODEL = {"torch", "transformers"}


def run(code: str, *arguments: str, blocked: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """In a fresh process, where importing a blocked package fails as if it were not installed."""
    block = f"""
import sys
from importlib.machinery import PathFinder
there = PathFinder.find_spec
def find_spec(name, path=None, target=None):
    return None if name.partition(".")[0] in {blocked!r} else there(name, path, target)
PathFinder.find_spec = staticmethod(find_spec)
"""
    env = {**os.environ, "PYTHONPATH": str(SRC), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", block + code, *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


def loaded_by(code: str, *arguments: str, blocked: tuple[str, ...] = ()) -> set[str]:
    done = run(code + "\nimport json; print(json.dumps(sorted(sys.modules)))", *arguments, blocked=blocked)
    assert done.returncode == 0, done.stderr
    return {name.partition(".")[0] for name in json.loads(done.stdout.splitlines()[-1])} & HEAVY


HELP = """
import contextlib
from ephemera import cli
sys.argv = ["ephemera", *sys.argv[1:], "--help"]
with contextlib.suppress(SystemExit):
    cli.main()
"""


@pytest.mark.parametrize(
    "command", [[], ["answer"], ["train", "scalenet"], ["serve"], ["evaluate"], ["run"], ["bench"]], ids=str
)
def test_help_loads_nothing_heavy(command: list[str]):
    assert loaded_by(HELP, *command) == set()


def test_the_package_loads_nothing_heavy():
    assert loaded_by("import ephemera") == set()
    assert loaded_by("import ephemera; ephemera.__version__; dir(ephemera)") == set()


@pytest.mark.parametrize("name", ephemera.__all__)
def test_every_name_loads_when_it_is_used(name: str):
    assert vars(sys.modules[type(getattr(ephemera, name)).__module__]) is not None
    assert name in dir(ephemera)


def test_an_unknown_name():
    with pytest.raises(AttributeError, match=r"no attribute 'AdaptiveLm'. It has Adaptation, AdaptiveLM"):
        _ = ephemera.AdaptiveLm


ADAPT = """
from ephemera import AdaptiveLM
lm = AdaptiveLM.from_pretrained(sys.argv[1], rate=0.1)
adaptation = lm.adapt("The river runs.", steps=1)
lm.generate("The river runs.", adaptation=adaptation, max_new_tokens=2)
adaptation.export_peft(sys.argv[2])
AdaptiveLM.from_pretrained(sys.argv[1], init=sys.argv[2]).generate("The river runs.", max_new_tokens=2)
"""


def test_adapting_and_exporting_need_no_extra(llama_folder: Path, tmp_path: Path):
    extras = tuple(sorted({module for modules in EXTRAS.values() for module in modules}))
    assert loaded_by(ADAPT, str(llama_folder), str(tmp_path / "adapter"), blocked=extras) == MODEL


CLI = "from ephemera import cli; sys.argv = ['ephemera', *sys.argv[1:]]; cli.main()"


@pytest.mark.parametrize(
    ("package", "extra", "command"),
    [
        ("accelerate", "train", ["train", "scalenet", "--config", "configs/smoke.yaml", "--set", "train.source=x"]),
        ("peft", "train", ["train", "lora", "--set", "train.source=x", "--set", "output=x"]),
        ("rouge_score", "eval", ["evaluate", "--set", "data.source=x"]),
        ("matplotlib", "eval", ["evaluate", "--set", "data.source=x"]),
        ("ray", "ray", ["run", "--engine", "ray", "--input", "examples/prompts.jsonl", "--output", "x"]),
        ("fastapi", "serve", ["serve", "--port", "0"]),
        ("uvicorn", "serve", ["serve", "--port", "0"]),
        ("prometheus_client", "serve", ["serve", "--port", "0"]),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_a_missing_package_is_one_line(package: str, extra: str, command: list[str], tmp_path: Path):
    done = run(CLI, *command, blocked=(package,))
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == (
        f"ephemera: {package} is not installed. Get it by: pip install 'ephemera[{extra}]'"
    )
    assert "Traceback" not in done.stderr


def test_extras_are_those_of_the_project():
    extras = tomllib.loads((SRC.parent / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for extra, modules in EXTRAS.items():
        named = {re.split(r"[>\[]", line)[0].replace("-", "_") for line in extras[extra]}
        assert named >= set(modules) - {"starlette"}, extra  # fastapi brings starlette
