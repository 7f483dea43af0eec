"""The tuned lens, its files, and its training."""

from pathlib import Path

import pytest
import torch
from torch.distributions import Categorical, kl_divergence

from ephemera.config import TrainLens, load_config
from ephemera.early_exit.lens import Lens, load_lens
from ephemera.scoring import Encoded
from ephemera.training.lens import LensTrainee, chosen_tokens, divergence, fit_scale, train_lens
from reference import close
from tiny_models import left, random_ids, tiny_backbone
from training_runs import common, write_material


def rows(count: int, seed: int = 2) -> list[Encoded]:
    lengths = [4 + i % 7 for i in range(count)]
    return [Encoded(str(i), ids, [5]) for i, ids in enumerate(random_ids(lengths, seed=seed))]


def test_maps_start_as_the_identity():
    h = torch.randn(2, 3, 8)
    lens = Lens(hidden_size=8, exit_layers=[2, 5])
    close(lens(h, 5), h, 0)
    with torch.no_grad():
        lens.weight_EDD[1, 0, 3] = 2.0
        lens.scale_ED[1, 3] = 4.0
        lens.bias_ED[1, 7] = 1.0
    want = h.clone()
    want[..., 0] += h[..., 3] / 2
    want[..., 7] += 1
    close(lens(h, 5), want, 1e-6)
    close(lens(h, 2), h, 0)


def test_one_layer_of_it_and_back_from_disk(tmp_path):
    lens = Lens(hidden_size=8, exit_layers=[2, 5])
    with torch.no_grad():
        for t in lens.parameters():
            t.normal_()
        lens.scale_ED.uniform_(1, 1000)
    one = lens.only(5)
    h = torch.randn(4, 8)
    close(one(h, 5), lens(h, 5), 1e-6)
    one.save_pretrained(tmp_path)
    loaded = load_lens(tmp_path)
    assert loaded.exit_layers == (5,)
    assert not any(p.requires_grad for p in loaded.parameters())
    close(loaded.scale_ED, one.scale_ED, 0)  # the maps are bfloat16 on disk, this is not
    close(loaded.weight_EDD, one.weight_EDD.to(torch.bfloat16).float(), 0)
    with pytest.raises(ValueError, match=r"reads after layers 2, 5, not after 3.*exit_layers=\[3\]"):
        lens.only(3)
    (tmp_path / "lens.safetensors").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"the lens in .* is corrupt or incomplete"):
        load_lens(tmp_path)


def test_divergence_is_the_textbook_one():
    p, q = torch.randn(3, 9), torch.randn(3, 9)
    want = kl_divergence(Categorical(logits=p), Categorical(logits=q))
    close(divergence(p.log_softmax(-1), q), want, 1e-5)


def test_states_are_those_of_transformers():
    backbone = tiny_backbone("qwen3", depth=3)
    batch = left(random_ids([6, 6]))
    hidden, states = backbone.states(batch, [1, 2])
    want = backbone.model(input_ids=batch.ids_BT, output_hidden_states=True).hidden_states
    close(hidden, want[-1])
    close([states[1], states[2]], [want[1], want[2]])


def test_tokens_are_real_ones_and_drawn_by_name():
    batch = left(random_ids([9, 3]))
    chosen = chosen_tokens(batch, 0.5, "a")
    assert len(set(chosen.tolist())) == 6
    assert batch.mask_BT.flatten()[chosen].all()
    assert torch.equal(chosen, chosen_tokens(batch, 0.5, "a"))
    assert not torch.equal(chosen, chosen_tokens(batch, 0.5, "b"))


def test_training_lowers_the_divergence_at_every_layer():
    backbone = tiny_backbone("llama", depth=4, dtype=torch.float32)
    lens = Lens(hidden_size=backbone.hidden_size, exit_layers=[1, 3])
    some = rows(12)
    fit_scale(backbone, lens, some, 4)
    want = torch.stack([backbone.states(left([r.prompt]), [1])[1][1][0].square().sum(0) for r in some]).sum(0)
    close(lens.scale_ED[0], (want / sum(len(r.prompt) for r in some)).sqrt(), 1e-4)
    trainee = LensTrainee(backbone, lens, validation=some, batch_size=4, token_share=1.0, seed=0)
    before = trainee.validate()
    assert before["validation_kl_1"] == pytest.approx(before["validation_kl_untrained_1"])
    optimizer = torch.optim.Adam(lens.parameters(), lr=0.05)
    for step in range(60):
        optimizer.zero_grad()
        report = trainee.backward(some, step)
        optimizer.step()
    after = trainee.validate()
    assert set(report) == {"kl_1", "kl_3"}
    for layer in (1, 3):
        assert after[f"validation_kl_{layer}"] < 0.9 * before[f"validation_kl_{layer}"]
        assert after[f"validation_kl_untrained_{layer}"] == before[f"validation_kl_untrained_{layer}"]
    assert all(p.grad is None for p in backbone.model.parameters())


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_material(tmp_path_factory.mktemp("lens"), train=12, validation=4)


def settings(material: Path, output: Path, *more: str) -> TrainLens:
    own = ["exit_layers=[2, 1]", "optimizer.samples=40", "optimizer.warmup=1", "optimizer.learning_rate=0.001"]
    return load_config(TrainLens, None, [*common(material, output, "task=own"), *own, *more])


def test_a_run_stops_and_resumes_to_the_same_lens(material, tmp_path, monkeypatch):
    whole = train_lens(settings(material, tmp_path / "whole"))
    card = (whole / "README.md").read_text()
    assert "| untrained |" in card
    assert "KL after layer 1 | KL after layer 2" in card

    backward = LensTrainee.backward

    def stopped(self, rows, step):
        if step == 7:
            raise KeyboardInterrupt
        return backward(self, rows, step)

    monkeypatch.setattr(LensTrainee, "backward", stopped)
    with pytest.raises(KeyboardInterrupt):
        train_lens(settings(material, tmp_path / "run"))
    monkeypatch.setattr(LensTrainee, "backward", backward)
    resumed = train_lens(settings(material, tmp_path / "run"), resume=True)
    a, b = load_lens(whole), load_lens(resumed)
    assert a.exit_layers == (1, 2)
    assert a.weight_EDD.abs().max() > 0
    close([*a.parameters()], [*b.parameters()], 0)


def test_a_layer_that_is_not_there(material, tmp_path):
    with pytest.raises(ValueError, match=r"exit_layers names layer 3; .* has 2"):
        train_lens(settings(material, tmp_path / "run", "exit_layers=[3]"))
