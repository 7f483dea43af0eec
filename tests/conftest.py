"""Fixtures; what they are made of stands in tiny_models.py."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: no test reaches a hub

from pathlib import Path

import pytest
import torch

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
