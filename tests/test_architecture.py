"""The shape of the code itself: which module may know which."""

import ast
from pathlib import Path

import pytest

import ephemera

SRC = Path(ephemera.__file__).parent
# From the ground up; a module may import what stands before it, a package's modules their neighbours.
LAYERS = (
    *(
        "errors",
        "files",
        "yaml_values",
        "saving",
        "made_for",
        "store",
        "precision",
        "weights",
        "gguf_header",
        "model_files",
        "packed",
        "beginnings",
        "norms",
        "lora",
        "flat",
        "llama",
        "head",
        "objective",
        "checkpoint",
        "depth",
        "projections",
        "encoding",
        "backbone",
        "window",
        "load",
        "artifact",
        "lens",
        "readout",
        "inits",
        "generator",
        "gate",
        "rates",
        "adapt",
        "decode",
        "prefill",
        "prepared",
        "guard",
        "begin",
        "export",
        "adaptation",
    ),
    *("tasks", "scoring", "settings", "config", "rows", "model", "run_info"),
    *("training", "evaluation", "serving"),
    *("bench", "doctor", "demo", "cli", "__main__"),
)
SIBLINGS = {"training", "evaluation", "serving"}
FILES = sorted(SRC.rglob("*.py"))


def part(path: Path) -> str:
    """`training` for training/loop.py, `adapt` for adapt.py, `` for the package's own __init__."""
    first = path.relative_to(SRC).parts[0].removesuffix(".py")
    return "" if first == "__init__" else first


def imports(path: Path) -> set[str]:
    """Parts of ephemera that a file imports, late imports included; `` is the package itself."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [node.module or ""]
            if node.module == "ephemera":  # from ephemera import lora, __version__
                names = [f"ephemera.{a.name}" if a.name in LAYERS else "ephemera" for a in node.names]
        else:
            continue
        found |= {[*name.split("."), ""][1] for name in names if name.split(".")[0] == "ephemera"}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SRC)))
def test_imports_point_down(path):
    here = part(path)
    # The package's face is AdaptiveLM and what it needs
    level = LAYERS.index(here or "model")
    for other in imports(path):
        assert other == here or LAYERS.index(other or "model") < level or (here == "" and other == "model"), (
            f"{path.relative_to(SRC)} imports {other or 'ephemera'}"
        )
        assert not (here in SIBLINGS and other in SIBLINGS and here != other)
    if here == "tasks":
        assert imports(path) <= {"tasks", "errors", "files", "store"}


def test_every_part_has_its_place():
    assert {part(path) for path in FILES} - {""} <= set(LAYERS)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SRC)))
def test_house_rules(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 400
    assert path.name != "utils.py"
    names = {node.id for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Name)}
    assert not names & {"hasattr", "eval", "exec", "__import__"}
    modules = {alias.name for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Import) for alias in node.names}
    modules |= {node.module for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom) and node.module}
    assert not modules & {"pickle", "importlib", "dill", "joblib"}
    assert "torch.load(" not in text
    assert "torch.save(" not in text
    assert "trust_remote_code=True" not in text
