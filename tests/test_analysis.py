"""What adapters depend on: inner products against built matrices, scores on known data, controls, the command."""

from __future__ import annotations

import json
import math
import sys

import pytest
import torch

from ephemera import cli
from ephemera.backbone import Backbone, describe, load_backbone
from ephemera.config import Analyse, load_config
from ephemera.evaluation.analysis import (
    CONTROLS,
    analyse,
    centred,
    compare,
    control_nll,
    control_states,
    distances,
    embed,
    grouping,
    neighbour_accuracy,
    silhouette,
    task_cosines,
    update_products,
    variance_by_task,
)
from ephemera.generator import LoraGenerator
from ephemera.lora import LoraBatch
from ephemera.scoring import Encoded
from tiny import close, random_ids, random_lora, save_tiny, tiny_backbone

SNLI = [
    {"premise": f"A man {verb} by the river.", "hypothesis": f"He {other}.", "label": n % 3}
    for n, (verb, other) in enumerate(
        [("sat", "sat"), ("ran", "slept"), ("sang", "sang"), ("slept", "is 6"), ("ate", "ate")]
    )
]
BOOLQ = [
    {"passage": f"The {thing} is old.", "question": f"is the {thing} new", "answer": n % 2 == 0}
    for n, thing in enumerate(["mill", "river", "book", "sea", "winter"])
]


def updates(lora: LoraBatch) -> list[list[torch.Tensor]]:
    """scaling * B A of each prompt and projection, as whole matrices."""
    return [
        [lora.lora_alpha / lora.r * B[n] @ A[n] for A, B in zip(lora.A, lora.B, strict=True)]
        for n in range(lora.batch_size)
    ]


def make_generator(backbone: Backbone, *, reads_h: bool) -> LoraGenerator:
    """As after training; with heads' weights at zero, adapters that are not zero but the same for every h."""
    torch.manual_seed(4)
    generator = LoraGenerator(
        projections=backbone.projections,
        state_size=backbone.hidden_size,
        hidden_size=16,
        trained_for=describe(backbone),
    )
    with torch.no_grad():
        for head in (*generator.A_heads, *generator.B_heads):
            head[-1].bias.normal_(0, 0.2)
            if reads_h:
                head[-1].weight.normal_(0, 0.1)
    return generator.to(backbone.dtype).eval().requires_grad_(False)


def matrix_of(points_NC: torch.Tensor) -> torch.Tensor:
    return points_NC @ points_NC.T


@pytest.fixture(scope="module")
def long_folder(tmp_path_factory):
    """The tiny model with room for these tasks' prompts."""
    return with_room(save_tiny(tmp_path_factory.mktemp("long")))


def with_room(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 512}))
    return folder


