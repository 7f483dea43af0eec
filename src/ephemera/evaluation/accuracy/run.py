"""`ephemera benchmark`: models x variants on tasks, by log-probability of the choices and by what is generated."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.progress import track

from ephemera.artifact import NETWORKS
from ephemera.begin import adapt_from, reach_of
from ephemera.config import AdaptedModelSettings, Benchmark, TaskSource, Variant, fill, source_of
from ephemera.evaluation.shared.execute import run_program
from ephemera.evaluation.shared.progress import STOPPED, console
from ephemera.evaluation.shared.records import RUN, AnswerRecord, RecordFile, write_json
from ephemera.inits import Init, load_init
from ephemera.llm.frozen_lm import FrozenLM
from ephemera.llm.prefill import Prefill, prefill
from ephemera.llm.tokenize import encode_answer
from ephemera.rates import Rate, load_rate, place_rate
from ephemera.run_info import command, commit, versions
from ephemera.scoring import Encoded, batches_of, encode_examples, prompt_batch
from ephemera.tasks import Dataset, Example, Task, load_dataset
from ephemera.tasks.choice import parse
from ephemera.tasks.numbers import number_in


class Rows:
    """A task's rows as one model reads them."""

    def __init__(self, backbone: FrozenLM, data: Dataset, config: Benchmark):
        chat, system = config.data.format == "chat", data.task.system
        self.task = data.task
        self.examples = {e.id: e for e in data.examples}
        self.choices = {
            e.id: [
                backbone.check_ids(encode_answer(backbone.tokenizer, e.prompt, c, chat=chat, system=system))
                for c in e.choices
            ]
            for e in data.examples
        }
        for example in data.examples:
            self._check_room(example, 0, backbone)
        self.rows, self.long = encode_examples(
            backbone,
            data.examples,
            chat=chat,
            max_tokens=config.data.max_tokens,
            system=system,
            max_answer_tokens=config.data.max_answer_tokens,
            end_token=config.data.end_token,
        )
        for row in self.rows:
            self._check_room(self.examples[row.id], len(row.prompt), backbone)

    def _check_room(self, example: Example, prompt_tokens: int, backbone: FrozenLM) -> None:
        """ValueError where a choice, after its prompt, does not fit into the model's window.

        A row whose prompt and gold answer are too long is left out, and counted; scoring another choice would fail.
        """
        for text, ids in zip(example.choices, self.choices[example.id], strict=True):
            if prompt_tokens + len(ids) > backbone.max_length:
                after = f" after a prompt of {prompt_tokens}" if prompt_tokens else ""
                raise ValueError(
                    f"{example.place}: field {self.task.choices_field!r} has a choice of {len(ids)} tokens{after} "
                    f"({text[:30]!r} ...), more than the window of {backbone.name} holds ({backbone.max_length}). Shorten "
                    "it, or leave the row out."
                )


def benchmark(config: Benchmark) -> Path:
    """Fill the table, resuming what the folder already holds. Ctrl-C keeps all finished records."""
    folder = Path(config.output)
    folder.mkdir(parents=True, exist_ok=True)
    data = {entry.task: _load(config, entry) for entry in config.data.tasks}
    for name, found in data.items():
        if not config.allow_code_execution and found.task.tests and "generate" in config.scoring:
            raise ValueError(
                f"task {name!r} is judged by running generated code. Allow it with --allow-code-execution (it runs in a "
                "limited subprocess; a container is safer), or leave the task out."
            )
    records = RecordFile(folder, AnswerRecord)
    run = _open_run(folder, config, data, fresh=not records.records)
    try:
        for settings in config.models:
            for targets, variants in _by_targets(settings, config).items():
                backbone = settings.load(target_modules=json.loads(targets))
                run["models"][settings.name] = backbone.fingerprint()
                for found in data.values():
                    rows = Rows(backbone, found, config)
                    label = found.task.name if len(config.models) == 1 else f"{found.task.name} ({settings.name})"
                    run["left_out_as_too_long"][label] = rows.long
                    for variant in variants:
                        if variant.tasks is not None and found.task.name not in variant.tasks:
                            continue
                        _fill(backbone, settings, variant, rows, config, records)
    except KeyboardInterrupt:
        print("\n" + STOPPED.format(n=len(records.records), folder=folder), file=sys.stderr)
        raise SystemExit(130) from None
    write_json(folder / RUN, run)
    return folder


