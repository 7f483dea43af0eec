"""Python blocks of the README and the site run, in order, one namespace a page."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ephemera.downloads import DEFAULT_MODEL, home

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
SKIP = "# skip: "  # first line of a block that is not run, with the reason


def blocks(page: Path) -> list[tuple[int, str]]:
    """(line, text) of each Python block."""
    text = page.read_text()
    found = re.finditer(r"^```python\n(.*?)^```", text, flags=re.S | re.M)
    return [(text.count("\n", 0, match.start(1)), match[1]) for match in found]


def runnable() -> list:
    """Pages with Python blocks; those that load the default model are marked so."""
    params = []
    for page in PAGES:
        code = [text for _, text in blocks(page) if not text.startswith(SKIP)]
        if code:
            marks = [pytest.mark.default_model] if any(DEFAULT_MODEL in text for text in code) else []
            params.append(pytest.param(page, id=str(page.relative_to(ROOT)), marks=marks))
    return params


@pytest.mark.parametrize("page", runnable())
def test_the_blocks_of_a_page_run(page: Path, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch):
    if request.node.get_closest_marker("default_model") and not (home() / "models" / DEFAULT_MODEL).exists():
        pytest.skip("the default model is not fetched yet (`ephemera doctor`)")
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "__main__"}
    for line, text in blocks(page):
        if not text.startswith(SKIP):
            # As many empty lines before it as stand before it on the page: a traceback names the page's line
            exec(compile("\n" * line + text, str(page), "exec"), names)


def test_what_is_skipped_says_why():
    skipped = [text for page in PAGES for _, text in blocks(page) if text.startswith(SKIP)]
    assert all(len(text.splitlines()[0]) > len(SKIP) + 10 for text in skipped)
    assert len(skipped) <= 2  # a server's client, which examples/openai_client.py runs, and a push to the hub


def test_enough_pages_have_blocks():
    """That blocks are found at all."""
    ids = {param.id for param in runnable()}
    assert {"README.md", "docs/quick-start.md", "docs/concepts/loop.md", "docs/contributing/add-a-rate.md"} <= ids
