"""`ephemera evaluate`: methods x K on test rows, per-prompt records, then tables and figures (LDTTA 4.3)."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import track

from ephemera.artifact import NETWORKS
from ephemera.begin import adapt_from, reach_of
from ephemera.config import Evaluate, fill
from ephemera.evaluation.shared.progress import STOPPED, console
from ephemera.evaluation.shared.records import RUN, Record, RecordFile, write_json
from ephemera.evaluation.shared.rouge import rouge_lsum
from ephemera.inits import Init, load_init
from ephemera.llm.frozen_lm import FrozenLM
from ephemera.llm.prefill import prefill
from ephemera.lora import LoraBatch
from ephemera.made_for import Reach
from ephemera.rates import FixedRate, Rate, load_rate, place_rate
from ephemera.run_info import command, commit, peak_memory, versions
from ephemera.scoring import (
    Encoded,
    at_least_two,
    batches_of,
    best,
    encode_examples,
    parts_of,
    prompt_batch,
    search_uniform,
)
from ephemera.tasks import Dataset, load_dataset


@dataclass(frozen=True)
class Adapted:
    """One batch under one method: adapters, and what the records say about how they came about."""

    lora: LoraBatch
    initial_lora: LoraBatch
    prompt_nll: list[list[float]]
    rates: list[list[list[float]]] | None
    fallback: list[bool]
    seconds: float
    reach: Reach

    @staticmethod
    def joined(parts: Sequence[Adapted]) -> Adapted:
        rates = [part.rates for part in parts]
        return Adapted(
            lora=LoraBatch.cat([part.lora for part in parts]),
            initial_lora=LoraBatch.cat([part.initial_lora for part in parts]),
            prompt_nll=[row for part in parts for row in part.prompt_nll],
            rates=None if None in rates else [row for some in rates for row in some or []],
            fallback=[row for part in parts for row in part.fallback],
            seconds=sum(part.seconds for part in parts),
            reach=parts[0].reach,
        )


class Grid:
    """Every (method, K) of a batch, each adapted once; `swapped` reuses what `layerwise` adapted."""

    def __init__(self, backbone: FrozenLM, init: Init, rules: dict[str, Rate], uniform: dict[int, float], seed: int):
        self.backbone = backbone
        self.init = init
        self.rules = rules
        self.uniform = uniform
        self.seed = seed

    def adapt(self, rows: Sequence[Encoded], method: str, K: int) -> Adapted:
        parts = [self._adapt(rows[part], method, K) for part in parts_of(self.backbone, rows)]
        return parts[0] if len(parts) == 1 else Adapted.joined(parts)

    def _adapt(self, rows: Sequence[Encoded], method: str, K: int) -> Adapted:
        start = time.perf_counter()
        batch = prompt_batch(self.backbone, rows)
        rule = self._rule(method, K)
        reach = reach_of(self.init, rule)
        trace, _ = adapt_from(self.backbone, batch, self.init, [self.seed] * len(rows), rule, K if rule else 0, reach)
        return Adapted(
            lora=trace.lora,
            initial_lora=trace.initial_lora,
            prompt_nll=trace.prompt_nll_BK.tolist(),
            rates=trace.rates_BKM.tolist() if method == "layerwise" else None,
            fallback=trace.fallback_B.tolist(),
            seconds=time.perf_counter() - start,
            reach=reach,
        )

    def swap(self, adapted: Adapted) -> Adapted:
        """The control: each prompt is answered with its neighbour's adapter."""
        index = torch.arange(len(adapted.fallback)).roll(1)
        return Adapted(
            lora=adapted.lora.rows(index),
            initial_lora=adapted.initial_lora,
            prompt_nll=[[] for _ in index],
            rates=None,
            fallback=[adapted.fallback[i] for i in index.tolist()],
            seconds=adapted.seconds,
            reach=adapted.reach,
        )

    def _rule(self, method: str, K: int) -> Rate | None:
        if method == "none" or K == 0:
            return None
        if method == "uniform":
            return FixedRate(self.uniform[K], reach=self.rules["fixed"].reach)
        return self.rules[method]


