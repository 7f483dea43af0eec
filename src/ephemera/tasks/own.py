"""A user's own file of {"prompt", "answer"}: the prompt is used as it stands."""

from ephemera.tasks.base import Task

OWN = Task(
    name="own",
    fields=("prompt", "answer"),
    prompt=lambda row: row["prompt"],
    answer=lambda row: row["answer"],
    max_new_tokens=64,
    hub=None,
    hub_splits={},
    wheel={},
)
