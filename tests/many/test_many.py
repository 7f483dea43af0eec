"""`ephemera run` against AdaptiveLM called row by row; stopped at every write and resumed; memory that stays flat."""

from __future__ import annotations

import gc
import gzip
import json
import os
import signal
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ephemera import AdaptiveLM
from ephemera.config import Run, check_config
from ephemera.many import output as writing
from ephemera.many.output import Output
from ephemera.many.progress import Progress
from ephemera.many.run import run
from tiny_models import SENTENCES

WORDS = " ".join(SENTENCES).split()


def rows_of(count: int) -> list[dict[str, Any]]:
    """Prompts of many lengths, long and short ones beside each other."""
    return [
        {"id": f"row {i}", "prompt": " ".join(WORDS[i % 20 : i % 20 + 1 + (7 * i) % 9]), "answer": WORDS[-1 - i % 9]}
        for i in range(count)
    ]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def settings(llama_folder: Path, source: Path, output: Path, **values: Any) -> Run:
    model = {"name": str(llama_folder), "dtype": "float32", "device": "cpu"}
    common = {"model": model, "rate": 0.1, "max_new_tokens": 4, "window": 20}
    return check_config(Run, {"input": str(source), "output": str(output), **common, **values})


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def lm(llama_folder: Path) -> AdaptiveLM:
    return AdaptiveLM.from_pretrained(str(llama_folder), rate=0.1, dtype="float32", device="cpu")


