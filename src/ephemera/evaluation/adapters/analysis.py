"""`ephemera analyse`: what a generator's adapters depend on, and whether answers need a prompt's own (TaskWeaver 4.2).

Letters: N prompts, M projections, S tasks, H features of h. Every control's NLL is kept prompt by prompt, so that a
stopped run goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import Tensor

from ephemera.batch import length_batches
from ephemera.config import Analyse, source_of
from ephemera.evaluation.adapters.grouping import Grouping, embed, grouping, update_products
from ephemera.evaluation.shared.progress import STOPPED, console
from ephemera.evaluation.shared.records import RUN, ControlRecord, RecordFile, write_json
from ephemera.evaluation.shared.statistics import LEVEL, RESAMPLES, SEED, Estimate, bootstrap_mean
from ephemera.inits import LoraGenerator, load_generator
from ephemera.llm.frozen_lm import FrozenLM
from ephemera.lora import LoraBatch
from ephemera.rows import TaskRows, rows_of
from ephemera.run_info import command, commit, versions
from ephemera.scoring import Encoded, answer_nll, prompt_batch

CONTROLS = {
    "base": "no adapter",
    "own": "own adapter",
    "same_task": "another prompt's, same task",
    "other_task": "another prompt's, other task",
    "mean": "from the mean h",
    "random": "from a random h",
}


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
    records: list[ControlRecord]
    tasks: list[str]
    task_N: Tensor
    norms_NM: Tensor
    projections: list[tuple[int, str]]  # (layer, kind)
    updates: Grouping
    states: Grouping  # of h, as the generator standardises it
    embeddings: dict[str, Tensor]  # [N,2]
    pca_shares: list[float]  # of the variance, by component
    controls: dict[str, list[Control]]  # of "all" and of each task


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
    backbone: FrozenLM,
    generator: LoraGenerator,
    rows: Sequence[Encoded],
    states: Mapping[str, Tensor | None],
    tasks: Sequence[str],
    records: RecordFile[ControlRecord],
    *,
    batch_size: int,
) -> dict[str, list[float]]:
    """Answer NLL of every row under each control, all in the same batches; what `records` holds is not done again."""
    batches = length_batches([len(row.prompt) for row in rows], batch_size=batch_size)
    for batch in track(batches, "controls", console=console(), disable=not sys.stderr.isatty()):
        if records.has((tasks[n], rows[n].id) for n in batch):
            continue
        nll: dict[str, list[float]] = {}
        for name, h_NH in states.items():
            lora = None if h_NH is None else generator.lora(backbone.projections, h_NH[batch])
            nll[name] = answer_nll(backbone, [rows[n] for n in batch], lora).tolist()
        records.add(
            [
                ControlRecord(
                    task=tasks[n],
                    id=rows[n].id,
                    tokens=len(rows[n].answer),
                    nll={name: values[b] for name, values in nll.items()},
                )
                for b, n in enumerate(batch)
            ]
        )
    by_key = {record.key: record.nll for record in records.records}
    return {name: [by_key[task, row.id][name] for task, row in zip(tasks, rows, strict=True)] for name in states}


def compare(nll: Mapping[str, Sequence[float]], chosen: Sequence[int]) -> list[Control]:
    def difference(name: str, other: str) -> Estimate:
        return bootstrap_mean([nll[name][n] - nll[other][n] for n in chosen])

    return [
        Control(name, bootstrap_mean([values[n] for n in chosen]), difference(name, "own"), difference(name, "base"))
        for name, values in nll.items()
    ]


@torch.no_grad()
def _generate(
    backbone: FrozenLM, generator: LoraGenerator, rows: Sequence[Encoded], batch_size: int
) -> tuple[Tensor, LoraBatch]:
    """h [N,H] and the adapters of all rows, in their order."""
    batches = length_batches([len(row.prompt) for row in rows], batch_size=batch_size)
    states = [generator.state_BH(backbone, prompt_batch(backbone, [rows[n] for n in b])) for b in batches]
    h_NH = torch.cat(states)[torch.tensor([n for b in batches for n in b]).argsort()]
    return h_NH, LoraBatch.cat([generator.lora(backbone.projections, h) for h in h_NH.split(batch_size)])


def analyse(config: Analyse) -> Analysis:
    """All the numbers of `ephemera analyse`; tables.py and figures.py write them down.

    Resumes what the folder already holds. Ctrl-C keeps all finished prompts.
    """
    folder = Path(config.output)
    if (folder / RUN).exists() and json.loads((folder / RUN).read_text()).get("kind") != "analysis":
        raise ValueError(f"{folder} holds a run of another command. Give another output=.")
    folder.mkdir(parents=True, exist_ok=True)
    if config.data.limit == 1:
        raise ValueError("an analysis compares prompts of a task: data.limit should be at least 2, or null.")
    generator = load_generator(config.generator)
    backbone = config.model.load(target_modules=generator.target_modules)
    weights = _fingerprint(generator)
    generator = generator.placed(backbone)
    loaded = _load(backbone, config)
    tasks, rows = [task.task.name for task in loaded], [row for task in loaded for row in task.rows]
    names = [row.task for row in rows]
    task_N = torch.tensor([tasks.index(name) for name in names])
    records = RecordFile(folder, ControlRecord)
    _open_run(folder, config, backbone, weights, rows, fresh=not records.records)
    print(f"generating the adapters of {len(rows)} prompts ...", file=sys.stderr)
    try:
        h_NH, lora = _generate(backbone, generator, rows, config.batch_size)
        states = control_states(h_NH, task_N, seed=config.seed)
        nll = control_nll(backbone, generator, rows, states, names, records, batch_size=config.batch_size)
    except KeyboardInterrupt:
        print("\n" + STOPPED.format(n=len(records.records), folder=folder), file=sys.stderr)
        raise SystemExit(130) from None
    norms_NM, gram_NN = (t.cpu() for t in update_products(lora))
    del lora
    read_NH = ((h_NH - generator.mean_H) / generator.std_H).clamp(-5, 5).double().cpu()
    places, shares, used = embed(gram_NN, seed=config.seed)
    by_key = {record.key: record for record in records.records}
    whole = [
        by_key[key].model_copy(update=_placed(norms_NM, places, n))
        for n, key in enumerate(zip(names, (row.id for row in rows), strict=True))
    ]
    records.replace(whole)
    groups = {"all": list(range(len(rows)))} | {
        name: [n for n, mine in enumerate(names) if mine == name] for name in tasks
    }
    return Analysis(
        folder=folder,
        config=config,
        conditions=_conditions(config, backbone, generator, weights, loaded, used),
        records=whole,
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


def _placed(norms_NM: Tensor, places: Mapping[str, Tensor], n: int) -> dict[str, Any]:
    """Where prompt n's adapter lies: what its record says besides the controls."""
    return {
        "norms": [float(f"{x:.4g}") for x in norms_NM[n].tolist()],
        "places": {name: places_N2[n].tolist() for name, places_N2 in places.items()},
    }


