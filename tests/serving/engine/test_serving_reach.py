"""Rows whose adapters act everywhere, on the answer alone, or not at all, in one decode batch; and what is said of them."""

from __future__ import annotations

import httpx
import pytest

from counting import count_layers
from ephemera.inits import ZeroInit
from ephemera.llm.frozen_lm import describe
from ephemera.llm.tokenize import chat_beginning, encode_prompt
from ephemera.made_for import MadeFor
from ephemera.model import AdaptiveLM
from ephemera.rates import FixedRate, PerProjectionRate, ScaleNet
from ephemera.serving.engine import methods
from ephemera.serving.engine.messages import Finished, Job, Report
from ephemera.serving.engine.methods import Method
from ephemera.serving.engine.sampling import Sampling
from ephemera.serving.engine.scheduler import Engine
from serving_fixtures import PROMPTS, collect, job_for, live, running, text_of, tiny_generator
from tiny_models import ARCHITECTURES, SomeRowsWild, random_scalenet, tiny_backbone


def constants(backbone, format="chat", reach="answer", base_rates=(3.0,), steps=1) -> PerProjectionRate:
    made_for = MadeFor(("squad",), format=format, reach=reach, steps=steps)
    rate = PerProjectionRate(
        projections=len(backbone.projections), base_rates=base_rates, trained_for=describe(backbone), made_for=made_for
    )
    return rate.double()


def answering(backbone, name: str, init, rate, most: int = 3) -> Method:
    return Method(f"m:{name}", name, init, rate, most, "answer")


def mixed(backbone) -> list[Method]:
    """Both reaches, from each kind of start, and the model itself."""
    base, fixed = Method("m", "none", None, None, 0), FixedRate(3.0)
    network: ScaleNet = random_scalenet(backbone)
    network.base_rates = tuple(50 * rate for rate in network.base_rates)  # bold enough for another answer
    generator = tiny_generator(backbone)
    return [
        base,
        Method("m:fixed", "fixed", ZeroInit(), fixed, 3),
        answering(backbone, "fixed+answer", ZeroInit(), fixed),
        answering(backbone, "layerwise+answer", ZeroInit(), network),
        answering(backbone, "generated+answer", generator, fixed),
        Method("m:generated", "generated", generator, fixed, 3),
    ]


def alone(backbone, method: Method, prompt: str, *, steps: int, tokens: int, chat: bool = False) -> str:
    lm = AdaptiveLM(backbone, init=method.init, rate=method.rate, chat=chat, reach=method.reach)
    return lm.generate(prompt, steps=steps, max_new_tokens=tokens)[0]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_both_reaches_decode_together(architecture):
    backbone = tiny_backbone(architecture)
    cases = [
        (method, prompt, min(k, method.max_steps), 5 + 2 * k)
        for method in mixed(backbone)
        for k, prompt in enumerate(PROMPTS[:3])
    ]
    jobs = [job_for(backbone, m, p, steps=k, tokens=t) for m, p, k, t in cases]
    with running(Engine(backbone, max_rows=8)) as engine:
        found = collect(jobs, engine)
    for events, (method, prompt, steps, tokens) in zip(found, cases, strict=True):
        assert text_of(events) == alone(backbone, method, prompt, steps=steps, tokens=tokens), method.name
        assert sum(isinstance(e, Finished) for e in events) == 1


def test_the_reaches_answer_differently(llama):
    """Or the test above could not tell them apart."""
    texts = [alone(llama, m, PROMPTS[1], steps=min(2, m.max_steps), tokens=12) for m in mixed(llama)]
    assert len(set(texts)) == len(texts)


def test_the_prompt_is_read_once_with_reach_answer(llama, monkeypatch):
    """One pass of the prompt for the step, the last token again with its adapter, then a token a pass."""
    method = answering(llama, "fixed", ZeroInit(), FixedRate(3.0))
    engine = Engine(llama)
    passes = count_layers(llama, monkeypatch)
    with running(engine):
        collect([job_for(llama, method, PROMPTS[0], steps=1, n=0)], engine)
    assert set(passes.values()) == {2}


def test_chats_whose_beginning_is_kept(llama):
    """What the template's words gave in an earlier chat's step belongs to the reading too."""
    method = answering(llama, "constant", ZeroInit(), constants(llama))
    chats = [encode_prompt(llama.tokenizer, prompt, chat=True) for prompt in PROMPTS[:3]]
    assert len(chat_beginning(llama.tokenizer)) >= 5
    want = [alone(llama, method, prompt, steps=1, tokens=8, chat=True) for prompt in PROMPTS[:3]]
    jobs = [Job(ids, method, 1, lambda event: None, "chat", sampling=Sampling(max_tokens=8)) for ids in chats]
    with running(Engine(llama)) as engine:
        assert [text_of(collect([job], engine)[0]) for job in jobs] == want


def test_several_answers_and_diverged_rows(llama):
    method = answering(llama, "fixed", ZeroInit(), FixedRate(3.0))
    wild = answering(llama, "wild", ZeroInit(), SomeRowsWild({0: float("nan")}))
    with running(Engine(llama)) as engine:
        (three, lost) = collect(
            [
                job_for(llama, method, PROMPTS[0], steps=1, tokens=8, n=3),
                job_for(llama, wild, PROMPTS[0], steps=2, tokens=8),
            ],
            engine,
        )
    want = alone(llama, method, PROMPTS[0], steps=1, tokens=8)
    assert [text_of(three, choice) for choice in range(3)] == [want] * 3
    assert text_of(lost) == alone(llama, Method("m", "none", None, None, 0), PROMPTS[0], steps=0, tokens=8)
    assert "non-finite" in next(e for e in lost if isinstance(e, Report)).facts["note"]


