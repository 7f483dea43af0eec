"""A survey as one self-contained page: its table, and answers side by side."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from ephemera.evaluation.nll.report import PAGE, REPORT, STYLE, html_table
from ephemera.evaluation.shared.records import SurveyRecord, write_bytes
from ephemera.evaluation.survey.tables import cells_of, table_of, verdict

SHOWN = 6  # prompts of each task, the first ones


def pairs_of(records: Sequence[SurveyRecord], method: str) -> list[tuple[SurveyRecord, SurveyRecord]]:
    """(base, adapted) of each prompt that both answered, in the order of the records."""
    base = {(r.task, r.id): r for r in records if r.method == "none" and r.text is not None}
    mine = [r for r in records if r.method == method and r.text is not None]
    return [(base[r.task, r.id], r) for r in mine if (r.task, r.id) in base]


def changed(base: str, adapted: str) -> list[tuple[str, bool]]:
    """The words of the adapted answer, and whether each differs from the base model's answer."""
    theirs, mine = base.split(), adapted.split()
    matcher = difflib.SequenceMatcher(None, theirs, mine, autojunk=False)
    told = [(word, True) for word in mine]
    for match in matcher.get_matching_blocks():
        for i in range(match.b, match.b + match.size):
            told[i] = (mine[i], False)
    return told


def write_survey_report(folder: Path, records: Sequence[SurveyRecord], run: dict[str, Any]) -> None:
    """report.html of a survey's folder."""
    cells = cells_of(records)
    if not cells:
        return
    shown = run["config"]["shown"]
    body = [f"<p>{escape(verdict(cells, run['price'], shown))}</p>", html_table(table_of(cells)), "<h2>Answers</h2>"]
    seen: dict[str, int] = {}
    for base, mine in pairs_of(records, shown):
        seen[mine.task] = seen.get(mine.task, 0) + 1
        if seen[mine.task] <= SHOWN:
            body.append(_sample(base, mine))
    title = escape(f"{run['model']['name']}: what adapting does to its answers")
    write_bytes(folder / REPORT, PAGE.format(title=title, style=STYLE, body="\n".join(body)).encode())


def _sample(base: SurveyRecord, mine: SurveyRecord) -> str:
    words = "".join(
        f"<mark>{escape(word)}</mark> " if new else f"{escape(word)} "
        for word, new in changed(base.text or "", mine.text or "")
    )
    told = "abstained: the base model's answer" if mine.share == 0 else f"adapted (NLL {mine.nll:.2f})"
    return (
        f'<div class="sample"><h3>{escape(mine.task)}</h3><p class="text">{escape((mine.prompt or "").strip())}</p>'
        f'<div class="answers"><div><h3>base (NLL {base.nll:.2f})</h3><p class="text">{escape(base.text or "")}</p></div>'
        f'<div class="adapted"><h3>{told}</h3><p class="text">{words}</p></div>'
        f'<div><h3>expected</h3><p class="text">{escape(mine.answer or "")}</p></div></div></div>'
    )
