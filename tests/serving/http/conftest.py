"""A live server of a tiny model, which tests of its clients share."""

from __future__ import annotations

import pytest

from ephemera.serving.http.requests import Limits
from serving_fixtures import live, tiny_methods
from tiny_models import tiny_backbone


@pytest.fixture(scope="module")
def served():
    """(address, model, methods by name, engine)"""
    backbone = tiny_backbone("llama")
    known = tiny_methods(backbone)
    with live(backbone, known, limits=Limits(90, 16, 8, 60)) as (url, engine):
        yield url, backbone, {m.name: m for m in known}, engine
