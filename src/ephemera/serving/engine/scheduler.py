"""The one thread that owns the model: it adapts to waiting prompts together, and decodes all answers together.

A turn takes one group of waiting prompts (same start, rate and steps; bounded tokens), adapts, reads the prompts and
lets their answers join the decode batch; then every answer gets one token. Between two adaptation steps the answers
already under way get one token too, and prompts that ask for no adaptation begin: nobody waits longer for a token than
one adaptation step takes, and new prompts never wait for old answers to end.
"""

from __future__ import annotations

import logging
import math
import threading
import time
import traceback
from collections import deque
from collections.abc import Sequence

import torch

from ephemera.adaptation import Adaptation
from ephemera.batch import batch_tokens, length_batches, pad
from ephemera.begin import adapt_from
from ephemera.llm.frozen_lm import FrozenLM
from ephemera.llm.prefill import Prefill, prefill
from ephemera.llm.tokenize import chat_beginning
from ephemera.serving.engine.decode_batch import Answer, DecodeBatch, fail, greedy_tokens, out_of_memory
from ephemera.serving.engine.kv_cache import check_cache
from ephemera.serving.engine.logprobs import TokenLogprob, prompt_entries
from ephemera.serving.engine.messages import Adapting, Busy, Failed, Job, Observer
from ephemera.serving.engine.reporting import Times, reports
from ephemera.serving.engine.threads import in_passing_thread
from ephemera.serving.engine.vocabulary import Vocabulary

log = logging.getLogger("ephemera.serving")
GROUP = 16  # prompts that adapt together
CPU_TOKENS = 384  # padded tokens per adaptation group on a CPU: a step of more would hold up decoding for seconds
LATE = Failed(503, "the request's deadline has passed.", "deadline")
NO_MEMORY = Failed(503, "out of memory even for this prompt alone; shorten it or try again later.", "memory")


class _Abandoned(Exception):
    """Everyone who waited for this adaptation is gone."""


