"""What a run tells: terminal, train_log.csv, TensorBoard, learning_curve.png, Weights & Biases.

`reporter.py` is all that a training loop talks to, through `progress.py`, which makes averages and
pace of what it is told; `sinks.py` has where a report goes, `trace.py` what the profiler sees, and
`compare.py` and `figures.py` put finished runs beside each other, `report.py` any runs on one page.
"""

from fwm.reporting.compare import compare, paper_result
from fwm.reporting.figures import draw_learning_curves
from fwm.reporting.progress import Progress
from fwm.reporting.report import Run, write_report
from fwm.reporting.reporter import Reporter, parameter_table
from fwm.reporting.sinks import COLUMNS, EventWriter
from fwm.reporting.trace import Trace

__all__ = [
    "COLUMNS", "EventWriter", "Progress", "Reporter", "Run", "Trace", "compare",
    "draw_learning_curves", "paper_result", "parameter_table", "write_report",
]  # fmt: skip
