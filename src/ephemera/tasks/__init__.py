"""Prompt templates and data: one small file per family."""

from ephemera.tasks.data import TASKS, Dataset, find_task, load_dataset
from ephemera.tasks.example import Example, Task

__all__ = ["TASKS", "Dataset", "Example", "Task", "find_task", "load_dataset"]