class Engine:
    """Takes jobs from any thread; everything it has to tell goes through each job's `emit`, from its own thread."""

    def __init__(
        self,
        backbone: FrozenLM,
        *,
        max_rows: int = 32,
        max_queue: int = 256,
        observer: Observer | None = None,
    ):
        self.backbone = backbone = backbone.with_prefixes([chat_beginning(backbone.tokenizer)])
        self.vocabulary = Vocabulary(backbone.tokenizer)
        self.max_rows, self.max_queue = max_rows, max_queue
        self.observer = observer or Observer()
        self.waiting: deque[Job] = deque()
        self.batch = DecodeBatch(backbone, end_tokens(backbone))
        self._wake = threading.Condition()
        self._closed = False
        self._seconds = 1.0  # running mean of how long a prompt takes
        self._thread = threading.Thread(target=self._run, name="ephemera-engine", daemon=True)
        probe = pad([[1, 2]], pad_id=backbone.pad_id).to(backbone.device)
        check_cache(in_passing_thread(lambda: prefill(backbone, probe, None)).cache, backbone.name)
        self.tokens = CPU_TOKENS if backbone.device.type == "cpu" else batch_tokens(backbone.device)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and not self._closed

    def start(self) -> Engine:
        self._thread.start()
        return self

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queue jobs, all or none; Busy where there is no room."""
        if any(job.rows > self.max_rows for job in jobs):
            raise ValueError(f"a job asks for more answers than are decoded together ({self.max_rows}).")
        with self._wake:
            if self._closed:
                raise Busy("the server is shutting down.", 5, closed=True)
            if len(self.waiting) + len(jobs) > self.max_queue:
                seconds = math.ceil(self._seconds * len(self.waiting) / self.max_rows)
                raise Busy(f"{len(self.waiting)} requests wait already.", min(max(seconds, 1), 60))
            self.waiting.extend(jobs)
            self._wake.notify()

    def close(self, timeout: float | None = None) -> None:
        """Take no more jobs, finish those there are, end the thread."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._thread.join(timeout)

    def _run(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self.waiting or self.batch.answers or self._closed)
                if self._closed and not self.waiting and not self.batch.answers:
                    return
            with self.backbone.lock:
                group = self._next_group()
                if group:
                    self._guarded(group)
                self._decode()

    def _next_group(self) -> list[Job]:
        """The oldest waiting job and others that adapt alike, of similar length, as many as there is room for."""
        with self._wake:
            for job in [j for j in self.waiting if j.cancelled or j.late]:
                self.waiting.remove(job)
                if not job.cancelled:
                    job.tell(LATE)
                self.observer.ended(job, "cancelled" if job.cancelled else "late", 0)
            if not self.waiting:
                return []
            first = self.waiting[0]
            free = self.max_rows - len(self.batch.answers)
            alike = []
            for job in self.waiting:
                if job.method is first.method and job.steps == first.steps and job.rows <= free:
                    alike.append(job)
                    free -= job.rows
            if first not in alike:
                return []  # no room for the oldest: the younger must not overtake it for ever
            return self._taken(alike)

    def _next_plain_group(self, reserved: int) -> list[Job]:
        """Waiting prompts without an adaptation, as long as a row stays free for each who came before them."""
        with self._wake:
            free, plain = self.max_rows - len(self.batch.answers) - reserved, []
            for job in self.waiting:
                free -= job.rows
                if free < 0:
                    break
                if not (job.method.adapts(job.steps) or job.cancelled or job.late):
                    plain.append(job)
            return self._taken(plain) if plain else []

    def _taken(self, jobs: list[Job]) -> list[Job]:
        """The first of some waiting jobs and those of similar length, out of the queue."""
        batches = length_batches([len(j.ids) for j in jobs], batch_size=GROUP, max_tokens=self.tokens)
        group = [jobs[i] for i in next(b for b in batches if 0 in b)]
        for job in group:
            self.waiting.remove(job)
        return group

    def _guarded(self, group: list[Job]) -> None:
        """Whatever goes wrong with a group ends its jobs, and nothing else."""
        try:
            self._begin(group)
        except _Abandoned:
            for job in group:
                self.observer.ended(job, "cancelled", 0)
        except Exception as error:
            begun = [a for a in self.batch.answers if a.job in group]
            self.batch.leave(begun)
            if out_of_memory(error) and not begun:  # answers that have begun cannot begin again
                self.observer.out_of_memory()
                self._release()
                if len(group) > 1:
                    middle = len(group) // 2
                    self._guarded(group[:middle])
                    self._guarded(group[middle:])
                    return
                failed = NO_MEMORY
            else:
                _log(error)
                failed = Failed(500, "the server failed on this request; its log says where.", "internal")
            for job in group:
                job.tell(failed)
                self.observer.ended(job, "failed", 0)

    def _begin(self, group: list[Job]) -> None:
        """Adapt to a group's prompts, read them, let their answers join."""
        start, backbone = time.perf_counter(), self.backbone
        method, steps = group[0].method, group[0].steps
        batch = pad([j.ids for j in group], pad_id=backbone.pad_id).to(backbone.device)
        made: Adaptation | None = None
        read: Prefill | None = None
        if method.adapts(steps):
            assert method.init is not None
            for job in group if steps else ():
                job.tell(Adapting(1, steps))
            made, read = adapt_from(
                backbone,
                batch,
                method.init,
                [j.seed for j in group],
                method.rate,
                steps,
                method.reach,
                after_step=lambda k: self._between(group, k, steps),
                max_kl=method.max_kl,
            )
        seconds = time.perf_counter() - start
        if made is None:
            read = prefill(backbone, batch, None)
        elif read is None:
            read = prefill(backbone, batch, made.lora, made.initial_lora, cached=made.reading, reach=method.reach)
        with torch.no_grad():
            logits_BV = backbone.logits(read.hidden_BTD[:, -1])
        entries = [self._prompt_entries(job, read, row) for row, job in enumerate(group)]
        answers, sources = [], []
        for row, job in enumerate(group):
            for choice in range(job.n if not job.cancelled else 0):
                answers.append(Answer(job, choice, self.vocabulary, self.batch.end_tokens))
                sources.append(row)
        if answers:
            self.batch.join(answers, read, sources)
        first = time.perf_counter()
        for answer, source, token in zip(answers, sources, greedy_tokens([logits_BV[s] for s in sources]), strict=True):
            if token is None:
                fail(answer, Failed(500, "the model's logits were not finite.", "not_finite"))
                continue
            answer.begin(entries[source])
            if answer.reason is None:
                answer.take(logits_BV[source], token)
        self._report(group, made, read, Times(seconds, first))
        self._part([a for a in answers if a.reason is not None])

    @torch.no_grad()
    def _prompt_entries(self, job: Job, read: Prefill, row: int) -> list[TokenLogprob]:
        """What is told of a prompt's own tokens; Reader lets only prompts ask that no adapter has seen."""
        if not job.scored:
            return []
        states_TD, count = read.hidden_BTD[row, -len(job.ids) :], job.sampling.logprobs or 0
        entries = prompt_entries(states_TD, job.ids, self.backbone.logits, count, self.vocabulary)
        places = self.vocabulary.prompt_offsets(job.ids, job.echo or "", special=job.shows_special)
        for entry, place in zip(entries, places, strict=True):
            entry.offset = place
        return entries

    def _report(self, group: list[Job], made: Adaptation | None, read: Prefill, times: Times) -> None:
        found = reports(self.backbone, group, made, read, times)
        for job, (report, left) in zip(group, found, strict=True):
            job.tell(report)
            self.observer.adapted(job, report.facts["adapt_seconds"], left)
            if job.cancelled:
                self.observer.ended(job, "cancelled", 0)
            elif job.n:
                self.observer.first_token(job, report.facts["first_token_seconds"])
            else:
                self.observer.ended(job, "complete", 0)

    def _between(self, group: list[Job], k: int, steps: int) -> None:
        """After an adaptation step: who waits hears of it, plain prompts begin, and the answers under way get a token."""
        if all(job.cancelled or job.late for job in group):
            for job in group:
                job.tell(LATE)
            raise _Abandoned
        if k < steps:
            for job in group:
                job.tell(Adapting(k + 1, steps))
        plain = self._next_plain_group(reserved=sum(job.rows for job in group))
        if plain:
            self._guarded(plain)
        self._decode()

    def _decode(self) -> None:
        """One token for every answer. Those whose asker is gone, or too late, leave first."""
        gone = [a for a in self.batch.answers if a.job.cancelled or a.job.late]
        for answer in gone:
            if not answer.job.cancelled:
                fail(answer, LATE)
            answer.reason = "cancelled" if answer.reason is None else answer.reason
        self._part(gone)
        if not self.batch.answers:
            return
        try:
            done = self.batch.step()
        except Exception as error:  # no row is known to be sound: all end, the engine goes on
            _log(error)
            done = list(self.batch.answers)
            for answer in done:
                fail(answer, Failed(500, "the server failed while answering; its log says where.", "internal"))
            self.batch = DecodeBatch(self.backbone, self.batch.end_tokens)
        self._told(done)

    def _part(self, answers: list[Answer]) -> None:
        self.batch.leave(answers)
        self._told(answers)

    def _told(self, answers: list[Answer]) -> None:
        for answer in answers:
            if answer.reason in ("stop", "length"):
                answer.close()
                taken = time.perf_counter() - answer.job.arrived
                self._seconds += 0.1 * (taken - self._seconds)
                self.observer.ended(answer.job, "complete", answer.count)
            else:
                self.observer.ended(answer.job, answer.reason or "failed", answer.count)

    def _release(self) -> None:
        if self.backbone.device.type == "cuda":
            torch.cuda.empty_cache()


def end_tokens(backbone: FrozenLM) -> frozenset[int]:
    """The tokens that end an answer, as transformers' generate takes them."""
    config = backbone.model.generation_config
    ends = getattr(config, "eos_token_id", None)
    if ends is None:
        ends = backbone.tokenizer.eos_token_id
    found = ends if isinstance(ends, list) else [ends]
    return frozenset(int(e) for e in found if e is not None)


def _log(error: Exception) -> None:
    """Where it happened; not the message, which may quote a prompt."""
    places = "".join(traceback.format_tb(error.__traceback__))
    log.error("%s\n%s", type(error).__name__, places)
