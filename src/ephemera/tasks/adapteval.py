"""AdaptEval's ten subsets: instruction, domain and reasoning sets in one format (LDTTA A.4)."""

from collections.abc import Callable
from dataclasses import replace

from ephemera.tasks.base import Row, Task

PLAIN = "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
)


def question_prompt(row: Row) -> str:
    return f"{PLAIN}### Instruction:\n{row['question']}\n\n### Response:"


def instruction_prompt(row: Row) -> str:
    instruction, extra = row["instruction"], _input(row)
    if instruction.startswith(PLAIN):  # AdaptEval's own GSM8K file carries the template in its rows
        return instruction
    if extra.strip():
        return f"{WITH_INPUT}### Instruction:\n{instruction}\n\n### Input:\n{extra}\n\n### Response:"
    return f"{PLAIN}### Instruction:\n{instruction}\n\n### Response:"


def _input(row: Row) -> str:
    extra = row.get("input")
    if extra is not None and not isinstance(extra, str):
        raise ValueError(f"field 'input' should be a text or null; got {extra!r}.")
    return extra or ""


def answers_answer(row: Row) -> str:
    return row["answers"]


def output_answer(row: Row) -> str:
    return row["output"]


def _subset(name: str, fields: tuple[str, ...], prompt: Callable[[Row], str], answer: Callable[[Row], str]) -> Task:
    # The benchmark is published as files in a repository, not on a hub: give them as a local source.
    return Task(f"adapteval/{name}", fields, prompt, answer, max_new_tokens=256, hub=None, hub_splits={}, wheel={})


INSTRUCTION_SUBSETS = (
    *("geography", "medicine", "finance"),
    *("alpaca_gpt4", "dolly", "instruction_wild"),
    *("gsm8k", "metamath", "metamath_backward", "logiqa"),
)


def asked(row: Row) -> str:
    """What a person sends: the instruction, then its input, without AdaptEval's template."""
    if "question" in row:
        return row["question"]
    instruction = (
        row["instruction"].removeprefix(PLAIN).removeprefix("### Instruction:\n").removesuffix("\n\n### Response:")
    )
    extra = _input(row).strip()
    return f"{instruction}\n\n{extra}" if extra else instruction


def _asked(task: Task) -> Task:
    return replace(task, name=task.name.replace("adapteval/", "asked/"), prompt=asked)


ADAPTEVAL = (
    _subset("agriculture_qa", ("question", "answers"), question_prompt, answers_answer),
    *(_subset(name, ("instruction", "output"), instruction_prompt, output_answer) for name in INSTRUCTION_SUBSETS),
)
# The same rows as messages of a chat
ASKED = tuple(_asked(task) for task in ADAPTEVAL)
