"""Fixtures; what they are made of stands in tiny_models.py."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: no test reaches a hub

import contextlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from ephemera.downloads import fetch_default_model
from ephemera.llm.frozen_lm import FrozenLM
from tiny_models import save_tiny, tiny_backbone

SHARED_DATA = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(autouse=True)
def _one_seed():
    torch.manual_seed(0)


@pytest.fixture
def llama() -> FrozenLM:
    """A tiny random Llama in float64."""
    return tiny_backbone("llama")


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The real data sets beside the checkout."""
    if not SHARED_DATA.is_dir():  # real rows have licences of their own and are not in the repository
        pytest.skip(f"real data sets are not at {SHARED_DATA}")
    return SHARED_DATA


@pytest.fixture(scope="session")
def smol() -> Any:
    """The default model's tokenizer; who changes it takes a copy."""
    try:
        folder = fetch_default_model()
    except ValueError as error:  # an offline machine that has not fetched it yet
        pytest.skip(f"the default model cannot be fetched: {error}")
    return AutoTokenizer.from_pretrained(folder)


SKIPPED: dict[str, int] = {}
HOW = {
    "real data sets": "put the real data sets beside the checkout",
    "CUDA": "run on a machine with a CUDA device",
    "Ray": "install it: pip install 'ephemera[ray]'",
    "bitsandbytes": "install it: pip install 'ephemera[bnb]'",
    "torchao": "install it: pip install 'ephemera[torchao]'",
    "browser": "install a browser: .venv/bin/playwright install chromium",
    "default model": "fetch the default model: .venv/bin/ephemera try hello",
}


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.skipped and isinstance(report.longrepr, tuple):
        reason = report.longrepr[2].removeprefix("Skipped: ")
        SKIPPED[reason] = SKIPPED.get(reason, 0) + 1


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    """The last lines: what was skipped, why, and how to get it."""
    for reason, count in sorted(SKIPPED.items()):
        how = next((fix for word, fix in HOW.items() if word in reason), "")
        print(f"SKIPPED {count}: {reason}{'; ' + how if how else ''}")


# rouge_score loads absl, whose handler closes the stream it was made with once uvicorn configures logging: not pytest's
with contextlib.suppress(ModuleNotFoundError):
    from absl import logging as absl_logging

    absl_logging.get_absl_handler().python_handler.stream = sys.__stderr__  # pyright: ignore[reportAttributeAccessIssue]
