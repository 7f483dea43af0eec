import gzip
import io
import json

import pytest

from ephemera.cli.answer import prompts_of
from ephemera.files import kind_of, read_rows, read_text
from ephemera.tasks import load_dataset

MARK = b"\xef\xbb\xbf"
ROW = {"prompt": "The mill\u2028turns.", "answer": "so"}
LINE = json.dumps(ROW, ensure_ascii=False).encode() + b"\n"
LIST = json.dumps([ROW, ROW], ensure_ascii=False, indent=1).encode()


def packed(name: str, data: bytes) -> bytes:
    return gzip.compress(data) if name.lower().endswith(".gz") else data


def given(path):
    """What `answer --file` and what a command on data read from a file."""
    return prompts_of(None, path), [e.prompt for e in load_dataset("own", source=str(path)).examples]


@pytest.mark.parametrize("mark", [b"", MARK])
@pytest.mark.parametrize(
    ("name", "data"),
    [
        *((name, LINE * 2) for name in ("p.jsonl", "P.JSONL", "p.ndjson", "p.json", "p.JSONL.GZ", "p.ndjson.gz")),
        *((name, LIST) for name in ("p.json", "P.Json", "p.json.gz")),
    ],
)
def test_rows_are_rows_for_every_command(name, data, mark, tmp_path):
    (tmp_path / name).write_bytes(packed(name, mark + data))
    assert given(tmp_path / name) == ([ROW["prompt"]] * 2, [ROW["prompt"]] * 2)


@pytest.mark.parametrize("name", ["p.csv", "p.CSV", "p.tsv", "p.parquet", "p.yaml", "p.csv.gz"])
def test_other_names_are_refused_by_every_command(name, tmp_path):
    (tmp_path / name).write_bytes(packed(name, LINE))
    for read in (lambda: prompts_of(None, tmp_path / name), lambda: load_dataset("own", source=str(tmp_path / name))):
        with pytest.raises(
            ValueError, match=r"(?i)files that end in \.\w+ are not read\. Rows are in \.jsonl, .*\.txt"
        ):
            read()


@pytest.mark.parametrize("name", ["p.txt", "P.TXT", "p.md", "p", "p.txt.gz"])
@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n"])
def test_text_is_one_prompt_and_no_rows(name, end, tmp_path):
    (tmp_path / name).write_bytes(packed(name, MARK + LINE + b"caf\xc3\xa9" + end))
    assert prompts_of(None, tmp_path / name) == [LINE.decode() + "caf\u00e9"]
    with pytest.raises(ValueError, match="its name says that it holds one text, and rows are needed"):
        load_dataset("own", source=str(tmp_path / name))


def test_marks_within_a_joined_file_are_read_past(tmp_path):
    (tmp_path / "p.jsonl").write_bytes((MARK + LINE) * 2)
    assert [place.rpartition(":")[2] for place, _ in read_rows(tmp_path / "p.jsonl")] == ["1", "2"]


@pytest.mark.parametrize(
    ("typed", "want"), [("x\n", "x"), ("x\n\n", "x\n"), ("x", "x"), ("\ufeffx \r\n", "x "), ("\nx", "\nx")]
)
def test_standard_input_ends_before_the_newline_that_echo_adds(typed, want, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(typed, newline=""))
    assert prompts_of(None, None) == [want]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        (
            "p.json",
            b'[{"prompt": "p"},\n{"prompt": }]',
            r"p.json:2: not valid JSON \(.* at column 12\); expected a list",
        ),
        ("p.json", b'[{"prompt": "p"}, 5]', r'p.json: row 2: expected an object with a "prompt" text'),
        ("p.json", b'{"prompt": "p"}\n{"prompt": ', r"p.json:2: not valid JSON"),
        ("p.json", b"[]", "p.json holds no prompts"),
        ("p.txt", "x".encode("utf-16"), r"p.txt is not valid Unicode: .* which is not UTF-8"),
        ("p.txt.gz", b"x", r"p.txt.gz is not readable text: Not a gzipped file"),
        ("p.jsonl", "{}".encode("utf-16"), r"p.jsonl is not a readable .jsonl file: .* Save it as UTF-8"),
    ],
)
def test_unreadable_files_are_named(name, data, message, tmp_path):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=message):
        prompts_of(None, tmp_path / name)


def test_a_folder_of_two_files_of_a_split_names_both(tmp_path):
    (tmp_path / "TEST.NDJSON").write_bytes(LINE)
    assert len(load_dataset("own", source=str(tmp_path)).examples) == 1
    (tmp_path / "test.jsonl.gz").write_bytes(gzip.compress(LINE))
    with pytest.raises(ValueError, match=r"has TEST.NDJSON and test.jsonl.gz; name one of them"):
        load_dataset("own", source=str(tmp_path))


def test_a_missing_file_is_no_hub_id_whatever_its_case():
    for name in ("none.JSONL", "none.ndjson", "none.json.GZ"):
        with pytest.raises(ValueError, match="does not exist"):
            load_dataset("own", source=name)


def test_dots_that_begin_no_ending(tmp_path):
    (tmp_path / ".prompt").write_text("x")
    assert read_text(tmp_path / ".prompt") == "x"
    with pytest.raises(ValueError, match=r"end in \.v2"):
        kind_of(tmp_path / "prompt.v2")
