"""answer, try and chat: which network is the default, what is said where there is none, and the two answers compared."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from ephemera import cli, rates
from ephemera.cli.compare import compared
from ephemera.llm.frozen_lm import describe
from ephemera.llm.load import load_backbone
from ephemera.made_for import MadeFor
from ephemera.model import AdaptiveLM
from ephemera.rates import PerProjectionRate, load_rate
from tiny_models import tiny_backbone

PROMPT = "the cat sat on the mat"


@pytest.fixture
def run(monkeypatch, capsys):
    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["ephemera", *words])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out, err = capsys.readouterr()
        return (stop.value.code if isinstance(stop.value.code, int) else 1), out, err

    return run


@pytest.fixture
def ships(llama_folder, tmp_path, monkeypatch) -> str:
    """A model for which a network of each format ships; its folder."""
    backbone = load_backbone(str(llama_folder), device="cpu")
    for format, bold in (("chat", 30.0), ("plain", 60.0)):
        made_for = MadeFor(("squad",), format=format, reach="answer", steps=2)
        rate = PerProjectionRate(
            projections=4, base_rates=[bold, 1.0], trained_for=describe(backbone), made_for=made_for
        )
        rate.save_pretrained(tmp_path / format)
    names = {format: str(tmp_path / format) for format in ("chat", "plain")}
    monkeypatch.setattr(rates, "DEFAULT_RATES", {str(llama_folder): names})
    return str(llama_folder)


def test_the_default_is_the_network_of_the_format(ships, run, tmp_path):
    for words, format in ((["answer", "--chat"], "chat"), (["answer"], "plain")):
        code, out, err = run(*words, "--model", ships, "--max-new-tokens", "8", "--json", PROMPT)
        assert code == 0
        assert err == ""
        record = json.loads(out)
        lm = AdaptiveLM.from_pretrained(ships, rate=tmp_path / format, chat=format == "chat")
        assert record["answer"] == lm.generate(PROMPT, steps=2, max_new_tokens=8)[0]
        assert (record["steps"], record["reach"], record["note"]) == (2, "answer", None)
        assert record["mean_rates"] == pytest.approx([30.0 if format == "chat" else 60.0, 1.0])


def test_a_network_for_the_other_format_says_so(ships, run, tmp_path):
    words = "this network was trained on chat prompts of squad, with 2 steps"
    asked = ["answer", "--model", ships, "--max-new-tokens", "4", "--rate", str(tmp_path / "chat")]
    _, out, err = run(*asked, PROMPT)
    assert f"prompt 1: {words}" in err
    assert words not in out
    _, _, err = run(*asked, "--chat", PROMPT)
    assert words not in err
    _, out, err = run(*asked, "--chat", "--reach", "all", "--json", PROMPT)
    assert json.loads(out)["reach"] == "all"
    assert json.loads(out)["note"].startswith(words)


def test_no_network_ships_for_another_model(llama_folder, run):
    asked = ["answer", "--model", str(llama_folder), "--max-new-tokens", "4"]
    plain = AdaptiveLM.from_pretrained(str(llama_folder)).generate(PROMPT, steps=0, max_new_tokens=4)[0].strip()
    code, out, err = run(*asked, PROMPT)
    assert (code, out.strip()) == (0, plain)
    assert err.startswith(f"no network ships for {llama_folder} and plain prompts: answered unadapted. Give --rate")
    assert len(err.splitlines()) == 1
    _, _, err = run(*asked, "--chat", PROMPT)
    assert "and chat prompts" in err
    for silent in (["--rate", "none"], ["--steps", "0"]):
        assert run(*asked, *silent, PROMPT)[1:] == (out, "")
    code, out, err = run(*asked, "--steps", "2", PROMPT)
    assert (code, out) == (2, "")
    assert "--steps 2 cannot be taken. Give --rate" in err
    code, _, err = run(*asked, "--steps", "2", "--rate", "none", PROMPT)
    assert code == 2
    assert "with --rate none" in err


@pytest.mark.parametrize("command", ["answer", "export", "chat", "serve", "try"])
def test_an_unknown_reach(command, llama_folder, run, tmp_path):
    more = {"export": ["--output", str(tmp_path / "a"), PROMPT], "answer": [PROMPT], "try": [PROMPT]}.get(command, [])
    code, out, err = run(command, "--model", str(llama_folder), "--reach", "answers", *more)
    assert (code, out) == (2, "")
    assert err.strip() == "ephemera: unknown reach 'answers'. Did you mean 'answer'? Known: all, answer."


def test_a_network_for_another_model(ships, run, tmp_path):
    made = PerProjectionRate(
        projections=4, base_rates=[0.1], trained_for=describe(tiny_backbone("qwen2", dtype=torch.float32))
    )
    made.save_pretrained(tmp_path / "other")
    code, out, err = run("answer", "--model", ships, "--rate", str(tmp_path / "other"), PROMPT)
    assert (code, out) == (2, "")
    assert "was trained for tiny-qwen2" in err
    assert len(err.strip().splitlines()) == 1


def test_numbers_act_everywhere_unless_asked(llama_folder, run):
    asked = ["answer", "--model", str(llama_folder), "--max-new-tokens", "8", "--json", "--rate", "60"]
    told = {reach: json.loads(run(*asked, *more, PROMPT)[1]) for reach, more in
            (("all", []), ("answer", ["--reach", "answer"]))}  # fmt: skip
    for reach, record in told.items():
        assert record["reach"] == reach
        assert record["steps"] == 1
        lm = AdaptiveLM.from_pretrained(str(llama_folder), rate=60, reach=reach)
        assert record["answer"] == lm.generate(PROMPT, steps=1, max_new_tokens=8)[0]
    assert told["all"]["answer"] != told["answer"]["answer"]


def test_steps_that_raise_the_loss_are_said_to(llama_folder, run):
    asked = ["answer", "--model", str(llama_folder), "--max-new-tokens", "2"]
    bold = ("--rate", "300", "--steps", "2", "Question: who wrote the first book about the river? Answer:")
    _, _, err = run(*asked, *bold)
    assert "prompt 1: the steps raised the prompt's loss (" in err
    _, _, err = run(*asked, "--reach", "answer", *bold)  # the second step saw a lower loss than the first
    assert "prompt 1:" not in err
    _, _, err = run(*asked, "--rate", "3", PROMPT)
    assert "prompt 1:" not in err
    _, _, err = run(*asked, "--rate", "0", PROMPT)
    assert "prompt 1: the steps left the prompt's loss as it was (" in err
    _, _, err = run(*asked, "--rate", "0", "--reach", "answer", PROMPT)  # nothing left it otherwise
    assert "prompt 1:" not in err


def test_special_tokens_are_text_unless_asked(llama_folder, run):
    asked = ["answer", "--model", str(llama_folder), "--max-new-tokens", "8", "--steps", "0"]
    prompt = f"</s>{PROMPT}"
    lm = AdaptiveLM.from_pretrained(str(llama_folder))
    _, out, _ = run(*asked, prompt)
    assert out.strip() == lm.generate(prompt, steps=0, max_new_tokens=8)[0].strip()
    _, out, _ = run(*asked, "--special-tokens", prompt)
    lm.special_tokens = True
    assert len(lm.encode(prompt)) == 1 + len(lm.encode(PROMPT))
    assert out.strip() == lm.generate(prompt, steps=0, max_new_tokens=8)[0].strip()


def test_try_compares_in_the_chat_format(ships, run, tmp_path):
    code, out, err = run("try", "--model", ships, "--max-new-tokens", "8", PROMPT)
    assert code == 0
    lm = AdaptiveLM.from_pretrained(ships, rate=tmp_path / "chat", chat=True)
    base, adapted = (lm.generate(PROMPT, steps=k, max_new_tokens=8)[0] for k in (0, 2))
    assert base.strip() != adapted.strip()
    assert out == "\n".join(compared(base, adapted, bold=False)) + "\n"
    assert "2 steps on 1 prompt(s) in" in err


@pytest.mark.parametrize("reach", ["all", "answer"])
def test_both_answers_share_a_reading(reach, llama_folder, monkeypatch):
    """With reach answer the base model's answer begins where the adapted one did: each layer reads the prompt once."""
    lm = AdaptiveLM.from_pretrained(str(llama_folder), rate=60.0, reach=reach)
    prompts = [PROMPT, "The mill", "down to the old sea of 1820"]
    want = [lm.generate(prompts, steps=k, max_new_tokens=6, eos_token_id=-1) for k in (1, 0)]
    texts, adaptation = lm.reply(prompts, max_new_tokens=6)
    assert adaptation.notes == (None,) * 3
    widths = []
    lm.backbone.decoder.register_forward_pre_hook(
        lambda _m, _args, kwargs: widths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    have = lm.generate(prompts, adaptation=adaptation.unadapted(), max_new_tokens=6, eos_token_id=-1)
    assert have == want[1]
    assert widths[0] == (1 if reach == "answer" else max(len(lm.encode(p)) for p in prompts))
    assert set(widths[1:]) == {1}
    assert lm.generate(prompts, adaptation=adaptation, max_new_tokens=6, eos_token_id=-1) == want[0]  # none is used up
    assert texts != have


def test_what_changed_is_marked():
    assert compared("a b c", "a b c ") == ["base:    a b c", "adapted: = the same answer"]
    lines = compared("the cat sat", "the dog sat down", bold=True)
    assert lines == [
        "base:    the \x1b[1mcat\x1b[0m sat",
        "adapted: the \x1b[1mdog\x1b[0m sat \x1b[1mdown\x1b[0m",
        "changed: 2 of 4 words",
    ]
    assert compared("the cat sat", "the dog", bold=False)[1:] == ["adapted: the dog", "changed: 1 of 2 words"]
    assert compared("the cat sat", "the cat")[2] == "changed: 1 words left out"
    assert compared("the cat", "")[2] == "changed: an empty answer"
    assert compared("a  b", "a b")[2] == "changed: spaces only"


def test_chat_takes_the_network_for_chats(ships, tmp_path):
    from typer.testing import CliRunner

    def talk(*options: str):
        command = ["chat", "--model", ships, "--max-tokens", "8", *options]
        return CliRunner().invoke(cli.app, command, input=f"{PROMPT}\n/why\n", catch_exceptions=False)

    done = talk()
    lm = AdaptiveLM.from_pretrained(ships, rate=load_rate(tmp_path / "chat"), chat=True)
    assert done.stdout == f"{lm.generate(PROMPT, steps=2, max_new_tokens=8)[0]}\n"
    assert "step 2: prompt NLL" in done.stderr
    assert "note:" not in done.stderr
    done = talk("--rate", str(tmp_path / "plain"))
    assert "note: this network was trained on plain prompts of squad, with 2 steps" in done.stderr


def test_chat_without_a_network_says_so(llama_folder):
    from typer.testing import CliRunner

    command = ["chat", "--model", str(llama_folder), "--max-tokens", "8"]
    done = CliRunner().invoke(cli.app, command, input=f"{PROMPT}\n/steps 1\n", catch_exceptions=False)
    lm = AdaptiveLM.from_pretrained(str(llama_folder), chat=True)
    assert done.stdout == f"{lm.generate(PROMPT, steps=0, max_new_tokens=8)[0]}\n"
    assert "no network ships for" in done.stderr
    assert "1 steps need a rate" in done.stderr


@pytest.fixture
def serve(run, monkeypatch):
    """What `ephemera serve` says before it would listen, and the application that it made."""
    uvicorn = pytest.importorskip("uvicorn")
    apps = []
    monkeypatch.setattr(uvicorn.Server, "run", lambda self, sockets: apps.append(self.config.app))

    def serve(*words: str) -> tuple[str, list[dict]]:
        from fastapi.testclient import TestClient

        code, out, err = run("serve", "--port", "0", *words)
        assert (code, out) == (0, ""), err
        with TestClient(apps[-1]) as client:  # its end ends the engine
            return err, client.get("/v1/models").json()["data"]

    return serve


def test_serve_offers_what_ships(ships, serve):
    err, listed = serve("--model", ships)
    told = [(m["id"].partition(":")[2], m["format"], m["reach"], m["steps"]) for m in listed]
    assert told == [
        ("", ["chat", "plain"], None, 0),
        ("universal", ["chat", "plain"], "answer", 2),
        ("fixed", ["chat", "plain"], "all", 1),
    ]
    assert "no network ships" not in err
    _, listed = serve("--model", ships, "--steps", "1", "--reach", "all", "--rate", "0.3")
    assert [(m["steps"], m["reach"]) for m in listed] == [(0, None), (1, "all"), (1, "all")]


def test_serve_says_what_does_not_ship(ships, serve, monkeypatch):
    del rates.DEFAULT_RATES[ships]["plain"]
    err, listed = serve("--model", ships)
    assert listed[1]["format"] == ["chat"]
    assert f"no network ships for {ships} and plain prompts: those are not adapted to." in err
    monkeypatch.setattr(rates, "DEFAULT_RATES", {})
    err, listed = serve("--model", ships)
    assert [m["method"] for m in listed] == ["none", "fixed"]
    assert (
        f"no network ships for {ships} and plain and chat prompts: the model itself and a fixed rate are served." in err
    )
    assert "no network ships" not in serve("--model", ships, "--rate", "0.3")[0]


def test_adapt_writes_one_adapter_that_others_start_at(llama_folder, run, tmp_path):
    rows = tmp_path / "prompts.jsonl"
    rows.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in (PROMPT, "the mill runs", "a river")))
    model, folder = ["--model", str(llama_folder)], tmp_path / "adapter"
    code, out, err = run(
        "adapt", *model, "--prompts", str(rows), "--export", str(folder), "--rate", "9", "--steps", "2"
    )
    assert (code, out.strip()) == (0, str(folder))
    assert err.startswith("2 steps on 3 prompt(s) together in ")
    assert f"--init {folder} --reach all" in err
    code, out, _ = run("answer", *model, "--init", str(folder), "--max-new-tokens", "4", "--json", PROMPT)
    assert code == 0
    lm = AdaptiveLM.from_pretrained(str(llama_folder), rate=9)
    shared = lm.adapt_together([PROMPT, "the mill runs", "a river"], steps=2)
    made = lm.adapt(PROMPT, init=shared, steps=0)
    assert json.loads(out)["answer"] == lm.generate(PROMPT, adaptation=made, max_new_tokens=4)[0]


