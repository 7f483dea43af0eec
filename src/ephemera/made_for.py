"""What a trained network was made for: a network is offered for nothing else."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from ephemera.messages import unknown

Format = Literal["plain", "chat"]
Reach = Literal["all", "answer"]
FORMATS: tuple[Format, ...] = ("plain", "chat")
REACHES: tuple[Reach, ...] = ("all", "answer")


def checked_reach(reach: str) -> Reach:
    for known in REACHES:
        if reach == known:
            return known
    raise unknown("reach", reach, REACHES)


@dataclass(frozen=True)
class MadeFor:
    """Tasks and prompt format of the training data, where adapters act, and how many steps were validated (a generator: 0).

    `reach`: "all", the papers': an adapter acts on every token. "answer": it acts from the last prompt token on, over the
    base model's keys and values. `validation`: figures on validation rows, by name.
    """

    tasks: tuple[str, ...]
    format: Format = "plain"
    reach: Reach = "all"
    steps: int = 1
    validation: dict[str, float] | None = None

    def __post_init__(self):
        known = self.format in FORMATS and self.reach in REACHES
        if not known or not isinstance(self.steps, int) or self.steps < 0:
            raise ValueError(f"made_for holds format {self.format!r}, reach {self.reach!r}, steps {self.steps!r}")

    @property
    def words(self) -> str:
        """One sentence for users."""
        tasks = ", ".join(self.tasks[:6]) + (f" and {len(self.tasks) - 6} more" if len(self.tasks) > 6 else "")
        prompts = "chat prompts" if self.format == "chat" else "plain prompts"
        if not self.steps:
            return f"this generator was trained on {prompts} of {tasks}"
        return f"this network was trained on {prompts} of {tasks}, with {self.steps} step{'s' * (self.steps != 1)}"

    def describe(self) -> dict[str, Any]:
        """As it stands in a network's file."""
        return {**asdict(self), "tasks": list(self.tasks)}


def read_made_for(record: dict[str, Any] | None, folder: Path) -> MadeFor:
    """From a network's file. Files from before there was a record count as plain, of the task in their card."""
    if record is not None:
        if not isinstance(record["tasks"], list):
            raise ValueError(f"made_for holds tasks {record['tasks']!r}")
        return MadeFor(**{**record, "tasks": tuple(record["tasks"])})
    card = (folder.parent if folder.name == "averaged" else folder) / "README.md"
    text = card.read_text(errors="replace") if card.exists() else ""
    found = re.search(r"^#.* on ([\w/+-]+)", text, flags=re.M)
    mixture = re.search(r"drawn from (.+?)\.\n", text)
    if found:
        return MadeFor(tuple(found[1].split("+")))
    return MadeFor(tuple(re.findall(r"([\w/-]+) \(\d+ rows\)", mixture[1])) if mixture else ("an unknown task",))
