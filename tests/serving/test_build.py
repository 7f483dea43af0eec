"""The application from settings alone, against the library."""

from __future__ import annotations

from pathlib import Path

import pytest

from ephemera import AdaptiveLM
from ephemera.config import Serve, check_config

pytest.importorskip("fastapi", reason="FastAPI is not installed")

from fastapi.testclient import TestClient

from ephemera.serving.build import build


def settings(folder: Path, **values) -> Serve:
    model = {"name": str(folder), "dtype": "float32", "device": "cpu"}
    return check_config(Serve, {"model": model, "rates": ["0.2"], **values})


def test_an_application_from_its_settings(llama_folder: Path):
    seen = []
    app = build(
        settings(llama_folder, api_keys=["first"], max_tokens=9, steps=2), lambda lm, known: seen.append((lm, known))
    )
    ((lm, known),) = seen
    assert [method.name for method in known] == ["none", "fixed"]
    with TestClient(app, headers={"Authorization": "Bearer first"}) as client:
        ask = {"model": f"{llama_folder.name}:fixed", "prompt": "The river", "temperature": 0}
        made = client.post("/v1/completions", json=ask).json()
        assert (
            made["choices"][0]["text"]
            == AdaptiveLM(lm.backbone, rate=0.2).generate("The river", steps=2, max_new_tokens=9)[0]
        )
        assert made["ephemera"]["steps"] == 2
        assert client.post("/v1/completions", json={**ask, "max_tokens": 10}).status_code == 413
        assert client.get("/v1/models", headers={"Authorization": "Bearer second"}).status_code == 401
        assert client.get("/ready").status_code == 200


def test_mistakes_are_told_before_anything_listens(llama_folder: Path):
    with pytest.raises(ValueError, match="unknown rate 'nowhere'"):
        build(settings(llama_folder, rates=["nowhere"]))
    with pytest.raises(ValueError, match=r"replicas: most=1 is less than number=2"):
        check_config(Serve, {"replicas": {"number": 2, "most": 1}})
    assert "first" not in repr(Serve(api_keys=["first"]))
