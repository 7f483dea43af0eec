"""RACE (middle school): a passage, and a question with four choices about it."""

from ephemera.tasks.base import Row, Task
from ephemera.tasks.choice import correct, shown, texts
from ephemera.tasks.fields import label

LETTERS = "ABCD"


def choices(row: Row) -> list[str]:
    return texts(row["options"], "options")


def prompt(row: Row) -> str:
    return f"{row['article']}\n\nQuestion: {row['question']}\n\nChoices:\n{shown(choices(row))}\n\nAnswer:"


def answer(row: Row) -> str:
    letter, found = row["answer"], choices(row)
    if letter == "":
        return ""
    labels = list(LETTERS[: len(found)])
    if label(letter) not in labels:
        raise ValueError(f"field 'answer' is {letter!r}, but the choices are {', '.join(labels)}.")
    return found[labels.index(label(letter))]


RACE_MIDDLE = Task(
    name="race-middle",
    fields=("article", "question", "options", "answer"),
    prompt=prompt,
    answer=answer,
    max_new_tokens=32,
    hub=("ehovy/race", "middle"),
    hub_splits={"train": "train", "validation": "validation", "test": "test"},
    wheel={},
    choices=choices,
    choices_field="options",
    correct=correct,
    system="You answer questions about a passage by repeating one of the given choices.",
)
