"""The site builds with warnings as errors, its reference is what the code gives, and its prose keeps the house rules."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [p for p in sorted((ROOT / "docs").rglob("*.md")) if "results" not in p.parts]  # those quote whole commands
WRITTEN = ("python.md", "cli.md", "configuration.md", "http.md")  # by docs/generate.py


def test_the_site_builds_strictly(tmp_path: Path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, check=False
    )
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "index.html").read_text()
    assert "An adapter for every prompt" in page
    # Nothing is fetched from another host: fonts, scripts, styles and pictures lie beside the page
    assert not re.findall(r'<(?:link|script|img)[^>]+(?:href|src)="(?:https?:)?//', page)


def test_a_broken_link_fails_the_build(tmp_path: Path):
    """The check itself: strictness is what turns a lost page into an error."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text("[lost](lost.md)\n")
    settings = (ROOT / "mkdocs.yml").read_text()
    (tmp_path / "mkdocs.yml").write_text(settings[: settings.index("\nnav:")] + "\nnav: [index.md]\n")
    command = [sys.executable, "-m", "mkdocs", "build"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "lost.md" in done.stderr


@pytest.mark.parametrize("name", WRITTEN)
def test_the_reference_is_what_the_code_gives(name: str, generated: dict[str, str]):
    page = (ROOT / "docs" / "reference" / name).read_text()
    assert page == generated[name], f"docs/reference/{name} is out of date: run `python docs/generate.py`"


@pytest.fixture(scope="module")
def generated() -> dict[str, str]:
    return runpy.run_path(str(ROOT / "docs" / "generate.py"))["pages"]()


def test_the_reference_names_everything(generated: dict[str, str]):
    """What a reader would look for is there: every public name, command, settings class and route."""
    import ephemera
    from ephemera import config

    assert all(f"\n## {name}\n" in generated["python.md"] for name in ephemera.__all__)
    for command in ("answer", "try", "export", "serve", "survey", "train scalenet", "train gate"):
        assert f" ephemera {command}\n" in generated["cli.md"]
    kinds = [name for name in config.__all__ if not name.isupper() and name[0].isupper()]
    kinds = [name for name in kinds if name not in ("Method", "Settings")]
    assert all(f"\n## {name}\n" in generated["configuration.md"] for name in kinds)
    for route in ("POST /v1/chat/completions", "POST /v1/adapt", "GET /metrics"):
        assert f"\n## {route}\n" in generated["http.md"]
    assert "| `harm_weight` | number, >= 0 | `0.0` |" in generated["configuration.md"]


def prose(page: Path) -> list[str]:
    """Lines outside of code blocks and tables."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.S | re.M)
    return [line for line in text.splitlines() if not line.lstrip().startswith("|")]


def test_the_readme_has_at_most_600_words():
    """Words that a reader sees outside of code blocks and the table; where a link leads is no word."""
    text = re.sub(r"\]\([^)]*\)", "]", "\n".join(prose(ROOT / "README.md")))
    assert len(text.split()) <= 600


@pytest.mark.parametrize(
    "page",
    [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(p for p in PAGES if p.name not in WRITTEN)],
    ids=lambda p: str(p.relative_to(ROOT)),
)
def test_prose_fits_in_130_columns(page: Path):
    assert [line for line in prose(page) if len(line) > 130] == []


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "CONTRIBUTING.md"], ids=lambda p: p.name)
def test_links_of_pages_outside_the_site_lead_somewhere(page: Path):
    for link in re.findall(r"\]\(([^)#]+)", page.read_text()):
        assert (ROOT / link).exists(), f"{page.name} links to {link}"


def keys(value: dict, *within: str) -> set[str]:
    """The keys of a JSON object, and of some objects within."""
    return set(value) | {key for part in within for key in value[part]}


def test_file_formats_name_every_key():
    """The page on file formats is written by hand; the files that ship hold nothing that it leaves out."""
    from ephemera.inits.generator import RETIRED as OF_GENERATORS
    from ephemera.rates.protocol import RETIRED

    shipped, told = ROOT / "src" / "ephemera" / "pretrained", (ROOT / "docs" / "reference" / "files.md").read_text()
    network = json.loads((shipped / "universal" / "rate.json").read_text())
    gate = json.loads((shipped / "universal" / "gate.json").read_text())
    generator = json.loads((shipped / "taskweaver" / "generator.json").read_text())
    results = json.loads((ROOT / "docs" / "results" / "nq-open" / "results.json").read_text())
    found = keys(network, "trained_for", "made_for") - set(RETIRED)
    found |= keys(gate, "calibration") | set(gate["calibration"]["calibration"])
    found |= set(generator) - set(OF_GENERATORS)
    found |= set(results) | {key for cell in results["cells"] for key in cell}
    assert {key for key in found if key not in told} == set()