def score(
    backbone: FrozenLM,
    rows: Sequence[Encoded],
    adapted: Adapted,
    method: str,
    K: int,
    *,
    answers: dict[str, str],
    generate: bool,
    max_new_tokens: int,
) -> list[Record]:
    """One prefill, then answer NLL, and the generated answer where it is asked for."""
    nlls: list[float] = []
    texts: list[str | None] = []
    fallback: list[bool] = []
    prefill_seconds = 0.0
    for part in parts_of(backbone, rows):
        some, places = rows[part], range(len(rows))[part]
        start = time.perf_counter()
        lora, initial_lora = adapted.lora.rows(places), adapted.initial_lora.rows(places)
        read = prefill(backbone, prompt_batch(backbone, some), lora, initial_lora, reach=adapted.reach)
        prefill_seconds += time.perf_counter() - start
        nlls += read.answer_nll([row.answer for row in some]).tolist()
        fallback += read.fallback_B.tolist()
        ids = read.generate(max_new_tokens=max_new_tokens) if generate else None
        texts += [None] * len(some) if ids is None else backbone.tokenizer.batch_decode(ids, skip_special_tokens=True)
    return [
        Record(
            method=method,
            K=K,
            id=row.id,
            nll=nlls[b],
            tokens=len(row.answer),
            prompt_nll=[round(x, 5) for x in adapted.prompt_nll[b]],
            seconds=(adapted.seconds + prefill_seconds) / len(rows),
            fallback=adapted.fallback[b] or fallback[b],
            rates=[[float(f"{x:.4g}") for x in step] for step in adapted.rates[b]] if adapted.rates else None,
            prompt=None if text is None else _prompt_end(backbone, row),
            answer=None if text is None else answers[row.id],
            text=text,
            rouge_lsum=None if text is None else rouge_lsum(answers[row.id], text),
        )
        for b, (row, text) in enumerate(zip(rows, texts, strict=True))
    ]


def _prompt_end(backbone: FrozenLM, row: Encoded, characters: int = 300) -> str:
    text = backbone.tokenizer.decode(row.prompt, skip_special_tokens=True)
    assert isinstance(text, str)
    return text[-characters:]


def evaluate(config: Evaluate) -> Path:
    """Fill the grid, resuming what the folder already holds. Ctrl-C keeps all finished records."""
    folder = Path(config.output)
    folder.mkdir(parents=True, exist_ok=True)
    init = load_init(config.init, **config.model.lora.model_dump(exclude={"target_modules", "layers"}))
    brought = config.model.lora.model_copy(update=init.lora_settings)  # what is adapted is the init's to say
    config = config.model_copy(update={"model": config.model.model_copy(update={"lora": brought})})
    backbone = config.model.load()
    init = init.placed(backbone)
    rules = load_rules(config, backbone)
    data = load_dataset(
        config.data.task,
        split=config.data.split,
        source=fill(config.data.source, config.data.task),
        limit=config.data.limit,
        seed=config.data.seed,
    ).once()
    chat = config.data.format == "chat"
    rows, long = encode_examples(
        backbone, data.examples, chat=chat, max_tokens=config.data.max_tokens, system=data.task.system
    )
    if len(rows) < 2:
        equal = f" (and {data.repeated} equal to another)" if data.repeated else ""
        raise ValueError(f"an evaluation needs at least 2 different rows; {data.source} gave {len(rows)}{equal}.")
    records = RecordFile(folder, Record)
    run = _open_run(folder, config, data, rows=len(rows), long=long, backbone=backbone, fresh=not records.records)
    if "uniform" in config.methods and any(config.steps):
        run = _settle_uniform(folder, run, config, backbone, init)
    uniform = {int(k): v for k, v in (run["uniform_rates"] or {}).items()}
    missing = [K for K in config.steps if K and K not in uniform]
    if "uniform" in config.methods and missing:
        raise ValueError(f"uniform_rates has no rate for K = {missing[0]}; give one for each of steps, or none at all.")
    grid = Grid(backbone, init, rules, uniform, config.seed)
    answers = {e.id: e.answer for e in data.examples}
    batches = at_least_two(batches_of(backbone, rows, config.batch_size))
    try:
        for batch_rows in track(batches, "evaluating", console=console(), disable=not sys.stderr.isatty()):
            _fill(grid, batch_rows, config, records, answers, data.task.max_new_tokens)
    except KeyboardInterrupt:
        print("\n" + STOPPED.format(n=len(records.records), folder=folder), file=sys.stderr)
        raise SystemExit(130) from None
    run["peak_memory_bytes"] = peak_memory()
    write_json(folder / RUN, run)
    return folder


