"""WinoGrande: which of two fills the blank?"""

from ephemera.tasks.base import Row, Task
from ephemera.tasks.choice import correct, pick, shown, texts


def choices(row: Row) -> list[str]:
    return texts([row["option1"], row["option2"]], "option1, option2")


def prompt(row: Row) -> str:
    return f"Sentence: {row['sentence']}\n\nWhat does the blank (_) stand for?\n{shown(choices(row))}\n\nAnswer:"


def answer(row: Row) -> str:
    label = row["answer"]
    if label == "":  # the official test rows
        return ""
    return pick(choices(row), label, "answer", first=1)


WINOGRANDE = Task(
    name="winogrande",
    fields=("sentence", "option1", "option2", "answer"),
    prompt=prompt,
    answer=answer,
    max_new_tokens=16,
    hub=("allenai/winogrande", "winogrande_l"),
    # No public test labels: the official validation rows are the test set, and validation comes off the end of train.
    hub_splits={"train": "train[:-500]", "validation": "train[-500:]", "test": "validation"},
    wheel={},
    choices=choices,
    choices_field="option1, option2",
    correct=correct,
    system="You say which of two words a blank stands for.",
)
