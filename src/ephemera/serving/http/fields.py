"""Types of request fields: numbers as JSON has them, whole Unicode, fields that take only what changes nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, GetJsonSchemaHandler, model_validator
from pydantic_core import CoreSchema, PydanticCustomError, core_schema


def _no_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError(f"expected a number, not {str(value).lower()}")
    return value


def _integral(value: Any) -> Any:
    """JSON knows one kind of number, and some clients write 5.0 for 5."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Number = Annotated[float, Field(allow_inf_nan=False), BeforeValidator(_no_bool)]
Integer = Annotated[int, Field(strict=True), BeforeValidator(_integral)]
Seed = Annotated[int, Field(strict=True, ge=-(1 << 63), lt=1 << 63), BeforeValidator(_integral)]


@dataclass(frozen=True)
class Only:
    """Of a field's values null and these: they ask for nothing. Others are refused with the reason."""

    values: tuple[Any, ...]
    why: str

    def __get_pydantic_core_schema__(self, _source: Any, _handler: Any) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self._check)

    def __get_pydantic_json_schema__(self, _schema: CoreSchema, _handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"enum": [None, *self.values], "description": self.why}

    def _check(self, value: Any) -> Any:
        if value is None or any(_same(value, known) for known in self.values):
            return value
        allowed = " or ".join(json.dumps(known) for known in (None, *self.values))
        raise ValueError(f"{self.why}; allowed: {allowed}. Leave the field out.")


def _same(value: Any, known: Any) -> bool:
    """Equal as JSON values: true is not 1, but 1.0 is."""
    return value == known and isinstance(value, bool) == isinstance(known, bool)


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Body(Strict):
    """A whole request: no text in it, however deep, may hold half of a character."""

    @model_validator(mode="before")
    @classmethod
    def _unicode(cls, body: Any) -> Any:
        for place, text in _texts(body):
            half = next((i for i, c in enumerate(text) if "\ud800" <= c <= "\udfff"), None)
            if half is not None:
                shown = ascii(".".join(place))[1:-1]
                words = f"invalid Unicode: a lone surrogate ({ascii(text[half])[1:-1]}) at character {half}. "
                words += "Send the whole character, or take it out."
                raise PydanticCustomError("surrogate", "{words}", {"words": words, "field": shown or None})
        return body


def _texts(body: Any) -> Iterator[tuple[tuple[str, ...], str]]:
    """Every text of a JSON value, keys too, with its place. Without recursion: bodies may be deep."""
    waiting: list[tuple[tuple[str, ...], Any]] = [((), body)]
    while waiting:
        place, value = waiting.pop()
        if isinstance(value, str):
            yield place, value
        elif isinstance(value, dict):
            yield from ((place, key) for key in value)
            waiting += [((*place, key), part) for key, part in value.items()]
        elif isinstance(value, list):
            # numbers hold no text, and a prompt may be thousands of them
            waiting += [((*place, str(i)), part) for i, part in enumerate(value) if isinstance(part, str | dict | list)]
