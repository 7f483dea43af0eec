"""Text that is none, prompts without tokens, chats that a template refuses: one line that says so, everywhere."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from ephemera import cli
from ephemera.llm.tokenize import encode_answer, encode_chat, encode_prompt
from ephemera.model import AdaptiveLM
from ephemera.scoring import encode_examples
from ephemera.tasks import Example, load_dataset
from tiny_models import CHAT_TEMPLATE, save_tiny, tiny_backbone, tiny_tokenizer

HALF = "Good \ud83d"
SAID = r"is not valid Unicode: it has a lone surrogate, \\ud83d, at character 6\. Take it out"
REFUSES = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
NO_SYSTEM = (
    "this model's chat template takes no system message (System role not supported). Leave it out, put its words"
)


@pytest.fixture
def run(monkeypatch, capsys):
    def run(*words: str, stdin: bytes = b"") -> tuple[int | str | None, str, str]:
        monkeypatch.setattr(sys, "argv", ["ephemera", *words])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="ascii"))
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return stop.value.code, *capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def refusing(tmp_path_factory) -> Path:
    """A model whose chat template takes no system message."""
    folder = save_tiny(tmp_path_factory.mktemp("refusing"))
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = REFUSES + CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


# --- lone surrogates ---


@pytest.mark.parametrize("chat", [False, True])
def test_the_library(llama, chat):
    lm = AdaptiveLM(llama, rate=0.1, chat=chat)
    calls = [lm.encode, lambda p: lm.adapt([p]), lambda p: lm.generate(["The mill", p], steps=0)]
    calls += [lambda p: lm.answer_nll("The mill", p), lambda p: lm.answer_nll(p, "runs"), lm.reply]
    for call in calls:
        with pytest.raises(ValueError, match=SAID):
            call(HALF)
    with pytest.raises(ValueError, match=SAID):
        encode_chat(llama.tokenizer, [{"role": "user", "content": [{"type": "text", "text": HALF}]}])


def test_arguments_files_and_standard_input(run, llama_folder, tmp_path):
    asked = ["answer", "--model", str(llama_folder), "--steps", "0", "--max-new-tokens", "2"]
    lines, text = tmp_path / "p.jsonl", tmp_path / "p.txt"
    lines.write_text('{"prompt": "The mill"}\n{"prompt": "Good \\ud83d"}\n')
    text.write_bytes(b"caf\xe9")
    byte = r"lone surrogate, \udce9, at character 4, read from the byte 0xe9, which is not UTF-8."
    for words, stdin, place, what in (
        ([*asked, "--file", str(lines)], b"", f"{lines}:2: the prompt", r"lone surrogate, \ud83d, at character 6."),
        ([*asked, "--file", str(text)], b"", str(text), byte),
        (asked, b"caf\xe9", "standard input", byte),
        ([*asked, "caf\udce9"], b"", "the prompt", byte),
        (["try", "--model", str(llama_folder), "caf\udce9"], b"", "the prompt", byte),
        (["export", "--model", str(llama_folder), "-o", str(tmp_path / "a"), "caf\udce9"], b"", "the prompt", byte),
        (["chat", "--model", str(llama_folder), "--system", "caf\udce9"], b"", "--system", byte),
    ):
        code, out, err = run(*words, stdin=stdin)
        assert (code, out) == (2, "")
        assert err == (
            f"ephemera: {place} is not valid Unicode: it has a {what} Take it out, or give the whole character as UTF-8.\n"
        )


def test_utf_8_is_read_whatever_the_locale(run, llama_folder, tmp_path):
    words = ["answer", "--model", str(llama_folder), "--steps", "0", "--max-new-tokens", "2", "--json"]
    (tmp_path / "p.txt").write_bytes("café 🙂".encode())
    for code, out, _ in (run(*words, stdin="café 🙂".encode()), run(*words, "--file", str(tmp_path / "p.txt"))):
        assert code == 0
        assert json.loads(out)["prompt"] == "café 🙂"


def test_a_chat_goes_on_after_one(llama_folder):
    command = ["chat", "--model", str(llama_folder), "--steps", "0", "--max-tokens", "8"]
    done = CliRunner().invoke(cli.app, command, input=b"caf\xe9\nThe mill\n", catch_exceptions=False)
    lm = AdaptiveLM.from_pretrained(str(llama_folder), chat=True)
    assert done.stdout == f"{lm.generate('The mill', steps=0, max_new_tokens=8)[0]}\n"
    assert "the text is not valid Unicode" in done.stderr


@pytest.mark.parametrize(
    ("task", "row", "what"),
    [
        ("own", {"prompt": HALF, "answer": "a"}, "prompt"),
        ("own", {"prompt": "a", "answer": HALF}, "answer"),
        (
            "openbookqa",
            {"question_stem": "q", "choices": {"text": ["a", HALF], "label": ["A", "B"]}, "answerKey": "A"},
            "",
        ),
    ],
)
def test_rows_name_their_place(task, row, what, tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=rf"rows\.jsonl:1: the {what or '(prompt|choice)'} is not valid Unicode"):
        load_dataset(task, source=str(tmp_path / "rows.jsonl"))


def test_lm_eval():
    harness = pytest.importorskip("ephemera.evaluation.lm_eval")
    lm = object.__new__(harness.EphemeraLM)
    lm.tokenizer = tiny_tokenizer()
    with pytest.raises(ValueError, match=SAID):
        lm.tok_encode(HALF, add_special_tokens=True)
    lm.tokenizer.chat_template = "{{ raise_exception('no') }}"
    with pytest.raises(ValueError, match="chat template refuses these messages: no"):
        lm.apply_chat_template([{"role": "user", "content": "a"}])


# --- prompts that become no tokens ---


@pytest.fixture
def dropping():
    """A tiny model whose tokenizer drops "~" and knows no BOS."""
    made = Tokenizer(models.WordLevel({"<unk>": 0, "mill": 1, "sea": 2}, unk_token="<unk>"))
    made.normalizer = normalizers.Replace("~", "")
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    backbone = tiny_backbone()
    backbone.tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>")
    return backbone


def test_no_tokens(dropping):
    lm = AdaptiveLM(dropping, rate=0.1)
    assert lm.encode("~ mill") == [1]
    for call in (lm.encode, lm.adapt, lambda p: lm.generate(p, steps=0), lambda p: lm.answer_nll(p, "sea")):
        with pytest.raises(
            ValueError, match="the prompt has no tokens: this model's tokenizer drops all of its characters"
        ):
            call("~~")
    with pytest.raises(ValueError, match="the answer '~' has no tokens"):
        lm.answer_nll("mill", "~")
    with pytest.raises(ValueError, match=r"f\.jsonl:3: the prompt '~' has no tokens"):
        encode_examples(dropping, [Example("1", "~", "sea", place="f.jsonl:3")], chat=False, max_tokens=9)


# --- templates that refuse ---


def test_the_system_message_is_named():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = REFUSES + CHAT_TEMPLATE
    plain = encode_prompt(tokenizer, "The mill", chat=True)
    assert plain == encode_prompt(tiny_tokenizer(), "The mill", chat=True)
    for encode in (
        lambda: encode_prompt(tokenizer, "The mill", chat=True, system="Be brief."),
        lambda: encode_answer(tokenizer, "The mill", "runs", chat=True, system="Be brief."),
        lambda: encode_chat(tokenizer, [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]),
    ):
        with pytest.raises(ValueError, match="takes no system message") as said:
            encode()
        assert str(said.value).startswith(NO_SYSTEM)
    tokenizer.chat_template = "{{ raise_exception('turns must alternate.\nReally') }}"
    with pytest.raises(
        ValueError, match=r"^this model's chat template refuses these messages: turns must alternate\.$"
    ):
        AdaptiveLM(tiny_backbone_with(tokenizer), chat=True).encode("a")
    tokenizer.chat_template = "{{ messages[0]['content'] + 1 }}"  # jinja2 lets Python's own errors through
    with pytest.raises(ValueError, match="refuses these messages: can only concatenate str"):
        encode_prompt(tokenizer, "a", chat=True)


def tiny_backbone_with(tokenizer):
    backbone = tiny_backbone(dtype=torch.float32)
    backbone.tokenizer = tokenizer
    return backbone


def test_commands_say_it_in_one_line(run, refusing, tmp_path):
    row = {"question": "is it", "passage": "It is.", "answer": True}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n" + json.dumps({**row, "passage": "It was."}) + "\n")
    data = ["--set", f"data.source={tmp_path / 'rows.jsonl'}", "--set", "data.format=chat"]
    output = ["--set", f"output={tmp_path / 'run'}"]
    train = [f"{part}.{key}" for part in ("train", "validation")
             for key in (f"source={tmp_path / 'rows.jsonl'}", "task=boolq", "format=chat")]  # fmt: skip
    for words in (
        ["chat", "--model", str(refusing), "--system", "Be brief."],
        ["evaluate", "--set", f"model.name={refusing}", "--set", "data.task=boolq", "--set", "methods=[none]", *data, *output],
        ["benchmark", "--set", f"models=[{{name: {refusing}}}]", "--set", "data.tasks=[{task: boolq}]",
         "--set", "variants=[{name: base}]", *data, *output],
        ["train", "scalenet", "--set", f"model.name={refusing}", *output, *(w for s in train for w in ("--set", s))],
    ):  # fmt: skip
        code, out, err = run(*words, stdin=b"hi\n")
        assert (code, out) == (2, ""), words
        assert err.startswith(f"ephemera: {NO_SYSTEM}")
        assert len(err.splitlines()) == 1
    code, out, _ = run("chat", "--model", str(refusing), "--max-tokens", "2", stdin=b"hi\n")
    assert code == 0
    assert out


def test_answer_chat_of_a_template_that_wants_a_system_message(run, refusing, tmp_path):
    folder = save_tiny(tmp_path / "m")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% if messages[0]['role'] != 'system' %}{{ raise_exception('say who I am') }}{% endif %}"
    tokenizer.save_pretrained(folder)
    code, out, err = run("answer", "--chat", "--model", str(folder), "--rate", "0.1", "hi")
    assert (code, out) == (2, "")
    assert err == "ephemera: this model's chat template refuses these messages: say who I am.\n"
