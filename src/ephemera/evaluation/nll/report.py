"""`write_report`: from a run folder's records to tables, figures and one self-contained page."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from ephemera.evaluation.nll.cross_report import cross_figure, cross_results, cross_table, read_cross
from ephemera.evaluation.nll.figures import save_figure, styled, write_figures
from ephemera.evaluation.nll.tables import (
    Table,
    conditions,
    details_table,
    kept_table,
    method_names,
    nll_table,
    write_tables,
)
from ephemera.evaluation.shared.records import RECORDS, RUN, Record, read_records, write_bytes
from ephemera.evaluation.shared.statistics import by_cell, schedule_consistency, spread_of_A, summarize

REPORT = "report.html"
SAMPLES = 3
CROSS_CAPTION = (
    "Cross-gradient of prompt and answer at the start adapter (LDTTA Eq. 5), size and sign by layer; the learned rate of each "
    "projection; and over prompts, the gain against the sum of rate times cross-gradient."
)
NEEDED = ("config", "source", "rows", "uniform_rates", "model", "projections", "versions", "commit", "command")

# No scripts, and the policy lets nothing be fetched: the page works from a mail or a USB stick.
PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
<h1>{title}</h1>
{body}
</main>
</body>
</html>
"""

STYLE = """
:root { --ink: #1d2126; --soft: #5c6670; --line: #d9dee3; --paper: #ffffff; --card: #f5f7f9; --mark: #0072b2; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ec; --soft: #9aa5b0; --line: #353c44; --paper: #15181c; --card: #1e2328; --mark: #56b4e9; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 system-ui, sans-serif; }
main { max-width: 72rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: .5rem 0 1.5rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .5rem; }
.note, figcaption { color: var(--soft); font-size: .9rem; max-width: 60rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .75rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th { color: var(--soft); font-weight: 600; }
tbody th { color: var(--ink); text-align: left; }
thead th.label { text-align: left; }
tbody tr:hover { background: var(--card); }
figure { margin: 1.5rem 0; }
figure img { display: block; width: 100%; min-width: 40rem; height: auto; padding: .75rem; background: #fff; }
figure img { border: 1px solid var(--line); border-radius: 8px; }
figure.narrow img { max-width: 44rem; min-width: 26rem; }
figcaption { margin-top: .5rem; }
.sample { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 1rem; margin: 1rem 0; }
.answers { display: grid; grid-template-columns: repeat(auto-fit, minmax(14rem, 1fr)); gap: 1rem; margin-top: 1rem; }
.sample h3 { font-size: .8rem; color: var(--soft); margin: 0 0 .25rem; font-weight: 600; }
.answers .adapted h3 { color: var(--mark); }
.text { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; }
dl { display: grid; grid-template-columns: minmax(8rem, max-content) 1fr; gap: .35rem 1.5rem; font-size: .9rem; }
dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; }
@media (max-width: 36rem) { dl { grid-template-columns: 1fr; gap: 0; } dd { margin-bottom: .6rem; } }
"""


def write_report(folder: Path) -> Path:
    """results.json, table.csv, table.md, figures/*.png and report.html of a run folder; returns the page.

    It may be called again at any time, also on a run that was stopped. ValueError where the folder
    holds no run or no record yet.
    """
    run, records = read_run(folder)
    cells = summarize(records)
    consistency = schedule_consistency(records)
    spreads, cross, names = spread_of_A(records), read_cross(folder, run, records), method_names(run)
    found = cross_results(cross) if cross else None
    controls = kept_table(cells, names, spreads)
    tables = [nll_table(cells, names), details_table(cells, names), *([controls] if controls else [])]
    figures = write_figures(folder, run, records, cells, consistency)
    if cross and found:
        tables.append(cross_table(cross, found))
        with styled():
            figures[CROSS_CAPTION] = save_figure(folder, "cross_gradient", cross_figure(cross, found))
    write_tables(folder, run, cells, consistency, spreads, found, tables)
    first, *others = map(html_table, tables)
    body = [
        first,
        "<h2>Figures</h2>",
        *(_figure(caption, path) for caption, path in figures.items()),
        *others,
        _samples(records, names),
        _conditions(conditions(run, cells)),
    ]
    title = escape(f"{run['model']['name']} on {run['config']['data']['task']}")
    path = folder / REPORT
    write_bytes(path, PAGE.format(title=title, style=STYLE, body="\n".join(body)).encode())
    return path


