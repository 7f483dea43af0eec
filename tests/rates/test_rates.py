import json
import math
import shutil

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from ephemera import artifact
from ephemera.llm.frozen_lm import describe
from ephemera.rates import AveragedRate, FixedRate, ScaleNet, load_rate
from reference import close
from tiny_models import random_scalenet, tiny_backbone

HIDDEN, M = 3, 4


def small(**settings) -> ScaleNet:
    return ScaleNet(hidden_size=HIDDEN, projections=M, mlp_size=5, **settings)


def with_output(network: ScaleNet, a: list[float]) -> ScaleNet:
    """The last layer gives exactly these numbers."""
    with torch.no_grad():
        network.out.bias.copy_(torch.tensor(a))
    return network


@pytest.mark.parametrize("granularity", ["layer", "step"])
def test_s_is_one_at_the_start(granularity):
    network = small(granularity=granularity, base_rates=(6.0, 0.5, 0.1))
    s = network.scales(torch.randn(2, 2 * HIDDEN), 1, 3)
    assert s.shape == (2, M)
    assert (s == 1).all()
    for k, eta in ((1, 6.0), (2, 0.5), (3, 0.1)):
        have = network.rates_BM(torch.randn(2, 2 * HIDDEN), k, 3, like=torch.zeros(2), projections=M)
        close(have, torch.full((2, M), eta), 1e-6)


def test_equation_16():
    a = [-3.0, -0.5, 0.0, 1.5]
    s = with_output(small(), a).scales(torch.zeros(1, 2 * HIDDEN), 1, 1)[0]
    close(s, torch.tensor([math.exp(-3), math.exp(-0.5), 1.0, 1 + 1.5 + 1.5**2 / 2]), 1e-6)


def test_s_is_clamped_above_and_positive():
    s = with_output(small(max_log_scale=2.0), [100.0, 2.0, -50.0, -1e30]).scales(torch.zeros(1, 2 * HIDDEN), 1, 1)[0]
    assert s[0] == s[1] == 5
    assert s[2] > 0
    assert s.isfinite().all()


def test_s_has_a_gradient_on_both_branches():
    a = [-3.0, -0.5, 0.5, 1.5]
    network = with_output(small(), a)
    network.scales(torch.zeros(1, 2 * HIDDEN), 1, 1).sum().backward()
    slopes = [math.exp(-3), math.exp(-0.5), 1.5, 2.5]  # of exp(a), and of 1 + a + a^2/2
    close(network.out.bias.grad, torch.tensor(slopes), 1e-6)
    far = with_output(small(), [-1e4, -200.0, 3.0, 0.0])
    far.scales(torch.zeros(1, 2 * HIDDEN), 1, 1).sum().backward()
    assert far.out.bias.grad.isfinite().all()
    # exp of a number that the other branch takes must not overflow into its gradient
    high = with_output(small(max_log_scale=1e3), [500.0, 1.0, 0.0, -1.0])
    high.scales(torch.zeros(1, 2 * HIDDEN), 1, 1).sum().backward()
    assert high.out.bias.grad.isfinite().all()


def test_step_wise_is_one_rate_for_all_projections():
    torch.manual_seed(0)
    for granularity, count in (("layer", M), ("step", 1)):
        network = small(granularity=granularity)
        torch.nn.init.normal_(network.out.weight)
        s = network.scales(torch.randn(2, 2 * HIDDEN), 1, 3)
        assert network.out.out_features == count
        assert [len(set(row)) for row in s.tolist()] == [count, count]
        assert s[0, 0] != s[1, 0]


def test_k_and_K_enter_as_shares_of_kmax():
    network = small()  # mean 0, deviation 1: h as it is, within 5
    torch.nn.init.normal_(network.out.weight)
    h = torch.randn(1, 2 * HIDDEN)
    for k, K in ((1, 1), (1, 4), (2, 4)):
        x = torch.cat([h[0], torch.tensor([k / 5, K / 5])])
        a = network.out.weight @ F.gelu(network.hidden.weight @ x + network.hidden.bias) + network.out.bias
        want = torch.stack([v.exp() if v <= 0 else 1 + v + v * v / 2 for v in a.clamp(max=4)])
        close(network.scales(h, k, K)[0], want, 1e-5)