def _fill(
    grid: Grid,
    rows: Sequence[Encoded],
    config: Evaluate,
    records: RecordFile[Record],
    answers: dict[str, str],
    max_new_tokens: int,
) -> None:
    ids = [row.id for row in rows]
    for K in sorted(set(config.steps)):
        layerwise: Adapted | None = None
        for method in sorted(config.methods, key=lambda m: m == "swapped"):
            if (
                records.has((method, K, i) for i in ids)
                or (method == "none" and K > 0)
                or (method != "none" and K == 0)
            ):
                continue  # every method is the base model at K = 0, and "none" is nothing else
            if method == "swapped":
                adapted = grid.swap(layerwise or grid.adapt(rows, "layerwise", K))
            else:
                adapted = grid.adapt(rows, method, K)
                layerwise = adapted if method == "layerwise" else layerwise
            new = score(
                grid.backbone,
                rows,
                adapted,
                method,
                K,
                answers=answers,
                generate=K in config.generate and method in config.generate_methods,
                max_new_tokens=max_new_tokens,
            )
            records.add(new)


def load_rules(config: Evaluate, backbone: FrozenLM) -> dict[str, Rate]:
    """The rate of each method of the grid, checked against the model and Kmax."""
    rules: dict[str, Rate] = {"fixed": FixedRate(config.fixed_rate, reach=config.reach)}
    wanted = set(config.methods) | ({"layerwise"} if "swapped" in config.methods else set())
    specs = {"stepwise": config.stepwise, "layerwise": config.layerwise, "averaged": config.averaged}
    if "averaged" in wanted and config.averaged is None:
        beside = NETWORKS / config.layerwise
        specs["averaged"] = str((beside if beside.exists() else Path(config.layerwise)) / "averaged")
    for method, spec in specs.items():
        if method not in wanted:
            continue
        assert spec is not None
        rule = place_rate(load_rate(spec), backbone)
        if rule.max_steps is not None and max(config.steps) > rule.max_steps:
            raise ValueError(
                f"steps holds {max(config.steps)}, but {method}={spec} was trained for at most {rule.max_steps} (Kmax)."
            )
        rules[method] = rule
    return rules


def _open_run(
    folder: Path, config: Evaluate, data: Dataset, *, rows: int, long: int, backbone: FrozenLM, fresh: bool
) -> dict[str, Any]:
    """run.json: what was run, on what. A folder holds one run; another configuration is refused."""
    settings = config.model_dump(mode="json")
    path = folder / RUN
    if path.exists() and not fresh:
        run = json.loads(path.read_text())
        old = {"init": "zero", "reach": "all", **run["config"]}  # runs made before there was a choice
        changed = sorted(k for k in settings if settings[k] != old.get(k) and k not in ("output", "methods"))
        if changed:
            raise ValueError(
                f"{folder} holds a run with other settings ({', '.join(changed)} differ). Give another output=, "
                "or remove the folder to start over."
            )
        return {**run, "config": settings, "command": command()}
    run = {
        "config": settings,
        "source": data.source,
        "rows": rows,
        "dropped_without_answer": data.dropped,
        "left_out_as_too_long": long,
        "left_out_as_equal": data.repeated,
        "uniform_rates": config.uniform_rates,
        "uniform_search": None,
        "model": {"name": backbone.name, "fingerprint": backbone.fingerprint(), "dtype": str(backbone.dtype)},
        "projections": [[p.layer, p.kind] for p in backbone.projections],
        "versions": versions(),
        "commit": commit(),
        "command": command(),
    }
    write_json(path, run)
    return run


def _settle_uniform(
    folder: Path, run: dict[str, Any], config: Evaluate, backbone: FrozenLM, init: Init
) -> dict[str, Any]:
    """The best uniform rate of each K, on validation rows, kept in run.json."""
    if run["uniform_rates"]:
        return run
    data = load_dataset(
        config.validation.task,
        split=config.validation.split,
        source=fill(config.validation.source, config.validation.task),
        limit=config.validation.limit,
        seed=config.validation.seed,
    )
    rows, _ = encode_examples(
        backbone,
        data.examples,
        chat=config.validation.format == "chat",
        max_tokens=config.validation.max_tokens,
        system=data.task.system,
    )
    print(f"searching the best uniform rate of each K on {len(rows)} validation rows ...", file=sys.stderr)
    table = search_uniform(
        backbone,
        init,
        rows,
        steps=max(config.steps),
        batch_size=config.batch_size,
        grid=config.uniform_grid,
        seed=config.seed,
        reach=config.reach,
    )
    run = {**run, "uniform_rates": {str(K): best(t) for K, t in table.items()}, "uniform_search": table}
    write_json(folder / RUN, run)
    return run
