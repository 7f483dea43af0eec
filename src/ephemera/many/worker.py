"""Lines of a window's rows: adapt, then answer, score or keep the adapter, batch by batch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ephemera.adaptation import Adaptation
from ephemera.batch import batch_tokens, length_batches
from ephemera.config import Run
from ephemera.many.rows import BadRow, Lines, Row, parse
from ephemera.model import BATCH_SIZE, AdaptiveLM
from ephemera.saving import json_text

Made = dict[int, str]  # a row's number to its line of output
PER_FOLDER = 1000  # adapters that lie in one folder


def load(settings: Run) -> AdaptiveLM:
    model = settings.model
    return AdaptiveLM.from_pretrained(
        model.name,
        init=settings.init,
        rate=settings.rate,
        chat=settings.chat,
        truncate=settings.truncate,
        reach=settings.reach,
        special_tokens=settings.special_tokens,
        **model.loading,
    )


class Worker:
    """A model, and what a run does with it.

    A window's batches follow from its rows only, so that a window that was stopped in the middle gives the same bytes.
    """

    def __init__(self, settings: Run, lm: AdaptiveLM, root: Path = Path()):
        """`root`: where a relative folder of adapters lies."""
        self.settings, self.lm, self.root = settings, lm, root

    def window(self, lines: Lines, kind: str, known: Made) -> Iterator[Made]:
        """The output lines of a window, a batch at a time; batches that are `known` are passed over."""
        rows, bad = self._checked([parse(*line, kind=kind, scored=self.settings.task == "score") for line in lines])
        if missing := {row.number: _line(row.id, error=row.error) for row in bad if row.number not in known}:
            yield missing
        lengths = [length for _, length in rows]
        limit = batch_tokens(self.lm.backbone.device)
        for places in length_batches(lengths, batch_size=BATCH_SIZE, max_tokens=limit):
            batch = [rows[i][0] for i in places]
            if not all(row.number in known for row in batch):
                yield self._batch(batch)

    def _checked(self, found: Sequence[Row | BadRow]) -> tuple[list[tuple[Row, int]], list[BadRow]]:
        """The rows that the model takes, with their tokens, and the others."""
        rows: list[tuple[Row, int]] = []
        bad: list[BadRow] = []
        for row in found:
            if isinstance(row, BadRow):
                bad.append(row)
                continue
            try:
                rows.append((row, self._tokens(row)))
            except ValueError as error:
                bad.append(BadRow(row.number, row.id, f"line {row.number}: {error}"))
        return rows, bad

    def _tokens(self, row: Row) -> int:
        """Tokens of the prompt; ValueError where the model cannot take it with what follows it."""
        if not isinstance(row.prompt, str) and not self.settings.chat:
            raise ValueError("messages need the model's chat template; run with --chat.")
        reserve = self.settings.max_new_tokens if self.settings.task == "answer" else 0
        if row.answer is not None and self.settings.task == "score":
            reserve = len(self.lm.encode_answer(row.prompt, row.answer))
        return len(self.lm.encode(row.prompt, reserve=reserve))

    def _batch(self, rows: Sequence[Row]) -> Made:
        prompts = [row.prompt for row in rows]
        steps, seed = self.settings.steps, self.settings.seed
        if self.settings.task == "answer":
            texts, made = self.lm.reply(prompts, steps=steps, seed=seed, max_new_tokens=self.settings.max_new_tokens)
            results = [{"text": text} for text in texts]
        else:
            made = self.lm.adapt(prompts, steps=steps, seed=seed)
            after_B = self.lm.prompt_nll(prompts, made)
            made = made.after_reading(None if after_B is None else after_B.tolist())
            results = self._scores(rows, made) if self.settings.task == "score" else self._adapters(rows, made)
        return {
            row.number: _line(row.id, **result, **_facts(made, place), seed=seed)
            for place, (row, result) in enumerate(zip(rows, results, strict=True))
        }

    def _scores(self, rows: Sequence[Row], made: Adaptation) -> list[dict[str, Any]]:
        answers = [row.answer or "" for row in rows]
        nll_B = self.lm.answer_nll([row.prompt for row in rows], answers, adaptation=made).tolist()
        return [{"nll": _rounded(nll)} for nll in nll_B]

    def _adapters(self, rows: Sequence[Row], made: Adaptation) -> list[dict[str, Any]]:
        folders = [
            self.settings.adapters_folder / f"{row.number // PER_FOLDER:05d}" / f"{row.number:08d}" for row in rows
        ]
        for place, folder in enumerate(folders):
            made.export_peft(self.root / folder, row=place)
        return [{"adapter": str(folder)} for folder in folders]


def _facts(made: Adaptation, place: int) -> dict[str, Any]:
    """What adapting did to a row's prompt."""
    seen_K = made.prompt_nll_BK[place].tolist()
    return {
        "prompt_nll_before": _rounded(seen_K[0]) if seen_K else None,
        "prompt_nll_after": None if made.after_B is None else _rounded(made.after_B[place].item()),
        "share": None if made.share_B is None else made.share_B[place].item(),
        "note": made.notes[place],
    }


def _rounded(nll: float) -> float | None:
    return round(nll, 5) if math.isfinite(nll) else None


def _line(row_id: str | int, **values: Any) -> str:
    return json_text({"id": row_id, **values}, ensure_ascii=False) + "\n"