def _load(config: Benchmark, entry: TaskSource) -> Dataset:
    drawn = config.data
    load = partial(
        load_dataset,
        entry.task,
        split=drawn.split,
        source=source_of(entry, drawn.source),
        seed=drawn.seed,
        cut=drawn.cut,
    )
    limit = drawn.limit
    if drawn.fraction is not None:
        limit = max(1, round(drawn.fraction * len(load().examples)))
    return load(limit=limit).once()


def _open_run(folder: Path, config: Benchmark, data: dict[str, Dataset], *, fresh: bool) -> dict[str, Any]:
    """run.json. A folder holds one run, to which models, variants, tasks and repeats may be added.

    `seen` keeps what every record was made with, by name; what comes again under a name must be the same.
    """
    settings = config.model_dump(mode="json")
    common = {
        k: v for k, v in settings.items() if k not in ("output", "variants", "against", "models", "repeats", "data")
    }
    common |= {f"data.{k}": v for k, v in settings["data"].items() if k not in ("tasks", "source")}
    del common["allow_code_execution"]
    now: dict[str, Any] = {f"setting {k}": v for k, v in common.items()}
    now |= {f"model {m.name}": m.model_dump(mode="json") for m in config.models}
    now |= {f"source of {name}": found.source for name, found in data.items()}
    for variant in config.variants:
        for name in data if variant.tasks is None else variant.tasks:
            now[f"variant {variant.name} on {name}"] = _identity(variant, name)
    path = folder / RUN
    before: dict[str, Any] = {}
    if path.exists() and not fresh:
        before = json.loads(path.read_text()).get("seen", {})
        changed = sorted(key for key in now if before.get(key, now[key]) != now[key])
        if changed:
            raise ValueError(
                f"{folder} holds records of a run with other settings ({', '.join(changed)} differ). Give another output=, "
                "or remove the folder to start over."
            )
    run = {
        "config": settings,
        "seen": before | now,
        "sources": {name: found.source for name, found in data.items()},
        "dropped_without_answer": {name: found.dropped for name, found in data.items()},
        "left_out_as_too_long": {},
        "left_out_as_equal": {name: found.repeated for name, found in data.items()},
        "models": {},
        "versions": versions(),
        "commit": commit(),
        "command": command(),
    }
    write_json(path, run)
    return run


def _identity(variant: Variant, task: str) -> dict[str, Any]:
    """A variant's settings and the contents of the files it names: a network trained anew is another variant."""
    digests = {}
    init = fill(variant.init, task)
    for what, spec in (("init", init), ("rate", variant.rate)):
        for folder in (NETWORKS / str(spec), Path(str(spec)).expanduser()) if spec is not None else ():
            for file in sorted(folder.glob("*.safetensors")):
                digests[f"{what}/{file.name}"] = hashlib.sha256(file.read_bytes()).hexdigest()[:16]
    return {"init": init, "rate": variant.rate, "steps": variant.steps, "files": digests}


def _by_targets(settings: AdaptedModelSettings, config: Benchmark) -> dict[str, list[Variant]]:
    """Variants by the modules that they adapt: each group is one loading of the model."""
    groups: dict[str, list[Variant]] = {}
    for variant in config.variants:
        targets = None
        if variant.init is not None:
            first = (variant.tasks or [config.data.tasks[0].task])[0]
            targets = load_init(str(fill(variant.init, first))).lora_settings.get("target_modules")
        groups.setdefault(json.dumps(targets or settings.lora.target_modules), []).append(variant)
    return groups


def _fill(
    backbone: FrozenLM,
    settings: AdaptedModelSettings,
    variant: Variant,
    rows: Rows,
    config: Benchmark,
    records: RecordFile[AnswerRecord],
) -> None:
    init = load_init(fill(variant.init, rows.task.name) or "zero", **settings.lora.start)
    init = init.placed(backbone)
    rule = place_rate(load_rate(variant.rate), backbone) if variant.rate is not None and variant.steps else None
    if rule is not None and rule.max_steps is not None and variant.steps > rule.max_steps:
        raise ValueError(f"variant {variant.name!r}: {variant.steps} steps, but its rate has at most {rule.max_steps}.")
    for repeat in range(config.repeats):
        batches = batches_of(backbone, rows.rows, config.batch_size)
        label = f"{rows.task.name}, {variant.name}"
        for some in track(batches, label, console=console(), disable=not sys.stderr.isatty()):
            if records.has((settings.name, variant.name, rows.task.name, repeat, row.id) for row in some):
                continue
            records.add(_answer(backbone, settings, variant, init, rule, rows, some, config, repeat))


