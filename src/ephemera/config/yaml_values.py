"""YAML whose values are read as they are written.

PyYAML follows YAML 1.1, where 010 is 8, 1:30 is 90, yes and off are truth values and 1e-4 is a text. Here, as in YAML
1.2, only true and false are truth values, 1e-4 is a number, and the rest of these are texts.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import Any, ClassVar

import yaml
from yaml.constructor import ConstructorError
from yaml.scanner import ScannerError

NUMBER = r"(?:(?:0|[1-9][0-9]*)(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?"
RESOLVERS = (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?(?:0|[1-9][0-9]*)", "-+0123456789"),
    ("float", rf"[-+]?{NUMBER}|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)", "-+.0123456789"),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("merge", r"<<", "<"),
)
NULLS = ("~", "null", "Null", "NULL")


class Loader(yaml.SafeLoader):
    """For files. A key that is given twice is an error."""

    yaml_implicit_resolvers: ClassVar[dict[str, list[tuple[str, re.Pattern[str]]]]] = {}  # pyright: ignore[reportIncompatibleVariableOverride]

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise ConstructorError(None, None, f"{key.value!r} is given twice", key.start_mark)
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else "")
        return super().construct_mapping(node, deep)


class ValueLoader(Loader):
    """For a value on the command line, where a comment would be lost text."""

    def scan_to_next_token(self) -> None:
        while self.peek() == " ":
            self.forward()
        if self.peek() == "#":
            raise ScannerError(None, None, "a # begins a comment", self.get_mark())
        super().scan_to_next_token()


class Dumper(yaml.SafeDumper):
    """Quotes what either kind of YAML would take for something else than a text."""


for tag, pattern, first in RESOLVERS:
    Loader.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(f"^(?:{pattern})$"), list(first))
Dumper.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(f"^[-+]?{NUMBER}$"), list("-+.0123456789"))


def load(text: str) -> Any:
    """The value of a file's text; yaml.YAMLError for a mistake."""
    return yaml.load(text, Loader=Loader)


def load_value(text: str) -> Any:
    """A value of the command line; yaml.YAMLError for a mistake, a comment, or nothing."""
    value = yaml.load(text, Loader=ValueLoader)
    if value is None and text.strip() not in NULLS:
        raise ScannerError(None, None, "there is no value; null stands for none")
    return value


def dump(value: Any) -> str:
    return yaml.dump(value, Dumper=Dumper, sort_keys=False)
