"""MBPP: write a Python function from one sentence and the tests it should pass (Austin et al. 2021)."""

from ephemera.tasks.base import Example, Row, Task
from ephemera.tasks.choice import texts
from ephemera.tasks.code import SYSTEM, code_in, statements


def prompt(row: Row) -> str:
    shown = "\n".join(texts(row["test_list"], "test_list"))
    return f"{row['text']}\n\nYour code should pass these tests:\n{shown}\n\nCode:"


def answer(row: Row) -> str:
    code = row["code"]
    if code is not None and not isinstance(code, str):
        raise ValueError(f"field 'code' should be a text; got {code!r}.")
    return (code or "").replace("\r\n", "\n")


def tests(row: Row) -> str:
    # The setup makes objects of the solution's own classes, so it comes after the solution.
    lines = [row["test_setup_code"].replace("\r\n", "\n"), *texts(row["test_list"], "test_list")]
    return "\n".join(line for line in lines if line) + "\n"


def program(text: str, example: Example) -> str:
    """The text's code and the tests."""
    return f"{statements(code_in(text))}\n\n{example.tests}"


MBPP = Task(
    name="mbpp",
    fields=("text", "test_setup_code", "test_list", "code"),
    prompt=prompt,
    answer=answer,
    max_new_tokens=256,
    hub=("google-research-datasets/mbpp", "full"),
    hub_splits={"train": "train", "validation": "validation", "test": "test"},
    wheel={},
    tests=tests,
    program=program,
    system=SYSTEM,
)
