"""The command line: help that is true, one line for a mistake, answers on stdout."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path

import click
import pytest
import torch
import typer

from ephemera import cli
from ephemera.config import (
    Analyse,
    Benchmark,
    Evaluate,
    Run,
    Survey,
    TrainGate,
    TrainGenerator,
    TrainLens,
    TrainScaleNet,
    TrainTaskLora,
    load_config,
)
from ephemera.inits import LoraGenerator
from ephemera.llm.load import load_backbone

ROOT = Path(__file__).parents[2]
OURS = re.compile(r"(?:^|\| |-m |^[A-Z_]+=\S+ )ephemera ")  # not another program's argument
SETTINGS = {
    "train scalenet": TrainScaleNet,
    "train generator": TrainGenerator,
    "train lora": TrainTaskLora,
    "train lens": TrainLens,
    "train gate": TrainGate,
    "survey": Survey,
    "run": Run,
    "evaluate": Evaluate,
    "benchmark": Benchmark,
    "analyse": Analyse,
}


def commands() -> dict[str, click.Command]:
    group = typer.main.get_command(cli.app)
    found = {}

    def walk(command, name):
        subcommands = getattr(command, "commands", None)
        if subcommands is None:
            found[name] = command
        else:
            for key, sub in subcommands.items():
                walk(sub, f"{name} {key}".strip())

    walk(group, "")
    return found


def documented() -> list[str]:
    """Every `ephemera ...` line of the help pages, the README and the docs."""
    lines = []
    for command in commands().values():
        lines += [line.strip() for line in (command.epilog or "").splitlines() if "ephemera " in line]
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))):
        blocks = re.findall(r"```(?:bash|sh|console)\n(.*?)```", page.read_text(), flags=re.S)
        lines += [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if OURS.search(line)]
    return lines


@pytest.mark.parametrize("line", documented())
def test_every_documented_command_parses(line, tmp_path, monkeypatch):
    """Parsed as the shell and the program would, config files and settings included; not run."""
    words = shlex.split(line.split("|")[-1], comments=True)
    words = words[words.index("ephemera") + 1 :]
    words = [w for w in words if w not in ("&&",)]
    name, arguments = next(
        ((name, words[len(name.split()) :]) for name in commands() if words[: len(name.split())] == name.split()),
        ("", words),
    )
    assert name, f"{line!r} names no command"
    context = commands()[name].make_context(name, arguments)
    params = context.params
    kind = SETTINGS.get(name)
    if kind is not None:
        config = params["config"]
        load_config(kind, str(ROOT / config) if config else None, list(params["set_"] or []))


def test_every_command_has_examples():
    for name, command in commands().items():
        assert f"ephemera {name}" in (command.epilog or ""), name


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_shipped_config_loads(path):
    """As the setting of the command that its first lines name."""
    command = re.findall(rf"ephemera (train \w+|\w+) --config configs/{path.name}", path.read_text())[0]
    load_config(SETTINGS[command], str(path))


def run(monkeypatch, capsys, *words: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["ephemera", *words])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    out, err = capsys.readouterr()
    code = stop.value.code
    return (code if isinstance(code, int) else int(code is not None)), out, err


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["answer", "--model", "./nowhere", "x"], "no such file or folder"),
        (["answer", "--file", "nowhere.txt"], "does not exist"),
        (["answer", "--file", "a.txt", "x"], "not both"),
        (["answer", "--truncate", "right", "x"], "left"),
        (["train", "scalenet", "--set", "optimizr.samples=3"], "Did you mean 'optimizer'?"),
        (["train", "scalenet", "--set", "optimizer.samples"], "key=value"),
        (["train", "scalenet", "--config", "nowhere.yaml"], "cannot read config"),
        (["evaluate", "--set", "methods=[layerwize]"], "methods"),
        (["report", "nowhere"], "nowhere"),
        (["run", "--output", "a.jsonl"], "--input and --output are needed"),
        (["run", "--input", "nowhere.jsonl", "--output", "a.jsonl"], "does not exist"),
        (["run", "--task", "anser"], "'answer', 'score' or 'adapt'; got 'anser'"),
        (["run", "--set", "windw=3"], "Did you mean 'window'?"),
        (["run", "--steps", "2", "--rate", "none"], "give a number or a network"),
    ],
)
def test_a_mistake_is_one_clear_line(words, expected, monkeypatch, capsys):
    code, out, err = run(monkeypatch, capsys, *words)
    assert code != 0
    assert out == ""
    assert expected in err
    assert "Traceback" not in err


def test_unknown_rate_is_refused_with_the_nearest_name(llama_folder, monkeypatch, capsys):
    code, _, err = run(monkeypatch, capsys, "answer", "--model", str(llama_folder), "--rate", "scalenet-nq-opne", "x y")
    assert code == 2
    assert "Did you mean 'scalenet-nq-open'?" in err


def test_answer_writes_answers_to_stdout_alone(llama_folder, monkeypatch, capsys):
    words = ["answer", "--model", str(llama_folder), "--rate", "0.1", "--steps", "2", "--max-new-tokens", "3"]
    code, out, err = run(monkeypatch, capsys, *words, "--json", "--compare", "the cat sat on the mat")
    assert code == 0
    record = json.loads(out)
    assert set(record) == {
        "prompt",
        "answer",
        "base_answer",
        "steps",
        "reach",
        "prompt_nll",
        "mean_rates",
        "note",
        "seconds",
    }
    assert len(record["prompt_nll"]) == 2
    assert record["mean_rates"] == [0.1, 0.1]
    code, out, err = run(monkeypatch, capsys, *words, "the cat sat on the mat")
    assert out.strip() == record["answer"].strip()
    assert "prompt NLL by step" in err


def test_compare_shows_the_base_model_whatever_the_start(llama_folder, tmp_path, monkeypatch, capsys):
    backbone = load_backbone(str(llama_folder), device="cpu")
    generator = LoraGenerator(projections=backbone.projections, state_size=backbone.hidden_size, hidden_size=8)
    with torch.no_grad():
        for head in generator.B_heads:
            head[-1].bias.normal_(0, 5)
    generator.save_pretrained(tmp_path / "generator")
    words = ["answer", "--model", str(llama_folder), "--max-new-tokens", "8", "--json", "--compare"]
    _, out, _ = run(monkeypatch, capsys, *words, "--steps", "0", "the cat sat on the mat")
    base = json.loads(out)["base_answer"]
    words += ["--init", str(tmp_path / "generator")]
    _, out, _ = run(monkeypatch, capsys, *words, "the cat sat on the mat")
    record = json.loads(out)
    assert record["base_answer"] == base
    assert record["answer"] != base
    # The default rate is the zero start's
    code, out, err = run(monkeypatch, capsys, *words, "--steps", "1", "the cat sat on the mat")
    assert (code, out) == (2, "")
    assert "--steps 1 from --init" in err
    assert "needs a --rate" in err


def test_answer_reads_a_jsonl_file_and_names_a_bad_line(llama_folder, tmp_path, monkeypatch, capsys):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "the cat"}\n{"prompt": "a dog sat"}\n')
    words = ["answer", "--model", str(llama_folder), "--steps", "0", "--max-new-tokens", "2", "--json", "--file"]
    code, out, _ = run(monkeypatch, capsys, *words, str(path))
    assert code == 0
    assert [json.loads(line)["prompt"] for line in out.splitlines()] == ["the cat", "a dog sat"]
    path.write_text('{"prompt": "the cat"}\n{"text": "a dog"}\n')
    code, _, err = run(monkeypatch, capsys, *words, str(path))
    assert code == 2
    assert f"{path}:2" in err


def test_print_config_is_yaml_that_loads_again(tmp_path, monkeypatch, capsys):
    code, out, _ = run(monkeypatch, capsys, "train", "scalenet", "--set", "optimizer.samples=7", "--print-config")
    assert code == 0
    (tmp_path / "c.yaml").write_text(out)
    assert load_config(TrainScaleNet, str(tmp_path / "c.yaml")).optimizer.samples == 7


def test_export_opens_in_peft(llama_folder, tmp_path, monkeypatch, capsys):
    words = ["export", "--model", str(llama_folder), "--rate", "0.5", "--steps", "1", "-o", str(tmp_path / "adapter")]
    code, out, _ = run(monkeypatch, capsys, *words, "the cat sat on the mat")
    assert code == 0
    assert Path(out.strip()) == tmp_path / "adapter"
    assert {p.name for p in (tmp_path / "adapter").iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}


def test_models_and_doctor_say_what_is_there(monkeypatch, capsys):
    code, out, _ = run(monkeypatch, capsys, "models")
    assert "preset fast)" in out
    assert code == 0
    assert "smollm2-135m-instruct" in out
    assert "scalenet-squad" in out
    _, out, _ = run(monkeypatch, capsys, "doctor")
    assert re.search(r"^5\. ", out, flags=re.M)
