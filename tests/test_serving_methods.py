"""Which model ids a server's --rate and --init make."""

import pytest

from ephemera.inits import ZeroInit
from ephemera.rates import AveragedRate, FixedRate, ScaleNet
from ephemera.serving import methods
from ephemera.store import DEFAULT_MODEL
from serving_fixtures import tiny_generator
from tiny import random_scalenet


def test_the_default_model_comes_with_its_networks():
    rules, start = methods.specs(DEFAULT_MODEL, [], None)
    assert [methods.kind_of(rule) for rule in rules] == ["layerwise", "stepwise", "fixed"]
    assert start == "taskweaver"


def test_other_models_come_with_the_paper_s_rate():
    rules, start = methods.specs("some/model", [], None)
    assert [(type(rule), getattr(rule, "rate", None)) for rule in rules] == [(FixedRate, 0.05)]
    assert start == "zero"
    assert methods.trained(rules) is None


def test_a_rate_for_some_layers_is_not_joined_with_the_generator_of_all():
    rules, start = methods.specs(DEFAULT_MODEL, ["fast"], None)
    assert start == "zero"
    assert methods.trained(rules) is rules[0]
    assert methods.specs(DEFAULT_MODEL, ["fast"], "taskweaver")[1] == "taskweaver"  # as asked; loading then refuses it


def test_ids(llama):
    made = methods.build(llama, ZeroInit(), [random_scalenet(llama), FixedRate(0.1)], most_steps=3)
    assert [(m.model_id, m.max_steps) for m in made] == [
        ("tiny-llama", 0),
        ("tiny-llama:layerwise", 3),
        ("tiny-llama:fixed", 3),
    ]


def test_learned_rates_from_another_start_are_served_where_asked_for(llama):
    rates, start = [random_scalenet(llama), FixedRate(0.1)], tiny_generator(llama)
    names = [m.name for m in methods.build(llama, start, rates, joined=False)]
    assert names == ["none", "layerwise", "fixed", "generated", "generated+fixed"]
    assert "generated+layerwise" in [m.name for m in methods.build(llama, start, rates)]


def test_two_rates_of_one_kind(llama):
    with pytest.raises(ValueError, match="two fixed rates"):
        methods.build(llama, ZeroInit(), [FixedRate(0.1), FixedRate(0.2)])


def test_kinds(llama):
    assert methods.kind_of(random_scalenet(llama, granularity="step")) == "stepwise"
    assert isinstance(random_scalenet(llama), ScaleNet)
    assert methods.kind_of(AveragedRate.__new__(AveragedRate)) == "averaged"
