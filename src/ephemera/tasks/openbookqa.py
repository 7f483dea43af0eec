"""OpenBookQA: elementary science facts, asked as sentences to complete."""

from ephemera.tasks.base import Row, Task
from ephemera.tasks.choice import SYSTEM, correct, lettered_answer, lettered_choices, shown


def prompt(row: Row) -> str:
    return f"Question: {row['question_stem']}\n\nChoices:\n{shown(lettered_choices(row))}\n\nAnswer:"


OPENBOOKQA = Task(
    name="openbookqa",
    fields=("question_stem", "choices", "answerKey"),
    prompt=prompt,
    answer=lettered_answer,
    max_new_tokens=32,
    hub=("allenai/openbookqa", "main"),
    hub_splits={"train": "train", "validation": "validation", "test": "test"},
    wheel={},
    choices=lettered_choices,
    choices_field="choices.text",
    correct=correct,
    system=SYSTEM,
)
