"""From a request's fields to jobs: which method, which tokens, how far."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ephemera.llm.frozen_lm import FrozenLM
from ephemera.llm.tokenize import encode_chat, encode_prompt
from ephemera.made_for import FORMATS, Format
from ephemera.serving.engine.messages import Event, Job
from ephemera.serving.engine.methods import Method, find
from ephemera.serving.engine.sampling import Sampling
from ephemera.serving.http.errors import ApiError
from ephemera.serving.http.schema import AdaptOptions, AdaptRequest, ChatRequest, CompletionRequest, Message, Prompt


@dataclass(frozen=True)
class Limits:
    """The most that one request may ask for."""

    prompt_tokens: int = 4096
    answer_tokens: int = 1024
    rows: int = 32
    seconds: float = 300.0


def _nobody(_event: Event) -> None:
    """Until a job is queued nobody listens."""


class Reader:
    """Checks requests against the model and the limits; ApiError says what is wrong."""

    def __init__(self, backbone: FrozenLM, methods: Sequence[Method], *, limits: Limits, steps: int | None = None):
        """`steps`: of a request that names none; by default what each method's rate was validated at."""
        self.backbone, self.methods, self.steps, self.limits = backbone, methods, steps, limits

    def method(self, model_id: str, format: Format | None = None) -> Method:
        found = find(self.methods, model_id, format)
        if isinstance(found, str):
            raise ApiError(404, found, param="model", code="model_not_found")
        return found

    def describe(self, model_id: str, created: int) -> dict[str, Any]:
        """What a model id takes: by default as many `steps`, at most `max_steps`; prompts of each `format`.

        `generates`: a generator makes a chat's adapter where no steps are asked for.
        """
        first = self.method(model_id)
        alike = [method for method in self.methods if method.model_id == model_id]
        formats = [f for f in reversed(FORMATS) if any(m.format in (None, f) for m in alike)]
        if not self.backbone.tokenizer.chat_template and formats != ["chat"]:
            formats = ["plain"]
        entry = {"id": model_id, "object": "model", "created": created, "owned_by": "ephemera", "method": first.name}
        generates = self.steps is None and first.unasked is not None
        given = 0 if generates else first.steps(self.steps)
        steps = {"steps": given, "max_steps": first.max_steps, "generates": generates}
        return {**entry, **steps, "format": formats, "reach": first.reach if first.init is not None else None}

    def described(self, created: int) -> list[dict[str, Any]]:
        return [self.describe(model_id, created) for model_id in dict.fromkeys(m.model_id for m in self.methods)]

    def plain(self, prompt: Prompt) -> list[int]:
        """Token ids of a text, or token ids as they are."""
        if not isinstance(prompt, str):
            known = self.backbone.vocabulary_VD.shape[0]
            if unknown := next((i for i in prompt if i >= known), None):
                words = f"prompt: the token id {unknown} is not in the vocabulary (0 to {known - 1})."
                raise ApiError(400, words, param="prompt")
            return self._fits(prompt, "prompt")
        if not prompt.strip():
            raise ApiError(400, "prompt: it is empty; give some text to adapt to and answer.", param="prompt")
        try:
            ids = self.backbone.check_ids(encode_prompt(self.backbone.tokenizer, prompt))
        except ValueError as error:
            raise ApiError(422, f"prompt: {error}", param="prompt") from None
        tokenizer = self.backbone.tokenizer
        added = {i for i in tokenizer.all_special_ids if i != tokenizer.unk_token_id}  # a text makes none of them
        return self._fits([] if added.issuperset(ids) else ids, "prompt")

    def chat(self, messages: Sequence[Message]) -> list[int]:
        tokenizer = self.backbone.tokenizer
        if not tokenizer.chat_template:
            raise ApiError(422, f"{self.backbone.name} has no chat template; use /v1/completions.", param="messages")
        if not any(m.plain()["content"].strip() for m in messages):
            raise ApiError(400, "messages: all are empty; give some text to answer.", param="messages")
        try:
            ids = self.backbone.check_ids(encode_chat(tokenizer, [m.plain() for m in messages]))
        except ValueError as error:
            raise ApiError(422, f"messages: {error}", param="messages") from None
        return self._fits(ids, "messages")

    def jobs(self, body: ChatRequest | CompletionRequest, prompts: list[list[int]]) -> list[Job]:
        """One job per prompt, given in tokens."""
        format: Format = "chat" if isinstance(body, ChatRequest) else "plain"
        method, steps = self._asked(self.method(body.model, format), body.adapt)
        n = body.n or 1
        if n * len(prompts) > self.limits.rows:
            words = (
                f"n: {n * len(prompts)} answers were asked for; this server gives at most {self.limits.rows} at once."
            )
            raise ApiError(400, words, param="n")
        options = body.adapt or AdaptOptions()
        echoes = self._echoes(body, method, steps)
        made = []
        for ids, echo in zip(prompts, echoes or [None] * len(prompts), strict=True):
            sampling = Sampling(
                temperature=1.0 if body.temperature is None else body.temperature,
                top_p=1.0 if body.top_p is None else body.top_p,
                max_tokens=self._longest(body.longest, len(ids)),
                stop=body.stops,
                logprobs=body.told,
                seed=body.seed,
            )
            made.append(
                Job(
                    ids,
                    method,
                    steps,
                    _nobody,
                    format,
                    echo=echo[0] if echo else None,
                    shows_special=bool(echo and echo[1]),
                    sampling=sampling,
                    n=n,
                    seed=options.seed,
                    trace=options.trace,
                    seconds=self.limits.seconds,
                )
            )
        return made

    def _echoes(
        self, body: ChatRequest | CompletionRequest, method: Method, steps: int
    ) -> list[tuple[str, bool]] | None:
        """What answers are to begin with: each prompt's text, and whether it shows special tokens."""
        if isinstance(body, ChatRequest) or not body.echo:
            return None
        if body.logprobs is not None and method.adapts(steps):
            words = (
                f"echo: {body.model} with {steps} steps adapts to the prompt, so that logprobs would score a text that "
            )
            words += f"it had adapted to. Use the model {self.methods[0].model_id!r}, or leave out echo or logprobs."
            raise ApiError(400, words, param="echo")
        decode: Any = self.backbone.tokenizer.decode
        return [
            (p, False) if isinstance(p, str) else (decode(p, skip_special_tokens=False), True) for p in body.prompts
        ]

    def adaptation(self, body: AdaptRequest, ids: list[int], *, adapter: bool) -> Job:
        format: Format = "plain" if body.messages is None else "chat"
        method, steps = self._asked(self.method(body.model, format), body.adapt)
        if adapter and not method.adapts(steps):
            words = f"adapter: {body.model} with {steps} steps has no adapter; choose another model or more steps."
            raise ApiError(400, words, param="adapter")
        seed, wait = body.adapt.seed if body.adapt else 0, self.limits.seconds
        return Job(ids, method, steps, _nobody, format, n=0, seed=seed, trace=True, adapter=adapter, seconds=wait)

    def _asked(self, method: Method, options: AdaptOptions | None) -> tuple[Method, int]:
        """The method, or what stands in for it where nobody asks for steps, and its steps."""
        if options is None or options.steps is None:
            if self.steps is None and method.unasked is not None:
                return method.unasked, 0
            return method, method.steps(self.steps)
        if options.steps > method.max_steps:
            words = f"adapt.steps: {options.steps} is more than {method.model_id} takes ({method.max_steps})."
            raise ApiError(400, words, param="adapt.steps")
        return method, options.steps

    def _longest(self, asked: int | None, tokens: int) -> int:
        """How long an answer may get: as asked, or what the limits and the model's window leave."""
        room = self.backbone.max_length - tokens
        if asked is None:
            return min(self.limits.answer_tokens, room)
        if asked > min(self.limits.answer_tokens, room):
            most = min(self.limits.answer_tokens, room)
            words = f"max_tokens: {asked} is more than fits: after this prompt of {tokens} tokens at most {most}."
            raise ApiError(413, words, param="max_tokens", code="context_length_exceeded")
        return asked

    def _fits(self, ids: list[int], field: str) -> list[int]:
        if not ids:
            words = f"{field}: the tokenizer of {self.backbone.name} makes no tokens of it; give some text to answer."
            raise ApiError(400, words, param=field)
        most = min(self.limits.prompt_tokens, self.backbone.max_length - 1)
        if len(ids) > most:
            words = f"{field}: {len(ids)} tokens are more than this server takes ({most})."
            raise ApiError(413, words, param=field, code="context_length_exceeded")
        return ids
