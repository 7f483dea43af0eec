"""A gate leaves prompts alone: those are answered by the base model, and it is said so, in the library and the server."""

from __future__ import annotations

import pytest

from ephemera.adaptation import LeftAlone
from ephemera.gate import Gate
from ephemera.inits import ZeroInit, load_generator
from ephemera.llm.frozen_lm import FrozenLM
from ephemera.made_for import MadeFor
from ephemera.model import AdaptiveLM
from ephemera.rates import FixedRate, PerProjectionRate
from ephemera.serving.engine.messages import Report
from ephemera.serving.engine.methods import Method
from ephemera.serving.engine.scheduler import Engine
from serving_fixtures import PROMPTS, collect, job_for, running, text_of
from tiny_models import generator_of, length_gate, tiny_backbone


def network(backbone: FrozenLM, gate: Gate | None) -> PerProjectionRate:
    made_for = MadeFor(("squad",), format="plain", reach="answer", steps=1)
    rate = PerProjectionRate(projections=len(backbone.projections), base_rates=(30.0,), made_for=made_for).double()
    rate.gate = gate
    return rate


def served(backbone: FrozenLM, method: Method, prompts, *, steps: int = 1) -> list[tuple[str, dict]]:
    with running(Engine(backbone)) as engine:
        found = collect([job_for(backbone, method, p, steps=steps, tokens=8) for p in prompts], engine)
    return [(text_of(events), next(e for e in events if isinstance(e, Report)).facts) for events in found]


@pytest.mark.parametrize("threshold", [0.4, 0.6])
def test_whom_the_gate_leaves_alone(threshold):
    backbone = tiny_backbone("llama")
    free = network(backbone, None)
    lm = AdaptiveLM(backbone, rate=network(backbone, length_gate(backbone, threshold)))
    prompts = list(PROMPTS[:3])
    base, adapted = (AdaptiveLM(backbone, rate=free).generate(prompts, steps=k, max_new_tokens=8) for k in (0, 1))
    assert all(a != b for a, b in zip(base, adapted, strict=True))
    texts, adaptation = lm.reply(prompts, max_new_tokens=8)
    method = Method("m", "constant", ZeroInit(), lm.rate, 1)
    server = served(backbone, method, prompts)
    assert texts == [text for text, _ in server] == (base if threshold < 0.5 else adapted)
    note = LeftAlone.ABSTAINED.words() if threshold < 0.5 else None
    assert list(adaptation.notes) == [facts["note"] for _, facts in server] == [note] * 3
    assert lm.generate(prompts, adaptation=adaptation, max_new_tokens=8) == texts


def test_each_prompt_is_judged_by_itself():
    """One batch of short prompts, which adapt, and long ones, which do not."""
    backbone = tiny_backbone("llama")
    lm = AdaptiveLM(backbone, rate=network(backbone, length_gate(backbone, 0.5, by_length=9.0)))
    prompts = ["The sea", "Give a short answer of the following question. Who wrote it in the winter?", "The mill runs"]
    texts, adaptation = lm.reply(prompts, max_new_tokens=8)
    assert adaptation.notes == (None, LeftAlone.ABSTAINED.words(), None)
    assert texts == [lm.generate(p, max_new_tokens=8)[0] for p in prompts]
    assert [text for text, _ in served(backbone, Method("m", "c", ZeroInit(), lm.rate, 1), prompts)] == texts
    plain = AdaptiveLM(backbone, rate=network(backbone, None))
    want = [plain.generate(p, steps=k, max_new_tokens=8)[0] for p, k in zip(prompts, (1, 0, 1), strict=True)]
    assert texts == want


def test_a_generators_gate(tmp_path):
    """Without a step: short prompts keep the generated adapter, long ones are the base model's."""
    backbone = tiny_backbone("llama")
    generator = load_generator(generator_of(tmp_path / "g", backbone)).to(backbone.dtype)
    prompts = ["The sea", "Give a short answer of the following question. Who wrote it in the winter?", "The mill runs"]
    plain, free = AdaptiveLM(backbone, rate="none"), AdaptiveLM(backbone, init=generator)
    want = [lm.generate(p, max_new_tokens=8)[0] for p, lm in zip(prompts, (free, plain, free), strict=True)]
    assert free.generate(prompts[1], max_new_tokens=8) != want[1:2]
    generator.gate = length_gate(backbone, 0.5, by_length=9.0, state_size=backbone.hidden_size)
    texts, adaptation = free.reply(prompts, max_new_tokens=8)
    server = served(backbone, Method("m", "generated", generator, None, 0), prompts, steps=0)
    assert texts == [text for text, _ in server] == want
    notes = [None, LeftAlone.ABSTAINED.words(), None]
    assert list(adaptation.notes) == [facts["note"] for _, facts in server] == notes
    assert [facts["abstained"] for _, facts in server] == [False, True, False]


def test_a_trust_region_alone():
    """Where no share of the adapter keeps the first token near the base model's, none is kept."""
    backbone = tiny_backbone("llama")
    lm = AdaptiveLM(backbone, rate=network(backbone, length_gate(backbone, 1.0, tau=-1.0)))
    texts, adaptation = lm.reply(PROMPTS[0], max_new_tokens=8)
    assert adaptation.notes == (LeftAlone.ABSTAINED.words(),)
    assert texts == lm.generate(PROMPTS[0], steps=0, max_new_tokens=8)


def test_a_gate_is_for_the_reach_it_was_made_for():
    backbone = tiny_backbone("llama")
    rate = network(backbone, length_gate(backbone, 0.4))
    everywhere = AdaptiveLM(backbone, rate=rate, reach="all")
    assert everywhere.adapt(PROMPTS[0]).notes[0] != LeftAlone.ABSTAINED.words()
    assert Method("m", "c", ZeroInit(), rate, 1, "all").gate(1) is None
    assert Method("m", "c", ZeroInit(), FixedRate(0.1), 1, "answer").gate(1) is None
    assert AdaptiveLM(backbone, rate=rate).adapt(PROMPTS[0], steps=0).notes == (None,)
    backbone.tokenizer.backend_tokenizer.post_processor = None  # no BOS: "a" is one token
    assert AdaptiveLM(backbone, rate=rate).adapt("a").notes == (LeftAlone.ONE_TOKEN.words(),)


@pytest.mark.parametrize("reach", ["answer", "all"])
def test_a_servers_bound(tmp_path, reach):
    """Of every kind of adapter nothing is left under a bound that none keeps, and all under one that all keep."""
    backbone = tiny_backbone("llama")
    generator = load_generator(generator_of(tmp_path / "g", backbone, reach)).to(backbone.dtype)
    base = AdaptiveLM(backbone, rate="none").generate(list(PROMPTS[:3]), max_new_tokens=8)
    for init, rate, steps in ((ZeroInit(), FixedRate(30.0, reach=reach), 1), (generator, None, 0)):
        free = Method("m", "free", init, rate, steps)
        wide, none = (Method("m", "bounded", init, rate, steps, None, kl) for kl in (1e3, 1e-12))
        whole, same, left = (served(backbone, m, PROMPTS[:3], steps=steps) for m in (free, wide, none))
        assert [text for text, _ in same] == [text for text, _ in whole] != base
        assert [text for text, _ in left] == base
        assert {facts["note"] for _, facts in left} == {LeftAlone.TOO_FAR.words()}
        assert {facts["abstained"] for _, facts in left} == {False}
