"""Examples as token ids, their answer NLL under adapters, and the best uniform rate on validation rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ephemera.adapt import adapt
from ephemera.batch import TokenBatch, batch_tokens, length_batches, pad
from ephemera.inits import Init
from ephemera.llm.frozen_lm import FrozenLM
from ephemera.llm.prefill import prefill
from ephemera.llm.tokenize import encode_answer, encode_prompt
from ephemera.lora import LoraBatch
from ephemera.made_for import Reach
from ephemera.prompt_loss import PROMPT, PromptLoss
from ephemera.rates import UNIFORM_GRID, FixedRate
from ephemera.tasks import Example

LATER_GRID = (0.0, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3)


@dataclass(frozen=True)
class Encoded:
    """An example as token ids."""

    id: str
    prompt: list[int]
    answer: list[int]
    task: str = ""


def encode_examples(
    backbone: FrozenLM,
    examples: Sequence[Example],
    *,
    chat: bool,
    max_tokens: int,
    system: str | None = None,
    task: str = "",
    max_answer_tokens: int | None = None,
) -> tuple[list[Encoded], int]:
    """Token ids of each example, and how many were left out because they are longer than `max_tokens`.

    `system` is the system message of the chat format; the plain format has none. Answers end after `max_answer_tokens`.
    ValueError names the row of a prompt that has no tokens.
    """
    room = min(max_tokens, backbone.max_length)
    encoded = [
        Encoded(
            e.id,
            backbone.check_ids(encode_prompt(backbone.tokenizer, e.prompt, chat=chat, system=system)),
            backbone.check_ids(encode_answer(backbone.tokenizer, e.prompt, e.answer, chat=chat, system=system))[
                :max_answer_tokens
            ],
            task,
        )
        for e in examples
    ]
    for example, row in zip(examples, encoded, strict=True):
        if not row.prompt:
            raise ValueError(
                f"{example.place or 'a row'}: the prompt {example.prompt[:40]!r} has no tokens: the tokenizer of "
                f"{backbone.name} drops all of its characters. Leave the row out."
            )
    kept = [e for e in encoded if len(e.prompt) + len(e.answer) <= room]
    if not kept:
        raise ValueError(f"every example is longer than {room} tokens; raise data.max_tokens or use shorter prompts.")
    return kept, len(encoded) - len(kept)


def prompt_batch(backbone: FrozenLM, rows: Sequence[Encoded]) -> TokenBatch:
    return pad([row.prompt for row in rows], pad_id=backbone.pad_id).to(backbone.device)


def batches_of(backbone: FrozenLM, rows: Sequence[Encoded], batch_size: int) -> list[list[Encoded]]:
    """Rows of similar length together: at most `batch_size`, and no more tokens than the device likes at once."""
    lengths = [len(row.prompt) for row in rows]
    made = length_batches(lengths, batch_size=batch_size, max_tokens=batch_tokens(backbone.device))
    return [[rows[i] for i in b] for b in made]


def at_least_two(batches: list[list[Encoded]]) -> list[list[Encoded]]:
    """A batch of one has no neighbour to swap with: two of them make a pair, a last one joins the batch before."""
    joined: list[list[Encoded]] = []
    for batch in batches:
        if joined and len(joined[-1]) == 1:
            joined[-1] = joined[-1] + batch
        else:
            joined.append(batch)
    if len(joined) > 1 and len(joined[-1]) == 1:
        last = joined.pop()
        joined[-1] = joined[-1] + last
    return joined


def parts_of(backbone: FrozenLM, rows: Sequence[Encoded]) -> list[slice]:
    """What passes through the model at once: neighbours that were joined may be longer than the device likes."""
    parts, start = [], 0
    for some in batches_of(backbone, rows, len(rows)):
        assert [row.id for row in some] == [row.id for row in rows[start : start + len(some)]], "rows by length"
        parts.append(slice(start, start + len(some)))
        start += len(some)
    return parts


def answer_nll(backbone: FrozenLM, rows: Sequence[Encoded], lora: LoraBatch | None, *, reach: Reach = "all") -> Tensor:
    """Mean NLL [B] over each row's answer tokens under the given adapters."""
    read = prefill(backbone, prompt_batch(backbone, rows), lora, reach=reach)
    return read.answer_nll([row.answer for row in rows])


