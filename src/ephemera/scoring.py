"""Examples as token ids, the batches that they pass through a model in, and their answers' NLL under adapters, and its gradient."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ephemera.batch import TokenBatch, batch_tokens, last_tokens, length_batches, pad
from ephemera.llm.answer_end import end_of_answer
from ephemera.llm.cached_layers import CachedLayers
from ephemera.llm.frozen_lm import FrozenLM
from ephemera.llm.prefill import nll_after, prefill, whole_reading
from ephemera.llm.tokenize import encode_answer, encode_prompt
from ephemera.lora import LoraBatch
from ephemera.made_for import Reach
from ephemera.tasks import Example


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
    end_token: bool = False,
) -> tuple[list[Encoded], int]:
    """Token ids of each example, and how many were left out because they are longer than `max_tokens`.

    `system` is the system message of the chat format; the plain format has none. `end_token`: answers go on to the token
    that ends them. They are cut after `max_answer_tokens`. ValueError names the row of a prompt that has no tokens.
    """
    end = [end_of_answer(backbone.tokenizer, chat=chat)] if end_token else []
    room = min(max_tokens, backbone.max_length)
    encoded = [
        Encoded(
            e.id,
            backbone.check_ids(encode_prompt(backbone.tokenizer, e.prompt, chat=chat, system=system)),
            backbone.check_ids(encode_answer(backbone.tokenizer, e.prompt, e.answer, chat=chat, system=system) + end)[
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


def answer_gradient(
    backbone: FrozenLM,
    rows: Sequence[Encoded],
    lora: LoraBatch,
    *,
    reach: Reach = "all",
    reading: CachedLayers | None = None,
) -> tuple[Tensor, LoraBatch]:
    """Answer NLL [B] under the adapters, and its gradient by them: one forward and one backward pass.

    With reach `answer` over the answers' tokens only, after the base model's `reading`, kept or made anew.
    """
    if reach == "answer":
        batch, leaves = prompt_batch(backbone, rows), lora.leaves()
        reading = whole_reading(backbone, batch, reading)
        with torch.enable_grad():
            nll_B = nll_after(backbone, batch, reading, [row.answer for row in rows], leaves)
            grads = torch.autograd.grad(nll_B.sum(), leaves.buffers, allow_unused=True, materialize_grads=True)
        return nll_B.detach(), leaves.with_buffers(*grads)
    joined = pad([row.prompt + row.answer for row in rows], pad_id=backbone.pad_id).to(backbone.device)
    answers = last_tokens(joined, [len(row.answer) for row in rows])
    leaves = lora.leaves()
    with torch.enable_grad():
        hidden_BTD = backbone.forward(joined, leaves).hidden_BTD
        nll_B = backbone.mean_nll(hidden_BTD, joined, tokens=answers)
        grads = torch.autograd.grad(nll_B.sum(), leaves.buffers, allow_unused=True, materialize_grads=True)
    return nll_B.detach(), leaves.with_buffers(*grads)
