"""Settings from YAML files and `a.b=c` overrides, with errors that name the mistake.

Values are read as they are written: of YAML's spellings only true and false are truth values, 010 and 1:30 are texts.
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator
from yaml import YAMLError

from ephemera.config.yaml_values import dump, load, load_value
from ephemera.messages import nearest


class Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        """ValueError where a number is wanted and true or false is given: Pydantic would take it for 1 or 0."""
        assert info.field_name is not None
        kinds = _kinds(cls.model_fields[info.field_name].annotation)
        if not kinds & {bool} and kinds & {int, float} and _holds_truth(value):
            raise ValueError(f"a number is needed, and true and false are none; got {value!r}")
        return value


def _kinds(annotation: Any) -> set[type]:
    """The types that an annotation is made of: {list, int} of list[Annotated[int, ...]]."""
    inner = {kind for part in get_args(annotation) for kind in _kinds(part)}
    return inner | {annotation} if isinstance(annotation, type) else inner


def _holds_truth(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_holds_truth, value.values()))
    return any(map(_holds_truth, value)) if isinstance(value, list) else isinstance(value, bool)


Config = TypeVar("Config", bound=Settings)


def load_config(kind: type[Config], path: str | None = None, overrides: list[str] | None = None) -> Config:
    """Defaults, then a YAML file, then `a.b=c` overrides (values are YAML). ValueError names any mistake."""
    # Given values are laid over the defaults key by key: setting train.source must not reset train.split.
    values = kind().model_dump(mode="json")
    if path is not None:
        _lay_over(values, _read_yaml(Path(path)))
    for override in overrides or []:
        key, separator, text = override.partition("=")
        if not separator:
            raise ValueError(f"--set takes key=value, e.g. optimizer.samples=100; got {override!r}.")
        try:
            value = load_value(text)
        except YAMLError as error:
            quoted = shlex.quote(f"{key}={json.dumps(text, ensure_ascii=False)}")
            raise ValueError(
                f"--set {override!r}: the value is not valid YAML ({getattr(error, 'problem', None) or error}). In quotes "
                f"it is a text as written: --set {quoted}"
            ) from error
        _put(values, key.split("."), value, override)
    return check_config(kind, values)


def _lay_over(values: dict[str, Any], given: dict[str, Any]) -> None:
    for key, value in given.items():
        inner = values.get(key)
        if isinstance(inner, dict) and isinstance(value, dict):
            _lay_over(inner, value)
        else:
            values[key] = value


def check_config(kind: type[Config], values: dict[str, Any]) -> Config:
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise ValueError("\n".join(_explain(kind, item) for item in error.errors())) from None


def dump_yaml(config: Settings) -> str:
    return dump(config.model_dump(mode="json"))


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = load(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ValueError(f"cannot read config {path}: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"config {path} is not text in UTF-8: {error.reason}.") from error
    except YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}.") from error
    if values is not None and not isinstance(values, dict):
        raise ValueError(f"{path} should hold settings (key: value); it holds a {type(values).__name__}.")
    return values or {}


def _put(values: dict[str, Any], keys: list[str], value: Any, override: str) -> None:
    for key in keys[:-1]:
        inner = values.get(key)
        if inner is None:  # a part that is left out by default
            inner = values[key] = {}
        if not isinstance(inner, dict):
            raise ValueError(f"--set {override!r}: {key} is a single value, it has no parts.")
        values = inner
    values[keys[-1]] = value


def _explain(kind: type[BaseModel], item: Any) -> str:
    where = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        known = _fields_at(kind, item["loc"][:-1])
        hint = nearest(str(item["loc"][-1]), known)
        return f"unknown setting {where!r}. {hint + ' ' if hint else ''}Known here: {', '.join(known)}."
    if item["type"] == "value_error":
        return f"{where + ': ' if where else ''}{item['msg'].removeprefix('Value error, ')}."
    hint = ""
    if item["type"] == "string_type" and isinstance(item["input"], int | float):
        hint = f" In YAML's quotes it is a text: {where}='\"{item['input']}\"'."
    elif item["type"] == "string_type" and isinstance(item["input"], dict | list):
        hint = f" A text that begins with {{ or [ needs YAML's quotes: {where}='\"...\"'."
    return f"setting {where!r}: {item['msg'][0].lower()}{item['msg'][1:]}; got {item['input']!r}.{hint}"


def _fields_at(kind: type[BaseModel], path: tuple[Any, ...]) -> list[str]:
    for part in path:
        if isinstance(part, int):  # a place in a list: its kind is already found
            continue
        annotation = kind.model_fields[str(part)].annotation
        # X, X | None, or list[X]
        (kind,) = [a for a in (annotation, *get_args(annotation)) if isinstance(a, type) and issubclass(a, BaseModel)]
    return list(kind.model_fields)