def facts_of(backbone, method: Method, *, steps: int, trace: bool = False, format="plain") -> dict:
    job = job_for(backbone, method, PROMPTS[1], steps=steps, n=0, trace=trace, format=format)
    with running(Engine(backbone)) as engine:
        (events,) = collect([job], engine)
    return next(e for e in events if isinstance(e, Report)).facts


def test_losses_that_no_adapter_acts_on_are_not_compared(llama):
    """With reach answer the last step leaves the prompt's loss as it is: only what later steps saw is compared."""
    bold = FixedRate(300.0)  # the second step takes back what the first gained
    two = facts_of(llama, answering(llama, "fixed", ZeroInit(), bold), steps=2, trace=True)
    assert (len(two["prompt_nll"]), two["note"], two["reach"]) == (2, None, "answer")
    first, *_, last = facts_of(llama, answering(llama, "fixed", ZeroInit(), bold), steps=3)["prompt_nll"]
    assert last > first
    three = facts_of(llama, answering(llama, "fixed", ZeroInit(), bold), steps=3)
    assert f"raised the prompt's loss ({first:.2f} to {last:.2f} nats" in three["note"]
    everywhere = facts_of(llama, Method("m", "fixed", ZeroInit(), bold, 8), steps=2)
    assert everywhere["prompt_nll"] == pytest.approx([*two["prompt_nll"], last])
    assert f"raised the prompt's loss ({first:.2f} to {last:.2f} nats" in everywhere["note"]
    assert everywhere["reach"] == "all"


def test_steps_that_change_nothing_are_said_to(llama):
    still = facts_of(llama, Method("m", "fixed", ZeroInit(), FixedRate(0.0), 8), steps=1)
    assert "left the prompt's loss as it was" in still["note"]
    assert facts_of(llama, Method("m", "fixed", ZeroInit(), FixedRate(0.05), 8), steps=1)["note"] is None


def test_a_note_tells_both_faults(llama):
    method = Method("m", "constant", ZeroInit(), constants(llama, reach="all", base_rates=(300.0, 300.0)), 2)
    note = facts_of(llama, method, steps=2, format="plain")["note"]
    assert note.startswith("this network was trained on chat prompts of squad, with 1 step; the steps raised")


def test_requests_find_the_network_of_their_format(llama):
    chat, plain = constants(llama, "chat"), constants(llama, "plain", base_rates=(6.0, 1.0), steps=2)
    known = methods.build(llama, "zero", [FixedRate(0.05)], defaults={"chat": chat, "plain": plain})
    only = methods.build(llama, "zero", [chat])
    ask = {"max_tokens": 8, "temperature": 0, "adapt": {"trace": True}}
    messages = [{"role": "user", "content": PROMPTS[1]}]
    with live(llama, known, steps=None) as (url, _), httpx.Client(base_url=url, timeout=60) as raw:
        listed = {m["id"]: m for m in raw.get("/v1/models").json()["data"]}
        assert list(listed) == ["tiny-llama", "tiny-llama:universal", "tiny-llama:fixed"]
        assert listed["tiny-llama:universal"]["format"] == ["chat", "plain"]
        assert listed["tiny-llama:universal"]["reach"] == "answer"
        assert (listed["tiny-llama:fixed"]["format"], listed["tiny-llama:fixed"]["reach"]) == (["chat", "plain"], "all")
        ask["model"] = "tiny-llama:universal"
        told = raw.post("/v1/chat/completions", json={**ask, "messages": messages}).json()
        lm = AdaptiveLM(llama, rate=chat, chat=True)
        assert told["choices"][0]["message"]["content"] == lm.generate(PROMPTS[1], max_new_tokens=8)[0]
        assert (told["ephemera"]["steps"], told["ephemera"]["note"]) == (1, None)
        assert told["ephemera"]["trace"]["rates"][0] == pytest.approx([3.0] * 4)
        told = raw.post("/v1/completions", json={**ask, "prompt": PROMPTS[1]}).json()
        lm = AdaptiveLM(llama, rate=plain)
        assert told["choices"][0]["text"] == lm.generate(PROMPTS[1], max_new_tokens=8)[0]
        assert told["ephemera"]["steps"] == 2
        told = raw.post("/v1/adapt", json={"model": "tiny-llama:universal", "messages": messages}).json()
        assert told["ephemera"]["trace"]["rates"][0] == pytest.approx([3.0] * 4)
    with live(llama, only, steps=None) as (url, _), httpx.Client(base_url=url, timeout=60) as raw:
        (_, listed) = raw.get("/v1/models").json()["data"]
        assert (listed["id"], listed["format"]) == ("tiny-llama:constant", ["chat"])
        told = raw.post("/v1/completions", json={"model": listed["id"], "prompt": PROMPTS[1]}).json()
        assert told["ephemera"]["note"] == "this network was trained on chat prompts of squad, with 1 step"
