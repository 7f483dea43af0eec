"""Whether a prompt fits the model's window, and the words of the user that are cut where it does not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from ephemera.llm.frozen_lm import FrozenLM
from ephemera.llm.tokenize import frame


def fit(
    backbone: FrozenLM, ids: Sequence[int], *, reserve: int, chat: bool, truncate: Literal["left"] | None
) -> list[int]:
    """A prompt's token ids as the window holds them; `reserve` places stay free after them.

    `truncate="left"` cuts the beginning of a longer prompt's own text: BOS and the chat template's words stay.
    ValueError if it is too long and not to be cut, or has no tokens at all.
    """
    if not ids:
        raise ValueError(
            "the prompt has no tokens: this model's tokenizer drops all of its characters. Give other text."
        )
    room = backbone.max_length - reserve
    if room < 1:
        raise ValueError(
            f"an answer of {reserve} tokens leaves no room for a prompt: {backbone.name}'s window is "
            f"{backbone.max_length}. Ask for fewer new tokens (max_new_tokens), or a shorter answer."
        )
    if len(ids) <= room:
        return list(ids)
    window = f" (its window of {backbone.max_length} less {reserve} for the answer)" if reserve else ""
    if truncate != "left":
        raise ValueError(
            f"the prompt has {len(ids)} tokens; {backbone.name} takes {room}{window}. "
            'Shorten it, or cut its beginning with truncate="left" (--truncate left).'
        )
    before, after = frame(backbone.tokenizer, ids, chat=chat)
    own = room - before - after
    if own < 1:
        raise ValueError(
            f"{before + after} tokens of every prompt are the {'chat template' if chat else 'tokenizer'}'s own, and "
            f"{backbone.name} takes {room}{window}: no word of this prompt would be left. Ask for fewer new tokens."
        )
    end = len(ids) - after
    return [*ids[:before], *ids[end - own :]]
