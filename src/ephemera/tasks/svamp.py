"""SVAMP: one-step word problems that vary known ones; judged as GSM8K is."""

from ephemera.tasks.base import Row, Task
from ephemera.tasks.gsm8k import SYSTEM, correct
from ephemera.tasks.gsm8k import prompt as worded
from ephemera.tasks.numbers import number_of


def prompt(row: Row) -> str:
    return worded({"question": f"{row['Body'].strip()} {row['Question'].strip()}"})


def answer(row: Row) -> str:
    """`The answer is N.`, a whole number without its decimals."""
    given = row["Answer"]
    if given is None or given == "":
        return ""
    number = number_of(str(given)) if isinstance(given, str | int | float) else None
    if number is None:
        raise ValueError(f"field 'Answer' should be a number; got {given!r}.")
    return f"The answer is {int(number) if number.is_integer() else number}."


SVAMP = Task(
    name="svamp",
    fields=("Body", "Question", "Answer"),
    prompt=prompt,
    answer=answer,
    max_new_tokens=200,
    hub=("ChilleD/SVAMP", None),
    # No public validation rows: they come off the end of the 700 of train.
    hub_splits={"train": "train[:-100]", "validation": "train[-100:]", "test": "test"},
    wheel={},
    correct=correct,
    system=SYSTEM,
)