def read_run(folder: Path) -> tuple[dict[str, Any], list[Record]]:
    """run.json and the records of a run folder."""
    expected = f"a folder that `ephemera evaluate` wrote is expected, with {RUN} and at least one line in {RECORDS}."
    for name in (RUN, RECORDS):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} has no {name}: {expected}")
    try:
        run = json.loads((folder / RUN).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{folder / RUN} is not valid JSON ({error}): {expected}") from error
    missing = [key for key in NEEDED if key not in run]
    if missing:
        raise ValueError(f"{folder / RUN} lacks {', '.join(missing)}: {expected}")
    records = read_records(folder / RECORDS, Record)
    if not records:
        raise ValueError(f"{folder / RECORDS} is empty: {expected}")
    return run, records


def html_table(table: Table) -> str:
    header = "".join(
        f'<th scope="col"{" class=label" if i < table.labels else ""}>{escape(text)}</th>'
        for i, text in enumerate(table.header)
    )
    rows = []
    for row in table.rows:
        heads = "".join(f'<th scope="row">{escape(text)}</th>' for text in row[: table.labels])
        rows.append(f"<tr>{heads}{''.join(f'<td>{escape(text)}</td>' for text in row[table.labels :])}</tr>")
    return (
        f'<h2>{escape(table.title)}</h2>\n<p class="note">{escape(table.note)}</p>\n<div class="scroll"><table>'
        f"<thead><tr>{header}</tr></thead>\n<tbody>\n" + "\n".join(rows) + "\n</tbody></table></div>"
    )


def _figure(caption: str, path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    shape = ' class="narrow"' if path.stem == "fig4" else ""
    return (
        f'<figure{shape}><div class="scroll"><img alt="{escape(caption)}" src="data:image/png;base64,{data}"></div>'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def samples(records: Sequence[Record]) -> list[tuple[Record, Record]]:
    """(unadapted, adapted) records of the run's first prompts for which both generated a text.

    Adapted is the layer-wise method where it generated, else another, at its largest K.
    """
    cells = by_cell([r for r in records if r.text is not None])
    base = cells.get(("none", 0), {})
    adapted = sorted((key for key in cells if key[0] != "none"), key=lambda key: (key[0] == "layerwise", key[1]))
    mine = cells[adapted[-1]] if adapted else {}
    return [(base[i], mine[i]) for i in base if i in mine][:SAMPLES]


def _samples(records: Sequence[Record], names: dict[str, str]) -> str:
    blocks = []
    for base, adapted in samples(records):
        parts = [
            ("reference", "Reference", base.answer or "not known"),
            ("base", f"{names['none']}, NLL {base.nll:.2f}", base.text or ""),
            ("adapted", f"{names[adapted.method]}, K = {adapted.K}, NLL {adapted.nll:.2f}", adapted.text or ""),
        ]
        answers = "".join(f'<div class="{kind}">{_text(head, text)}</div>' for kind, head, text in parts)
        blocks.append(
            f'<div class="sample">{_text("End of the prompt", base.prompt or "not kept")}'
            f'<div class="answers">{answers}</div></div>'
        )
    if not blocks:
        return ""
    note = f"The first {len(blocks)} prompts of the run for which both generated an answer, not chosen."
    return f'<h2>Answers side by side</h2>\n<p class="note">{note}</p>\n' + "\n".join(blocks)


def _text(head: str, text: str) -> str:
    return f'<h3>{escape(head)}</h3><p class="text">{escape(text.strip()) or "(empty)"}</p>'


def _conditions(stated: Sequence[tuple[str, str]]) -> str:
    lines = "".join(f"<dt>{escape(key)}</dt><dd>{escape(value)}</dd>" for key, value in stated)
    return f"<h2>Conditions</h2>\n<dl>{lines}</dl>"
