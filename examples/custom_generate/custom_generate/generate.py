"""transformers' `generate` with a step on each prompt first. The keywords of `ephemera.as_generate` stand beside its own."""

from typing import Any

from ephemera import as_generate


def generate(
    model: Any,
    rate: Any = None,
    init: Any = None,
    steps: int | None = None,
    reach: Any = None,
    seed: int = 0,
    **kwargs: Any,
) -> Any:
    if rate is None:
        raise ValueError("give rate=: a number, a folder, a shipped name or a hub id of a network for this model.")
    decode = as_generate(rate, init=init, steps=steps, reach=reach, seed=seed)
    return model.generate(custom_generate=decode, **{key: value for key, value in kwargs.items() if value is not None})
