"""Talking through a pipe: answers on stdout, everything else on stderr."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from ephemera.cli import app
from ephemera.model import AdaptiveLM


@pytest.fixture
def talk(llama_folder):
    def run(lines: str, *options: str):
        command = ["chat", "--model", str(llama_folder), "--rate", "0.5", "--max-tokens", "12", *options]
        return CliRunner().invoke(app, command, input=lines, catch_exceptions=False)

    return run


def test_answers_and_reasons(talk, llama_folder):
    lm = AdaptiveLM.from_pretrained(str(llama_folder), rate=0.5, chat=True)
    done = talk("The mill\n/why\n/base\n/quit\nnever read\n", "--steps", "2")
    want = [lm.generate("The mill", steps=k, max_new_tokens=12)[0] for k in (2, 0)]
    assert done.exit_code == 0
    assert done.stdout == f"{want[0]}\n{want[1]}\n"
    assert "step 1: prompt NLL" in done.stderr
    assert "step 2: prompt NLL" in done.stderr
    assert "rates q 0.5 to 0.5, v 0.5 to 0.5" in done.stderr
    assert "after 2 steps" in done.stderr


def test_the_conversation_goes_on(talk, llama_folder):
    lm = AdaptiveLM.from_pretrained(str(llama_folder), rate=0.5)
    done = talk("The mill\n/steps 0\nAnd the sea?\n", "--steps", "1")
    first = AdaptiveLM(lm.backbone, rate=0.5, chat=True).generate("The mill", steps=1, max_new_tokens=12)[0]
    messages = [("user", "The mill"), ("assistant", first), ("user", "And the sea?")]
    text = lm.backbone.tokenizer.apply_chat_template(
        [{"role": r, "content": c} for r, c in messages], tokenize=False, add_generation_prompt=True
    )
    second = lm.generate(text.removeprefix("<s>"), steps=0, max_new_tokens=12)[0]
    assert done.stdout == f"{first}\n{second}\n"


def test_no_network_is_missed_without_steps(llama_folder):
    command = ["chat", "--model", str(llama_folder), "--max-tokens", "4"]
    done = CliRunner().invoke(app, [*command, "--steps", "0"], input="The mill\n/steps 1\n", catch_exceptions=False)
    assert done.exit_code == 0
    assert done.stdout.strip()
    assert "no network ships" not in done.stderr
    assert "1 steps need a rate" in done.stderr
    assert "no network ships" in CliRunner().invoke(app, command, input="", catch_exceptions=False).stderr


def test_mistakes_are_said_and_survived(talk):
    done = talk("/why\n/base\n/steps x\n/frob\n/help\nThe mill\n")
    assert done.exit_code == 0
    for words in (
        "nothing was answered yet",
        "nothing was asked yet",
        "/steps takes a number",
        "no command /frob",
        "\n/base: the last",
    ):
        assert words in done.stderr
    assert done.stdout.strip()