def test_adapt_without_a_rate_or_a_file_is_one_line(llama_folder, run, tmp_path):
    rows = tmp_path / "prompts.jsonl"
    rows.write_text(json.dumps({"prompt": PROMPT}) + "\n")
    asked = ["adapt", "--model", str(llama_folder), "--export", str(tmp_path / "adapter"), "--prompts"]
    code, _, err = run(*asked, str(rows))
    assert code == 2
    assert "there is no step to take. Give --rate" in err
    code, _, err = run(*asked, str(tmp_path / "none.jsonl"), "--rate", "1")
    assert (code, err.count("\n")) == (2, 1)
    assert not (tmp_path / "adapter").exists()


def test_quantised_weights(ships, run, serve):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    asked = ["answer", "--model", ships, "--max-new-tokens", "4", "--quantization", "int8", PROMPT]
    code, out, err = run(*asked)
    with pytest.warns(UserWarning, match="has int8 weights"):
        lm = AdaptiveLM.from_pretrained(ships, quantization="int8")
    assert (code, out.strip()) == (0, lm.generate(PROMPT, max_new_tokens=4)[0].strip())
    assert "weights are quantised (int8); passes take the " in err
    err, listed = serve("--model", ships, "--quantization", "int8")
    assert "weights are quantised (int8)" in err
    assert len(listed) == 3


