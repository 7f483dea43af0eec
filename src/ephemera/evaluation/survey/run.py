"""`ephemera survey`: one step on the prompts of many tasks, beside the base model and the controls that tell what it is worth.

A prompt is read and differentiated once for all methods that take one step; only its answer is scored under each.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.progress import track
from torch import Tensor

from ephemera.adaptation import Adaptation
from ephemera.batch import TokenBatch
from ephemera.begin import from_base
from ephemera.config import Survey
from ephemera.evaluation.shared.progress import STOPPED
from ephemera.evaluation.shared.records import RUN, RecordFile, SurveyRecord, write_json
from ephemera.evaluation.shared.rouge import rouge_lsum
from ephemera.evaluation.survey.report import write_survey_report
from ephemera.evaluation.survey.tables import write_tables
from ephemera.gate import Gate
from ephemera.guard import guard
from ephemera.inits import LoraGenerator, PeftInit, ZeroInit, load_generator
from ephemera.llm.frozen_lm import FrozenLM
from ephemera.llm.prefill import Prefill, prefill
from ephemera.prepared import Prepared, prepare
from ephemera.rates import FixedRate, PerProjectionRate, Rate, ScaleNet, adapted_by, load_rate, place_rate
from ephemera.rows import TaskRows, load_tasks
from ephemera.run_info import command, commit, versions
from ephemera.scoring import Encoded, at_least_two, batches_of, parts_of, prompt_batch


@dataclass(frozen=True, eq=False)
class Answered:
    """A batch's prompts as one method has read them, and what its gate did."""

    read: Prefill
    share_B: Tensor
    kl_B: Tensor | None = None


class Methods:
    """Every method of a survey on one batch of prompts."""

    def __init__(self, config: Survey, backbone: FrozenLM, network: ScaleNet | PerProjectionRate):
        self.backbone, self.network, self.seed, self.shown = backbone, network, config.seed, config.shown
        self.rules: dict[str, Rate] = {
            "uniform": FixedRate(config.uniform_rate, reach="answer"),
            "ungated": network,
            "swapped": network,
            "network": network,
        }
        if config.constants is not None:
            self.rules["constants"] = place_rate(load_rate(config.constants), backbone)
        self.steps = any(method in self.rules for method in config.methods)
        self.lora: PeftInit | None = None
        if config.lora is not None:
            self.lora = PeftInit.load(config.lora)
            self.lora.check(backbone)
        self.generator: LoraGenerator | None = None
        if config.generator is not None:
            self.generator = load_generator(config.generator).placed(backbone)
            if self.generator.reach != "answer":
                raise ValueError(f"generator={config.generator} has reach all; a survey compares reach answer.")

    def prepare(self, rows: Sequence[Encoded], *, gradient: bool | None = None) -> Prepared:
        parts = [[row.prompt for row in rows[part]] for part in parts_of(self.backbone, rows)]
        return prepare(
            self.backbone,
            ZeroInit(),
            parts,
            [self.seed] * len(rows),
            objective=self.network.objective,
            gradient=self.steps if gradient is None else gradient,
        )

    @torch.no_grad()
    def answered(self, ready: Prepared, rows: Sequence[Encoded], method: str) -> Answered:
        one_B = torch.ones(len(rows))
        if method == "none":
            return Answered(ready.read(None), torch.zeros(len(rows)))
        if method == "lora":
            assert self.lora is not None
            batch = prompt_batch(self.backbone, rows)
            return Answered(prefill(self.backbone, batch, self.lora(self.backbone, batch, [0] * len(rows))), one_B)
        if method.startswith("generated"):
            return self._generated(ready, method)
        trace = ready.adapted(self.rules[method])
        if method == "swapped":  # each prompt with its neighbour's adapter
            return Answered(ready.read(trace.lora.rows(torch.arange(len(rows)).roll(1))), one_B)
        gate = self.network.gate if method == "network" else None
        return (
            Answered(ready.read(trace.lora), one_B)
            if gate is None
            else _guarded(gate, self.backbone, ready.batch, trace)
        )

    def _generated(self, ready: Prepared, method: str) -> Answered:
        """Adapters from the base model's own reading: each prompt's, as the generator's gate leaves them or whole, or its
        neighbour's."""
        reading, generator = ready.made.reading, self.generator
        assert reading is not None
        assert generator is not None
        lora = generator.after(self.backbone, ready.batch, reading)
        if method == "generated-swapped":
            lora = lora.rows(torch.arange(len(lora.B_BN)).roll(1))
        gate = generator.gate if method == "generated" else None
        if gate is None:
            whole_B = torch.ones(len(lora.B_BN))
            return Answered(prefill(self.backbone, ready.batch, lora, reach="answer", cached=reading), whole_B)
        return _guarded(gate, self.backbone, ready.batch, from_base(ready.unstepped(lora), ready.batch))


