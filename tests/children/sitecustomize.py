"""Python imports this as it starts, in the processes that have this folder on their path."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))

import whole_entries  # noqa: F401
