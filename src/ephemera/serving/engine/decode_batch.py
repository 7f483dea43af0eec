"""The rows being decoded: one token each per pass, every row with its own adapter, cache and random numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ephemera.batch import TokenBatch
from ephemera.llm.frozen_lm import FrozenLM
from ephemera.llm.prefill import Prefill
from ephemera.lora import LoraBatch
from ephemera.serving.engine.kv_cache import Rows
from ephemera.serving.engine.logprobs import TokenLogprob, logprob_entry
from ephemera.serving.engine.messages import Failed, Finished, Job, Text
from ephemera.serving.engine.sampling import draw
from ephemera.serving.engine.text import Detokenizer, Stop
from ephemera.serving.engine.vocabulary import Vocabulary

CONTEXT = 8  # tokens of an echoed prompt that an answer's first text may depend on


class Answer:
    """One answer as it grows."""

    def __init__(self, job: Job, choice: int, vocabulary: Vocabulary, end_tokens: frozenset[int]):
        self.job, self.choice = job, choice
        self.vocabulary = vocabulary
        self.end_tokens = end_tokens
        context = () if job.echo is None else job.ids[-CONTEXT:]
        self.text = Detokenizer(vocabulary.tokenizer, context)
        self.stop = Stop(job.sampling.stop)
        self.generator = job.sampling.generator(choice)
        self.token, self.count, self.silent = 0, 0, 0
        self.read = self.shown = 0  # characters that the tokens made, and that were told
        self.unread: list[TokenLogprob] = []  # of tokens that are no text yet
        self.logprobs: list[TokenLogprob] = []  # of tokens whose text is not told yet
        self.reason: str | None = None

    def begin(self, entries: Sequence[TokenLogprob]) -> None:
        """Tell the prompt's text, where it is asked for, and what is known of its tokens."""
        if self.job.echo is not None:
            self.read = self.shown = len(self.job.echo)
            self.job.tell(Text(self.choice, self.job.echo, 0, list(entries)))
        if self.job.sampling.max_tokens == 0:
            self._finish("length")

    def take(self, logits_V: Tensor, greedy: int) -> None:
        """Choose the next token, and tell its text. `reason` is set when the answer is complete."""
        sampling = self.job.sampling
        token = greedy if sampling.greedy else draw(logits_V, sampling, self.generator)
        self.token = token
        self.count += 1
        self.silent += 1
        ends = token in self.end_tokens
        # As OpenAI's: completions tell the token that ends them, chats do not
        if sampling.logprobs is not None and not (ends and self.job.format == "chat"):
            self.unread.append(logprob_entry(logits_V, token, sampling.logprobs, self.vocabulary))
        if ends:
            return self._finish("stop")
        shown, stopped = self.stop.push(self._text(token))
        if stopped:
            self.reason = "stop"
            return self._say(shown)
        if self.count == sampling.max_tokens:
            return self._finish("length", shown)
        if shown:
            self._say(shown)

    def _text(self, token: int | None) -> str:
        """The text that a token completes (None: what was held back); its tokens get their places."""
        before = self.text.given
        text = self.text.finish() if token is None else self.text.push(token)
        if self.unread:
            ids = self.text.ids[before : self.text.given]
            entries, self.unread = self.unread[: len(ids)], self.unread[len(ids) :]
            for entry, offset in zip(entries, self.vocabulary.offsets(ids, text), strict=False):
                entry.offset = self.read + offset
            self.logprobs += entries
        self.read += len(text)
        return text

    def _finish(self, reason: str, shown: str = "") -> None:
        more, stopped = self.stop.push(self._text(None))
        self.reason = "stop" if stopped else reason
        if stopped:
            return self._say(shown + more)
        for entry in self.unread:  # the token that ends the answer
            entry.offset = self.read
        self.logprobs += self.unread
        self._say(shown + more + self.stop.finish(), last=True)

    def _say(self, text: str, *, last: bool = False) -> None:
        """Tell text, and of its tokens: those behind it wait, or belong to a stop sequence."""
        self.shown += len(text)
        told = [entry for entry in self.logprobs if last or entry.offset < self.shown]
        self.job.tell(Text(self.choice, text, self.silent, told))
        self.logprobs, self.silent = self.logprobs[len(told) :], 0

    def close(self) -> None:
        assert self.reason is not None
        self.job.tell(Finished(self.choice, self.reason))


def folded(lora: LoraBatch, r: int) -> LoraBatch:
    """The same adapters with rank `r` and a scaling of 1, so that those of several starts fit in one batch."""
    pad = r - lora.r
    A = tuple(torch.nn.functional.pad(a, (0, 0, 0, pad)) for a in lora.A)
    B = tuple(torch.nn.functional.pad(b * lora.scaling, (0, pad)) for b in lora.B)
    return LoraBatch.of(lora.projections, A, B, r=r, lora_alpha=float(r))


def no_adapters(like: LoraBatch, rows: int) -> LoraBatch:
    return like.with_buffers(*(t.new_zeros(rows, t.shape[1]) for t in like.buffers))