def test_standardisation():
    h = torch.randn(50, 2 * HIDDEN) * 3 + 2
    standard = small()
    standard.fit_normalization(h)
    normal = standard._normalized(h)
    close(normal.mean(0), torch.zeros(2 * HIDDEN), 1e-5)
    close(normal.std(0), torch.ones(2 * HIDDEN), 1e-5)
    assert standard._normalized(h * 1e6).abs().max() == 5


def test_a_constant_feature_is_no_division_by_zero():
    network = small()
    network.fit_normalization(torch.ones(4, 2 * HIDDEN))
    assert network.scales(torch.ones(1, 2 * HIDDEN), 1, 1).isfinite().all()


def test_a_row_without_a_representation_does_not_touch_the_gradient():
    network = small()
    torch.nn.init.normal_(network.out.weight)
    h = torch.randn(2, 2 * HIDDEN)
    h[1] = float("nan")
    network.scales(h, 1, 1)[0].sum().backward()
    assert all(p.grad.isfinite().all() for p in network.parameters())


def test_fixed_rates():
    like = torch.zeros(3, dtype=torch.float64)
    assert (FixedRate(0.05).rates_BM(None, 2, 3, like=like, projections=M) == 0.05).all()
    for wrong in (-0.1, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="a rate is a number >= 0"):
            FixedRate(wrong)
    assert load_rate(0.1) == load_rate("0.1") == FixedRate(0.1)
    assert load_rate(3) == FixedRate(3.0)
    with pytest.raises(ValueError, match="a rate is a number >= 0; got -1"):
        load_rate(-1)


@pytest.mark.parametrize("granularity", ["layer", "step"])
def test_a_network_is_saved_and_loaded(granularity, tmp_path):
    backbone = tiny_backbone(dtype=torch.float32)
    network = random_scalenet(backbone, granularity=granularity)
    network.float().fit_normalization(torch.randn(9, 64))
    network.config["trained_for"] = network.trained_for = describe(backbone)
    network.save_pretrained(tmp_path / "a")
    loaded = load_rate(tmp_path / "a")
    assert isinstance(loaded, ScaleNet)
    assert loaded.config == network.config
    assert not any(p.requires_grad for p in loaded.parameters())
    h = torch.randn(2, 64)
    assert torch.equal(loaded.scales(h, 2, 3), network.scales(h, 2, 3))
    assert loaded.base_rates == network.base_rates
    loaded.check(backbone)
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["rate.json", "rate.safetensors"]


def averaged(backbone) -> AveragedRate:
    return AveragedRate(torch.rand(3, 3, len(backbone.projections)), describe(backbone))


def test_averaged_rates_are_saved_and_loaded(tmp_path):
    backbone = tiny_backbone(dtype=torch.float32)
    rate = averaged(backbone)
    rate.save_pretrained(tmp_path)
    loaded = load_rate(str(tmp_path))
    assert isinstance(loaded, AveragedRate)
    assert torch.equal(loaded.table_KKM, rate.table_KKM)
    assert (loaded.max_steps, loaded.uses_representation) == (3, "no")
    like = torch.zeros(2)
    assert torch.equal(loaded.rates_BM(None, 2, 3, like=like, projections=M)[1], rate.table_KKM[2, 1])
    loaded.check(backbone)


def saved(folder):
    small().save_pretrained(folder)
    return folder