@pytest.fixture
def two_tasks(tmp_path):
    for name, rows in (("snli", SNLI), ("boolq", BOOLQ)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


@pytest.mark.parametrize("architecture", ["llama", "gpt_neox"])
def test_norms_and_inner_products_are_those_of_the_built_updates(architecture):
    lora = random_lora(tiny_backbone(architecture), 4)
    norms_NM, gram_NN = update_products(lora)
    built = updates(lora)
    for n, mine in enumerate(built):
        close(norms_NM[n], torch.stack([delta_OI.square().sum().sqrt() for delta_OI in mine]))
        for m, other in enumerate(built):
            close(gram_NN[n, m], torch.stack([(a * b).sum() for a, b in zip(mine, other, strict=True)]).sum())


def test_updates_do_not_depend_on_their_factoring(llama):
    lora = random_lora(llama, 3)
    mixed_BRR = torch.randn(3, 3, 3, dtype=torch.float64)
    other = lora.with_tensors([*(mixed_BRR @ A for A in lora.A), *(B @ torch.linalg.inv(mixed_BRR) for B in lora.B)])
    close(update_products(lora), update_products(other), 1e-7)


def test_cosines_are_means_over_pairs_in_a_loop(llama):
    lora = random_lora(llama, 5)
    task_N = torch.tensor([0, 1, 0, 1, 1])
    flat_NP = torch.stack([torch.cat([delta.flatten() for delta in mine]) for mine in updates(lora)])
    gram_NN = update_products(lora)[1]
    for vectors_NP, given_NN in ((flat_NP, gram_NN), (flat_NP - flat_NP.mean(0), centred(gram_NN))):
        have_SS = task_cosines(given_NN, task_N)
        for s in (0, 1):
            for u in (0, 1):
                pairs = [
                    torch.cosine_similarity(vectors_NP[i], vectors_NP[j], dim=0)
                    for i in range(5)
                    for j in range(5)
                    if i != j and task_N[i] == s and task_N[j] == u
                ]
                close(have_SS[s, u], torch.stack(pairs).mean())
        close(distances(given_NN), torch.cdist(vectors_NP, vectors_NP), 1e-6)


def test_variance_by_task_is_that_of_a_loop():
    points_NC, task_N = torch.randn(7, 3).double(), torch.tensor([0, 0, 1, 2, 2, 2, 1])
    within = sum((points_NC[task_N == s] - points_NC[task_N == s].mean(0)).square().sum() for s in range(3))
    total = (points_NC - points_NC.mean(0)).square().sum()
    assert variance_by_task(matrix_of(points_NC), task_N) == pytest.approx(float(1 - within / total))
    assert variance_by_task(centred(matrix_of(points_NC)), task_N) == pytest.approx(float(1 - within / total))


def test_silhouette_is_scikit_learns():
    metrics = pytest.importorskip("sklearn.metrics")
    task_N = torch.tensor([0, 0, 1, 2, 2, 2, 1, 3])  # one task of a single prompt
    distance_NN = distances(matrix_of(torch.randn(8, 3).double()))
    want = metrics.silhouette_score(distance_NN.numpy(), task_N.numpy(), metric="precomputed")
    assert silhouette(distance_NN, task_N) == pytest.approx(want)


def test_neighbours_by_hand():
    places_N = torch.tensor([0.0, 1.0, 2.2, 10.0, 11.0, 3.3]).double()
    distance_NN, task_N = (places_N[:, None] - places_N).abs(), torch.tensor([0, 0, 0, 1, 1, 1])
    assert neighbour_accuracy(distance_NN, task_N, k=3) == pytest.approx(5 / 6)  # all but the last
    # k=2 at 10: nearest 11 (task 1), then 3.3 (1); at 3.3: 2.2 and 1.0 (0); at 2.2: 3.3 (1) before 1.0 (0) breaks the tie
    assert neighbour_accuracy(distance_NN, task_N, k=2) == pytest.approx(4 / 6)


def test_scores_tell_separable_from_inseparable():
    task_N = torch.arange(4).repeat_interleave(15)
    noise_NC = torch.randn(60, 6, generator=torch.Generator().manual_seed(1)).double()
    apart_NC = noise_NC + 50 * torch.eye(4, 6).double()[task_N]
    apart, alike = (grouping(matrix_of(points), task_N, seed=0) for points in (apart_NC, noise_NC))
    assert apart.neighbour_accuracy.value == 1
    assert apart.silhouette.value > 0.9
    assert apart.variance_by_task.value > 0.98
    assert apart.neighbour_accuracy.chance == pytest.approx(14 / 59, abs=0.05)
    assert min(apart.cosines[s][s] for s in range(4)) > 0.99
    assert max(apart.cosines_centred[s][u] for s in range(4) for u in range(4) if s != u) < 0
    assert alike.neighbour_accuracy.value < alike.neighbour_accuracy.chance_high + 0.05
    assert abs(alike.silhouette.value) < 0.1
    assert alike.variance_by_task.value == pytest.approx(3 / 59, abs=0.06)
    assert alike.variance_by_task.chance == pytest.approx(3 / 59, abs=0.02)


def test_vectors_that_are_all_the_same_have_no_groups():
    task_N = torch.tensor([0, 0, 1, 1])
    gram_NN = matrix_of(torch.randn(1, 5).double().expand(4, 5))
    found = grouping(gram_NN, task_N, seed=0)
    assert found.shared == pytest.approx(1)
    assert found.cosines == [[pytest.approx(1)] * 2] * 2
    scores = (found.variance_by_task, found.silhouette, found.neighbour_accuracy)
    assert all(math.isnan(s.value) for s in scores)
    assert all(math.isnan(c) for line in found.cosines_centred for c in line)
    assert embed(gram_NN, seed=0) == ({}, [], {})


def test_pca_is_that_of_the_flattened_updates(llama):
    lora = random_lora(llama, 6)
    flat_NP = torch.stack([torch.cat([delta.flatten() for delta in mine]) for mine in updates(lora)])
    places, shares, _ = embed(update_products(lora)[1], seed=0)
    _, s_C, Vh_CP = torch.linalg.svd(flat_NP - flat_NP.mean(0), full_matrices=False)
    close(places["PCA"].abs(), ((flat_NP - flat_NP.mean(0)) @ Vh_CP[:2].T).abs(), 1e-6)
    close(torch.tensor(shares), (s_C**2 / (s_C**2).sum()), 1e-6)


def test_without_scikit_learn_there_is_pca_and_a_word(llama, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "umap", None)
    places, _, used = embed(update_products(random_lora(llama, 6))[1], seed=0)
    assert list(places) == ["PCA"]
    assert used == {}
    assert "scikit-learn is not installed" in capsys.readouterr().err


def test_shuffled_states_are_never_a_prompts_own():
    h_NH = torch.arange(9.0)[:, None]
    task_N = torch.tensor([0, 0, 1, 1, 1, 1, 2, 2, 2])
    states = control_states(h_NH, task_N, seed=3)
    assert list(states) == list(CONTROLS)
    same_N, other_N = (states[name][:, 0].long() for name in ("same_task", "other_task"))
    assert sorted(same_N.tolist()) == list(range(9))
    assert (same_N != torch.arange(9)).all()
    assert (task_N[same_N] == task_N).all()
    assert (task_N[other_N] != task_N).all()
    assert states["mean"].unique().tolist() == [4.0]
    assert "other_task" not in control_states(h_NH, torch.zeros(9, dtype=torch.long), seed=3)


def test_random_states_have_the_prompts_mean_and_deviation_by_feature():
    h_NH = torch.randn(4000, 3) * torch.tensor([1.0, 5.0, 0.1]) + torch.tensor([0.0, 2.0, -3.0])
    random_NH = control_states(h_NH, torch.arange(4000) % 2, seed=0)["random"]
    torch.testing.assert_close(random_NH.std(0), h_NH.std(0), rtol=0.05, atol=0)
    assert ((random_NH.mean(0) - h_NH.mean(0)).abs() < 0.05 * h_NH.std(0)).all()


@pytest.mark.parametrize("reads_h", [False, True])
def test_controls_tell_whether_a_generator_reads_its_input(reads_h, llama):
    generator = make_generator(llama, reads_h=reads_h)
    rows = [Encoded(str(n), ids[:-3], ids[-3:]) for n, ids in enumerate(random_ids([9, 7, 12, 8, 10, 7]))]
    h_NH, task_N = torch.randn(6, llama.hidden_size), torch.tensor([0, 0, 0, 1, 1, 1])
    states = control_states(h_NH, task_N, seed=0)
    nll = control_nll(llama, generator, rows, states, batch_size=4)
    assert nll["base"] != nll["own"]
    for name in ("same_task", "other_task", "mean", "random"):
        assert (nll[name] == nll["own"]) is not reads_h
    by_name = {c.name: c for c in compare(nll, range(6))}
    assert by_name["own"].against_own.mean == 0
    want = sum(nll["random"]) / 6 - sum(nll["own"]) / 6
    assert by_name["random"].against_own.mean == pytest.approx(want, abs=1e-12)
    assert by_name["random"].against_own.low <= want + 1e-12


def test_the_command_from_a_folder_to_figures(long_folder, two_tasks, monkeypatch, capsys):
    generator = make_generator(load_backbone(str(long_folder), device="cpu"), reads_h=True)
    generator.save_pretrained(two_tasks / "network")
    settings = [
        f"output={two_tasks / 'run'}",
        f"model.name={long_folder}",
        "model.device=cpu",
        f"generator={two_tasks / 'network'}",
        "data.tasks=[{task: snli}, {task: boolq}]",
        f"data.source={two_tasks}/{{task}}",
        "data.limit=4",
        "batch_size=3",
    ]
    words = ["analyse", *(word for setting in settings for word in ("--set", setting))]
    monkeypatch.setattr(sys, "argv", ["ephemera", *words])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    out, _ = capsys.readouterr()
    assert stop.value.code == 0
    folder = two_tasks / "run"
    figures = {path.name for path in (folder / "figures").iterdir()}
    assert figures == {"norms.png", "cosines.png", "embedding.png", "controls.png"}
    page = (folder / "table.md").read_text()
    assert page.strip() == out.strip()
    for said in (*CONTROLS.values(), "- Commit: ", "- Command: `ephemera analyse", "8 (snli 4, boolq 4)"):
        assert said in page
    results = json.loads((folder / "results.json").read_text())
    assert results["tasks"] == {"snli": 4, "boolq": 4}
    assert results["config"]["data"]["limit"] == 4
    assert len(results["norms"]["mean_by_task"]["snli"]) == len(results["norms"]["projections"]) == 4
    assert [c["name"] for c in results["controls"]["all"]] == list(CONTROLS)
    records = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
    assert len(records) == 8
    own = [r["nll"]["own"] for r in records]
    assert results["controls"]["all"][1]["nll"]["mean"] == pytest.approx(sum(own) / 8)
    again = analyse(load_config(Analyse, None, settings))
    assert [r["nll"] for r in again.records] == [r["nll"] for r in records]


def test_adapters_that_are_all_the_same_leave_no_embedding(long_folder, two_tasks):
    from ephemera.evaluation.analysis_figures import write_figures
    from ephemera.evaluation.analysis_tables import write_tables

    generator = make_generator(load_backbone(str(long_folder), device="cpu"), reads_h=False)
    generator.save_pretrained(two_tasks / "network")
    analysis = analyse(config_for(long_folder, two_tasks))
    assert len(write_figures(analysis)) == 3
    assert "–" in write_tables(analysis).read_text()
    assert json.loads((two_tasks / "run" / "results.json").read_text())["updates"]["silhouette"]["value"] is None


def config_for(model, folder, *more: str) -> Analyse:
    settings = [
        f"output={folder / 'run'}",
        f"model.name={model}",
        "model.device=cpu",
        f"generator={folder / 'network'}",
    ]
    settings += ["data.tasks=[{task: snli}, {task: boolq}]", f"data.source={folder}/{{task}}", *more]
    return load_config(Analyse, None, settings)


def test_a_generator_for_another_model_is_one_clear_error(long_folder, two_tasks, tmp_path_factory):
    other = with_room(save_tiny(tmp_path_factory.mktemp("other"), seed=5))
    make_generator(load_backbone(str(other), device="cpu"), reads_h=True).save_pretrained(two_tasks / "network")
    with pytest.raises(ValueError, match=r"this generator was trained for .*the model at hand is") as error:
        analyse(config_for(long_folder, two_tasks))
    assert "\n" not in str(error.value)
    assert str(long_folder) in str(error.value)


def test_mistakes_are_one_clear_error(long_folder, two_tasks):
    with pytest.raises(ValueError, match="unknown generator"):
        analyse(config_for(long_folder, two_tasks))
    make_generator(load_backbone(str(long_folder), device="cpu"), reads_h=True).save_pretrained(two_tasks / "network")
    with pytest.raises(ValueError, match=r"data\.limit should be at least 2"):
        analyse(config_for(long_folder, two_tasks, "data.limit=1"))
    (two_tasks / "snli" / "test.jsonl").write_text(json.dumps(SNLI[0]) + "\n" + json.dumps(SNLI[0]) + "\n")
    with pytest.raises(ValueError, match=r"at least 2 rows of each task; snli has 1"):
        analyse(config_for(long_folder, two_tasks))
    (two_tasks / "run").mkdir(exist_ok=True)
    (two_tasks / "run" / "run.json").write_text("{}")
    with pytest.raises(ValueError, match="holds a run of another command"):
        analyse(config_for(long_folder, two_tasks))


def test_the_generators_own_lora_is_used_and_said(long_folder, two_tasks, capsys):
    make_generator(load_backbone(str(long_folder), device="cpu"), reads_h=True).save_pretrained(two_tasks / "network")
    analysis = analyse(config_for(long_folder, two_tasks, "model.lora.r=7"))
    assert analysis.config.model.lora.r == 2
    assert "model.lora.r: the generator's own 2 is used" in capsys.readouterr().err
