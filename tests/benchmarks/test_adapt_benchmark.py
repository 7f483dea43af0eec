"""The benchmark: its JSON, its comparison with PEFT, and its count of operations."""

from __future__ import annotations

import json
from pathlib import Path

import benchmarks.adapt
import benchmarks.memory
import benchmarks.peers
import pytest
import torch

from ephemera.bench import floor, timing
from ephemera.bench.contenders import PeftLoop, adapt_batched, encoded, initial_lora, max_relative_difference
from ephemera.bench.floor import Floor, count
from ephemera.bench.prompts import examples
from ephemera.llm.load import load_backbone
from ephemera.llm.precision import multiplies_bfloat16
from tiny_models import tiny_backbone

NATIVE = multiplies_bfloat16()
KEYS = {"vs_peft_float32", "vs_peft_bfloat16", "vs_floor_float32", "vs_floor_bfloat16"}


def bench(folder: Path, *more: str) -> int:
    settings = ["--model", str(folder), "--lengths", "short", "--repeats", "1", "--threads", "1", "--minutes", "1"]
    return benchmarks.adapt.main([*settings, *more])


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
def test_the_last_line_is_one_json_object(llama_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert bench(llama_folder, "--json", "--batch", "3", "--output", str(tmp_path)) == 0
    out, err = capsys.readouterr()
    results = json.loads(out.splitlines()[-1])
    assert set(results) == {"short", "details"}
    assert set(results["short"]) == KEYS
    assert all(value > 0 for key, value in results["short"].items() if key.endswith("float32") or NATIVE)
    float32 = results["details"]["cells"][0]
    assert (float32["dtype"], len(float32["tokens"])) == ("float32", 3)
    assert float32["max_relative_difference"] < 1e-4
    assert 0 < float32["exact"]["ephemera"] < 1e-4
    assert float32["exact"]["prompts"] == 2
    assert json.loads((tmp_path / "results.json").read_text()) == results
    assert "ephemera against it" in err  # the table stays out of the way of the JSON
    assert (tmp_path / "results.md").read_text().strip() in err


@pytest.mark.usefixtures("one_thread")
def test_all_peers_end_in_the_same_adapters(llama_folder: Path, capsys: pytest.CaptureFixture[str]):
    assert bench(llama_folder, "--json", "--batch", "3", "--dtypes", "float32", "--peers", "vmap,einsum") == 0
    results = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(results["short"]) == {"vs_peft_float32", "vs_floor_float32", "vs_vmap_float32", "vs_einsum_float32"}
    (cell,) = results["details"]["cells"]
    assert all(0 < cell[peer]["max_relative_difference"] < 1e-4 for peer in ("peft", "vmap", "einsum"))


@pytest.mark.usefixtures("one_thread")
def test_another_peer_that_moves_otherwise_is_an_error(
    llama_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(benchmarks.peers, "RATE", 0.04)
    assert bench(llama_folder, "--batch", "2", "--dtypes", "float32", "--peers", "einsum") == 1
    assert "differ from those of einsum on short prompts (" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.usefixtures("one_thread")
def test_other_adapters_than_pefts_are_an_error(
    llama_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def one_step_short(backbone, prompts, steps):
        return adapt_batched(backbone, prompts, steps - 1)

    monkeypatch.setattr(benchmarks.adapt, "adapt_batched", one_step_short)
    assert bench(llama_folder, "--batch", "2", "--dtypes", "float32") == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: float32 adapters of ephemera differ from those of peft on short prompts (")
    assert "and a float64 loop's on short prompts (" in last


@pytest.mark.usefixtures("one_thread")
def test_a_cpu_without_bfloat16_is_not_measured_in_it(
    llama_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(timing, "multiplies_bfloat16", lambda: False)
    assert bench(llama_folder, "--json", "--batch", "2") == 0
    out, err = capsys.readouterr()
    results = json.loads(out.splitlines()[-1])
    assert set(results["short"]) == KEYS
    assert results["short"]["vs_peft_bfloat16"] is None
    assert "without bfloat16, for which this CPU has no instructions" in err


def test_rows_keep_their_order_and_move_as_in_peft(llama_folder: Path):
    backbone = load_backbone(str(llama_folder), dtype="float32", device="cpu")
    prompts = [[5, 9, 6, 200, 17, 4], [7, 30, 12, 90], [40, 41, 42, 43, 44, 45, 46, 47, 48], [3, 250, 77, 8, 60]]
    initial = initial_lora(backbone, prompts)
    want = PeftLoop(backbone).adapt_all(prompts, initial, 2)
    assert max_relative_difference(adapt_batched(backbone, prompts, 2), want) < 1e-5
    assert max_relative_difference(initial, want) > 0.1


def test_operations_are_counted_as_by_hand(monkeypatch: pytest.MonkeyPatch):
    """A Llama with D=32, 4 heads of 8, 2 key-value heads, MLP 40, 2 layers, 320 words."""
    lengths = [7, 4, 9]
    backbone = tiny_backbone("llama", dtype=torch.float32)
    work = count(backbone, [[5] * n for n in lengths])
    N, D, kv, mlp, V = sum(lengths), 32, 16, 40, 320
    whole_layer = 2 * N * (D * D + 2 * D * kv + D * D + 3 * D * mlp)
    head = 2 * (N - 3) * D * V
    below_the_first_adapter = 2 * N * (D * D + 2 * D * kv)  # its query, key and value read the embedding
    assert work.linear_flops == 2 * (2 * whole_layer + head) - below_the_first_adapter
    # Scores and their use: D multiplications each for every (query, key) pair; twice as many back, less dK of layer 0
    pair_sums = sum(t for n in lengths for t in range(1, n + 1))
    assert work.attention_flops == 2 * pair_sums * D * (2 * 2 + 4 + 3)
    assert work.flops == work.linear_flops + work.attention_flops
    # Products of two seconds each: attention takes as long for an operation as they do
    monkeypatch.setattr(floor, "timed", lambda product: 2.0)
    products = sum(work.forward.values()) + sum(work.backward.values())
    seconds = 3 * 2.0 * products * work.flops / work.linear_flops
    assert Floor(work, 3, torch.float32).seconds() == pytest.approx(seconds)


def test_prompts_are_the_same_every_time_and_differ():
    for length in ("short", "long"):
        prompts = [e.prompt for e in examples(length, 8)]
        assert prompts == [e.prompt for e in examples(length, 16)][:8]
        assert len(set(prompts)) == 8
        assert len({len(p.split()) for p in prompts}) > 1


@pytest.mark.parametrize("who", ["ephemera", "peft", "step", "scalenet"])
@pytest.mark.usefixtures("one_thread")
def test_peak_memory_is_what_the_system_says(
    who: str, llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "status").write_text("Name:\tpython\nVmHWM:\t 1500 kB\nVmRSS:\t 1000 kB\n")
    (tmp_path / "clear_refs").touch()
    monkeypatch.setattr(benchmarks.memory, "STATUS", tmp_path / "status")
    monkeypatch.setattr(benchmarks.memory, "CLEAR_REFS", tmp_path / "clear_refs")
    sizes = {"model": str(llama_folder), "dtype": "float32", "length": "short", "batch": 2, "steps": 2, "threads": 1}
    found = benchmarks.memory.run(who=who, **sizes)
    assert (found["loaded_bytes"], found["peak_bytes"]) == (1000 * 1024, 500 * 1024)
    assert (tmp_path / "clear_refs").read_text() == "5", "the peak starts anew when the model is loaded"
    backbone = load_backbone(str(llama_folder), dtype="float32", device="cpu")
    prompts = [row.prompt for row in encoded(backbone, "short", 2)]
    assert found["gradient_bytes"] == sum(4 * t.numel() for t in initial_lora(backbone, prompts).tensors)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["--dtypes", "float16"], "unknown dtype 'float16'. Did you mean 'bfloat16'?"),
        (["--lengths", "shrot"], "unknown length 'shrot'. Did you mean 'short'?"),
        (["--batch", "0"], "--batch is 0; it must be 1 or more."),
        (["--steps", "x"], "invalid int value: 'x'"),
        (["--peers", "vmpa"], "unknown peer 'vmpa'. Did you mean 'vmap'?"),
        (["--bogus"], "unrecognized arguments: --bogus"),
        (["--model", "/no/such/folder"], "cannot load model '/no/such/folder'"),
    ],
)
def test_a_mistake_is_one_line(wrong: list[str], said: str, capsys: pytest.CaptureFixture[str]):
    assert benchmarks.adapt.main(wrong) == 2
    out, err = capsys.readouterr()
    assert not out
    assert said in err.splitlines()[-1]
