"""What requests may hold. Unknown fields are refused; OpenAI's fields are taken where they would change nothing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, model_validator

from ephemera.serving.http.fields import Body, Integer, Number, Only, Seed, Strict

NO_EFFECT = "Has no effect."
Stop = Annotated[str, Field(min_length=1, max_length=256)]
Steps = Annotated[Integer, Field(ge=0, le=1000)]


class AdaptOptions(Strict):
    """How to adapt; `steps` defaults to the server's, `seed` draws the adapter's start, `trace` tells every rate."""

    steps: Steps | None = None
    seed: Seed = 0
    trace: Annotated[bool, Field(strict=True)] = False


class TextPart(Strict):
    type: Literal["text"]
    text: str
    prompt_cache_breakpoint: Any = Field(None, description=NO_EFFECT)


def _text_parts(content: Any) -> Any:
    """Words for the parts that people send."""
    if not isinstance(content, str | list):
        raise ValueError("give a text, or a list of text parts")
    for i, part in enumerate(content if isinstance(content, list) else ()):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text":
            raise ValueError(f"part {i} has the type {kind!r}; this server reads parts of the type 'text' only")
    return content


class Message(Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str | list[TextPart], BeforeValidator(_text_parts)] | None = None
    name: str | None = Field(None, description=NO_EFFECT)
    refusal: Annotated[Any, Only(("",), "this server's models do not refuse")] = None
    annotations: Annotated[Any, Only(([],), "chat templates have no place for annotations")] = None
    audio: Annotated[Any, Only((), "this server reads text only")] = None
    function_call: Annotated[Any, Only((), "this server calls no functions")] = None
    tool_calls: Annotated[Any, Only(([],), "this server calls no tools")] = None
    parsed: Annotated[Any, Only((), "this server reads text only")] = None
    reasoning: Annotated[Any, Only(("",), "give the reasoning in the content, as the model writes it")] = None
    reasoning_content: Annotated[Any, Only(("",), "give the reasoning in the content, as the model writes it")] = None

    @model_validator(mode="after")
    def _says_something(self):
        if self.content is None and self.role != "assistant":
            raise ValueError(f"a message of the role {self.role!r} needs content; give a text, or a list of text parts")
        return self

    def plain(self) -> dict[str, str]:
        text = self.content if isinstance(self.content, str) else "".join(p.text for p in self.content or ())
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class StreamOptions(Strict):
    include_usage: bool | None = None
    include_obfuscation: Annotated[Any, Only((False,), "this server adds no obfuscation to a stream")] = None


class TextFormat(Strict):
    type: Literal["text"]


def _no_bias(bias: dict[str, float]) -> dict[str, float]:
    if any(bias.values()):
        raise ValueError("this server has no biases; allowed: null, {} or zeros. Leave the field out")
    return bias


class _Generation(Body):
    model: Annotated[str, Field(max_length=512)]
    temperature: Annotated[Number, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    n: Annotated[Integer, Field(ge=1, le=128)] | None = None
    seed: Seed | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    stream: Annotated[bool, Field(strict=True)] | None = None
    stream_options: StreamOptions | None = None
    adapt: AdaptOptions | None = None
    user: Annotated[str, Field(max_length=512)] | None = Field(None, description=NO_EFFECT)
    presence_penalty: Annotated[Any, Only((0,), "this server has no penalties")] = None
    frequency_penalty: Annotated[Any, Only((0,), "this server has no penalties")] = None
    logit_bias: Annotated[dict[str, Number], AfterValidator(_no_bias)] | None = Field(
        None, description="Only empty, or zeros."
    )

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
        return self.stream_options is not None and bool(self.stream_options.include_usage)


class ChatRequest(_Generation):
    """POST /v1/chat/completions"""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[Integer, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[Integer, Field(ge=1)] | None = None
    logprobs: Annotated[bool, Field(strict=True)] | None = None
    top_logprobs: Annotated[Integer, Field(ge=0, le=20)] | None = None
    response_format: TextFormat | None = None
    tools: Annotated[Any, Only(([],), "this server calls no tools")] = None
    tool_choice: Annotated[Any, Only(("none", "auto"), "this server calls no tools")] = None
    functions: Annotated[Any, Only(([],), "this server calls no functions")] = None
    function_call: Annotated[Any, Only(("none", "auto"), "this server calls no functions")] = None
    parallel_tool_calls: bool | None = Field(None, description=NO_EFFECT)
    modalities: Annotated[Any, Only((["text"],), "this server writes text only")] = None
    audio: Annotated[Any, Only((), "this server writes text only")] = None
    moderation: Annotated[Any, Only((), "this server moderates nothing")] = None
    web_search_options: Annotated[Any, Only((), "this server searches nothing")] = None
    reasoning_effort: Annotated[Any, Only(("none",), "this server cannot set how long a model reasons")] = None
    verbosity: Annotated[Any, Only(("medium",), "this server cannot set how long an answer is")] = None
    service_tier: Annotated[Any, Only(("auto", "default"), "this server has one service tier")] = None
    store: Annotated[Any, Only((False,), "this server keeps nothing of a request")] = None
    metadata: dict[str, str] | None = Field(None, description=NO_EFFECT)
    prediction: dict[str, Any] | None = Field(None, description=NO_EFFECT)
    prompt_cache_key: str | None = Field(None, description=NO_EFFECT)
    prompt_cache_options: dict[str, Any] | None = Field(None, description=NO_EFFECT)
    prompt_cache_retention: str | None = Field(None, description=NO_EFFECT)
    safety_identifier: str | None = Field(None, description=NO_EFFECT)

    @model_validator(mode="after")
    def _one_of_each(self):
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens differ; give one of them")
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs is allowed with logprobs=true only")
        return self

    @property
    def told(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def longest(self) -> int | None:
        return self.max_tokens or self.max_completion_tokens


Text = Annotated[str, Field(min_length=1)]
Ids = Annotated[list[Annotated[Integer, Field(ge=0)]], Field(min_length=1)]
Prompt = str | list[int]
SHAPES = "give a text, a list of texts, a list of token ids, or a list of such lists"


def _prompt(value: Any) -> Any:
    """Words for what no branch of the union takes, in place of each branch's own."""
    if value in ("", []):
        raise ValueError("it is empty; give some text to adapt to and answer")
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise ValueError(f"it is {'null' if value is None else f'no prompt: {value!r}'[:60]}; {SHAPES}")
    if all(_is_id(part) for part in value):
        return value
    if len(value) > 128:
        raise ValueError(f"{len(value)} prompts are more than the 128 that one request may hold; send fewer at a time")
    if "" in value or [] in value:
        raise ValueError("one of its prompts is empty; leave that one out")
    texts = all(isinstance(part, str) for part in value)
    if not texts and not all(isinstance(part, list) and all(_is_id(i) for i in part) for part in value):
        raise ValueError(f"its parts are of other kinds, or of several; {SHAPES} (integers from 0 on)")
    return value


