"""Which layers and kinds are adapted. (Kinds in every architecture: test_frozen_lm.py.)"""

import pytest

from ephemera.llm.projections import chosen_layers, find_projections
from tiny_models import tiny_model


@pytest.mark.parametrize(
    ("layers", "want"),
    [
        ("all", [0, 1, 2, 3, 4, 5]),
        ("first-2", [0, 1]),
        ("last-2", [4, 5]),
        ("2-4", [2, 3, 4]),
        ("3-3", [3]),
        ([5, 0, 5], [0, 5]),
    ],
)
def test_layers(layers, want):
    assert chosen_layers(layers, 6) == want


@pytest.mark.parametrize("layers", ["first-7", "last-7", "first-0", "4-6", "4-2", "some", "", [], [6], [-1]])
def test_layers_that_do_not_fit(layers):
    with pytest.raises(ValueError, match=r'does not fit: the model has 6 layers.*"first-4".*from 0 to 5'):
        chosen_layers(layers, 6)


def test_layers_and_kinds_of_a_model():
    model = tiny_model("llama", depth=4)

    def names(*args, **kwargs):
        return [(p.layer, p.kind) for p in find_projections(model, *args, **kwargs)]

    assert names("qv", "first-2") == [(0, "q"), (0, "v"), (1, "q"), (1, "v")]
    assert names("v", "last-1") == names(["v"], [3]) == [(3, "v")]
    assert names(["v", "q"], "1-1") == [(1, "v"), (1, "q")]
    assert names(["up_proj"], [2]) == [(2, "up_proj")]
    one = find_projections(model, "qv")[3].name
    assert [p.name for p in find_projections(model, "qv", only=[one])] == [one]
    # Another model's network: its own check will name both
    assert len(find_projections(model, "qv", only=["h.0.attn"])) == 8
