"""What is written: whole or not at all, with the umask's mode, and without NaN."""

from __future__ import annotations

import json
import os
import resource
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ephemera import artifact, cli, doctor, saving
from ephemera import downloads as store
from ephemera.cli import answer
from ephemera.model import AdaptiveLM
from ephemera.serving.engine.logprobs import NamedToken, TokenLogprob
from ephemera.serving.engine.messages import Finished, Text
from ephemera.serving.http.answers import Answering
from ephemera.training.card import read_metrics
from ephemera.training.loop import write_checkpoint
from serving_fixtures import job_for, tiny_methods
from tiny_models import save_tiny

PROMPT = "the cat sat on the mat"
ADAPTER = {"adapter_config.json", "adapter_model.safetensors"}


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


@contextmanager
def small_disk(size: int) -> Iterator[None]:
    """The system refuses to let a file grow further, as it does on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def modes(folder: Path) -> dict[str, int]:
    return {str(p.relative_to(folder)): stat.S_IMODE(p.stat().st_mode) for p in (folder, *folder.rglob("*"))}


@pytest.fixture
def lm(llama_folder) -> AdaptiveLM:
    return AdaptiveLM.from_pretrained(str(llama_folder), rate=0.5, reach="answer", device="cpu")


@pytest.fixture
def run(monkeypatch, capsys):
    def run(*words: str) -> tuple[int | str | None, str, str]:
        monkeypatch.setattr(sys, "argv", ["ephemera", *words])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return stop.value.code, *capsys.readouterr()

    return run


# --- modes ---


@pytest.mark.parametrize(
    ("mask", "file", "folder"), [(0o022, 0o644, 0o755), (0o027, 0o640, 0o750), (0o0, 0o666, 0o777)]
)
def test_modes_are_the_umasks(mask, file, folder, lm, tmp_path):
    with umask(mask):
        lm.adapt(PROMPT, steps=1).export_peft(tmp_path / "adapter")
        artifact.save(tmp_path / "network", "rate", {"a": 1}, {"w": torch.ones(2)})
        store._build(tmp_path / "model", lambda staging: save_file({"w": torch.ones(2)}, staging / "m.safetensors"))
        network = torch.nn.Linear(2, 1)
        write_checkpoint(tmp_path / "run", 1, network, torch.optim.AdamW(network.parameters()))
    for name in ("adapter", "network", "model", "run"):
        found = modes(tmp_path / name)
        assert len(found) > 1
        assert found == {path: folder if (tmp_path / name / path).is_dir() else file for path in found}
        assert any(path.endswith(".safetensors") for path in found)


# --- a full disk ---


@pytest.mark.parametrize("there", [False, True])
def test_an_export_onto_a_full_disk_leaves_nothing(there, run, llama_folder, tmp_path):
    folder = tmp_path / "new" / "adapter"
    if there:
        folder.mkdir(parents=True)
        (folder / "notes.txt").write_text("mine")
    words = ["export", "--model", str(llama_folder), "--rate", "0.5", "--output", str(folder), PROMPT]
    with small_disk(2048):
        code, out, err = run(*words)
    assert (code, out) == (2, "")
    assert err == (
        f"ephemera: cannot write {folder}: File too large. Nothing of it was kept. Free some disk space, check the "
        "permissions, or give another folder.\n"
    )
    left = [p.name for p in tmp_path.rglob("*")]
    assert sorted(left) == (["adapter", "new", "notes.txt"] if there else [])
    code, out, err = run(*words)
    assert code == 0
    assert {p.name for p in folder.iterdir()} == ADAPTER | ({"notes.txt"} if there else set())


def test_an_export_to_a_file(lm, tmp_path):
    (tmp_path / "adapter").write_text("mine")
    with pytest.raises(ValueError, match=r"cannot write .*adapter: Not a directory\. Nothing of it was kept"):
        lm.adapt(PROMPT, steps=1).export_peft(tmp_path / "adapter")
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]
    assert (tmp_path / "adapter").read_text() == "mine"


def test_another_export_replaces_the_first(lm, tmp_path):
    folder = lm.adapt(PROMPT, steps=1).export_peft(tmp_path / "adapter")
    first = load_file(folder / "adapter_model.safetensors")
    assert (folder / "adapter_config.alora.json").exists()
    lm.reach = "all"
    lm.adapt("The mill runs", steps=1).export_peft(folder)
    second = load_file(folder / "adapter_model.safetensors")
    assert any(not torch.equal(first[key], second[key]) for key in first)
    assert {p.name for p in folder.iterdir()} == ADAPTER  # no configuration or card of the first one


def test_networks_and_checkpoints_onto_a_full_disk(tmp_path):
    artifact.save(tmp_path / "network", "rate", {"a": 1}, {"w": torch.ones(2)})
    with small_disk(2048), pytest.raises(ValueError, match=r"cannot write .*network: File too large"):
        artifact.save(tmp_path / "network", "rate", {"a": 2}, {"w": torch.ones(2000)})
    assert artifact.load(tmp_path / "network", "rate", lambda config, state: (config["a"], len(state["w"]))) == (1, 2)
    network = torch.nn.Linear(2000, 1)
    with small_disk(2048), pytest.raises(ValueError, match=r"cannot write checkpoint .*File too large"):
        write_checkpoint(tmp_path / "run", 1, network, torch.optim.AdamW(network.parameters()))
    assert not [p for p in (tmp_path / "run").rglob("*") if p.is_file()]


def test_a_model_onto_a_full_disk(tmp_path, monkeypatch):
    with small_disk(2048), pytest.raises(ValueError, match=r"cannot write .*m: File too large. Nothing was kept"):
        store._build(tmp_path / "m", lambda staging: save_file({"w": torch.ones(2000)}, staging / "m.safetensors"))
    assert not list(tmp_path.iterdir())


# --- another user's cache ---


@pytest.fixture
def cached(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("EPHEMERA_HOME", str(tmp_path))
    return save_tiny(tmp_path / "models" / store.DEFAULT_MODEL)


@pytest.fixture
def forbidden(monkeypatch):
    """No open of such a file, as for another user. root may open everything, so modes would not do here."""
    opens = Path.open

    def opened(self, *args, **kwargs):
        if self.suffix == ".safetensors":
            raise PermissionError(13, "Permission denied", str(self))
        return opens(self, *args, **kwargs)

    monkeypatch.setattr(Path, "open", opened)


def test_doctor_reads_the_model(cached):
    assert doctor.check_model().fix is None
    assert doctor.check_cache().fix is None


def test_what_another_user_may_not_read(cached, forbidden, run):
    told = f"cannot read {cached / 'model.safetensors'} (Permission denied)"
    for check in (doctor.check_model(), doctor.check_cache()):
        assert check.found == told
        assert check.fix is not None
        assert check.fix.startswith("Ask its owner to run `chmod -R a+rX ")
    code, out, err = run("answer", PROMPT)
    assert (code, out) == (2, "")
    assert err == (
        f"ephemera: {told}. Ask its owner to run `chmod -R a+rX {cached}`, or set EPHEMERA_HOME to a folder of your own.\n"
    )


def test_a_local_model_that_may_not_be_read(llama_folder, forbidden, run):
    code, out, err = run("answer", "--model", str(llama_folder), PROMPT)
    assert (code, out) == (2, "")
    told = f"cannot read {llama_folder / 'model.safetensors'} (Permission denied)"
    assert err == f"ephemera: cannot load model {str(llama_folder)!r}: {told}. Ask its owner to let you read it.\n"


def test_doctor_finds_a_model_that_is_cut_short(cached):
    whole = (cached / "model.safetensors").read_bytes()
    (cached / "model.safetensors").write_bytes(whole[:-5])
    found = doctor.check_model()
    assert "is incomplete (" in found.found
    assert found.fix == f"remove {cached}; the next use fetches it again"
    (cached / "model.safetensors").write_bytes(whole)
    (cached / "tokenizer.json").write_text("{")
    assert "is incomplete (" in doctor.check_model().found
    (cached / "tokenizer.json").unlink()
    assert "is incomplete (No such file" in doctor.check_model().found


# --- numbers that are not finite ---


def strictly(text: str) -> Any:
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_json_has_null_for_them():
    value = {"a": [1.5, float("nan"), (float("inf"), {"b": -float("inf")})], "c": None, "d": "NaN", "e": True}
    assert strictly(saving.json_text(value)) == {
        "a": [1.5, None, [None, {"b": None}]],
        "c": None,
        "d": "NaN",
        "e": True,
    }


def test_answer_json(lm, capsys):
    made = lm.adapt(PROMPT, steps=2)
    lost = replace(made, prompt_nll_BK=torch.tensor([[1.5, torch.nan]]), rates_BKM=made.rates_BKM * torch.inf)
    answer._print_json(lost, 0, "a", None)
    record = strictly(capsys.readouterr().out)
    assert record["prompt_nll"] == [1.5, None]
    assert record["mean_rates"] == [None, None]


def test_bench_json(run, monkeypatch):
    monkeypatch.setattr("ephemera.bench.quick.bench", lambda *_args, **_kwargs: {"ratio": float("nan")})
    monkeypatch.setattr("ephemera.bench.quick.verdict", lambda _results: [])
    _, out, _ = run("bench", "--json")
    assert strictly(out) == {"ratio": None, "verdict": []}


def test_metrics_are_read_again_as_nan(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(saving.json_text({"step": 1, "nll": float("inf")}) + "\n")
    (line,) = read_metrics(tmp_path)
    assert line["step"] == 1
    assert line["nll"] != line["nll"]


async def _of(*events):
    for event in events:
        yield 0, event


def test_a_stream_of_the_server(llama):
    import asyncio

    base = next(m for m in tiny_methods(llama) if m.name == "none")
    job = job_for(llama, base, PROMPT)
    never = NamedToken("a", b"a", float("-inf"))
    logprobs = [TokenLogprob(never, [never])]
    answering = Answering([job], "m", chat=True, wants_logprobs=True)
    events = _of(Text(0, "a", 1, logprobs), Finished(0, "stop"))

    async def lines() -> list[str]:
        return [line async for line in answering.stream(events)]

    for line in asyncio.run(lines()):
        if line.startswith("data: {"):
            strictly(line.removeprefix("data: "))