def _is_id(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value >= 0 and value == value // 1


class CompletionRequest(_Generation):
    """POST /v1/completions"""

    prompt: Annotated[
        Text
        | Annotated[list[Text], Field(min_length=1, max_length=128)]
        | Ids
        | Annotated[list[Ids], Field(min_length=1, max_length=128)],
        BeforeValidator(_prompt),
    ]
    max_tokens: Annotated[Integer, Field(ge=0)] | None = None
    logprobs: Annotated[Integer, Field(ge=0, le=5)] | None = None
    echo: Annotated[bool, Field(strict=True)] | None = Field(
        None, description="Answers begin with the prompt. With logprobs only where nothing adapts to the prompt."
    )
    best_of: Annotated[Integer, Field(ge=1)] | None = Field(None, description="Only 1, or what n is.")
    suffix: Annotated[Any, Only(("",), "this server writes on from the prompt only")] = None

    @model_validator(mode="after")
    def _best_of(self):
        if self.best_of not in (None, 1, self.n or 1):
            raise ValueError(f"best_of: {self.best_of} is neither 1 nor n ({self.n or 1}); leave it out")
        return self

    @property
    def prompts(self) -> Sequence[Prompt]:
        prompt: Any = self.prompt
        return [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt

    @property
    def told(self) -> int | None:
        return self.logprobs

    @property
    def longest(self) -> int | None:
        return self.max_tokens


class AdaptRequest(Body):
    """POST /v1/adapt"""

    model: Annotated[str, Field(max_length=512)]
    prompt: Text | None = None
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


def where(errors: Sequence[Any]) -> tuple[str, str | None]:
    """(words, field) of what pydantic found; of a union's branches, the first that says something."""
    first = errors[0]
    place = [str(p) for p in first["loc"] if p != "body" and not _branch(p)]
    context = first.get("ctx", {})
    field = ".".join(place) or context.get("field")
    message = first["msg"].removeprefix("Value error, ").rstrip(".")
    if first["type"] == "extra_forbidden":
        words = f"{field!a} is no field that this server knows, and it ignores none; take it out."
        return f"{words} GET /openapi.json lists the fields.", field
    if first["type"] == "json_invalid":
        return f"the body is no valid JSON: {context.get('error', message)}.", None
    if first["type"] == "missing":
        return (
            f"{field}: this field is missing; give it." if field else "the body is empty; send a JSON object."
        ), field
    if not place and first["type"] in ("model_attributes_type", "model_type", "dict_type"):
        return f"the body is JSON, but no object; send one: {{...}}, not {_shown(first.get('input')) or 'this'}.", None
    given = _shown(first.get("input")) if first["type"] not in ("value_error", "surrogate") else ""
    return f"{f'{field}: ' if field else ''}{message}{f', not {given}' if given else ''}.", field


def _shown(value: Any) -> str:
    """A value as JSON, if it is one and short: errors quote no prompts."""
    shown = json.dumps(value) if value is None or isinstance(value, str | int | float | bool) else ""
    return shown if len(shown) <= 40 else ""


def _branch(part: Any) -> bool:
    """pydantic names a union's branches in the place of an error."""
    return isinstance(part, str) and (part in ("str", "constrained-str") or "[" in part)
