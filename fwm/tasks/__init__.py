"""What a model is trained on: one file a task, chosen by `config.task`.

A config file that lies anywhere registers its own, `TASKS["mine"] = Mine`. `task.py` says what a
task must have, `synthetic.py` makes one of a function that draws a sequence.
"""

from fwm.registry import Table
from fwm.tasks.synthetic import Synthetic
from fwm.tasks.task import Task
from fwm.tasks.text import Text

TASKS: Table[type[Task]] = Table("task")
TASKS["text"] = Text

__all__ = ["TASKS", "Synthetic", "Task", "Text"]
