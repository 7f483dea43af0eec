"""Events of the engine into OpenAI's response bodies, whole or as a stream of chunks."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from ephemera.saving import json_text
from ephemera.serving.engine.logprobs import TokenLogprob, chat_logprobs, completion_logprobs
from ephemera.serving.engine.messages import Adapting, Event, Failed, Finished, Job, Report, Text
from ephemera.serving.http.errors import envelope


@dataclass
class Choice:
    texts: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    reason: str | None = None
    begun: bool = False


class Answering:
    """One HTTP request's answers: its jobs (one per prompt), and what has come of them so far."""

    def __init__(self, jobs: list[Job], model: str, *, chat: bool, wants_logprobs: bool, wants_usage: bool = False):
        self.jobs, self.model, self.chat = jobs, model, chat
        self.wants_logprobs, self.wants_usage = wants_logprobs, wants_usage
        self.choices = [Choice() for job in jobs for _ in range(job.n)]
        self.reports: list[dict[str, Any] | None] = [None] * len(jobs)
        self.tokens = 0
        self.id = f"{'chatcmpl' if chat else 'cmpl'}-{secrets.token_hex(12)}"
        self.created = int(time.time())
        self.failed: Failed | None = None

    @property
    def done(self) -> bool:
        return self.failed is not None or all(c.reason is not None for c in self.choices)

    def take(self, prompt: int, event: Event) -> int | None:
        """Note an event; the index of the choice that it belongs to."""
        if isinstance(event, Report):
            self.reports[prompt] = event.facts
        elif isinstance(event, Failed):
            self.failed = event
        elif isinstance(event, Text | Finished):
            index = prompt * self.jobs[0].n + event.choice
            choice = self.choices[index]
            if isinstance(event, Finished):
                choice.reason = event.reason
            else:
                self.tokens += event.tokens
                choice.texts.append(event.text)
                choice.logprobs += event.logprobs
            return index
        return None

    def usage(self) -> dict[str, int]:
        read = sum(len(job.ids) for job in self.jobs)
        return {"prompt_tokens": read, "completion_tokens": self.tokens, "total_tokens": read + self.tokens}

    def extension(self) -> Any:
        return self.reports[0] if len(self.jobs) == 1 else self.reports

    def body(self) -> dict[str, Any]:
        """The whole response, when all is done."""
        choices = []
        for index, choice in enumerate(self.choices):
            text = "".join(choice.texts)
            made: dict[str, Any] = {"index": index, "finish_reason": choice.reason}
            made["logprobs"] = self._logprobs(choice.logprobs)
            if self.chat:
                made["message"] = {"role": "assistant", "content": text, "refusal": None}
            else:
                made["text"] = text
            choices.append(made)
        kind = "chat.completion" if self.chat else "text_completion"
        head = self._head(kind)
        return {**head, "choices": choices, "usage": self.usage(), "ephemera": self.extension()}

    async def stream(self, events: AsyncGenerator[tuple[int, Event]]) -> AsyncGenerator[str]:
        """Server-sent events. Whoever stops reading ends `events` too."""
        async with aclosing(events):
            async for line in self._lines(events):
                yield line

    async def _lines(self, events: AsyncGenerator[tuple[int, Event]]) -> AsyncGenerator[str]:
        async for prompt, event in events:
            if isinstance(event, Adapting):
                yield f": adapting {event.step}/{event.steps}\n\n"
                continue
            index = self.take(prompt, event)
            if isinstance(event, Failed):
                yield _sse(envelope(event.status, event.message, code=event.code))
                return
            if index is not None:
                assert isinstance(event, Text | Finished)
                yield _sse(self._chunk(index, event, prompt))
        if self.wants_usage:
            yield _sse({**self._head(self._chunk_kind), "choices": [], "usage": self.usage()})
        yield "data: [DONE]\n\n"

    @property
    def _chunk_kind(self) -> str:
        return "chat.completion.chunk" if self.chat else "text_completion"

    def _chunk(self, index: int, event: Text | Finished, prompt: int) -> dict[str, Any]:
        choice = self.choices[index]
        text = event.text if isinstance(event, Text) else ""
        made: dict[str, Any] = {"index": index, "finish_reason": None}
        made["logprobs"] = self._logprobs(event.logprobs if isinstance(event, Text) else [])
        if self.chat:
            made["delta"] = {} if choice.begun else {"role": "assistant"}
            if isinstance(event, Text):
                made["delta"]["content"] = text
        else:
            made["text"] = text
        choice.begun = True
        chunk = {**self._head(self._chunk_kind), "choices": [made]}
        if self.wants_usage:
            chunk["usage"] = None
        if isinstance(event, Finished):
            made["finish_reason"] = event.reason
            chunk["ephemera"] = self.reports[prompt]
        return chunk

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _logprobs(self, entries: list[TokenLogprob]) -> dict[str, Any] | None:
        if not self.wants_logprobs:
            return None
        return chat_logprobs(entries) if self.chat else completion_logprobs(entries)


def _sse(data: dict[str, Any]) -> str:
    return f"data: {json_text(data, ensure_ascii=False)}\n\n"
