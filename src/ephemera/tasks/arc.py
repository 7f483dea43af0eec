"""ARC-Easy and ARC-Challenge: grade-school science questions with choices."""

from ephemera.tasks.base import Row, Task
from ephemera.tasks.choice import SYSTEM, correct, lettered_answer, lettered_choices, shown


def prompt(row: Row) -> str:
    return f"Question: {row['question']}\n\nChoices:\n{shown(lettered_choices(row))}\n\nAnswer:"


def _arc(name: str, config: str) -> Task:
    return Task(
        name=name,
        fields=("question", "choices", "answerKey"),
        prompt=prompt,
        answer=lettered_answer,
        max_new_tokens=32,
        hub=("allenai/ai2_arc", config),
        hub_splits={"train": "train", "validation": "validation", "test": "test"},
        wheel={},
        choices=lettered_choices,
        choices_field="choices.text",
        correct=correct,
        system=SYSTEM,
    )


ARC = (_arc("arc-easy", "ARC-Easy"), _arc("arc-challenge", "ARC-Challenge"))
