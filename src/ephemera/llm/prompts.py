"""Prompts as a caller gives them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ephemera.llm.tokenize import Prompt


def checked_prompts(prompts: Sequence[Prompt] | str) -> tuple[Prompt, ...]:
    """One prompt or several, as a tuple. ValueError for none, and for a single message of a chat."""
    prompts = (prompts,) if isinstance(prompts, str) else tuple(prompts)
    if not prompts:
        raise ValueError("no prompts: give at least one.")
    if any(isinstance(prompt, Mapping) for prompt in prompts):
        raise ValueError("a prompt is a message: give a list of prompts, each a text or a list of messages.")
    return prompts
