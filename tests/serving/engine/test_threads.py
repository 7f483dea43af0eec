"""Work on a passing thread: its result, its error, and that the thread is gone afterwards."""

import threading

import pytest
from typer.testing import CliRunner

from ephemera.cli import app
from ephemera.llm.load import load_backbone
from ephemera.model import AdaptiveLM
from ephemera.serving.engine import methods
from ephemera.serving.engine.scheduler import Engine
from ephemera.serving.engine.threads import in_passing_thread


def test_the_result_comes_from_a_thread_that_is_gone():
    thread = in_passing_thread(threading.current_thread)
    assert thread is not threading.current_thread()
    assert not thread.is_alive()  # and with it its pool of workers


def test_an_error_arrives_as_it_was_raised():
    def fail():
        raise ValueError("no such model")

    with pytest.raises(ValueError, match="no such model"):
        in_passing_thread(fail)


def test_making_an_engine_runs_the_model_on_another_thread(llama_folder):
    backbone = load_backbone(str(llama_folder), device="cpu")
    ran = []
    backbone.decoder.register_forward_hook(lambda *_: ran.append(threading.current_thread()))
    Engine(backbone)
    assert ran
    assert threading.current_thread() not in ran


@pytest.mark.parametrize("words", [["serve", "--port", "0"], ["chat"]])
def test_commands_load_on_another_thread(words, monkeypatch):
    """Rates too: making a network computes in parallel."""
    loaded = []

    def note(*_args, **_kwargs):
        loaded.append(threading.current_thread())
        raise ValueError("seen enough")

    monkeypatch.setattr(AdaptiveLM, "from_pretrained", note)
    monkeypatch.setattr(methods, "offer", note)
    CliRunner().invoke(app, words)
    assert loaded
    assert threading.current_thread() not in loaded