def _guarded(gate: Gate, backbone: FrozenLM, batch: TokenBatch, made: Adaptation) -> Answered:
    made, read = guard(gate, backbone, batch, made)
    assert made.share_B is not None
    assert made.kl_B is not None
    return Answered(read, made.share_B.cpu(), made.kl_B.cpu())


def survey(config: Survey) -> Path:
    """Fill the records, resuming what the folder holds, then write the tables. Ctrl-C keeps all finished records."""
    folder = Path(config.output)
    network = load_rate(config.network)
    if not isinstance(network, ScaleNet | PerProjectionRate) or network.reach != "answer":
        raise ValueError(f"network={config.network}: a survey is of one trained network with reach answer.")
    backbone = config.model.load(**adapted_by(network))
    place_rate(network, backbone)
    methods = Methods(config, backbone, network)
    tasks = load_tasks(backbone, config.data, once=True)
    if any(len(task.rows) < 2 for task in tasks):
        raise ValueError("a survey needs at least 2 different rows of each task; raise data.limit or data.max_tokens.")
    folder.mkdir(parents=True, exist_ok=True)
    records = RecordFile(folder, SurveyRecord)
    run: dict[str, Any] = {
        "config": config.model_dump(mode="json"),
        "made_for": None if network.made_for is None else network.made_for.describe(),
        "sources": {t.task.name: t.source for t in tasks},
        "left_out_as_equal": {t.task.name: t.repeated for t in tasks if t.repeated},
        "model": {"name": backbone.name, "fingerprint": backbone.fingerprint(), "dtype": str(backbone.dtype)},
        "versions": versions(),
        "commit": commit(),
        "command": command(),
    }
    run["price"] = price(methods, batches_of(backbone, tasks[0].rows, config.batch_size)[0])
    write_json(folder / RUN, run)
    try:
        for task in tasks:
            batches = at_least_two(batches_of(backbone, task.rows, config.batch_size))
            for rows in track(batches, task.task.name, disable=not sys.stderr.isatty()):
                _fill(config, methods, task, rows, records)
            write_tables(folder, records.records, run)
            write_survey_report(folder, records.records, run)
            print(f"{task.task.name}: done", file=sys.stderr)
    except KeyboardInterrupt:
        print("\n" + STOPPED.format(n=len(records.records), folder=folder), file=sys.stderr)
        raise SystemExit(130) from None
    return folder


@torch.no_grad()
def price(methods: Methods, rows: Sequence[Encoded], rounds: int = 3) -> float:
    """Time to the first token of the method that is shown, in plain prefills: the median over rounds on one batch of prompts.

    Of a generator without the step's gradient, also where other methods of the survey take one.
    """
    ratios = []
    for _ in range(rounds):
        start = time.perf_counter()
        for part in parts_of(methods.backbone, rows):
            prefill(methods.backbone, prompt_batch(methods.backbone, rows[part]), None)
        middle = time.perf_counter()
        methods.answered(methods.prepare(rows, gradient=methods.shown in methods.rules), rows, methods.shown)
        ratios.append((time.perf_counter() - middle) / (middle - start))
    return round(median(ratios), 3)


def _fill(
    config: Survey, methods: Methods, task: TaskRows, rows: Sequence[Encoded], records: RecordFile[SurveyRecord]
) -> None:
    name = task.task.name
    missing = [m for m in config.methods if not records.has((name, m, row.id) for row in rows)]
    if not missing:
        return
    ready = methods.prepare(rows)
    chosen = {row.id for row in task.rows[: config.generate_limit]}
    for method in missing:
        answered = methods.answered(ready, rows, method)
        nll_B = answered.read.answer_nll([row.answer for row in rows])
        texts: list[str | None] = [None] * len(rows)
        if method in config.generate and any(row.id in chosen for row in rows):
            longest = min(config.max_new_tokens or task.task.max_new_tokens, task.task.max_new_tokens)
            ids = answered.read.generate(max_new_tokens=longest)
            texts = list(methods.backbone.tokenizer.batch_decode(ids, skip_special_tokens=True))
        records.add([_record(task, method, row, answered, nll_B, texts, b) for b, row in enumerate(rows)])


def _record(
    task: TaskRows,
    method: str,
    row: Encoded,
    answered: Answered,
    nll_B: Tensor,
    texts: Sequence[str | None],
    b: int,
) -> SurveyRecord:
    example, text = task.examples[row.id], texts[b]
    record = SurveyRecord(
        task=task.task.name,
        method=method,
        id=row.id,
        nll=nll_B[b].item(),
        tokens=len(row.answer),
        share=answered.share_B[b].item(),
        kl=None if answered.kl_B is None else answered.kl_B[b].item(),
    )
    if text is None:
        return record
    judge = task.task.correct
    quality = rouge_lsum(example.answer, text) if judge is None else float(judge(text, example))
    told = {"prompt": example.prompt[-300:], "answer": example.answer, "text": text, "quality": quality}
    return record.model_copy(update={**told, "judged": judge is not None})
