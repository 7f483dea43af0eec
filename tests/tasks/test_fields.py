"""Answers as people's files spell them: read as what they say, or refused with file, line and field."""

import json

import pytest

from ephemera.tasks import load_dataset

SQUAD = {"context": "Paris is in France.", "question": "What is in France?"}
NQ = {"question": "what is in france"}
ARC = {"question": "What turns a mill?", "choices": {"text": ["sun", "wind"], "label": ["A", "B"]}, "answerKey": "B"}
OPEN = {"question_stem": "Mills are turned by", "choices": ARC["choices"], "answerKey": "B"}
RACE = {"article": "A mill turns.", "question": "What turns?", "options": ["A man.", "A mill."], "answer": "B"}
SNLI = {"premise": "A mill turns.", "hypothesis": "A mill stands.", "label": 2}
SWAG = {"ctx": "A man nears a mill. he", "endings": ["sleeps.", "grinds."], "label": "1"}


def labelled(labels, key):
    return {"choices": {"text": ["sun", "wind"], "label": labels}, "answerKey": key}


def load(tmp_path, task, row):
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    return load_dataset(task, source=str(tmp_path / "rows.jsonl"))


@pytest.mark.parametrize(
    ("task", "row", "want"),
    [
        ("squad", {**SQUAD, "answers": {"text": "Paris"}}, "Paris"),
        ("squad", {**SQUAD, "answers": {"text": ["Paris", "the city"]}}, "Paris"),
        ("squad", {**SQUAD, "answers": {"text": ["", " ", None, "Paris"], "answer_start": [0]}}, "Paris"),
        ("squad", {**SQUAD, "answers": [{"text": "Paris", "answer_start": 0}, {"text": "a"}]}, "Paris"),
        ("squad", {**SQUAD, "answers": [{"text": ""}, {"text": "Paris"}]}, "Paris"),
        ("squad", {**SQUAD, "answers": ["Paris"]}, "Paris"),
        ("squad", {**SQUAD, "answers": "Paris"}, "Paris"),
        ("nq-open", {**NQ, "answer": ["", "Paris"]}, "Paris"),
        ("nq-open", {**NQ, "answer": "[Paris]"}, "[Paris]"),
        ("arc-easy", {**ARC, **labelled([0, 1], 0)}, "sun"),
        ("arc-easy", {**ARC, **labelled([0, 1], 1)}, "wind"),
        ("arc-easy", {**ARC, **labelled([0, 1], "1")}, "wind"),
        ("arc-challenge", {**ARC, **labelled(["1", "2"], 2.0)}, "wind"),
        ("commonsense-qa", {**ARC, **labelled(["A", "B"], "B ")}, "wind"),
        ("openbookqa", {**OPEN, **labelled([0, 1], 0)}, "sun"),
        ("arc-easy", {**ARC, "choices": [{"text": "sun", "label": "A"}, {"text": "wind", "label": "B"}]}, "wind"),
        ("race-middle", {**RACE, "answer": "B "}, "A mill."),
        ("hellaswag", {**SWAG, "label": 0.0}, "sleeps."),
        ("snli", {**SNLI, "label": 0}, "entailment"),
        ("svamp", {"Body": "A mill.", "Question": "How many?", "Answer": 0}, "The answer is 0."),
    ],
)
def test_the_answer_that_a_row_gives(task, row, want, tmp_path):
    dataset = load(tmp_path, task, row)
    assert ([e.answer for e in dataset.examples], dataset.dropped) == ([want], 0)


@pytest.mark.parametrize(
    ("task", "row", "message"),
    [
        (
            "squad",
            {**SQUAD, "answers": {"text": [["Paris"]]}},
            r"field 'answers.text' should be .*; it holds \['Paris'\]",
        ),
        ("squad", {**SQUAD, "answers": {"text": 5}}, "field 'answers.text' should be a text or a list of texts; got 5"),
        ("squad", {**SQUAD, "answers": {"text": "['Paris']"}}, r"field 'answers.text' is a list written as text"),
        (
            "squad",
            {**SQUAD, "answers": {"span": ["Paris"]}},
            r"field 'answers' should be {'text': \[...\]}; got {'span'",
        ),
        (
            "squad",
            {**SQUAD, "answers": [{"span": "Paris"}]},
            "field 'answers' should be .*; it holds {'span': 'Paris'}",
        ),
        ("nq-open", {**NQ, "answer": [["Paris"]]}, r"field 'answer' should be .*; it holds \['Paris'\]"),
        ("nq-open", {**NQ, "answer": [{"text": "Paris"}]}, r"field 'answer' should be .*; it holds {'text': 'Paris'}"),
        ("nq-open", {**NQ, "answer": [True]}, "field 'answer' should be .*; it holds True"),
        ("nq-open", {**NQ, "answer": {"text": "Paris"}}, "field 'answer' should be a text or a list of texts; got {"),
        ("nq-open", {**NQ, "answer": '["Paris", "a"]'}, "field 'answer' is a list written as text"),
        ("arc-easy", {**ARC, **labelled("AB", "B")}, "field 'choices' should be {'text'"),
        ("arc-easy", {**ARC, **labelled([0, "0"], 0)}, "field 'choices' has two choices with one label: 0, 0"),
        (
            "arc-easy",
            {**ARC, **labelled([0, 1], False)},
            "field 'answerKey' is False, but the choices are labelled 0, 1",
        ),
        ("arc-easy", {**ARC, **labelled(["A", "B"], ["B"])}, r"field 'answerKey' is \['B'\], but"),
        ("arc-easy", {**ARC, "choices": [{"text": "sun"}, {"text": "wind"}]}, "field 'choices' should be {'text'"),
        ("commonsense-qa", {"question": "q", "options": "A. a\nB. b", "answer": ["A"]}, "not of the kind .* reads"),
        ("race-middle", {**RACE, "answer": 1}, "field 'answer' is 1, but the choices are A, B"),
        ("hellaswag", {**SWAG, "label": 0.5}, "field 'label' should be a whole number; got 0.5"),
        ("boolq", {"passage": "p", "question": "q", "answer": 0}, "field 'answer' should be true or false; got 0"),
        (
            "adapteval/dolly",
            {"instruction": "i", "input": 0, "output": "o"},
            "field 'input' should be a text or null; got 0",
        ),
        ("own", {"prompt": "p", "answer": ["a"]}, r"field 'answer' should be a text; got \['a'\]"),
        ("xsum", {"document": "d", "summary": {"text": "a"}}, "field 'summary' should be a text; got {'text': 'a'}"),
    ],
)
def test_what_has_no_certain_reading_is_refused(task, row, message, tmp_path):
    with pytest.raises(ValueError, match=rf"rows.jsonl:1: .*{message}"):
        load(tmp_path, task, row)


def test_rows_that_all_lack_the_answer_field_name_what_they_hold(tmp_path):
    with pytest.raises(
        ValueError, match=r"\(1 rows without one\)\. They have no field 'answer', but passage, question, lab"
    ):
        load(tmp_path, "boolq", {"passage": "p", "question": "q", "label": 1})
