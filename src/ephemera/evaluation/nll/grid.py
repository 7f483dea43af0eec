"""`ephemera evaluate`: methods x K on test rows, per-prompt records, then tables and figures (LDTTA 4.3)."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.progress import track

from ephemera.adaptation import Adaptation
from ephemera.artifact import NETWORKS
from ephemera.config import Evaluate
from ephemera.evaluation.nll.adapting import adapted
from ephemera.evaluation.nll.controls import CONTROLS, Material, controlled
from ephemera.evaluation.nll.cross_gradient import write_cross_gradients
from ephemera.evaluation.shared.progress import STOPPED, console
from ephemera.evaluation.shared.records import RUN, Record, RecordFile, write_json
from ephemera.evaluation.shared.rouge import rouge_lsum
from ephemera.inits import Init
from ephemera.llm import processes
from ephemera.llm.frozen_lm import FrozenLM, describe
from ephemera.llm.prefill import prefill
from ephemera.llm.tokenize import encode_prompt
from ephemera.made_for import Reach
from ephemera.rate_search import RateSearch, best
from ephemera.rates import DECAYS, DecayedRate, FixedRate, Rate, load_rate, place_rate
from ephemera.rows import TaskRows, load_rows, load_tasks
from ephemera.run_info import command, commit, peak_memory, versions
from ephemera.scoring import Encoded, at_least_two, batches_of, parts_of, prompt_batch
from ephemera.tasks import bare_prompt


def cells_of(config: Evaluate, rules: dict[str, Rate], uniform: dict[int, float]) -> dict[int, dict[str, Rate | None]]:
    """The methods of each K with their rates, controls last. At K = 0 each is the base model, and `none` is nothing else."""
    cells: dict[int, dict[str, Rate | None]] = {}
    for K in sorted(set(config.steps)):
        if K == 0:
            cells[K] = {"none": None} if "none" in config.methods else {}
            continue
        known = rules | searched(uniform, K, config.reach)
        wanted = sorted(dict.fromkeys(config.methods), key=lambda method: method in CONTROLS)
        cells[K] = {
            method: known["layerwise" if method in CONTROLS else method] for method in wanted if method != "none"
        }
    return cells


def searched(uniform: dict[int, float], K: int, reach: Reach) -> dict[str, Rate]:
    """The rates that a search on validation rows settles: the best one for K steps, and decays of the best first one."""
    found: dict[str, Rate] = {"uniform": FixedRate(uniform[K], reach=reach)} if K in uniform else {}
    if 1 in uniform:
        found |= {decay: DecayedRate(uniform[1], reach=reach, decay=decay) for decay in DECAYS}
    return found


def score(
    backbone: FrozenLM,
    rows: Sequence[Encoded],
    made: Adaptation,
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
        lora, initial_lora = made.lora.rows(places), made.initial_lora.rows(places)
        read = prefill(backbone, prompt_batch(backbone, some), lora, initial_lora, reach=made.reach)
        prefill_seconds += time.perf_counter() - start
        nlls += read.answer_nll([row.answer for row in some]).tolist()
        fallback += read.fallback_B.tolist()
        ids = read.generate(max_new_tokens=max_new_tokens) if generate else None
        texts += [None] * len(some) if ids is None else backbone.tokenizer.batch_decode(ids, skip_special_tokens=True)
    prompt_nll, rates, fell_back = (t.tolist() for t in (made.prompt_nll_BK, made.rates_BKM, made.fallback_B))
    return [
        Record(
            method=method,
            K=K,
            id=row.id,
            nll=nlls[b],
            tokens=len(row.answer),
            prompt_nll=[round(x, 5) for x in prompt_nll[b]],
            seconds=(made.seconds + prefill_seconds) / len(rows),
            fallback=fell_back[b] or fallback[b],
            rates=[[float(f"{x:.4g}") for x in step] for step in rates[b]] if method == "layerwise" else None,
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
    """Fill the grid, resuming what the folder already holds. Ctrl-C keeps all finished records.

    Several processes share the batches, unless they hold parts of the model: then all of them run every batch.
    """
    folder = Path(config.output)
    folder.mkdir(parents=True, exist_ok=True)
    model, init = config.model.started(config.init)
    config = config.model_copy(update={"model": model})
    backbone = config.model.load(spread=True)
    processes.check_same("settings", config.model_dump(mode="json", exclude={"output"}), backbone.device)
    init = init.placed(backbone)
    rules = load_rules(config, backbone)
    if "+" in config.data.task:
        raise ValueError(f"data.task={config.data.task}: an evaluation is of one task. Run one for each.")
    (data,) = load_tasks(backbone, config.data, once=True)
    if len(data.rows) < 2:
        equal = f" (and {data.repeated} equal to another)" if data.repeated else ""
        raise ValueError(f"an evaluation needs at least 2 different rows; {data.source} gave {len(data.rows)}{equal}.")
    records = RecordFile(folder, Record, alike=config.model.cut)
    about, fresh = describe(backbone), not records.records
    run = processes.by_first(lambda: _open_run(folder, config, data, about, backbone, fresh=fresh))
    decays = set(DECAYS) & set(config.methods)
    if ("uniform" in config.methods or decays) and any(config.steps):
        run = _settle_uniform(folder, run, config, backbone, init)
    uniform = {int(k): v for k, v in (run["uniform_rates"] or {}).items()}
    missing = [K for K in config.steps if K and K not in uniform]
    if "uniform" in config.methods and missing:
        raise ValueError(f"uniform_rates has no rate for K = {missing[0]}; give one for each of steps, or none at all.")
    if decays and any(config.steps) and 1 not in uniform:
        raise ValueError(
            f"uniform_rates has no rate for K = 1, from which {min(decays)} decays; give it, or none at all."
        )
    cells = cells_of(config, rules, uniform)
    material = material_of(config, backbone, init, rules, data)
    batches = at_least_two(batches_of(backbone, data.rows, config.batch_size))
    batches = batches if config.model.cut else processes.dealt(batches)
    try:
        for batch_rows in track(batches, "evaluating", console=console(), disable=not sys.stderr.isatty()):
            _fill(backbone, init, cells, batch_rows, config, records, data, material)
        if config.cross_gradient:
            write_cross_gradients(folder, backbone, init, rules["layerwise"], batches, seed=config.seed)
        records.gather()
    except KeyboardInterrupt:
        print("\n" + STOPPED.format(n=len(records.records), folder=folder), file=sys.stderr)
        raise SystemExit(130) from None
    run["peak_memory_bytes"] = peak_memory()
    _write_run(folder, run)
    return folder


def _write_run(folder: Path, run: dict[str, Any]) -> None:
    if processes.rank() == 0:
        write_json(folder / RUN, run)


def _fill(
    backbone: FrozenLM,
    init: Init,
    cells: dict[int, dict[str, Rate | None]],
    rows: Sequence[Encoded],
    config: Evaluate,
    records: RecordFile[Record],
    data: TaskRows,
    material: Material | None,
) -> None:
    for K, rules in cells.items():
        layerwise: Adaptation | None = None
        for method, rule in rules.items():
            if records.has((method, K, row.id) for row in rows):
                continue
            control = method in CONTROLS
            made = (layerwise if control else None) or adapted(backbone, init, rows, rule, K, seed=config.seed)
            layerwise = made if control or method == "layerwise" else layerwise
            if control:
                assert material is not None
                made = controlled(material, method, rows, made, K)
            new = score(
                backbone,
                rows,
                made,
                method,
                K,
                answers={row.id: data.examples[row.id].answer for row in rows},
                generate=K in config.generate and method in config.generate_methods,
                max_new_tokens=data.task.max_new_tokens,
            )
            records.add(new)


def material_of(
    config: Evaluate, backbone: FrozenLM, init: Init, rules: dict[str, Rate], data: TaskRows
) -> Material | None:
    """What the run's controls draw on; None without controls. ValueError for a task that has no bare template."""
    if not set(config.methods) & set(CONTROLS):
        return None
    bare = None
    if "template" in config.methods:
        chat = config.data.format == "chat"
        ids = encode_prompt(backbone.tokenizer, bare_prompt(data.task), chat=chat, system=data.task.system)
        bare = Encoded("template", backbone.check_ids(ids), [])
    return Material(
        backbone,
        init,
        rules["layerwise"],
        data.rows,
        bare,
        load_rows(backbone, config.other) if config.other is not None else [],
        config.seed,
        config.batch_size,
    )


