"""HellaSwag: which ending goes on from a text?"""

from ephemera.tasks.base import Row, Task
from ephemera.tasks.choice import correct, pick, shown, texts


def choices(row: Row) -> list[str]:
    return texts(row["endings"], "endings")


def prompt(row: Row) -> str:
    return f"Text: {row['ctx']}\n\nEndings:\n{shown(choices(row))}\n\nThe ending that goes on from the text:"


def answer(row: Row) -> str:
    label = row["label"]
    if label == "":  # the official test rows
        return ""
    return pick(choices(row), label, "label")


HELLASWAG = Task(
    name="hellaswag",
    fields=("ctx", "endings", "label"),
    prompt=prompt,
    answer=answer,
    max_new_tokens=64,
    hub=("Rowan/hellaswag", None),
    # No public test labels: the official validation rows are the test set, and validation comes off the end of train.
    hub_splits={"train": "train[:-500]", "validation": "train[-500:]", "test": "validation"},
    wheel={},
    choices=choices,
    choices_field="endings",
    correct=correct,
    system="You choose the ending that goes on from a text.",
)
