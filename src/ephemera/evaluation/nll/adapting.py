"""One batch of rows after K steps."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

from ephemera.adaptation import Adaptation
from ephemera.begin import adapt_from, reach_of
from ephemera.inits import Init
from ephemera.llm.frozen_lm import FrozenLM
from ephemera.llm.share import Share
from ephemera.rates import Rate
from ephemera.scoring import Encoded, parts_of, prompt_batch


def adapted(
    backbone: FrozenLM, init: Init, rows: Sequence[Encoded], rule: Rate | None, K: int, *, seed: int
) -> Adaptation:
    """One batch of rows after K steps at this rate, the parts of it that pass through the model at once joined."""
    start, reach = time.perf_counter(), reach_of(init, rule)
    parts, places = [], parts_of(backbone, rows)
    for place in places:
        batch = prompt_batch(backbone, rows[place])
        part, _ = adapt_from(backbone, batch, init, [seed] * len(batch.ids_BT), rule, K, reach)
        parts.append(replace(part, cached={}))  # each method reads its prompts anew
    whole = Adaptation.joined(parts, [Share.whole(range(len(rows))[place]) for place in places])
    return replace(whole, seconds=time.perf_counter() - start, reach=reach)