def test_answers_are_those_of_each_row_alone(llama_folder: Path, lm: AdaptiveLM, tmp_path: Path):
    rows = rows_of(50)
    path = run(settings(llama_folder, write(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl", seed=3, steps=2))
    found = lines(path)
    assert [line["id"] for line in found] == [row["id"] for row in rows]
    for line, row in zip(found, rows, strict=True):
        (text,), made = lm.reply([row["prompt"]], steps=2, seed=3, max_new_tokens=4)
        assert line["text"] == text
        assert line["prompt_nll_before"] == pytest.approx(made.prompt_nll_BK[0, 0].item(), abs=1e-4)
        assert made.after_B is not None
        assert line["prompt_nll_after"] == pytest.approx(made.after_B[0].item(), abs=1e-4)
        assert line["note"] == made.notes[0]
        assert (line["seed"], line["share"]) == (3, None)
    assert len({line["text"] for line in found}) > 10  # the model does answer differently


def test_scores_are_those_of_each_row_alone(llama_folder: Path, lm: AdaptiveLM, tmp_path: Path):
    rows = rows_of(30)
    source = write(tmp_path / "in.jsonl", rows)
    found = lines(run(settings(llama_folder, source, tmp_path / "out.jsonl", task="score", steps=1)))
    moved = 0
    for line, row in zip(found, rows, strict=True):
        made = lm.adapt([row["prompt"]], steps=1)
        nll = lm.answer_nll([row["prompt"]], [row["answer"]], adaptation=made).item()
        assert line["nll"] == pytest.approx(nll, abs=1e-4)
        moved += abs(nll - lm.answer_nll([row["prompt"]], [row["answer"]]).item()) > 1e-3
        assert "text" not in line
        after = lm.prompt_nll([row["prompt"]], made)
        assert after is not None
        assert line["prompt_nll_after"] == pytest.approx(after.item(), abs=1e-4)
    assert moved > 15  # most scores are not the base model's


def test_adapters_are_those_of_each_row_alone(llama_folder: Path, lm: AdaptiveLM, tmp_path: Path):
    rows = rows_of(24)
    source = write(tmp_path / "in.jsonl", rows)
    found = lines(run(settings(llama_folder, source, tmp_path / "out.jsonl", task="adapt", steps=1)))
    assert len({line["adapter"] for line in found}) == 24
    for i in (0, 5, 23):
        alone = lm.adapt([rows[i]["prompt"]], steps=1).export_peft(tmp_path / f"alone-{i}")
        expected = load_file(alone / "adapter_model.safetensors")
        kept = load_file(Path(found[i]["adapter"]) / "adapter_model.safetensors")
        assert set(kept) == set(expected)
        for name, tensor in expected.items():
            torch.testing.assert_close(kept[name], tensor, atol=1e-5, rtol=1e-4)
    assert Path(found[0]["adapter"]).is_relative_to(tmp_path / "out-adapters")


def test_results_do_not_depend_on_their_neighbours(llama_folder: Path, tmp_path: Path):
    rows = rows_of(40)
    source = write(tmp_path / "in.jsonl", rows)
    one = lines(run(settings(llama_folder, source, tmp_path / "one.jsonl", window=1)))
    all_ = lines(run(settings(llama_folder, write(tmp_path / "b.jsonl", rows[::-1]), tmp_path / "all.jsonl")))[::-1]
    for a, b in zip(one, all_, strict=True):
        assert a["text"] == b["text"]
        assert a["prompt_nll_before"] == (b["prompt_nll_before"] and pytest.approx(b["prompt_nll_before"], abs=1e-4))


def test_rows_of_messages_are_chats(llama_folder: Path, tmp_path: Path):
    user = {"role": "user", "content": "who wrote the book?"}
    system = {"role": "system", "content": "Give a short answer."}
    rows = [{"prompt": user["content"]}, {"messages": [user]}, {"messages": [system, user]}]
    source = write(tmp_path / "in.jsonl", rows)
    plain, chat, long = lines(run(settings(llama_folder, source, tmp_path / "out.jsonl", chat=True)))
    assert {**plain, "id": 2} == chat
    lm = AdaptiveLM.from_pretrained(str(llama_folder), rate=0.1, dtype="float32", device="cpu", chat=True)
    template: Any = lm.backbone.tokenizer
    ids = template.apply_chat_template([system, user], add_generation_prompt=True, tokenize=True)
    assert lm.encode([system, user]) == (ids if isinstance(ids, list) else ids["input_ids"])
    assert long["text"] == lm.generate([[system, user]], max_new_tokens=4)[0]
    refused = lines(run(settings(llama_folder, source, tmp_path / "plain.jsonl")))
    assert "run with --chat" in refused[1]["error"]
    assert "text" in refused[0]


BAD = [
    (b"{not json", "not valid JSON"),
    (b'["a"]', "a JSON list"),
    (b"{}", 'no "prompt" text and no "messages"'),
    (b'{"prompt": 3}', '"prompt" is a int'),
    (b'{"prompt": "  "}', "the prompt is empty"),
    (b'{"prompt": "a b", "id": [1]}', '"id" is a list'),
    (b'{"prompt": "\\ud800"}', "lone surrogate"),
    (b'{"prompt": "\xff"}', "not UTF-8 at byte 13"),
    (b'{"prompt": "a", "messages": []}', 'both a "prompt" and "messages"'),
    (b'{"messages": [{"role": "user"}]}', 'lacks a "role" or a "content"'),
    (b'{"id": "long", "prompt": "' + b"river " * 200 + b'"}', "takes 92"),
    (b'{"prompt": ' + b"[" * 100_000 + b"}", "nested too deeply"),
    (b'{"prompt": "a", "id": ' + b"9" * 5000 + b"}", "a number too long"),
]


def test_a_bad_row_is_a_line_with_its_error_and_stops_nothing(llama_folder: Path, tmp_path: Path, capsys):
    source = tmp_path / "in.jsonl"
    good = b'{"prompt": "The river runs past", "id": 7}'
    source.write_bytes(b"\xef\xbb\xbf" + good + b"\r\n\n" + b"\n".join(line for line, _ in BAD) + b"\n" + good)
    found = lines(run(settings(llama_folder, source, tmp_path / "out.jsonl", window=4)))
    assert len(found) == len(BAD) + 2
    for number, (line, (_, words)) in enumerate(zip(found[1:-1], BAD, strict=True), 3):
        assert words in line["error"], line
        assert line["error"].startswith(f"line {number}: ")
        assert line["id"] == ("long" if "takes" in words else number)
    assert found[0] == found[-1]
    assert found[0]["text"]
    assert capsys.readouterr().err.splitlines()[-1] == f"{tmp_path}/out.jsonl: 15 rows, 13 with an error."


def test_a_row_without_an_answer_cannot_be_scored(llama_folder: Path, tmp_path: Path):
    rows = [{"prompt": "The river"}, {"prompt": "The river", "answer": " "}, {"prompt": "The river", "answer": "runs"}]
    found = lines(run(settings(llama_folder, write(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl", task="score")))
    assert 'no "answer" text' in found[0]["error"]
    assert "is empty" in found[1]["error"]
    assert found[2]["nll"] > 0


def test_text_and_gzip(llama_folder: Path, tmp_path: Path):
    prompts = [row["prompt"] for row in rows_of(30)]
    (tmp_path / "in.txt").write_text("\n\n".join(prompts))
    write(tmp_path / "in.jsonl", [{"prompt": prompt} for prompt in prompts])
    (tmp_path / "zip.jsonl.gz").write_bytes(gzip.compress((tmp_path / "in.jsonl").read_bytes()))
    text, rows, zipped = (
        lines(run(settings(llama_folder, tmp_path / name, tmp_path / f"{name}.out", window=8)))
        for name in ("in.txt", "in.jsonl", "zip.jsonl.gz")
    )
    assert rows == zipped
    assert [line["id"] for line in text] == list(range(1, 60, 2))  # every second line is blank
    assert [line["text"] for line in text] == [line["text"] for line in rows]


class Crash(BaseException):
    """As sudden as a kill: nothing in the program handles it."""


def resumed(config: Run, monkeypatch, at: int, *, torn: int) -> None:
    """A run that dies at its n-th write, of which so many last bytes are lost; then goes on."""
    count = 0
    real = os.fsync

    def fsync(descriptor: int) -> None:
        nonlocal count
        count += 1
        if count == at:
            if torn:
                os.ftruncate(descriptor, max(0, os.fstat(descriptor).st_size - torn))
            raise Crash
        real(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(writing.os, "fsync", fsync)
        with pytest.raises(Crash):
            run(config)
    run(config)


@pytest.fixture(scope="module")
def whole(llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    """An input with a bad row, and the bytes of a run that nothing stopped."""
    folder = tmp_path_factory.mktemp("whole")
    source = write(folder / "in.jsonl", [*rows_of(49), {"no": "prompt"}])
    return source, run(settings(llama_folder, source, folder / "out.jsonl", steps=1)).read_bytes()


@pytest.mark.parametrize("torn", [0, 1, 700])
@pytest.mark.parametrize("at", range(1, 10))
def test_a_run_that_dies_at_any_write_goes_on_to_the_same_bytes(at, torn, whole, llama_folder, tmp_path, monkeypatch):
    """50 rows in windows of 20: batches of 16 and 4, twice; then the bad row and a batch; 3 windows. 9 writes."""
    source, expected = whole
    config = settings(llama_folder, source, tmp_path / "out.jsonl", steps=1)
    resumed(config, monkeypatch, at, torn=torn)
    assert (tmp_path / "out.jsonl").read_bytes() == expected
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.jsonl", "out.jsonl.run.json"]


def test_a_journal_that_outlives_its_window_counts_no_row_twice(whole, llama_folder, tmp_path, monkeypatch):
    source, expected = whole
    config = settings(llama_folder, source, tmp_path / "out.jsonl", steps=1)
    kept: list[bytes] = []
    real = Output.finish

    def finish(self: Output, *made: Any) -> None:
        kept.append(self.journal.read_bytes())
        real(self, *made)
        if len(kept) == 2:
            self.journal.write_bytes(kept[-1])  # as if the machine had stopped before it was removed
            raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(Output, "finish", finish)
        with pytest.raises(Crash):
            run(config)
    run(config)
    assert (tmp_path / "out.jsonl").read_bytes() == expected


def test_finished_batches_are_not_computed_again(whole, llama_folder, tmp_path, monkeypatch):
    source, expected = whole
    config = settings(llama_folder, source, tmp_path / "out.jsonl", steps=1)
    adapted: list[int] = []
    real = AdaptiveLM.reply

    def reply(self: AdaptiveLM, prompts: Any, **options: Any) -> Any:
        adapted.append(len(prompts))
        if len(adapted) == 4:
            raise KeyboardInterrupt
        return real(self, prompts, **options)

    monkeypatch.setattr(AdaptiveLM, "reply", reply)
    with pytest.raises(SystemExit) as stop:
        run(config)
    assert stop.value.code == 130
    assert len((tmp_path / "out.jsonl").read_bytes().splitlines()) == 20
    run(config)
    assert adapted == [16, 4, 16, 4, 4, 9]  # the fourth was stopped, and is made again; the others are not
    assert (tmp_path / "out.jsonl").read_bytes() == expected


SCRIPT = """
import sys, time
from ephemera.config import Run
from ephemera.many import output
from ephemera.many.run import run

keep = output.Output.keep
def slow(self, lines):  # time enough to be killed mid-way
    keep(self, lines)
    print("kept", len(self.known), self.window, flush=True)
    time.sleep(0.5)
output.Output.keep = slow
run(Run.model_validate_json(sys.argv[1]))
"""


def test_a_killed_run_goes_on_to_the_same_bytes(whole, llama_folder, tmp_path):
    source, expected = whole
    config = settings(llama_folder, source, tmp_path / "out.jsonl", steps=1)
    command = [sys.executable, "-c", SCRIPT, config.model_dump_json()]
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if line.split() == ["kept", "16", "1"]:
            break
    with pytest.raises(ValueError, match="another run is writing"):
        run(config)
    process.send_signal(signal.SIGKILL)
    process.stdout.close()
    assert process.wait() == -signal.SIGKILL
    journal = tmp_path / "out.jsonl.part"
    with journal.open("ab") as file:
        file.write(b'{"row": 40, "line": "{')  # as a kill in the midst of a write leaves it
    with (tmp_path / "out.jsonl").open("ab") as file:
        file.write(b'{"id": "row 20", "te')
    run(config)
    assert (tmp_path / "out.jsonl").read_bytes() == expected
    assert not journal.exists()


def test_another_input_or_other_settings_are_refused(whole, llama_folder, tmp_path):
    source, expected = whole
    path = tmp_path / "out.jsonl"
    run(settings(llama_folder, source, path, steps=1))
    with pytest.raises(ValueError, match=r"was begun with max_new_tokens=4 \(now 5\); give that again"):
        run(settings(llama_folder, source, path, steps=1, max_new_tokens=5))
    changed = write(tmp_path / "in.jsonl", rows_of(50))
    with pytest.raises(ValueError, match=r"in.jsonl is not the input that .* begun with \(50 rows then, 50 now\)"):
        run(settings(llama_folder, changed, path, steps=1))
    assert path.read_bytes() == expected
    (tmp_path / "mine.jsonl").write_text('{"precious": 1}\n')
    with pytest.raises(ValueError, match="no `ephemera run` began it"):
        run(settings(llama_folder, source, tmp_path / "mine.jsonl"))
    assert (tmp_path / "mine.jsonl").read_text() == '{"precious": 1}\n'
    with pytest.raises(ValueError, match="is the input"):
        run(settings(llama_folder, source, source))


def test_a_run_that_wrote_nothing_may_be_begun_anew(llama_folder, tmp_path):
    """A misspelled model, say, is no reason to refuse the right one."""
    source = write(tmp_path / "in.jsonl", rows_of(3))
    wrong = settings(llama_folder, source, tmp_path / "out.jsonl", model={"name": "./nowhere"})
    with pytest.raises(ValueError, match="no such file or folder"):
        run(wrong)
    assert len(lines(run(settings(llama_folder, source, tmp_path / "out.jsonl")))) == 3


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("none.jsonl", None, "does not exist"),
        ("empty.jsonl", b"\n\n", "holds no rows"),
        ("list.json", b'[{"prompt": "a"}]', "give .jsonl"),
        ("table.csv", b"a,b", "files that end in .csv are not read"),
        ("torn.jsonl.gz", gzip.compress(b'{"prompt": "a"}\n' * 99)[:-9], "not a readable .gz"),
    ],
)
def test_an_input_that_cannot_be_read_is_one_line(name, content, words, llama_folder, tmp_path):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=words) as error:
        run(settings(llama_folder, tmp_path / name, tmp_path / "out.jsonl"))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out.jsonl").exists()


def test_a_full_disk_is_one_line_and_loses_nothing(whole, llama_folder, tmp_path, monkeypatch):
    source, expected = whole
    config = settings(llama_folder, source, tmp_path / "out.jsonl", steps=1)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(writing.os, "fsync", full)
        with pytest.raises(ValueError, match=r"No space left on device\. 0 finished rows are kept; free some"):
            run(config)
    run(config)
    assert (tmp_path / "out.jsonl").read_bytes() == expected


def test_memory_does_not_grow_with_the_rows(llama_folder, tmp_path, monkeypatch):
    """5,000 rows: 0.4 MB of input and 0.7 MB of output. What Python holds after a window is the same, first and last."""
    source = write(tmp_path / "in.jsonl", [{"prompt": f"The river runs past mill {i}."} for i in range(5000)])
    held: list[int] = []
    real = Output.finish

    def finish(self: Output, *made: Any) -> None:
        real(self, *made)
        gc.collect()
        held.append(tracemalloc.get_traced_memory()[0])

    monkeypatch.setattr(Output, "finish", finish)
    tracemalloc.start()
    try:
        path = run(settings(llama_folder, source, tmp_path / "out.jsonl", window=250, max_new_tokens=1))
    finally:
        tracemalloc.stop()
    assert len(held) == 20
    assert path.stat().st_size > 600_000
    assert held[-1] - held[5] < 50_000, held  # the first windows fill torch's and the tokenizer's own caches


def test_progress_tells_rows_speed_and_time_left(capsys):
    now = [0.0]
    progress = Progress(1000, 200, clock=lambda: now[0])
    now[0] = 20.0
    progress.at(210)
    assert capsys.readouterr().err == ""  # a log is told twice a minute
    now[0] = 40.0
    progress.at(300)
    assert capsys.readouterr().err == "300 of 1,000 rows, 2.5 rows/s, about 5 min left\n"
