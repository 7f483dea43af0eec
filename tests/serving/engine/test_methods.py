"""Which model ids a server's --rate and --init make."""

import pytest

from ephemera import rates
from ephemera.inits import ZeroInit
from ephemera.llm.frozen_lm import describe
from ephemera.llm.load import load_backbone
from ephemera.made_for import MadeFor
from ephemera.rates import AveragedRate, FixedRate, PerProjectionRate, load_rate
from ephemera.serving.engine import methods
from ephemera.serving.engine.methods import Method
from serving_fixtures import tiny_generator
from tiny_models import random_scalenet


@pytest.fixture
def ships(llama, tmp_path, monkeypatch):
    """Two tiny networks, of chat and of plain prompts, that ship for a model."""
    for format in ("chat", "plain"):
        made_for = MadeFor(("squad", "xsum"), format=format, reach="answer", steps=2)
        trained_for = describe(llama)
        rate = PerProjectionRate(projections=4, base_rates=[0.3, 0.2], trained_for=trained_for, made_for=made_for)
        rate.save_pretrained(tmp_path / format)
    names = {"tiny": {format: str(tmp_path / format) for format in ("chat", "plain")}}
    monkeypatch.setattr(rates, "DEFAULT_RATES", names)
    return names["tiny"]


def test_nothing_ships_for_another_model():
    found = methods.offer("some/model", [])
    assert found.rates == (FixedRate(0.05),)
    assert (found.init, found.defaults, found.trained) == ("zero", {}, None)


def test_what_ships_is_offered_beside_what_is_named(ships):
    found = methods.offer("tiny", [])
    assert list(found.defaults) == ["chat", "plain"]
    assert found.trained is found.defaults["chat"]
    assert found.rates == (FixedRate(0.05),)
    assert methods.offer("tiny", ["0.2"]).rates == (FixedRate(0.2),)
    assert list(methods.offer("tiny", ["0.2"]).defaults) == ["chat", "plain"]
    assert list(methods.offer("tiny", [ships["chat"]]).defaults) == ["chat", "plain"]
    assert methods.offer("tiny", ["scalenet-squad"]).defaults == {}  # for other projections
    assert methods.offer("tiny", [], "taskweaver").defaults == {}  # rates fit the start they were trained from
    del ships["plain"]
    assert list(methods.offer("tiny", []).defaults) == ["chat"]


def test_a_format_chooses_between_the_networks_that_ship(llama, ships):
    found = methods.offer("tiny", [])
    known = methods.build(llama, "zero", found.rates, defaults=found.defaults)
    assert [m.model_id for m in known] == [
        "tiny-llama",
        "tiny-llama:universal",
        "tiny-llama:universal",
        "tiny-llama:fixed",
    ]
    for format in ("chat", "plain"):
        method = methods.find(known, "tiny-llama:universal", format)
        assert isinstance(method, Method)
        assert (method.format, method.reach, method.steps(None), method.max_steps) == (format, "answer", 2, 2)
        assert method.beyond(format, 2) is None
    fixed = methods.find(known, "tiny-llama:fixed", "chat")
    assert isinstance(fixed, Method)
    assert (fixed.format, fixed.reach, fixed.steps(None), fixed.beyond("chat", 1)) == (None, "all", 1, None)


def test_a_network_for_other_prompts_says_so(llama, ships):
    alone = methods.build(llama, "zero", [load_rate(ships["chat"])])[1]
    assert alone.name == "constant"
    words = "this network was trained on chat prompts of squad, xsum, with 2 steps"
    assert alone.beyond("plain", 2) == words
    assert alone.beyond("chat", 2) is None
    assert alone.beyond("plain", 0) is None  # it is not used
    (_, everywhere) = methods.build(llama, "zero", [load_rate(ships["chat"])], reach="all")
    assert everywhere.reach == "all"
    assert everywhere.beyond("chat", 2) == words
    generated = methods.build(llama, tiny_generator(llama), [FixedRate(0.1)])[-1]
    assert generated.format == "plain"
    assert generated.beyond("chat", 1) == "this generator was trained on plain prompts of boolq, snli"
    assert generated.beyond("plain", 1) is None


def test_ids(llama):
    made = methods.build(llama, ZeroInit(), [random_scalenet(llama), FixedRate(0.1)], most_steps=3)
    assert [(m.model_id, m.max_steps) for m in made] == [
        ("tiny-llama", 0),
        ("tiny-llama:layerwise", 3),
        ("tiny-llama:fixed", 3),
    ]


def test_a_folder_s_own_name_is_its_model_id(llama_folder, monkeypatch):
    for where, name in (
        (llama_folder, "."),
        (llama_folder, "../" + llama_folder.name),
        (llama_folder.parent, f"./{llama_folder.name}"),
    ):
        monkeypatch.chdir(where)
        backbone = load_backbone(name, device="cpu")
        made = methods.build(backbone, ZeroInit(), [FixedRate(0.1)])
        assert [m.model_id for m in made] == [llama_folder.name, f"{llama_folder.name}:fixed"]
        assert describe(backbone)["name"] == llama_folder.name  # what a network trained on it remembers


def test_another_start_is_served_beside_zero(llama):
    rules, start = [random_scalenet(llama), FixedRate(0.1)], tiny_generator(llama)
    names = [m.name for m in methods.build(llama, start, rules)]
    assert names == ["none", "layerwise", "fixed", "generated", "generated+layerwise", "generated+fixed"]


def test_two_rates_of_one_kind(llama):
    with pytest.raises(ValueError, match="two fixed rates"):
        methods.build(llama, ZeroInit(), [FixedRate(0.1), FixedRate(0.2)])


def test_kinds(llama):
    assert random_scalenet(llama, granularity="step").label == "stepwise"
    assert random_scalenet(llama).label == "layerwise"
    assert AveragedRate.label.fget(None) == "averaged"
