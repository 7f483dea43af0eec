"""Log-probabilities of tokens, of an answer's and of a prompt's own, and how OpenAI's two APIs show them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ephemera.serving.engine.vocabulary import Vocabulary

LEAST = -9999.0  # OpenAI's for a token that cannot come; JSON has no infinity
CHUNK = 512  # prompt tokens whose logits are held at once


@dataclass(frozen=True)
class NamedToken:
    """`logprob` is None for a prompt's first token, which nothing predicts."""

    name: str
    raw: bytes | None
    logprob: float | None


@dataclass
class TokenLogprob:
    """A token, the likeliest ones in its place, and where it stands in the returned text, in characters."""

    token: NamedToken
    top: list[NamedToken]
    offset: int = 0


def logprob_entry(logits_V: Tensor, token: int, count: int, vocabulary: Vocabulary) -> TokenLogprob:
    """A token and the `count` likeliest ones, of the model itself (before temperature and top_p)."""
    return _entries(logits_V[None], [token], count, vocabulary)[0]


def prompt_entries(
    states_TD: Tensor, ids: Sequence[int], logits: Any, count: int, vocabulary: Vocabulary
) -> list[TokenLogprob]:
    """A prompt's own tokens, each after those before it. `states_TD`: its last hidden states; `logits` is the head."""
    found = [TokenLogprob(_named(ids[0], None, vocabulary), [])]
    for start in range(0, len(ids) - 1, CHUNK):
        targets = list(ids[start + 1 : start + 1 + CHUNK])
        found += _entries(logits(states_TD[start : start + len(targets)]), targets, count, vocabulary)
    return found


@torch.no_grad()
def _entries(logits_NV: Tensor, tokens: Sequence[int], count: int, vocabulary: Vocabulary) -> list[TokenLogprob]:
    logp_NV = logits_NV.float().log_softmax(-1)
    own_N = logp_NV.gather(1, torch.tensor([[t] for t in tokens], device=logp_NV.device))[:, 0].tolist()
    top = logp_NV.topk(count, -1)
    entries = []
    for token, own, logps, ids in zip(tokens, own_N, top.values.tolist(), top.indices.tolist(), strict=True):
        others = [_named(i, logp, vocabulary) for i, logp in zip(ids, logps, strict=True)]
        entries.append(TokenLogprob(_named(token, own, vocabulary), others))
    return entries


def _named(token: int, logprob: float | None, vocabulary: Vocabulary) -> NamedToken:
    return NamedToken(
        vocabulary.name(token), vocabulary.bytes_of(token), None if logprob is None else max(logprob, LEAST)
    )


def chat_logprobs(entries: Sequence[TokenLogprob]) -> dict[str, Any]:
    """As /v1/chat/completions shows them."""

    def shown(token: NamedToken) -> dict[str, Any]:
        raw = None if token.raw is None else list(token.raw)
        return {"token": token.name, "logprob": token.logprob, "bytes": raw}

    content = [{**shown(entry.token), "top_logprobs": [shown(token) for token in entry.top]} for entry in entries]
    return {"content": content, "refusal": None}


def completion_logprobs(entries: Sequence[TokenLogprob]) -> dict[str, Any]:
    """As /v1/completions shows them. Names are keys here, so no two tokens may share one (vocabulary.py)."""
    return {
        "tokens": [entry.token.name for entry in entries],
        "token_logprobs": [entry.token.logprob for entry in entries],
        "top_logprobs": [
            None if entry.token.logprob is None else {token.name: token.logprob for token in entry.top}
            for entry in entries
        ],
        "text_offset": [entry.offset for entry in entries],
    }
