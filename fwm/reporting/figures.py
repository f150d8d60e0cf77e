"""Learning curves."""

import math
from collections.abc import Mapping
from pathlib import Path

from fwm.files import replacing
from fwm.reporting.sinks import log_rows


def draw_learning_curves(logs: Mapping[str, Path], out: Path) -> None:
    """Draw training and validation perplexity against the step, one colour per named log."""
    # Figure objects, not pyplot: no global state, no display, and a second saved at every start.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="perplexity", yscale="log")
    for index, (name, log) in enumerate(logs.items()):
        rows = log_rows(log)
        for split, alpha, marker in [("train", 0.4, ""), ("valid", 1.0, ".")]:
            points = [(int(r["step"]), float(r["perplexity"])) for r in rows if r["split"] == split]
            points = sorted(point for point in points if math.isfinite(point[1]))
            if points:
                label = f"{name} {split}".strip()
                steps, perplexities = zip(*points, strict=True)
                (line,) = axes.plot(steps, perplexities, color=f"C{index}", label=label)
                line.set(alpha=alpha, marker=marker)
    if axes.lines:
        axes.legend()
    axes.grid(True, which="both", alpha=0.3)
    out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(out) as partial:
        figure.savefig(partial, format=out.suffix[1:] or "png", dpi=120)
