"""Answers of a mixed, concurrent batch equal the library's, one at a time; failures end their own request alone."""

from __future__ import annotations

import random
import threading
import time

import pytest
import torch

from counting import count_head
from ephemera import begin
from ephemera.fast import fast_lm
from ephemera.inits import ZeroInit
from ephemera.llm.tokenize import chat_beginning, encode_prompt
from ephemera.lora import attach
from ephemera.model import AdaptiveLM
from ephemera.rates import FixedRate
from ephemera.serving.engine import decode_batch as batch_module
from ephemera.serving.engine import methods
from ephemera.serving.engine.decode_batch import DecodeBatch, folded, joined
from ephemera.serving.engine.messages import Adapting, Busy, Failed, Finished, Job, Report, Text
from ephemera.serving.engine.methods import Method
from ephemera.serving.engine.sampling import Sampling
from ephemera.serving.engine.scheduler import Engine
from reference import close
from serving_fixtures import PROMPTS, collect, job_for, running, solo, text_of, tiny_generator, tiny_methods
from tiny_models import ARCHITECTURES, SomeRowsWild, random_lora, tiny_backbone


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_mixed_batch_equals_solo(architecture):
    """Methods, steps and lengths mixed; more prompts than rows, so answers join and leave while others go on."""
    backbone = tiny_backbone(architecture)
    known, dice = tiny_methods(backbone), random.Random(0)
    cases = []
    for i in range(14):
        method = known[i % len(known)]
        cases.append((method, PROMPTS[i % len(PROMPTS)], min(i % 3, method.max_steps), dice.randrange(1, 16)))
    jobs = [job_for(backbone, m, p, steps=k, tokens=t) for m, p, k, t in cases]
    with running(Engine(backbone, max_rows=4)) as engine:
        found = collect(jobs, engine)
    for events, (method, prompt, steps, tokens) in zip(found, cases, strict=True):
        assert text_of(events) == solo(backbone, method, prompt, steps=steps, tokens=tokens)
        assert sum(isinstance(e, Finished) for e in events) == 1
        assert sum(e.tokens for e in events if isinstance(e, Text)) <= tokens


def test_adapters_on_the_upper_layers_alone():
    """The prefill takes what lies below from the steps; the answers stay those of a model without such a short cut."""
    backbone = tiny_backbone("llama", layers="last-1", depth=3)
    method = Method("tiny-llama:fixed", "fixed", ZeroInit(), FixedRate(3.0), 3)
    jobs = [job_for(backbone, method, p, steps=2, tokens=8) for p in PROMPTS]
    with running(Engine(backbone)) as engine:
        found = collect(jobs, engine)
    backbone.architecture = None  # nothing is cut now
    for prompt, events in zip(PROMPTS, found, strict=True):
        assert text_of(events) == solo(backbone, method, prompt, steps=2, tokens=8)


def test_the_methods_answer_differently(llama):
    """Or the test above could not tell whose adapter was used."""
    known = tiny_methods(llama)
    texts = {solo(llama, m, PROMPTS[1], steps=min(2, m.max_steps)) for m in known}
    assert len(texts) >= len(known) - 1


