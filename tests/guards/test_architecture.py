"""The shape of the code itself: which module may know which."""

import ast
from pathlib import Path

import pytest

import ephemera

SRC = Path(ephemera.__file__).parent
# From the ground up; a module may import what stands before it, a package's modules their neighbours.
LAYERS = (
    *("messages", "files", "saving", "made_for", "downloads", "tasks", "cards", "hub", "batch"),
    *(
        "llm.precision",
        "llm.replaced",
        "llm.quantization",
        "llm.weights",
        "llm.processes",
        "llm.share",
        "llm.collectives",
    ),
    *("llm.gguf_header", "llm.model_files", "llm.tokenize", "llm.prompts", "llm.answer_end", "llm.architectures"),
    *("llm.head", "lora", "llm.cached_layers", "llm.projections", "llm.recompute", "llm.frozen_lm"),
    *("fast", "llm.parallel", "llm.window", "llm.load", "llm.prefill"),
    *("artifact", "early_exit", "prompt_loss", "gate", "inits", "rates"),
    *("peft_export", "engine_export", "adaptation", "adapt", "second_order", "prepared", "guard", "begin", "together"),
    *("scoring", "rate_search", "config", "rows", "as_generate", "model", "run_info", "cost", "plan"),
    *("training", "evaluation", "serving"),
    *("bench", "doctor", "doctor_vllm", "demo", "reproduce", "many", "cli", "__main__"),
)
SPLIT = {"llm"}  # a package whose modules have places of their own
SIBLINGS = {"training", "evaluation", "serving"}
FILES = sorted(SRC.rglob("*.py"))


def part(path: Path) -> str:
    """`training` for training/loop.py, `adapt` for adapt.py, `` for the package's own __init__."""
    return _part([*path.relative_to(SRC).with_suffix("").parts])


def _part(names: list[str]) -> str:
    if names[-1:] == ["__init__"]:
        names = names[:-1]
    return ".".join(names[: 2 if names and names[0] in SPLIT else 1])


def imports(path: Path) -> set[str]:
    """Parts of ephemera that a file imports, late imports included; `` is the package itself."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            module = node.module or ""
            names = [module]
            if (
                module.split(".")[0] == "ephemera"
            ):  # from ephemera import lora, __version__; from ephemera.fast import decode
                inner = [(module, f"{module}.{a.name}".removeprefix("ephemera.")) for a in node.names]
                names = [f"ephemera.{name}" if name in LAYERS else whole for whole, name in inner]
        else:
            continue
        found |= {_part(name.split(".")[1:]) for name in names if name.split(".")[0] == "ephemera"}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SRC)))
def test_imports_point_down(path):
    here = part(path)
    # The package's face is AdaptiveLM and what it needs
    if here in SPLIT:
        assert not imports(path), f"{path.relative_to(SRC)}: what this package holds is imported by its modules' names"
        return
    level = LAYERS.index(here or "model")
    for other in imports(path):
        assert other == here or LAYERS.index(other or "model") < level or (here == "" and other == "model"), (
            f"{path.relative_to(SRC)} imports {other or 'ephemera'}"
        )
        assert not (here in SIBLINGS and other in SIBLINGS and here != other)
    if here == "tasks":
        assert imports(path) <= {"tasks", "messages", "files", "downloads"}


MAY_KNOW_FAST = {"llm.load", "bench", "fast"}  # the loader chooses it; the benchmark compares with it


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SRC)))
def test_only_the_loader_knows_the_fast_path(path):
    assert "fast" not in imports(path) or part(path) in MAY_KNOW_FAST


def test_every_part_has_its_place():
    assert {part(path) for path in FILES} - {"", *SPLIT} <= set(LAYERS)


STILL_LONG = {("fast/llama_layer.py", "forward")}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SRC)))
def test_functions_are_short_and_modules_keep_their_private_names(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = node.end_lineno - node.lineno + 1
            assert lines <= 60 or (str(path.relative_to(SRC)), node.name) in STILL_LONG, (
                f"{node.name} has {lines} lines"
            )
        elif isinstance(node, ast.ImportFrom):
            private = [a.name for a in node.names if a.name.startswith("_") and not a.name.startswith("__")]
            assert not private, f"{private} of {node.module} are not for others"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SRC)))
def test_house_rules(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 350
    assert path.name != "utils.py"
    names = {node.id for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Name)}
    assert not names & {"hasattr", "eval", "exec", "__import__"}
    modules = {alias.name for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Import) for alias in node.names}
    modules |= {node.module for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom) and node.module}
    assert not modules & {"pickle", "importlib", "dill", "joblib"}
    assert "torch.load(" not in text
    assert "torch.save(" not in text
    assert "trust_remote_code=True" not in text
