"""Prompt templates and data: one small file per family."""

from ephemera.tasks.base import Example, Task, bare_prompt
from ephemera.tasks.load import TASKS, Dataset, find_task, load_dataset

__all__ = ["TASKS", "Dataset", "Example", "Task", "bare_prompt", "find_task", "load_dataset"]
