"""SQuAD v1.1: the answer is a span of the passage (LDTTA A.2)."""

from ephemera.tasks.base import Row, Task
from ephemera.tasks.fields import spans


def prompt(row: Row) -> str:
    return (
        "You are given a passage and a question.\n\n"
        "Answer with the exact text span from the passage. Output ONLY the answer span.\n\n"
        f"Passage:\n\n{row['context']}\n\nQuestion:\n\n{row['question']}\n\nAnswer:"
    )


def answer(row: Row) -> str:
    return spans(row["answers"], "answers")


SQUAD = Task(
    name="squad",
    fields=("context", "question", "answers"),
    prompt=prompt,
    answer=answer,
    max_new_tokens=32,
    hub=("rajpurkar/squad", None),
    # No public test split: the official dev rows are the test set, and validation comes off the end of train.
    hub_splits={"train": "train[:-500]", "validation": "train[-500:]", "test": "validation"},
    wheel={},
)
