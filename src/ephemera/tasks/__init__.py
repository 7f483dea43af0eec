"""Prompt templates and data: one small file per family."""

from ephemera.tasks.base import Example, Task
from ephemera.tasks.load import TASKS, Dataset, find_task, load_dataset

__all__ = ["TASKS", "Dataset", "Example", "Task", "find_task", "load_dataset"]
