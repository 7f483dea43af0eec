"""GSM8K: grade-school word problems; the last number of the answer counts, within a tolerance."""

import re

from ephemera.tasks.example import Example, Row, Task

TOLERANCE = 1e-4  # relative, and absolute near zero
# The sign of 10-5 is no minus, and neither is that of 5-10.
NUMBER = re.compile(r"(?:(?<!\w)-)?\$?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")
SYSTEM = "You solve word problems step by step."


def prompt(row: Row) -> str:
    return f"Question: {row['question']}\n\nWork it out step by step and end with the number.\n\nAnswer:"


def answer(row: Row) -> str:
    """The worked solution, without the calculator's notes, ending in `The answer is N.`"""
    text = row["answer"]
    if not text.strip():
        return ""
    steps, mark, number = text.partition("####")
    if not mark or not NUMBER.search(number):
        raise ValueError(f"field 'answer' has no '#### number' at its end: {text[-40:]!r}.")
    return f"{re.sub('<<.*?>>', '', steps).strip()}\nThe answer is {number.strip()}."


def number_in(text: str) -> float | None:
    """The number after "the answer is" where that stands, else the last one."""
    said = re.findall(rf"answer is:?\s*({NUMBER.pattern})", text, flags=re.IGNORECASE)
    found = said[:1] or NUMBER.findall(text)[-1:]
    return float(found[0].replace("$", "").replace(",", "")) if found else None


def correct(text: str, example: Example) -> bool:
    have, want = number_in(text), number_in(example.answer.rpartition("\n")[2])
    return have is not None and want is not None and abs(have - want) <= TOLERANCE * max(1.0, abs(want))


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
