"""The programs of examples/ and the notebooks run as a user runs them."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest

from ephemera.downloads import DEFAULT_MODEL, home
from serving_fixtures import live, tiny_methods
from tiny_models import tiny_backbone

ROOT = Path(__file__).parents[2]
EXAMPLES, ROWS = ROOT / "examples", str(ROOT / "examples" / "prompts.jsonl")
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))


@pytest.fixture
def default_model():
    if not (home() / "models" / DEFAULT_MODEL).exists():
        pytest.skip("the default model is not fetched yet (`ephemera doctor`)")


@pytest.fixture
def run(monkeypatch, capsys):
    def run(name: str, *words: str) -> str:
        monkeypatch.setattr(sys, "argv", [name, *words])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run


@pytest.mark.default_model
@pytest.mark.usefixtures("default_model")
def test_adapt_one_prompt(run):
    for asked, steps in (((), 0), (("--steps", "1"), 1)):
        out = run("adapt_one_prompt.py", "--max-new-tokens", "4", *asked, "Name the capital of Norway.")
        assert out.count(": saw the prompt at") == steps
        assert "the gate keeps" in out
        assert "base: " in out
        assert "adapted: " in out


@pytest.mark.default_model
@pytest.mark.usefixtures("default_model")
def test_compare(run):
    out = run("compare.py", ROWS, "--limit", "2").splitlines()
    assert len(out) == 3
    assert out[-1].startswith("mean ")
    assert "of 2 rows" in out[-1]


@pytest.mark.default_model
@pytest.mark.usefixtures("default_model")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_export_peft(run, tmp_path):
    out = run("export_peft.py", str(tmp_path / "adapter"))  # it compares logits with PEFT's itself
    assert "answer NLL: ours" in out
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()


def test_train_a_rate(run, tmp_path, llama_folder):
    """On a tiny model: what it does to the real one is `ephemera train`'s own tests' matter."""
    rows = tmp_path / "rows.jsonl"
    pairs = [{"prompt": f"the river runs past mill {i}", "answer": "to the sea"} for i in range(8)]
    rows.write_text("\n".join(map(json.dumps, pairs)))
    words = ["--output", str(tmp_path / "run"), "--samples", "16", "--model", str(llama_folder)]
    assert "network: rates from" in run("train_a_rate.py", str(rows), *words)
    assert (tmp_path / "run" / "network" / "rate.json").exists()


def test_openai_client(run):
    backbone = tiny_backbone("llama")
    with live(backbone, tiny_methods(backbone)) as (url, _):
        out = run("openai_client.py", "--base-url", f"{url}/v1", "--max-tokens", "4", "the river")
    first, second = [line for line in out.splitlines() if " steps): " in line]
    assert "(none, 0 steps)" in first
    assert "(fixed, 2 steps)" in second


def test_every_example_says_how_to_run_it():
    for path in EXAMPLES.glob("*.py"):
        assert f"python examples/{path.name}" in path.read_text().split('"""')[1], path.name


@pytest.mark.default_model
@pytest.mark.usefixtures("default_model")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_runs(path: Path):
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(notebook, timeout=200, resources={"metadata": {"path": str(path.parent)}})
    client.execute()
    said = [out for cell in notebook.cells if cell.cell_type == "code" for out in cell.outputs]
    assert any(out.output_type == "stream" and out.name == "stdout" for out in said)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_is_stored_without_outputs(path: Path):
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    assert cells
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)
