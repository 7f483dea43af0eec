"""Model cards: the front matter that a hub reads, and the table of harm."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ephemera.downloads import DEFAULT_MODEL
from ephemera.tasks.load import TASKS

HUB_NAMES = {DEFAULT_MODEL: "HuggingFaceTB/SmolLM2-135M-Instruct"}
FRONT = re.compile(r"\A---\n.*?\n---\n", flags=re.S)
HARM = re.compile(r"\n## Harm\n.*?(?=\n## |\Z)", flags=re.S)
REPO = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?")


def front_matter(model: str, tasks: Iterable[str], *, metrics: Iterable[str] = ("nll",), kind: str) -> str:
    """The YAML block that begins a card. `tasks` are those of the training data; the hub's names stand for them."""
    base = HUB_NAMES.get(model, model)
    datasets = sorted({hub[0] for task in tasks if (known := TASKS.get(task)) and (hub := known.hub)})
    lines = ["---"]
    if REPO.fullmatch(base):
        lines.append(f"base_model: {base}")
    lines += ["library_name: ephemera", "license: apache-2.0", "pipeline_tag: text-generation"]
    for key, values in (("datasets", datasets), ("metrics", metrics), ("tags", ["test-time-adaptation", "lora", kind])):
        if values := list(values):
            lines += [f"{key}:", *(f"- {value}" for value in values)]
    return "\n".join([*lines, "---", ""])


def has_front_matter(text: str) -> bool:
    return FRONT.match(text) is not None


def body(text: str) -> str:
    """A card without its front matter."""
    return FRONT.sub("", text, count=1).lstrip("\n")


def harm_table(calibration: Mapping[str, Any] | None, validation: Mapping[str, float] | None) -> str:
    """The section on harm, from the gate's calibration and the network's validation; empty if neither says anything."""
    rows = []
    if validation and "validation_harmed" in validation:
        change = validation.get("validation_nll_1", float("nan")) - validation.get("validation_nll_0", float("nan"))
        rows.append(f"| validation rows, no gate | {_number(change)} | {validation['validation_harmed']:.1%} | | |")
    if calibration and "calibration" in calibration:
        on = calibration["calibration"]
        rows.append(
            f"| {on['n']} calibration rows, with the gate | {_number(on['change'])} | {on['harmed']:.1%} | "
            f"{on['helped']:.1%} | {on['abstained']:.1%} |"
        )
    if not rows:
        return ""
    harm = (calibration or {}).get("harm", 0.05)
    return (
        f"\n## Harm\n\nHarmed or helped: the answer's NLL rose or fell by more than {harm:g} nats per token.\n\n"
        "| rows | change of NLL | harmed | helped | left alone |\n|---|--:|--:|--:|--:|\n" + "\n".join(rows) + "\n"
    )


def with_harm(text: str, table: str) -> str:
    """A card with this section on harm in place of the one it had."""
    return HARM.sub("", text).rstrip("\n") + "\n" + table


def add_harm(card: Path, table: str) -> None:
    """Put the section on harm into a card that is there."""
    if card.exists():
        card.write_text(with_harm(card.read_text(encoding="utf-8"), table), encoding="utf-8")


def _number(value: float) -> str:
    return "" if math.isnan(value) else f"{value:+.3f}".replace("-", "−")
