"""What requests may hold. Unknown fields are refused; OpenAI fields that would change nothing are taken as such."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator


def _no_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("expected a number, not true or false")
    return value


Number = Annotated[float, BeforeValidator(_no_bool)]
Zero = Annotated[Number, Field(ge=0, le=0)]
Integer = Annotated[int, Field(strict=True)]
Seed = Annotated[int, Field(strict=True, ge=-(1 << 63), lt=1 << 63)]
Stop = Annotated[str, Field(min_length=1, max_length=256)]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class AdaptOptions(Strict):
    """How to adapt; `steps` defaults to the server's, `seed` draws the adapter's start, `trace` tells every rate."""

    steps: Annotated[int, Field(strict=True, ge=0, le=1000)] | None = None
    seed: Seed = 0
    trace: Annotated[bool, Field(strict=True)] = False


class TextPart(Strict):
    type: Literal["text"]
    text: str


class Message(Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]

    def plain(self) -> dict[str, str]:
        text = self.content if isinstance(self.content, str) else "".join(p.text for p in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class StreamOptions(Strict):
    include_usage: bool = False


class TextFormat(Strict):
    type: Literal["text"]


class _Generation(Strict):
    model: Annotated[str, Field(max_length=512)]
    max_tokens: Annotated[Integer, Field(ge=1)] | None = None
    temperature: Annotated[Number, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    n: Annotated[Integer, Field(ge=1, le=128)] | None = None
    seed: Seed | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = None
    stream: Annotated[bool, Field(strict=True)] | None = None
    stream_options: StreamOptions | None = None
    adapt: AdaptOptions | None = None
    user: Annotated[str, Field(max_length=512)] | None = Field(None, description="Has no effect.")
    presence_penalty: Zero | None = Field(None, description="Only 0, which is no penalty.")
    frequency_penalty: Zero | None = Field(None, description="Only 0, which is no penalty.")
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = Field(None, description="Only empty.")

    @model_validator(mode="after")
    def _stream_options(self):
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is allowed with stream=true only")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def wants_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class ChatRequest(_Generation):
    """POST /v1/chat/completions"""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[Integer, Field(ge=1)] | None = None
    logprobs: Annotated[bool, Field(strict=True)] | None = None
    top_logprobs: Annotated[Integer, Field(ge=0, le=20)] | None = None
    response_format: TextFormat | None = None

    @model_validator(mode="after")
    def _one_of_each(self):
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("give max_tokens or max_completion_tokens, not both")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs is allowed with logprobs=true only")
        return self

    @property
    def told(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def longest(self) -> int | None:
        return self.max_tokens or self.max_completion_tokens


class CompletionRequest(_Generation):
    """POST /v1/completions"""

    prompt: (
        Annotated[str, Field(min_length=1)]
        | Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1, max_length=128)]
    )
    logprobs: Annotated[Integer, Field(ge=0, le=5)] | None = None
    echo: Literal[False] | None = Field(None, description="Only false.")
    best_of: Literal[1] | None = Field(None, description="Only 1.")
    suffix: Literal[""] | None = Field(None, description="Only empty.")

    @property
    def prompts(self) -> list[str]:
        return [self.prompt] if isinstance(self.prompt, str) else self.prompt

    @property
    def told(self) -> int | None:
        return self.logprobs

    @property
    def longest(self) -> int | None:
        return self.max_tokens


class AdaptRequest(Strict):
    """POST /v1/adapt"""

    model: Annotated[str, Field(max_length=512)]
    prompt: Annotated[str, Field(min_length=1)] | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    adapt: AdaptOptions | None = None
    adapter: Annotated[bool, Field(strict=True)] = False

    @model_validator(mode="after")
    def _one_prompt(self):
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give prompt or messages, one of them")
        return self


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorEnvelope(BaseModel):
    error: ErrorDetail


def where(errors: list[dict[str, Any]]) -> tuple[str, str | None]:
    """(words, field) of what pydantic found; of a union's branches, the first that says something."""
    first = errors[0]
    place = [str(p) for p in first["loc"] if p != "body" and not _branch(p)]
    field = ".".join(place) or None
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        return f"unsupported field {field!r}: this server does not know it, and ignores none.", field
    if first["type"] == "json_invalid":
        return f"the body is no valid JSON: {first.get('ctx', {}).get('error', message)}.", None
    return (f"{field}: {message}." if field else f"{message}."), field


def _branch(part: Any) -> bool:
    """pydantic names a union's branches in the place of an error."""
    return isinstance(part, str) and (part in ("str", "constrained-str") or "[" in part)