@pytest.mark.parametrize("command", ["answer", "adapt", "chat", "export", "run", "serve", "try"])
def test_a_missing_package_for_quantised_weights_is_one_line(command, llama_folder, run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": PROMPT}) + "\n")
    more = {
        "adapt": ["--prompts", str(rows), "--export", str(tmp_path / "a")],
        "export": ["--output", str(tmp_path / "a"), PROMPT],
        "run": ["--input", str(rows), "--output", str(tmp_path / "out.jsonl")],
        "serve": ["--port", "0"],
        "chat": [],
    }.get(command, [PROMPT])
    code, out, err = run(command, "--model", str(llama_folder), "--quantization", "nf4", *more)
    assert (code, out) == (2, "")
    assert err.strip().splitlines()[-1] == (
        "ephemera: bitsandbytes is not installed. Get it by: pip install 'ephemera[bnb]'"
    )


@pytest.mark.parametrize("command", ["answer", "serve", "chat"])
def test_an_unknown_form_of_weights(command, llama_folder, run):
    code, _, err = run(
        command, "--model", str(llama_folder), "--quantization", "int4", *([PROMPT] * (command == "answer"))
    )
    assert (code, len(err.strip().splitlines())) == (2, 1)
    assert "int4" in err
    assert "torchao-int8" in err
