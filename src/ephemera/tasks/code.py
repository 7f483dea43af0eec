"""Code tasks: the Python code in a generated text, without the prose, fences and trials around it."""

from __future__ import annotations

import ast
import re
import textwrap
import warnings

SYSTEM = "You write Python code."
FENCE = re.compile(r"^[ \t]*```.*$", re.MULTILINE)
DEFINITION = re.compile(r"^(?:(?:async )?def \w|class \w|import \w|from \S+ import\b|@\w)", re.MULTILINE)
AFTER = re.compile(r"^(?=(?:def|class|print|if __name__)\b)", re.MULTILINE)


def code_in(text: str) -> str:
    """What stands in the first Markdown fence that has a `def`, else in the first one, else the whole text.

    A fence need not be closed, nor opened (a prompt may have done that).
    """
    pieces = FENCE.split(text.replace("\r\n", "\n"))
    before = pieces[0].strip("\n")
    if len(pieces) == 1 or (len(pieces) == 2 and (DEFINITION.match(before) or re.match(r"[ \t]|return\b", before))):
        return before
    blocks = [block.strip("\n") for block in pieces[1::2]]
    return next((block for block in blocks if re.search(r"^\s*def ", block, re.MULTILINE)), blocks[0])


def statements(code: str) -> str:
    """The code from its first definition or import on, as far as it can be parsed; constants before it stay.

    Top-level prints, asserts and loose words are left out: they are trials of the code, or prose.
    """
    start = DEFINITION.search(code)
    before, code = (code[: start.start()], code[start.start() :]) if start else ("", code)
    constants = _parsed(before)
    if constants is None or not all(isinstance(node, ast.Assign) for node in constants.body):
        before = ""
    lines, tree = _longest(code)
    for node in tree.body:
        if _idle(node):
            lines[node.lineno - 1 : node.end_lineno] = [""] * len(lines[node.lineno - 1 : node.end_lineno])
    return before + "\n".join(lines)


def body(code: str) -> str:
    """The lines that continue a function, up to the first statement after it; indented where they are not."""
    code = code.strip("\n").expandtabs(4)
    # Decoding may strip the first line's indentation, and a chat model may leave all of it out.
    shifts = [code, f"    {code.lstrip()}", textwrap.indent(AFTER.split(code)[0], "    ")]
    found = []
    for shifted in shifts if code.startswith(" ") else shifts[1:]:
        lines, tree = _longest(f"def f():\n{shifted}")
        found.append(lines[1 : tree.body[0].end_lineno] if tree.body else [])
    return "\n".join(max(found, key=len))


def _idle(node: ast.stmt) -> bool:
    if not isinstance(node, ast.Expr):
        return isinstance(node, ast.Assert)
    call = node.value
    return not isinstance(call, ast.Call) or (isinstance(call.func, ast.Name) and call.func.id in ("print", "input"))


def _longest(source: str) -> tuple[list[str], ast.Module]:
    """The longest beginning of the source, in whole lines, that can be parsed."""
    lines = source.split("\n")
    while (tree := _parsed("\n".join(lines))) is None:
        lines.pop()
    return lines, tree


def _parsed(source: str) -> ast.Module | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a backslash that escapes nothing
            return ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