def joined(have: LoraBatch | None, have_rows: int, new: LoraBatch | None, new_rows: int) -> LoraBatch | None:
    """Adapters of two groups of rows, either of which may have none; where both have none there is nothing."""
    r = max((x.r for x in (have, new) if x is not None), default=0)
    sides = [folded(x, r) if x is not None else None for x in (have, new)]
    like = next((x for x in sides if x is not None), None)
    if like is None:
        return None
    parts = [
        side if side is not None else no_adapters(like, rows)
        for side, rows in zip(sides, (have_rows, new_rows), strict=True)
        if rows
    ]
    return LoraBatch.cat(parts)


class DecodeBatch:
    """Answers that are decoded together."""

    def __init__(self, backbone: FrozenLM, end_tokens: frozenset[int]):
        self.backbone = backbone
        self.end_tokens = end_tokens
        self.answers: list[Answer] = []
        self.rows = Rows()
        self.lora: LoraBatch | None = None
        self.adapted: list[bool] = []
        self._prepared: Callable[[], AbstractContextManager[None]] | None = (
            None  # of `lora`, made when it is first decoded with
        )

    def join(self, answers: Sequence[Answer], read: Prefill, sources: Sequence[int]) -> None:
        """Take in answers; `sources[i]` is the row of the prefill that answer i goes on from."""
        lora = read.lora.rows(sources) if read.lora is not None else None
        together = joined(self.lora, len(self.answers), lora, len(answers))
        self.rows.join(read.cache, sources, [len(a.job.ids) for a in answers])
        self.lora, self._prepared = together, None
        self.answers += answers
        self.adapted += [lora is not None] * len(answers)

    def leave(self, leaving: Sequence[Answer]) -> None:
        """Let answers go; the last row takes each one's place."""
        order = list(range(len(self.answers)))
        for answer in leaving:
            row = self.answers.index(answer)
            self.rows.leave(row)
            _last_to(self.answers, row)
            _last_to(self.adapted, row)
            _last_to(order, row)
        if not leaving or self.lora is None:
            return
        self._prepared = None
        if not any(self.adapted):
            self.lora = None
        else:
            self.lora = self.lora.rows(order)

    @torch.no_grad()
    def logits(self) -> list[Tensor | None]:
        """Logits [V] of every row's next token; None where memory was short even for that row alone."""
        self.rows.reserve()
        logits = self._pass(0, len(self.answers))
        self.rows.advance()
        return logits

    def _pass(self, lo: int, hi: int) -> list[Tensor | None]:
        """Rows lo..hi in one forward; halves of them where memory runs out."""
        device = self.backbone.device
        ids_B1 = torch.tensor([[a.token] for a in self.answers[lo:hi]], device=device)
        try:
            with self._adapters(lo, hi):
                out = self.backbone.forward(
                    TokenBatch(ids_B1, torch.ones_like(ids_B1).bool()),
                    cache=self.rows.cache(lo, hi),
                    past_mask_BT=self.rows.past_mask_BT(lo, hi, device),
                )
            return list(self.backbone.logits(out.hidden_BTD[:, -1]))
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
        if hi - lo == 1:
            return [None]
        middle = (lo + hi) // 2
        return self._pass(lo, middle) + self._pass(middle, hi)

    def _adapters(self, lo: int, hi: int) -> AbstractContextManager[None]:
        """Rows lo..hi decode with their adapters; those of all rows are laid out once, until one joins or leaves."""
        if self.lora is None:
            return nullcontext()
        if (lo, hi) != (0, len(self.answers)):
            some = self.lora.with_buffers(*(t[lo:hi] for t in self.lora.buffers))
            return self.backbone.decoding(some, merge=False)()
        if self._prepared is None:
            self._prepared = self.backbone.decoding(self.lora, merge=False)
        return self._prepared()

    def step(self) -> list[Answer]:
        """One token for every row; the answers that are complete, or failed, have left and are returned."""
        rows = self.logits()
        for answer, logits_V, token in zip(self.answers, rows, greedy_tokens(rows), strict=True):
            if logits_V is None:
                fail(answer, Failed(503, "out of memory while answering; try again, or a shorter prompt.", "memory"))
            elif token is None:
                fail(answer, Failed(500, "the model's logits were not finite; try fewer steps.", "not_finite"))
            else:
                answer.take(logits_V, token)
        done = [a for a in self.answers if a.reason is not None]
        self.leave(done)
        return done


def fail(answer: Answer, event: Failed) -> None:
    answer.reason = "failed"
    answer.job.tell(event)
    answer.job.cancelled = True  # its other answers end too


def greedy_tokens(rows: Sequence[Tensor | None]) -> list[int | None]:
    """The likeliest token of each row, all read from the device at once; None where the logits are not finite."""
    present = [row for row in rows if row is not None]
    if not present:
        return [None] * len(rows)
    logits_BV = torch.stack(present)
    best = torch.where(logits_BV.sum(-1).isfinite(), logits_BV.argmax(-1), -1).tolist()
    found = iter(best)
    return [None if row is None or (token := next(found)) < 0 else token for row in rows]


def out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    words = str(error).lower()
    return isinstance(error, RuntimeError) and ("out of memory" in words or "can't allocate memory" in words)


def _last_to(column: list[Any], row: int) -> None:
    """Take out a row; the last one takes its place."""
    column[row] = column[-1]
    column.pop()
