"""SNLI: does a sentence follow from another, contradict it, or neither?"""

from ephemera.tasks.base import Row, Task
from ephemera.tasks.choice import correct, pick
from ephemera.tasks.fields import label

LABELS = ["entailment", "neutral", "contradiction"]


def prompt(row: Row) -> str:
    return (
        f"Premise: {row['premise']}\nHypothesis: {row['hypothesis']}\n\n"
        "Is the relation of the hypothesis to the premise entailment, neutral or contradiction?\n\nAnswer:"
    )


def answer(row: Row) -> str:
    if label(row["label"]) in ("-1", ""):  # the annotators did not agree
        return ""
    return pick(LABELS, row["label"], "label")


SNLI = Task(
    name="snli",
    fields=("premise", "hypothesis", "label"),
    prompt=prompt,
    answer=answer,
    max_new_tokens=8,
    hub=("stanfordnlp/snli", None),
    hub_splits={"train": "train", "validation": "validation", "test": "test"},
    wheel={},
    choices=lambda row: LABELS,
    correct=correct,
    system="You judge how two sentences relate: entailment, neutral or contradiction.",
)
