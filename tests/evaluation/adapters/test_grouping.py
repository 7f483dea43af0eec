"""How adapters group by task: inner products against built matrices, scores on known data."""

from __future__ import annotations

import math
import sys
from types import SimpleNamespace

import pytest
import torch

from ephemera.evaluation.adapters.grouping import (
    centred,
    distances,
    embed,
    grouping,
    neighbour_accuracy,
    silhouette,
    task_cosines,
    update_products,
    variance_by_task,
)
from ephemera.lora import LoraBatch
from reference import close
from tiny_models import random_lora, tiny_backbone


def updates(lora: LoraBatch) -> list[list[torch.Tensor]]:
    """scaling * B A of each prompt and projection, as whole matrices."""
    return [
        [lora.lora_alpha / lora.r * B[n] @ A[n] for A, B in zip(lora.A, lora.B, strict=True)]
        for n in range(lora.batch_size)
    ]


def matrix_of(points_NC: torch.Tensor) -> torch.Tensor:
    return points_NC @ points_NC.T


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


def test_umap_is_drawn_from_three_prompts_on(llama, monkeypatch):
    class Reducer:
        def __init__(self, n_neighbors: int, **_):
            if n_neighbors < 2:
                raise ValueError("n_neighbors must be greater than 1")  # as umap-learn 0.5 says

        def fit_transform(self, rows):
            return rows[:, :2]

    monkeypatch.setitem(sys.modules, "umap", SimpleNamespace(UMAP=Reducer, __version__="0"))
    for count in (2, 3):
        places, _, used = embed(update_products(random_lora(llama, count))[1], seed=0)
        assert ("UMAP" in places) == ("umap-learn" in used) == (count > 2)


def test_without_scikit_learn_there_is_pca_and_a_word(llama, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "umap", None)
    places, _, used = embed(update_products(random_lora(llama, 6))[1], seed=0)
    assert list(places) == ["PCA"]
    assert used == {}
    assert "scikit-learn is not installed" in capsys.readouterr().err
