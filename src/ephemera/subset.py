"""Which of a prompt's tokens its loss counts: by their place, by their loss, or only those that are not the template's."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ephemera.objective import TokenBatch

ALL = "all"
HOLE = "{}"


def check_tokens(tokens: str) -> None:
    if re.fullmatch(r"all|(last|every)-[1-9]\d*|hardest-([1-9]\d?|100)%", tokens) is None:
        raise ValueError(f'tokens={tokens!r} is unknown; it is "all", "last-8", "every-2", "hardest-50%", or the like.')


def hardest_percent(tokens: str) -> int | None:
    """50 of "hardest-50%": of each row's scored tokens, those with the highest loss."""
    return int(tokens.removeprefix("hardest-").removesuffix("%")) if tokens.startswith("hardest-") else None


def by_place(batch: TokenBatch, tokens: str) -> Tensor:
    """Which tokens count [B,T], by their places from each row's end; all of a row's places are real tokens."""
    kind, _, number = tokens.partition("-")
    if kind in (ALL, "hardest"):
        return batch.mask_BT
    from_end_BT = batch.lengths_B[:, None] - 1 - batch.position_ids_BT
    if kind == "last":
        return batch.mask_BT & (from_end_BT < int(number))
    return batch.mask_BT & (from_end_BT % int(number) == 0)


def check_template(template: str) -> None:
    if HOLE not in template or not template.replace(HOLE, "").strip() or HOLE * 2 in template:
        raise ValueError(
            f"template={template!r}: give the words that all prompts share, with {HOLE} where each has its own, "
            f'e.g. "Question: {HOLE} Answer:"; no two {HOLE} side by side.'
        )


def own_text(batch: TokenBatch, template: str, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Which tokens are a row's own [B,T]: what stands in the template's holes. ValueError where a row does not fit it."""
    own_BT = torch.zeros_like(batch.mask_BT)
    for row, (ids, mask) in enumerate(zip(batch.ids_BT.tolist(), batch.mask_BT, strict=True)):
        own = own_tokens([i for i, real in zip(ids, mask.tolist(), strict=True) if real], template, tokenizer)
        own_BT[row, mask] = torch.tensor(own)
    return own_BT


def own_tokens(ids: Sequence[int], template: str, tokenizer: PreTrainedTokenizerBase) -> list[bool]:
    """Which tokens of one prompt stand in the template's holes.

    Found in the text that the tokens make, because tokens merge across the template's borders: a token is the
    template's where all of it is, white space aside. What stands before the template's beginning and after its end (a
    BOS, a chat template's turns) is the template's too.
    """
    ends = [len(_text(tokenizer, ids[: i + 1])) for i in range(len(ids))]
    text = _text(tokenizer, ids)
    match = _pattern(template).match(text)
    if match is None:
        raise ValueError(
            f"a prompt does not fit the objective's template {template!r}; it begins {text[:40]!r} and ends {text[-20:]!r}. "
            "Give prompts of that form, or take a rate whose objective has no template."
        )
    holes = [match.span(i + 1) for i in range(template.count(HOLE))]
    found = []
    for before, end in zip([0, *ends], ends, strict=False):
        start = min(before, end - 1)  # a character's later bytes add none
        words = [i for i in range(start, end) if not text[i].isspace()] or [start]
        found.append(any(low <= i < high for i in words for low, high in holes))
    return found


def _text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    text = tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text


def _pattern(template: str) -> re.Pattern[str]:
    """Each hole ends where the words after it come first; the last one where they come last."""
    first, *others = (re.escape(part) for part in template.split(HOLE))
    pattern = rf".*?{first}" if first else ""
    for place, words in enumerate(others, 1):
        pattern += f"(.*){words}" if place == len(others) else f"(.*?){words}"
    return re.compile(pattern if others[-1] else pattern + r"\Z", re.DOTALL)
