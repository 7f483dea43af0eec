"""GSM8K: grade-school word problems; the last number of the answer counts, within a tolerance."""

import re

from ephemera.tasks.base import Example, Row, Task
from ephemera.tasks.numbers import number_in, readings_in

TOLERANCE = 1e-4  # relative, and absolute near zero
SYSTEM = "You solve word problems step by step."


def prompt(row: Row) -> str:
    return f"Question: {row['question']}\n\nWork it out step by step and end with the number.\n\nAnswer:"


def answer(row: Row) -> str:
    """The worked solution, without the calculator's notes, ending in `The answer is N.`"""
    text = row["answer"]
    if not isinstance(text, str):
        raise ValueError(f"field 'answer' should be a text; got {text!r}.")
    if not text.strip():
        return ""
    steps, mark, number = text.partition("####")
    if not mark or number_in(_ending(number)) is None:
        raise ValueError(f"field 'answer' has no '#### number' at its end: {text[-40:]!r}.")
    return f"{re.sub('<<.*?>>', '', steps).strip()}\n{_ending(number)}"


def _ending(number: str) -> str:
    return f"The answer is {number.strip()}."


def correct(text: str, example: Example) -> bool:
    want = number_in(example.answer.rpartition("\n")[2])
    return want is not None and any(abs(have - want) <= TOLERANCE * max(1.0, abs(want)) for have in readings_in(text))


GSM8K = Task(
    name="gsm8k",
    fields=("question", "answer"),
    prompt=prompt,
    answer=answer,
    max_new_tokens=200,
    hub=("openai/gsm8k", "main"),
    # No public validation rows: they come off the end of train.
    hub_splits={"train": "train[:-500]", "validation": "train[-500:]", "test": "test"},
    wheel={},
    correct=correct,
    system=SYSTEM,
)