def load_rules(config: Evaluate, backbone: FrozenLM) -> dict[str, Rate]:
    """The rate of each method of the grid, checked against the model and Kmax."""
    rules: dict[str, Rate] = {"fixed": FixedRate(config.fixed_rate, reach=config.reach)}
    wanted = set(config.methods) | ({"layerwise"} if set(config.methods) & set(CONTROLS) else set())
    specs = {"stepwise": config.stepwise, "layerwise": config.layerwise, "averaged": config.averaged}
    specs |= {"constants": config.constants}
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
    folder: Path, config: Evaluate, data: TaskRows, about: dict[str, Any], backbone: FrozenLM, *, fresh: bool
) -> dict[str, Any]:
    """run.json: what was run, on what. A folder holds one run; another configuration is refused."""
    settings = config.model_dump(mode="json")
    path = folder / RUN
    if path.exists() and not fresh:
        run = json.loads(path.read_text())
        old = {"init": "zero", "reach": "all", **run["config"]}  # runs made before there was a choice
        free = {"output", "methods", "cross_gradient"} | ({"other"} if old.get("other") is None else set())
        free_too = {key: settings["model"][key] for key in ("parallel", "max_memory", "offload_folder")}
        old["model"] = {**old["model"], **free_too}  # they change no result
        changed = sorted(k for k in settings if settings[k] != old.get(k) and k not in free)
        if changed:
            raise ValueError(
                f"{folder} holds a run with other settings ({', '.join(changed)} differ). Give another output=, "
                "or remove the folder to start over."
            )
        return {**run, "config": settings, "command": command()}
    run = {
        "config": settings,
        "source": data.source,
        "rows": len(data.rows),
        "dropped_without_answer": data.dropped,
        "left_out_as_too_long": data.long,
        "left_out_as_equal": data.repeated,
        "uniform_rates": config.uniform_rates,
        "uniform_search": None,
        "model": {"name": backbone.name, "fingerprint": about["fingerprint"], "dtype": str(backbone.dtype)},
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
    rows = load_rows(backbone, config.validation)
    print(f"searching the best uniform rate of each K on {len(rows)} validation rows ...", file=sys.stderr)
    search = RateSearch(backbone, init, rows, config.batch_size, config.seed, reach=config.reach)
    table = search.uniform(max(config.steps), config.uniform_grid)
    run = {**run, "uniform_rates": {str(K): best(t) for K, t in table.items()}, "uniform_search": table}
    _write_run(folder, run)
    return processes.from_first(run)
