"""`ephemera analyse`: what a generator's adapters depend on, and whether answers need a prompt's own (TaskWeaver 4.2).

Letters: N prompts, M projections, S tasks, H features of h. Everything about the updates scaling * B A comes from their
inner products, which need no B A; norms, cosines and distances of the products don't depend on how they are factored.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import Tensor

from ephemera.backbone import Backbone, load_backbone
from ephemera.config import Analyse, source_of
from ephemera.evaluation.grid import _stderr, command, commit, versions
from ephemera.evaluation.records import RUN
from ephemera.evaluation.statistics import LEVEL, RESAMPLES, SEED, Estimate, bootstrap_mean
from ephemera.generator import LoraGenerator, load_generator
from ephemera.lora import LoraBatch
from ephemera.objective import length_batches
from ephemera.scoring import Encoded, answer_nll, encode_examples, prompt_batch
from ephemera.tasks import load_dataset

NEIGHBOURS, SHUFFLES, COMPONENTS = 5, 200, 50
NO_VARIATION = 1e-12  # of the mean squared norm: less is rounding
CONTROLS = {
    "base": "no adapter",
    "own": "own adapter",
    "same_task": "another prompt's, same task",
    "other_task": "another prompt's, other task",
    "mean": "from the mean h",
    "random": "from a random h",
}


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


@dataclass(frozen=True)
class Control:
    """Answer NLL of the same rows under one kind of adapter; differences are paired by prompt."""

    name: str
    nll: Estimate
    against_own: Estimate
    against_base: Estimate


@dataclass(frozen=True, eq=False)
class Analysis:
    """What `ephemera analyse` found; `records` holds one entry per prompt, in the order of `task_N`."""

    folder: Path
    config: Analyse
    conditions: dict[str, str]
    records: list[dict[str, Any]]
    tasks: list[str]
    task_N: Tensor
    norms_NM: Tensor
    projections: list[tuple[int, str]]  # (layer, kind)
    updates: Grouping
    states: Grouping  # of h, as the generator standardises it
    embeddings: dict[str, Tensor]  # [N,2]
    pca_shares: list[float]  # of the variance, by component
    controls: dict[str, list[Control]]  # of "all" and of each task


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
        reducer = umap.UMAP(n_neighbors=min(15, len(scaled) - 1), init="random", random_state=seed)
        found["UMAP"] = torch.from_numpy(reducer.fit_transform(scaled))
        used["umap-learn"] = umap.__version__
    return found, shares, used


def control_states(h_NH: Tensor, task_N: Tensor, *, seed: int) -> dict[str, Tensor | None]:
    """The h [N,H] that each control's adapters are generated from; None: no adapter.

    Shuffled rows are never their own. The mean of the factors A and B would not be the mean of B A, so the mean
    adapter is the one that the generator makes of the mean h.
    """
    rng = random.Random(f"analyse:{seed}")
    tasks: list[int] = task_N.tolist()
    members = {s: [n for n, task in enumerate(tasks) if task == s] for s in set(tasks)}
    same = list(range(len(tasks)))
    for found in members.values():
        order = rng.sample(found, len(found))
        for mine, next_one in zip(order, [*order[1:], order[0]], strict=True):
            same[mine] = next_one
    states: dict[str, Tensor | None] = {"base": None, "own": h_NH, "same_task": h_NH[same]}
    if len(members) > 1:
        others = {s: [n for n, task in enumerate(tasks) if task != s] for s in members}
        states["other_task"] = h_NH[[rng.choice(others[task]) for task in tasks]]
    generator = torch.Generator().manual_seed(seed)
    noise_NH = torch.randn(h_NH.shape, generator=generator).to(h_NH)
    states["mean"] = h_NH.mean(0).expand_as(h_NH)
    states["random"] = h_NH.mean(0) + h_NH.std(0) * noise_NH
    return states


@torch.no_grad()
def control_nll(
    backbone: Backbone,
    generator: LoraGenerator,
    rows: Sequence[Encoded],
    states: Mapping[str, Tensor | None],
    *,
    batch_size: int,
) -> dict[str, list[float]]:
    """Answer NLL of every row under each control, all in the same batches."""
    found = {name: [math.nan] * len(rows) for name in states}
    batches = length_batches([len(row.prompt) for row in rows], batch_size=batch_size)
    for batch in track(batches, "controls", console=_stderr(), disable=not sys.stderr.isatty()):
        for name, h_NH in states.items():
            lora = None if h_NH is None else generator.lora(backbone.projections, h_NH[batch])
            nll_B = answer_nll(backbone, [rows[n] for n in batch], lora)
            for n, nll in zip(batch, nll_B.tolist(), strict=True):
                found[name][n] = nll
    return found


def compare(nll: Mapping[str, Sequence[float]], chosen: Sequence[int]) -> list[Control]:
    def difference(name: str, other: str) -> Estimate:
        return bootstrap_mean([nll[name][n] - nll[other][n] for n in chosen])

    return [
        Control(name, bootstrap_mean([values[n] for n in chosen]), difference(name, "own"), difference(name, "base"))
        for name, values in nll.items()
    ]


@torch.no_grad()
def _generate(
    backbone: Backbone, generator: LoraGenerator, rows: Sequence[Encoded], batch_size: int
) -> tuple[Tensor, LoraBatch]:
    """h [N,H] and the adapters of all rows, in their order."""
    batches = length_batches([len(row.prompt) for row in rows], batch_size=batch_size)
    states = [generator.state_BH(backbone, prompt_batch(backbone, [rows[n] for n in b])) for b in batches]
    h_NH = torch.cat(states)[torch.tensor([n for b in batches for n in b]).argsort()]
    return h_NH, LoraBatch.cat([generator.lora(backbone.projections, h) for h in h_NH.split(batch_size)])


def analyse(config: Analyse) -> Analysis:
    """All the numbers of `ephemera analyse`; analysis_tables.py and analysis_figures.py write them down."""
    config, folder = config.model_copy(deep=True), Path(config.output)
    if (folder / RUN).exists() and json.loads((folder / RUN).read_text()).get("kind") != "analysis":
        raise ValueError(f"{folder} holds a run of another command. Give another output=.")
    folder.mkdir(parents=True, exist_ok=True)
    if config.data.limit == 1:
        raise ValueError("an analysis compares prompts of a task: data.limit should be at least 2, or null.")
    generator = load_generator(config.generator)
    own = {key: generator.config[key] for key in ("r", "lora_alpha", "init_std", "target_modules")}
    for key, value in own.items():
        if value != getattr(config.model.lora, key):
            print(f"model.lora.{key}: the generator's own {value} is used.", file=sys.stderr)
            setattr(config.model.lora, key, value)
    loaded = [
        load_dataset(
            entry.task,
            split=config.data.split,
            source=source_of(entry, config.data.source),
            limit=config.data.limit,
            seed=config.data.seed,
        )
        for entry in config.data.tasks
    ]
    model = config.model
    backbone = load_backbone(
        model.name,
        dtype=model.dtype,
        device=model.device,
        target_modules=model.lora.target_modules,
        layers=model.lora.layers,
        attn_implementation=model.attn_implementation,
    )
    generator.check(backbone)
    generator.to(backbone.device)
    rows, tasks, counts, long = [], [], [], {}
    chat, max_tokens = config.data.format == "chat", config.data.max_tokens
    for data in loaded:
        name = data.task.name
        encoded, long[name] = encode_examples(
            backbone, data.examples, chat=chat, max_tokens=max_tokens, system=data.task.system
        )
        kept = list({row.id: row for row in encoded}.values())  # a repeated row would be its own neighbour
        if len(kept) < 2:
            raise ValueError(f"an analysis needs at least 2 rows of each task; {name} has {len(kept)} ({data.source}).")
        rows += kept
        tasks.append(name)
        counts.append(len(kept))
    task_N = torch.arange(len(tasks)).repeat_interleave(torch.tensor(counts))
    print(f"generating the adapters of {len(rows)} prompts ...", file=sys.stderr)
    h_NH, lora = _generate(backbone, generator, rows, config.batch_size)
    norms_NM, gram_NN = (t.cpu() for t in update_products(lora))
    del lora
    read_NH = ((h_NH - generator.mean_H) / generator.std_H).clamp(-5, 5).double().cpu()
    places, shares, used = embed(gram_NN, seed=config.seed)
    states = control_states(h_NH, task_N, seed=config.seed)
    nll = control_nll(backbone, generator, rows, states, batch_size=config.batch_size)
    groups = {"all": list(range(len(rows)))} | {
        name: (task_N == s).nonzero()[:, 0].tolist() for s, name in enumerate(tasks)
    }
    stated = {
        "Model": f"{backbone.name} (weights {backbone.fingerprint()})",
        "Number type": str(backbone.dtype).removeprefix("torch."),
        "Generator": f"{config.generator} (weights {_fingerprint(generator)}), h from {generator.source}",
        "LoRA": f"r {generator.r}, alpha {generator.lora_alpha:g}, on {generator.target_modules}",
        "Prompts": f"{len(rows)} ({', '.join(f'{t} {n}' for t, n in zip(tasks, counts, strict=True))}), "
        f"{config.data.split} rows, {config.data.format}; longer than {max_tokens} tokens and left out: {sum(long.values())}",
        "Sources": ", ".join(dict.fromkeys(data.source for data in loaded)),
        "Seed": f"{config.seed} (controls, shuffles, embeddings), {config.data.seed} (choice of rows)",
        "Intervals": f"{LEVEL} %, percentile bootstrap over prompts, {RESAMPLES:,} resamples, seed {SEED}",
        "Versions": ", ".join(f"{name} {version}" for name, version in (versions() | used).items()),
        "Commit": commit() or "not a checkout",
        "Command": command(),
    }
    return Analysis(
        folder=folder,
        config=config,
        conditions=stated,
        records=[
            {
                "task": tasks[int(task_N[n])],
                "id": row.id,
                "tokens": len(row.answer),
                "nll": {name: values[n] for name, values in nll.items()},
                "norms": [float(f"{x:.4g}") for x in norms_NM[n].tolist()],
                "places": {name: places_N2[n].tolist() for name, places_N2 in places.items()},
            }
            for n, row in enumerate(rows)
        ],
        tasks=tasks,
        task_N=task_N,
        norms_NM=norms_NM,
        projections=[(p.layer, p.kind) for p in backbone.projections],
        updates=grouping(gram_NN, task_N, seed=config.seed),
        states=grouping(read_NH @ read_NH.T, task_N, seed=config.seed),
        embeddings=places,
        pca_shares=shares,
        controls={name: compare(nll, chosen) for name, chosen in groups.items()},
    )


def _fingerprint(generator: LoraGenerator) -> str:
    digest = hashlib.sha256()
    for key, tensor in sorted(generator.state_dict().items()):
        digest.update(key.encode() + tensor.float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