def _answer(
    backbone: FrozenLM,
    settings: AdaptedModelSettings,
    variant: Variant,
    init: Init,
    rule: Rate | None,
    rows: Rows,
    some: Sequence[Encoded],
    config: Benchmark,
    repeat: int,
) -> list[AnswerRecord]:
    """One batch: adapt, prefill, score the gold answer and the choices, generate."""
    start = time.perf_counter()
    batch = prompt_batch(backbone, some)
    seed = config.seed + repeat
    reach = reach_of(init, rule)
    trace, _ = adapt_from(backbone, batch, init, [seed] * len(some), rule, variant.steps if rule else 0, reach)
    kept = trace.reading
    read = prefill(backbone, batch, trace.lora, trace.initial_lora, cached=kept, reach=reach)
    nll_B = read.answer_nll([row.answer for row in some])
    examples = [rows.examples[row.id] for row in some]
    logprobs = _choice_logprobs(read, [rows.choices[row.id] for row in some]) if "choices" in config.scoring else None
    seconds = (time.perf_counter() - start) / len(some)
    texts: list[list[str]] | None = None
    if "generate" in config.scoring:
        texts = _generate(read, rows.task, len(some), config, f"{seed}:{' '.join(row.id for row in some)}")
    return [
        AnswerRecord(
            model=settings.name,
            variant=variant.name,
            task=rows.task.name,
            repeat=repeat,
            id=row.id,
            nll=nll_B[b].item(),
            choice_logprobs=logprobs[b] if logprobs and example.choices else None,
            choice_bytes=[len(c.encode()) for c in example.choices] if logprobs and example.choices else None,
            gold=example.choices.index(example.answer) if example.choices else None,
            texts=texts[b] if texts else None,
            correct=_all_or_none([_judged(rows.task, text, example) for text in texts[b]]) if texts else None,
            picked=[_picked(text, example) for text in texts[b]] if texts and rows.task.correct else None,
            seconds=seconds,
            fallback=bool(trace.fallback_B[b]) or bool(read.fallback_B[b]),
        )
        for b, (row, example) in enumerate(zip(some, examples, strict=True))
    ]


def _choice_logprobs(read: Prefill, choices: Sequence[Sequence[Sequence[int]]]) -> list[list[float]]:
    """Log-probability of each choice, summed over its tokens. Rows with fewer choices than others score one again."""
    widest = max(len(c) for c in choices)
    if widest == 0:
        return [[] for _ in choices]
    columns = []
    for place in range(widest):
        given = [c[min(place, len(c) - 1)] for c in choices]
        lengths_B = torch.tensor([len(ids) for ids in given])
        columns.append(-(read.answer_nll(given).cpu().double() * lengths_B))
    table_BC = torch.stack(columns, 1).tolist()
    return [[round(x, 5) for x in line[: len(c)]] for line, c in zip(table_BC, choices, strict=True)]


def _generate(read: Prefill, task: Task, count: int, config: Benchmark, seed: str) -> list[list[str]]:
    """`samples` texts for each row; batches draw on their own, so that a resumed run draws the same."""
    settings: dict[str, Any] = {"max_new_tokens": config.max_new_tokens or task.max_new_tokens}
    if config.temperature > 0:
        settings |= {"do_sample": True, "temperature": config.temperature, "top_p": 1.0, "top_k": 0}
        torch.manual_seed(int.from_bytes(hashlib.sha256(seed.encode()).digest()[:8], "little", signed=True))
    if config.samples > 1:
        settings["num_return_sequences"] = config.samples
    texts = read.backbone.tokenizer.batch_decode(read.generate(**settings), skip_special_tokens=True)
    return [list(texts[b * config.samples : (b + 1) * config.samples]) for b in range(count)]


def _judged(task: Task, text: str, example: Example) -> bool | None:
    """Is a generated answer right? None where the task has no judge of texts."""
    if task.program is not None:
        return run_program(task.program(text, example)).passed
    return None if task.correct is None else task.correct(text, example)


def _picked(text: str, example: Example) -> str | None:
    """What a text comes down to, for the majority vote: a choice or a number."""
    if example.choices:
        return parse(text, example.choices)
    number = number_in(text)
    return None if number is None else str(number)


def _all_or_none(judged: list[bool | None]) -> list[bool] | None:
    return [j for j in judged if j is not None] or None