def test_arrivals_in_the_middle(llama):
    known = tiny_methods(llama)
    with running(Engine(llama, max_rows=8)) as engine:
        results: dict[int, str] = {}

        def one(i: int) -> None:
            time.sleep(0.01 * i)
            job = job_for(llama, known[i % len(known)], PROMPTS[i % 5], steps=min(1, known[i % len(known)].max_steps))
            results[i] = text_of(collect([job], engine)[0])

        threads = [threading.Thread(target=one, args=(i,)) for i in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    for i in range(16):
        method = known[i % len(known)]
        assert results[i] == solo(llama, method, PROMPTS[i % 5], steps=min(1, method.max_steps))


def test_what_is_reported(llama):
    method = methods.find(tiny_methods(llama), "tiny-llama:layerwise")
    job = job_for(llama, method, PROMPTS[0], steps=2, trace=True)
    with running(Engine(llama)) as engine:
        (events,) = collect([job], engine)
    steps = [e for e in events if isinstance(e, Adapting)]
    assert steps == [Adapting(1, 2), Adapting(2, 2)]
    (report,) = [e for e in events if isinstance(e, Report)]
    lm = AdaptiveLM(llama, init=method.init, rate=method.rate)
    adaptation = lm.adapt(PROMPTS[0], steps=2)
    after = lm.adapt(PROMPTS[0], steps=2 + 1).prompt_nll_BK  # K changes the rates: only the first steps compare
    assert report.facts["prompt_nll"][:2] == pytest.approx(adaptation.prompt_nll_BK[0].tolist(), rel=1e-9)
    assert len(report.facts["prompt_nll"]) == 3
    assert after.shape == (1, 3)
    close(torch.tensor(report.facts["trace"]["rates"]), adaptation.rates_BKM[0], 1e-6)
    assert [p["name"] for p in report.facts["trace"]["projections"]] == [p.name for p in llama.projections]
    assert report.facts["method"] == "layerwise"
    assert report.facts["note"] is None
    assert events.index(report) < next(i for i, e in enumerate(events) if isinstance(e, Finished))


def test_the_last_loss_is_that_of_the_adapted_model(llama):
    method = methods.find(tiny_methods(llama), "tiny-llama:fixed")
    with running(Engine(llama)) as engine:
        (one,), (two,) = (
            [e for e in events if isinstance(e, Report)]
            for events in collect(
                [job_for(llama, method, PROMPTS[0], steps=k, n=0, trace=True) for k in (1, 2)], engine
            )
        )
    # with a fixed rate, what step 2 saw is what step 1 left
    assert one.facts["prompt_nll"][1] == pytest.approx(two.facts["prompt_nll"][1], rel=1e-9)


def test_the_chat_templates_words_are_run_once(llama, monkeypatch):
    """Of the second chat's first step only what follows the template goes through the head; answers stay as they were."""
    method = methods.find(tiny_methods(llama), "tiny-llama:fixed")
    chats = [encode_prompt(llama.tokenizer, prompt, chat=True) for prompt in PROMPTS[:3]]
    beginning = chat_beginning(llama.tokenizer)
    assert len(beginning) >= 5
    assert all(chat[: len(beginning)] == beginning for chat in chats)
    want = [solo(llama, method, prompt, steps=1, tokens=6, chat=True) for prompt in PROMPTS[:3]]
    scored = count_head(llama, monkeypatch)
    jobs = [Job(ids, method, 1, lambda event: None, sampling=Sampling(max_tokens=6)) for ids in chats]
    with running(Engine(llama)) as engine:
        found = [text_of(collect([job], engine)[0]) for job in jobs]
    assert found == want
    stepped = [len(chats[0]) - 1, *(len(chat) - len(beginning) for chat in chats[1:])]
    left = [len(chat) - 1 for chat in chats]  # the loss after the step, of which the adapter sees every token
    assert scored == [n for pair in zip(stepped, left, strict=True) for n in pair]


def test_nothing_is_computed_twice_or_unasked(llama, monkeypatch):
    """The head sees a prompt's last token and each answer's, once; adapters are laid out when rows come or go."""
    method, through, laid_out = methods.find(tiny_methods(llama), "tiny-llama:generated"), [], []
    lay_out = fast_lm.decoding
    monkeypatch.setattr(fast_lm, "decoding", lambda *args, **kw: laid_out.append(1) or lay_out(*args, **kw))
    engine = Engine(llama)
    scored = count_head(llama, monkeypatch)
    hook = llama.head.register_forward_hook(lambda _m, _x, logits: through.append(logits.shape[:-1].numel()))
    try:
        with running(engine):
            (events,) = collect([job_for(llama, method, PROMPTS[0], tokens=8)], engine)
            assert sum(e.tokens for e in events if isinstance(e, Text)) == 8
            assert sum(through) == 8
            assert len(laid_out) == 1
            (report,) = [e for e in events if isinstance(e, Report)]
            assert report.facts["prompt_nll"] == []
            collect([job_for(llama, method, PROMPTS[0], tokens=8, trace=True)], engine)
            assert sum(through) == 16
            assert scored == [len(AdaptiveLM(llama).encode(PROMPTS[0])) - 1]
    finally:
        hook.remove()


@pytest.mark.parametrize("rows", [2, 3])
def test_a_plain_prompt_need_not_wait_for_an_adaptation(llama, rows):
    """It begins after the step under way, unless a row would then be missing for someone who came before it."""
    fixed = methods.find(tiny_methods(llama), "tiny-llama:fixed")
    plain = methods.find(tiny_methods(llama), "tiny-llama")
    jobs = [job_for(llama, m, PROMPTS[0], steps=k) for m, k in ((fixed, 3), (fixed, 2), (plain, 0))]
    order: list[tuple[int, object]] = []
    left = threading.Semaphore(0)

    def heard(i, event):
        order.append((i, event))
        if i == 0 and event == Adapting(1, 3):  # the others come while the first is adapted to
            engine.submit(jobs[1:])
        if isinstance(event, Finished):
            left.release()

    for i, job in enumerate(jobs):
        job.emit = lambda event, i=i: heard(i, event)
    with running(Engine(llama, max_rows=rows)) as engine:
        engine.submit(jobs[:1])
        for _ in jobs:
            assert left.acquire(timeout=30)
    first = [next(n for n, (j, e) in enumerate(order) if j == i and isinstance(e, Text)) for i in range(3)]
    if rows == 3:
        assert first[2] < order.index((0, Adapting(3, 3)))
    else:
        assert first[0] < first[1] < first[2]
    for i, job in enumerate(jobs):
        told = [e for j, e in order if j == i]
        assert text_of(told) == solo(llama, job.method, PROMPTS[0], steps=job.steps)


def test_several_answers_share_an_adaptation(llama):
    method = methods.find(tiny_methods(llama), "tiny-llama:fixed")
    sampling = Sampling(temperature=1.0, seed=3, max_tokens=8)
    with running(Engine(llama)) as engine:
        (three,) = collect([job_for(llama, method, PROMPTS[0], steps=1, sampling=sampling, n=3)], engine)
        crowd = [job_for(llama, method, p, steps=1) for p in PROMPTS]
        again = collect([*crowd, job_for(llama, method, PROMPTS[0], steps=1, sampling=sampling, n=3)], engine)[-1]
        greedy = Sampling(max_tokens=8)
        (same,) = collect([job_for(llama, method, PROMPTS[0], steps=1, sampling=greedy, n=2)], engine)
    texts = [text_of(three, c) for c in range(3)]
    assert len(set(texts)) == 3
    assert texts == [text_of(again, c) for c in range(3)]  # the seed decides, not the neighbours
    assert text_of(same, 0) == text_of(same, 1) == solo(llama, method, PROMPTS[0], steps=1, tokens=8)


def test_stop_sequences_cut_the_solo_answer(llama):
    method = tiny_methods(llama)[0]
    whole = solo(llama, method, PROMPTS[1], steps=0, tokens=30)
    stop = whole[4:7]
    sampling = Sampling(max_tokens=30, stop=(stop,))
    with running(Engine(llama)) as engine:
        (events,) = collect([job_for(llama, method, PROMPTS[1], sampling=sampling)], engine)
    assert text_of(events) == whole[: whole.find(stop)]
    assert next(e for e in events if isinstance(e, Finished)).reason == "stop"


def test_cancelled_jobs_leave_and_others_go_on(llama):
    known = tiny_methods(llama)
    jobs = [job_for(llama, known[i % 3], PROMPTS[i % 5], steps=min(i % 3, 1), tokens=20) for i in range(10)]
    with running(Engine(llama, max_rows=4)) as engine:
        for job in jobs[::3]:
            job.cancelled = True
        kept = [j for i, j in enumerate(jobs) if i % 3]
        engine.submit(jobs[::3])
        found = collect(kept, engine)
        for _ in range(100):
            if not engine.batch.answers and not engine.waiting:
                break
            time.sleep(0.02)
        assert not engine.batch.answers
        assert not engine.waiting
    assert all(sum(isinstance(e, Finished) for e in events) == 1 for events in found)


def test_cancelled_while_adapting(llama):
    method = methods.find(tiny_methods(llama), "tiny-llama:fixed")
    job = job_for(llama, method, PROMPTS[0], steps=8)
    seen = []

    def emit(event) -> None:
        seen.append(event)
        job.cancelled = isinstance(event, Adapting) and event.step == 2

    job.emit = emit
    with running(Engine(llama)) as engine:
        engine.submit([job])
        (events,) = collect([job_for(llama, method, PROMPTS[1], steps=1)], engine)
    assert seen == [Adapting(1, 8), Adapting(2, 8)]  # the third step was not taken
    assert text_of(events) == solo(llama, method, PROMPTS[1], steps=1)


def test_deadline_and_full_queue(llama):
    method = tiny_methods(llama)[0]
    with running(Engine(llama, max_queue=2)) as engine:
        (events,) = collect([job_for(llama, method, PROMPTS[0], seconds=0.0)], engine)
        assert events[-1].status == 503
        assert events[-1].code == "deadline"
        with pytest.raises(Busy, match="wait already") as busy:
            engine.submit([job_for(llama, method, PROMPTS[0]) for _ in range(3)])
        assert 1 <= busy.value.seconds <= 60
    with pytest.raises(Busy, match="shutting down"):
        engine.submit([job_for(llama, method, PROMPTS[0])])


def test_closing_finishes_what_is_under_way(llama):
    method = tiny_methods(llama)[0]
    jobs = [job_for(llama, method, p, tokens=20) for p in PROMPTS]
    engine = Engine(llama, max_rows=2).start()
    seen = []
    for job in jobs:
        job.emit = seen.append
    engine.submit(jobs)
    engine.close(30)
    assert sum(isinstance(e, Finished) for e in seen) == len(jobs)
    assert not engine.alive


class Wild(SomeRowsWild):
    """A rate that no adapter survives."""

    def rates_BM(self, h_BH, k, K, *, like, projections):
        return like.new_full((like.shape[0], projections), float("inf"))


def test_a_diverging_adaptation_is_answered_unadapted_and_says_so(llama):
    wild = Method("wild", "wild", ZeroInit(), Wild({}), 8)
    calm = methods.build(llama, ZeroInit(), [FixedRate(0.3)])[1]
    jobs = [job_for(llama, m, p, steps=2) for m in (wild, calm) for p in PROMPTS]
    with running(Engine(llama)) as engine:
        found = collect(jobs, engine)
    for job, prompt, events in zip(jobs, PROMPTS * 2, found, strict=True):
        report = next(e for e in events if isinstance(e, Report))
        assert text_of(events) == solo(llama, job.method, prompt, steps=2)
        if job.method is wild:
            assert "non-finite" in report.facts["note"]
            assert None in report.facts["prompt_nll"]  # JSON has no NaN
            assert text_of(events) == solo(llama, Method("none", "none", None, None, 0), prompt, steps=0)


def test_steps_that_raise_the_loss_are_said_to(llama):
    bold, calm = (Method("m", "m", ZeroInit(), FixedRate(rate), 8) for rate in (300.0, 0.05))
    jobs = [job_for(llama, method, PROMPTS[1], steps=2, trace=True) for method in (bold, calm)]
    with running(Engine(llama)) as engine:
        reports = [next(e for e in events if isinstance(e, Report)) for events in collect(jobs, engine)]
    first, *_, last = reports[0].facts["prompt_nll"]
    assert last > first
    assert f"raised the prompt's loss ({first:.2f} to {last:.2f} nats" in reports[0].facts["note"]
    assert reports[1].facts["note"] is None


def test_out_of_memory_splits_groups_then_refuses(llama, monkeypatch):
    method = methods.find(tiny_methods(llama), "tiny-llama:fixed")
    sizes = []

    def adapt(backbone, batch, *args, **kwargs):
        sizes.append(batch.ids_BT.shape[0])
        if batch.ids_BT.shape[0] > 1 or batch.ids_BT.shape[1] > 20:
            raise torch.OutOfMemoryError("out of memory")
        return real(backbone, batch, *args, **kwargs)

    real = begin.adapt
    monkeypatch.setattr(begin, "adapt", adapt)
    with running(Engine(llama)) as engine:
        found = collect([job_for(llama, method, p, steps=1) for p in PROMPTS], engine)
    assert max(sizes) > 1
    for prompt, events in zip(PROMPTS, found, strict=True):
        if isinstance(events[-1], Failed):
            assert events[-1].status == 503
            assert len(prompt) > 20
        else:
            assert text_of(events) == solo(llama, method, prompt, steps=1)
    assert any(isinstance(events[-1], Failed) for events in found)
    assert not all(isinstance(events[-1], Failed) for events in found)


def test_out_of_memory_while_decoding_halves_the_pass(llama, monkeypatch):
    method = tiny_methods(llama)[0]
    real, sizes = type(llama).forward, []

    def forward(self, batch, *args, **kwargs):
        if kwargs.get("past_mask_BT") is not None:
            sizes.append(batch.ids_BT.shape[0])
            if batch.ids_BT.shape[0] > 2:
                raise RuntimeError("CUDA out of memory")
        return real(self, batch, *args, **kwargs)

    monkeypatch.setattr(type(llama), "forward", forward)
    with running(Engine(llama)) as engine:
        found = collect([job_for(llama, method, p) for p in PROMPTS], engine)
    assert max(sizes) > 2
    monkeypatch.undo()
    assert [text_of(e) for e in found] == [solo(llama, method, p, steps=0) for p in PROMPTS]


def test_an_unforeseen_error_ends_those_requests_alone(llama, monkeypatch, caplog):
    method = tiny_methods(llama)[0]
    real, secret = DecodeBatch.logits, "a prompt's text"

    def broken(self):
        raise RuntimeError(secret)

    monkeypatch.setattr(DecodeBatch, "logits", broken)
    with running(Engine(llama)) as engine:
        (events,) = collect([job_for(llama, method, PROMPTS[0])], engine)
        assert events[-1].status == 500
        monkeypatch.setattr(DecodeBatch, "logits", real)
        (events,) = collect([job_for(llama, method, PROMPTS[0])], engine)
        assert text_of(events) == solo(llama, method, PROMPTS[0], steps=0)
    assert secret not in caplog.text
    assert "RuntimeError" in caplog.text


def test_adapters_of_several_ranks_in_one_batch(llama):
    """Folded and padded adapters change nothing, and rows without one get exactly none."""
    one, two = random_lora(llama, 2, r=2, lora_alpha=8.0), random_lora(llama, 1, r=4, lora_alpha=6.0, seed=4)
    both = joined(joined(None, 2, one, 2), 4, two, 1)
    ids_BT = torch.arange(3, 8).expand(5, -1)
    with torch.no_grad():
        with attach(llama.model, both):
            have = llama.model(input_ids=ids_BT).logits
        plain = llama.model(input_ids=ids_BT[:1]).logits
        close(have[:1], plain)
        close(have[1:2], plain)
        for place, lora, row in ((2, one, 0), (3, one, 1), (4, two, 0)):
            with attach(llama.model, lora.rows([row])):
                close(have[place : place + 1], llama.model(input_ids=ids_BT[:1]).logits)
    assert both.r == 4
    assert folded(one, 2).scaling == 1
    assert joined(None, 3, None, 2) is None


def test_the_generator_is_no_noop(llama):
    assert any(bool(t.abs().max() > 0) for t in tiny_generator(llama)(llama, _ids(llama), [0]).B)


def _ids(backbone):
    from ephemera.batch import pad

    return pad([[1, 5, 9]], pad_id=backbone.pad_id)


def test_memory_errors_are_told_apart():
    assert batch_module.out_of_memory(torch.OutOfMemoryError("x"))
    assert batch_module.out_of_memory(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"))
    assert not batch_module.out_of_memory(RuntimeError("shapes differ"))
    assert not batch_module.out_of_memory(ValueError("out of memory"))