def search_uniform(
    backbone: FrozenLM,
    init: Init,
    rows: Sequence[Encoded],
    *,
    steps: int,
    batch_size: int = 16,
    grid: Sequence[float] = UNIFORM_GRID,
    seed: int = 0,
    objective: PromptLoss = PROMPT,
    reach: Reach = "all",
) -> dict[int, dict[float, float]]:
    """Mean answer NLL of every rate in `grid` after K = 1..steps uniform steps: {K: {rate: NLL}}."""
    table: dict[int, dict[float, float]] = {K: {} for K in range(1, steps + 1)}
    for rate in grid:
        sums = dict.fromkeys(table, 0.0)
        for batch_rows in batches_of(backbone, rows, batch_size):
            batch = prompt_batch(backbone, batch_rows)
            lora = init(backbone, batch, [seed] * len(batch_rows))
            for K in table:
                lora = adapt(backbone, batch, lora, FixedRate(rate, objective), 1).lora
                sums[K] += answer_nll(backbone, batch_rows, lora, reach=reach).double().sum().item()
        for K, by_rate in table.items():
            by_rate[rate] = sums[K] / len(rows)
    return table


def best(table: dict[float, float]) -> float:
    """The rate of the lowest finite NLL."""
    return min(table, key=lambda rate: table[rate] if math.isfinite(table[rate]) else math.inf)


def search_base_rates(
    backbone: FrozenLM,
    init: Init,
    rows: Sequence[Encoded],
    *,
    steps: int,
    batch_size: int = 16,
    seed: int = 0,
    objective: PromptLoss = PROMPT,
    reach: Reach = "all",
) -> tuple[list[float], dict[str, dict[float, float]]]:
    """A schedule to start ScaleNet from: the best first step, then one rate for all later ones.

    Found greedily: the best uniform rate for K = 1; after it, the share of it that does best for K = 2.
    The share is kept above zero, so that training can enlarge it.
    """
    first_table = search_uniform(
        backbone,
        init,
        rows,
        steps=1,
        batch_size=batch_size,
        seed=seed,
        objective=objective,
        reach=reach,
    )[1]
    first = _refined(first_table)
    later_table = {}
    for share in LATER_GRID:
        total = 0.0
        for batch_rows in batches_of(backbone, rows, batch_size):
            batch = prompt_batch(backbone, batch_rows)
            lora = init(backbone, batch, [seed] * len(batch_rows))
            for rate in (first, first * share):
                lora = adapt(backbone, batch, lora, FixedRate(rate, objective), 1).lora
            total += answer_nll(backbone, batch_rows, lora, reach=reach).double().sum().item()
        later_table[share] = total / len(rows)
    share = max(best(later_table), min(s for s in LATER_GRID if s > 0))
    return [first] + [first * share] * (steps - 1), {"first": first_table, "later_share": later_table}


def _refined(table: dict[float, float]) -> float:
    """The vertex of the parabola through the grid's best and its neighbours, in log rate."""
    rates = sorted(table)
    i = rates.index(best(table))
    if not 0 < i < len(rates) - 1 or not all(math.isfinite(table[r]) for r in rates[i - 1 : i + 2]):
        return rates[i]
    x0, x1, x2 = (math.log(r) for r in rates[i - 1 : i + 2])
    y0, y1, y2 = (table[r] for r in rates[i - 1 : i + 2])
    above, below = (
        (x1 - x0) ** 2 * (y1 - y2) - (x1 - x2) ** 2 * (y1 - y0),
        (x1 - x0) * (y1 - y2) - (x1 - x2) * (y1 - y0),
    )
    return rates[i] if below == 0 else round(math.exp(x1 - 0.5 * above / below), 4)


@torch.no_grad()
def training_representations(
    backbone: FrozenLM, rows: Sequence[Encoded], *, batch_size: int = 16, exit_layer: int | None = None
) -> Tensor:
    """h(x) [N,2D] of unadapted prompts, for ScaleNet's normalisation."""
    batches = (prompt_batch(backbone, b) for b in batches_of(backbone, rows, batch_size))
    return torch.cat([backbone.forward(b, embedded=True, stop=exit_layer).representation_BH(b) for b in batches])
