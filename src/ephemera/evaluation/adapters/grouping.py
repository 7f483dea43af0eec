"""How prompts' adapters group by task: norms, cosines, variance, clusters, embeddings (TaskWeaver 6.3).

Letters: N prompts, M projections, S tasks, P prompts x ranks. Everything about the updates scaling * B A comes from their
inner products, which need no B A; norms, cosines and distances of the products don't depend on how they are factored.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ephemera.lora import LoraBatch

NEIGHBOURS, SHUFFLES, COMPONENTS = 5, 200, 50
NO_VARIATION = 1e-12  # of the mean squared norm: less is rounding


@dataclass(frozen=True)
class Score:
    """A score of how prompts group by task; its mean and 97.5th percentile over shuffled task labels."""

    value: float
    chance: float
    chance_high: float


@dataclass(frozen=True)
class Grouping:
    """How N vectors lie about their tasks. Cosines [S,S] are means over pairs of different prompts."""

    cosines: list[list[float]]
    cosines_centred: list[list[float]]  # after the mean over all prompts was subtracted from each
    shared: float  # the squared norm of that mean, as a share of the mean squared norm
    variance_by_task: Score  # share of the variance over prompts that lies between the tasks' means
    silhouette: Score
    neighbour_accuracy: Score  # leave one out: the task that most of the nearest neighbours have


def update_products(lora: LoraBatch) -> tuple[Tensor, Tensor]:
    """Norms [N,M] of scaling * B A, and inner products [N,N] summed over projections, in float64.

    ||B A||_F^2 = tr((B^T B)(A A^T)),  <B1 A1, B2 A2> = tr((B2^T B1)(A1 A2^T))
    """
    N, R = lora.batch_size, lora.r
    norms, gram_NN = [], 0.0
    for A_NRI, B_NOR in zip(lora.A, lora.B, strict=True):
        A_PI, B_PO = A_NRI.double().flatten(0, 1), B_NOR.double().mT.flatten(0, 1)  # P: prompts x ranks
        products_NN = ((A_PI @ A_PI.T) * (B_PO @ B_PO.T)).view(N, R, N, R).sum((1, 3))
        norms.append(products_NN.diagonal().clamp(min=0).sqrt())
        gram_NN = gram_NN + products_NN
    assert isinstance(gram_NN, Tensor)
    return lora.scaling * torch.stack(norms, 1), lora.scaling**2 * gram_NN


def centred(gram_NN: Tensor) -> Tensor:
    """Inner products after the mean vector was subtracted from each; all zero where the vectors are the same."""
    means_N = gram_NN.mean(0)
    out_NN = gram_NN - means_N[:, None] - means_N + means_N.mean()
    return out_NN if out_NN.trace() > NO_VARIATION * gram_NN.trace() else torch.zeros_like(out_NN)


def distances(gram_NN: Tensor) -> Tensor:
    squares_N = gram_NN.diagonal()
    return (squares_N[:, None] + squares_N - 2 * gram_NN).clamp(min=0).sqrt().fill_diagonal_(0)


def task_cosines(gram_NN: Tensor, task_N: Tensor) -> Tensor:
    """Mean cosine [S,S] over pairs of different prompts; NaN where there is no pair, or a vector is zero."""
    lengths_N = gram_NN.diagonal().clamp(min=0).sqrt()
    cosines_NN = (gram_NN / (lengths_N[:, None] * lengths_N)).fill_diagonal_(0)
    of_NS = torch.nn.functional.one_hot(task_N).double()
    counts_S = of_NS.sum(0)
    return (of_NS.T @ cosines_NN @ of_NS) / (counts_S[:, None] * counts_S - counts_S.diag())


def variance_by_task(gram_NN: Tensor, task_N: Tensor) -> float:
    """1 - (squares within tasks) / (squares about the mean), both from inner products."""
    of_NS = torch.nn.functional.one_hot(task_N).double()
    sums_S = (of_NS.T @ gram_NN @ of_NS).diagonal()
    total = gram_NN.trace() - gram_NN.mean() * len(task_N)
    return (1 - (gram_NN.trace() - (sums_S / of_NS.sum(0)).sum()) / total).item()


def silhouette(distance_NN: Tensor, task_N: Tensor) -> float:
    """Mean over prompts of (b - a) / max(a, b): mean distance to its own task, a, and to the nearest other, b."""
    of_NS = torch.nn.functional.one_hot(task_N).double()
    sums_NS, counts_S = distance_NN @ of_NS, of_NS.sum(0)
    if len(counts_S) < 2:
        return math.nan
    own_N = sums_NS.gather(1, task_N[:, None])[:, 0] / (counts_S[task_N] - 1).clamp(min=1)
    other_N = (sums_NS / counts_S).masked_fill(of_NS.bool(), math.inf).amin(1)
    score_N = (other_N - own_N) / torch.maximum(other_N, own_N)
    return score_N.where(counts_S[task_N] > 1, 0.0).nan_to_num(0.0).mean().item()


def neighbour_accuracy(distance_NN: Tensor, task_N: Tensor, k: int = NEIGHBOURS) -> float:
    """Leave-one-out accuracy of the majority task of the k nearest prompts; nearer ones break a tie."""
    k = min(k, len(task_N) - 1)
    near_Nk = distance_NN.clone().fill_diagonal_(math.inf).argsort(stable=True, dim=1)[:, :k]
    votes_k = 1 + 0.01 / torch.arange(1, k + 1).double()
    counts_NS = torch.zeros(len(task_N), int(task_N.max()) + 1).double()
    counts_NS.scatter_add_(1, task_N[near_Nk], votes_k.expand_as(near_Nk))
    return (counts_NS.argmax(1) == task_N).double().mean().item()


def grouping(gram_NN: Tensor, task_N: Tensor, *, seed: int) -> Grouping:
    centred_NN = centred(gram_NN)
    varies = bool(centred_NN.trace() > 0)
    distance_NN = distances(centred_NN)

    def score(of: Callable[[Tensor, Tensor], float], given_NN: Tensor) -> Score:
        if not varies or int(task_N.max()) == 0:
            return Score(math.nan, math.nan, math.nan)
        generator = torch.Generator().manual_seed(seed)
        shuffled = [of(given_NN, task_N[torch.randperm(len(task_N), generator=generator)]) for _ in range(SHUFFLES)]
        by_chance = torch.tensor(shuffled, dtype=torch.float64)
        return Score(of(given_NN, task_N), by_chance.mean().item(), by_chance.quantile(0.975).item())

    return Grouping(
        cosines=task_cosines(gram_NN, task_N).tolist(),
        cosines_centred=task_cosines(centred_NN, task_N).tolist(),
        shared=(gram_NN.mean() / gram_NN.diagonal().mean()).item(),
        variance_by_task=score(variance_by_task, centred_NN),
        silhouette=score(silhouette, distance_NN),
        neighbour_accuracy=score(neighbour_accuracy, distance_NN),
    )


def embed(gram_NN: Tensor, *, seed: int) -> tuple[dict[str, Tensor], list[float], dict[str, str]]:
    """{method: places [N,2]}, PCA's shares of the variance, versions of what was used; nothing if nothing varies.

    PCA of the whole updates, from their inner products; t-SNE and UMAP see its first components.
    """
    centred_NN = centred(gram_NN)
    if not bool(centred_NN.trace() > 0):
        return {}, [], {}
    values_C, vectors_NC = (t.flip(-1)[..., :COMPONENTS] for t in torch.linalg.eigh(centred_NN))
    signs_C = vectors_NC.gather(0, vectors_NC.abs().argmax(0)[None]).sign()
    scores_NC = vectors_NC * signs_C * values_C.clamp(min=0).sqrt()
    found, used = {"PCA": scores_NC[:, :2]}, {}
    shares = (values_C.clamp(min=0) / centred_NN.trace()).tolist()
    scaled = (scores_NC / scores_NC[:, 0].std()).float().numpy()
    try:
        import sklearn
        from sklearn.manifold import TSNE
    except ImportError:
        print('no t-SNE: scikit-learn is not installed (pip install "ephemera[analysis]").', file=sys.stderr)
    else:
        perplexity = min(30.0, (len(scaled) - 1) / 3)
        tsne = TSNE(perplexity=perplexity, init=scaled[:, :2] * 1e-4, random_state=seed)
        found["t-SNE"] = torch.from_numpy(tsne.fit_transform(scaled))
        used["scikit-learn"] = sklearn.__version__
    try:
        import umap  # pyright: ignore[reportMissingImports]
    except ImportError:
        pass
    else:
        if len(scaled) > 2:  # it needs two neighbours
            neighbours = min(15, len(scaled) - 1)
            reducer = umap.UMAP(n_neighbors=neighbours, init="random", random_state=seed, n_jobs=1)
            found["UMAP"] = torch.from_numpy(reducer.fit_transform(scaled))
            used["umap-learn"] = umap.__version__
    return found, shares, used
