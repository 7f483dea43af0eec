"""GSM8K: grade-school word problems; the last number of the answer counts, within a tolerance."""

import re

from ephemera.tasks.example import Example, Row, Task

TOLERANCE = 1e-4  # relative, and absolute near zero
# The sign of 10-5 is no minus, and neither is that of 5-10. Commas are for thousands: 12,15 is two numbers.
NUMBER = re.compile(r"(?:(?<!\w)[-\u2212])?\$?(?:(?:\d{1,3}(?:,\d{3})+(?![\d])|\d+)(?:\.\d+)?|\.\d+)")
# Where a text says which number is its answer: GSM8K's own mark, or words. Markup, units of money and the terms of a sum
# ("the answer is 2 + 3 = **$5**") may stand between.
SAID = re.compile(
    rf"(?:####|answer is:?)(?:(?:[\d ,$+*/x\u00d7()-]|\.\d)+=)?[\s*_$\u20ac\u00a3\\(\[{{]*(?:boxed{{)?({NUMBER.pattern})",
    re.IGNORECASE,
)
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
    if not mark or not NUMBER.search(number):
        raise ValueError(f"field 'answer' has no '#### number' at its end: {text[-40:]!r}.")
    return f"{re.sub('<<.*?>>', '', steps).strip()}\nThe answer is {number.strip()}."


def number_in(text: str) -> float | None:
    """The first number after "the answer is" or "####" where one stands, else the last of all."""
    found = SAID.findall(text)[:1] or NUMBER.findall(text)[-1:]
    return float(re.sub("[$,]", "", found[0]).replace("\N{MINUS SIGN}", "-")) if found else None


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
