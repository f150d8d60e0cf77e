"""Learning curves."""

import math
import textwrap
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fwm.files import replacing
from fwm.reporting.sinks import log_rows

# Beside the colours, which a printer or an eye may not tell apart.
MARKERS = "os^Dv*PX"


def draw_learning_curves(logs: Mapping[str, Path], out: Path) -> None:
    """Draw training and validation perplexity against the step, a colour and marker per named log.

    One log has its name as the title, several have theirs in the legend.
    """
    figure = learning_curves(logs)
    out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(out) as partial, warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph \d+ ")  # Names in letters that the font has not.
        figure.savefig(partial, format=out.suffix[1:] or "png", dpi=120)


def learning_curves(logs: Mapping[str, Path]) -> Any:
    """The figure of `draw_learning_curves`, a matplotlib Figure."""
    # Figure objects, not pyplot: no global state, no display, and a second saved at every start.
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    figure = Figure(figsize=(10 if len(logs) > 1 else 8, 5), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="perplexity", yscale="log")
    said = ["training", "validation"]
    keys = [Line2D([], [], color="0.3", lw=1, alpha=0.5), Line2D([], [], color="0.3", marker=".")]
    for index, (name, log) in enumerate(logs.items()):
        color = f"C{index}"
        own: dict[str, Any] = {"marker": MARKERS[index % len(MARKERS)], "markersize": 4}
        rows = log_rows(log)
        for split, of_split in [("train", {"lw": 1, "alpha": 0.5}), ("valid", own)]:
            points = [(int(r["step"]), float(r["perplexity"])) for r in rows if r["split"] == split]
            points = sorted(point for point in points if math.isfinite(point[1]))
            if points:
                axes.plot(*zip(*points, strict=True), color=color, **of_split)
        if len(logs) > 1:
            said.append(textwrap.fill(name, 36))
            keys.append(Line2D([], [], color=color, **own))
    title = f"{len(logs)} runs" if len(logs) > 1 else textwrap.fill("".join(logs), 80)
    axes.set_title(_printable(title), fontsize="medium", parse_math=False)
    label_ticks(axes.yaxis)
    axes.grid(True, which="both", alpha=0.3)
    legend = figure.legend(keys, ["-"] * len(keys), loc="outside right upper", fontsize="small")
    for text, name in zip(legend.get_texts(), said, strict=True):
        # Afterwards: a label that begins with _ is left out, and $ would begin a formula.
        text.set(text=_printable(name), parse_math=False)
    return figure


def _printable(name: str) -> str:
    """A name of a folder may have bytes that are no text."""
    return name.encode("utf-8", errors="replace").decode("utf-8")


def label_ticks(axis: Any) -> None:
    """Give a logarithmic axis ticks with plain numbers, between decades too."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    low, high = sorted(axis.get_view_interval())
    if high < 3 * low:  # Powers and their like are rare here: round numbers, evenly spaced.
        axis.set_major_locator(MaxNLocator(6))
    else:
        subs = (
            (1, 1.5, 2, 3, 4, 6, 8) if high < 20 * low else (1, 2, 5) if high < 1e4 * low else (1,)
        )
        axis.set_major_locator(LogLocator(subs=subs, numticks=12))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
