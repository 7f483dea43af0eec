"""HumanEval: complete a Python function from its signature and docstring (Chen et al. 2021)."""

import re

from ephemera.tasks.base import Example, Row, Task
from ephemera.tasks.code import SYSTEM, body, code_in, statements


def prompt(row: Row) -> str:
    return row["prompt"]


def answer(row: Row) -> str:
    return row["canonical_solution"]


def tests(row: Row) -> str:
    if not row["entry_point"].isidentifier():
        raise ValueError(f"field 'entry_point' should be the name of a function; got {row['entry_point']!r}.")
    return f"{row['test'].strip()}\n\ncheck({row['entry_point']})\n"


def program(text: str, example: Example) -> str:
    """The prompt, completed by the text, and its tests.

    A text that defines the whole function again takes the prompt's place, whose imports and helpers stay.
    """
    called = re.search(r"check\((\w+)\)\s*\Z", example.tests)
    assert called is not None
    code = code_in(text)
    again = re.search(rf"^def {called[1]}\b", code, re.MULTILINE)
    # Indented code continues the function, whatever is defined after it.
    completion = statements(code) if again and not code.startswith((" ", "\t")) else body(code)
    # Every prompt ends in a docstring, so it can also stand alone before a second definition.
    return f"{example.prompt.rstrip()}\n{completion}\n\n{example.tests}"


HUMANEVAL = Task(
    name="humaneval",
    fields=("prompt", "test", "entry_point", "canonical_solution"),
    prompt=prompt,
    answer=answer,
    max_new_tokens=384,
    hub=("openai/openai_humaneval", None),
    hub_splits={"test": "test"},  # there is no other
    wheel={},
    tests=tests,
    program=program,
    system=SYSTEM,
)