def test_corrupt_folders(tmp_path):
    def cut_weights(folder):
        path = folder / "rate.safetensors"
        path.write_bytes(path.read_bytes()[:-8])

    def cut_header(folder):
        (folder / "rate.safetensors").write_bytes(b"\0\1")

    def no_weights(folder):
        (folder / "rate.safetensors").unlink()

    def cut_config(folder):
        path = folder / "rate.json"
        path.write_text(path.read_text()[:-20])

    def binary_config(folder):
        (folder / "rate.json").write_bytes(b"\xff\xfe\x00")

    def no_object(folder):
        (folder / "rate.json").write_text('"scalenet"')

    def no_kind(folder):
        (folder / "rate.json").write_text("{}")

    def other_size(folder):
        config = json.loads((folder / "rate.json").read_text())
        (folder / "rate.json").write_text(json.dumps({**config, "mlp_size": 6}))

    def not_finite(folder):
        state = load_file(folder / "rate.safetensors")
        state[max(state)].view(-1)[0] = float("nan")
        save_file(state, folder / "rate.safetensors")

    def other_key(folder):
        config = json.loads((folder / "rate.json").read_text())
        (folder / "rate.json").write_text(json.dumps({**config, "mlp_sizes": 6}))

    for spoil in (
        *(cut_weights, cut_header, no_weights, cut_config),
        *(binary_config, no_object, no_kind, other_size, other_key, not_finite),
    ):
        folder = saved(tmp_path / spoil.__name__)
        load_rate(folder)
        spoil(folder)
        with pytest.raises(ValueError, match=rf"the rate in .*{spoil.__name__} is corrupt or incomplete"):
            load_rate(folder)


def test_unknown_names(tmp_path, monkeypatch):
    monkeypatch.setattr(artifact, "NETWORKS", tmp_path / "networks")
    saved(tmp_path / "networks" / "scalenet-nq-open")
    assert artifact.shipped("rate") == ["scalenet-nq-open"]
    assert isinstance(load_rate("scalenet-nq-open"), ScaleNet)
    with pytest.raises(ValueError, match=r"unknown rate 'scalenet-nq-opne'. Did you mean 'scalenet-nq-open'\?"):
        load_rate("scalenet-nq-opne")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"holds no rate: rate.json and rate.safetensors are expected"):
        load_rate(tmp_path / "empty")


def test_a_rate_for_another_model_names_both():
    first, other = tiny_backbone("llama", dtype=torch.float32), tiny_backbone("gpt_neox", dtype=torch.float32)
    for rate in (averaged(first), random_scalenet(first, trained_for=describe(first))):
        rate.check(first)
        with pytest.raises(ValueError, match=r"trained for tiny-llama .*q_proj\); the model at hand is tiny-gpt_neox "):
            rate.check(other)
        # The same shapes and other weights
        with pytest.raises(
            ValueError, match=r"trained for tiny-llama .*weights \w+\); the model at hand is tiny-llama"
        ):
            rate.check(tiny_backbone("llama", dtype=torch.float32, seed=1))


def test_a_copied_folder_still_loads(tmp_path):
    saved(tmp_path / "a")
    shutil.move(tmp_path / "a", tmp_path / "b")
    assert load_rate(tmp_path / "b").max_steps == 5


@pytest.mark.parametrize(
    ("key", "neutral", "gone"),
    [
        ("normalize", "none", "prompt"),
        ("normalization", "standardize", "layernorm"),
        ("normalization", "standardize", "none"),
        ("representation", "step", "first"),
    ],
)
def test_settings_that_are_gone_load_at_their_neutral_value_only(key, neutral, gone, tmp_path):
    backbone = tiny_backbone(dtype=torch.float32)
    for name, rate in (("network", random_scalenet(backbone).float()), ("averaged", averaged(backbone))):
        rate.save_pretrained(tmp_path / name)
        path = tmp_path / name / "rate.json"
        config = json.loads(path.read_text())
        for value in (neutral, None):
            path.write_text(json.dumps({**config, key: value}))
            assert type(load_rate(path.parent)) is type(rate)
        path.write_text(json.dumps({**config, key: gone}))
        with pytest.raises(ValueError, match=rf"^the rate in .* sets {key} to '{gone}', which this version no longer"):
            load_rate(path.parent)