def _conditions(
    config: Analyse,
    backbone: FrozenLM,
    generator: LoraGenerator,
    weights: str,
    loaded: Sequence[TaskRows],
    used: dict[str, str],
) -> dict[str, str]:
    """What was run on what, as the report's last part says it."""
    data, counts = config.data, {task.task.name: len(task.rows) for task in loaded}
    return {
        "Model": f"{backbone.name} (weights {backbone.fingerprint()})",
        "Number type": str(backbone.dtype).removeprefix("torch."),
        "Generator": f"{config.generator} (weights {weights})",
        "LoRA": f"r {generator.r}, alpha {generator.lora_alpha:g}, on {generator.target_modules}",
        "Prompts": f"{sum(counts.values())} ({', '.join(f'{t} {n}' for t, n in counts.items())}), "
        f"{data.split} rows, {data.format}; longer than {data.max_tokens} tokens and left out: {sum(task.long for task in loaded)}, "
        f"equal to another and left out: {sum(task.repeated for task in loaded)}",
        "Sources": ", ".join(dict.fromkeys(task.source for task in loaded)),
        "Seed": f"{config.seed} (controls, shuffles, embeddings), {data.seed} (choice of rows)",
        "Intervals": f"{LEVEL} %, percentile bootstrap over prompts, {RESAMPLES:,} resamples, seed {SEED}",
        "Versions": ", ".join(f"{name} {version}" for name, version in (versions() | used).items()),
        "Commit": commit() or "not a checkout",
        "Command": command(),
    }


def _load(backbone: FrozenLM, config: Analyse) -> list[TaskRows]:
    """Each task's different rows: a repeated one would be its own neighbour."""
    data = config.data
    loaded = [rows_of(backbone, e.task, source_of(e, data.source), data, once=True) for e in data.tasks]
    for task in loaded:
        if len(task.rows) < 2:
            raise ValueError(
                f"an analysis needs at least 2 rows of each task; {task.task.name} has {len(task.rows)} ({task.source})."
            )
    return loaded


def _open_run(
    folder: Path, config: Analyse, backbone: FrozenLM, weights: str, rows: Sequence[Encoded], *, fresh: bool
) -> None:
    """run.json. A folder holds one analysis: the controls of some prompts depend on all the others."""
    settings = config.model_dump(mode="json", exclude={"output"})
    ids = hashlib.sha256(" ".join(row.id for row in rows).encode()).hexdigest()[:16]
    now = {**settings, "weights of the model": backbone.fingerprint(), "weights of the generator": weights, "rows": ids}
    path = folder / RUN
    if path.exists() and not fresh:
        before = json.loads(path.read_text()).get("made_with", {})
        changed = sorted(key for key in now if now[key] != before.get(key))
        if changed:
            raise ValueError(
                f"{folder} holds an analysis with other settings ({', '.join(changed)} differ). Give another output=, or "
                "remove the folder to start over."
            )
    write_json(path, {"kind": "analysis", "config": config.model_dump(mode="json"), "made_with": now})


def _fingerprint(generator: LoraGenerator) -> str:
    digest = hashlib.sha256()
    for key, tensor in sorted(generator.state_dict().items()):
        digest.update(key.encode() + tensor.float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
