"""Figure and table of the retrieval experiments, beside the published results."""

import csv
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fwm.files import replacing, write_text

SIZES = {"capacity": (40, 100, 160, 200, 300, 500), "update_rule": (40, 100, 160, 200)}
# The best evaluation loss at each of SIZES, one seed (ischlag/fast-weight-transformers).
PUBLISHED: dict[str, dict[str, tuple[float, ...]]] = {
    "capacity": {
        "softmax": (0.0003, 0.0000, 0.0000, 0.0000, 0.0000, 0.0089),
        "linear_sum": (0.0008, 0.1642, 0.3011, 0.3420, 0.3971, 0.4287),
        "dpfp1_sum": (0.0003, 0.0002, 0.1020, 0.1732, 0.2855, 0.3864),
        "dpfp2_sum": (0.0006, 0.0005, 0.0004, 0.0004, 0.0681, 0.2756),
        "dpfp3_sum": (0.0009, 0.0005, 0.0002, 0.0009, 0.0003, 0.1691),
        "favor64_sum": (0.2740, 0.4961, 0.5000, 0.5000, 0.5000, 0.5000),
        "favor128_sum": (0.1752, 0.5000, 0.5000, 0.5000, 0.5000, 0.5000),
        "favor512_sum": (0.0754, 0.5000, 0.5000, 0.5000, 0.5000, 0.5000),
    },
    "update_rule": {
        "dpfp1_sum": (0.1039, 0.1113, 0.1797, 0.2310),
        "dpfp1_delta": (0.0010, 0.0001, 0.1039, 0.1709),
        # S = 100: as in the log that ended at step 300; a later one has 0.0036 at step 2800.
        "dpfp2_delta": (0.0005, 0.0854, 0.0004, 0.0008),
        "linear_delta": (0.0007, 0.1502, 0.2762, 0.3415),
        "favor64_delta": (0.1832, 0.4994, math.nan, math.nan),
        "favor128_delta": (0.1629, 0.5000, math.nan, math.nan),
        "dpfp1_fwm": (0.4915, 0.5260, 1.9701, 1.0913),
        "tanh_fwm": (4.8251, 42.4175, 74.7594, 95.5134),
    },
}

# Seven and four: the first 28 models of a panel differ without their colours.
MARKERS = "os^vD*X"
DASHES = ("-", "--", "-.", ":")
YTICKS = (0, 0.1, 0.2, 0.3, 0.4, 0.5, 1, 10, 100)


class Result(NamedTuple):
    """What one run has come to, a line of results.csv."""

    setting: str
    model: str
    size: int
    seed: int
    best_loss: float
    step: int
    seconds: float


def read(path: Path) -> list[Result]:
    """The results of a results.csv, as `write` has written it."""
    kinds = Result.__annotations__.values()
    with path.open(encoding="utf-8", newline="") as file:
        _, *rows = csv.reader(file)
    return [Result(*(kind(cell) for kind, cell in zip(kinds, row, strict=True))) for row in rows]


def write(results: Sequence[Result], workdir: Path) -> None:
    """Write results.csv, results.md and results.png."""
    rows = io.StringIO(newline="")
    csv.writer(rows, lineterminator="\n").writerows([Result._fields, *sorted(results)])
    write_text(workdir / "results.csv", rows.getvalue())
    write_text(workdir / "results.md", text(results) + "\n")
    with replacing(workdir / "results.png") as partial:
        draw(results).savefig(partial, format="png", dpi=100)


def text(results: Sequence[Result]) -> str:
    """Both tables, in markdown."""
    return table(results) + "\n\n" + capacities(results)


def _losses(results):
    """The losses of all seeds by setting, model and size, in the paper's order of the models."""
    losses: dict = {setting: {model: {} for model in rows} for setting, rows in PUBLISHED.items()}
    for r in sorted(results):
        by_size = losses[r.setting].setdefault(r.model, {})
        by_size.setdefault(r.size, []).append(r.best_loss)
    return {s: {m: x for m, x in by_model.items() if x} for s, by_model in losses.items()}


def _published(setting, model):
    if model not in PUBLISHED[setting]:
        return {}
    return dict(zip(SIZES[setting], PUBLISHED[setting][model], strict=True))


def agrees(loss: float, published: float) -> bool:
    """Within a factor 1.5 above 0.01, within 0.02 below it; NaN agrees with nothing."""
    if published <= 0.01:
        return abs(loss - published) <= 0.02
    return published / 1.5 <= loss <= published * 1.5


def table(results: Sequence[Result]) -> str:
    """Mean and range over the seeds at every size, beside the published loss where there is one."""
    lines = [
        "| setting | model | S | seeds | mean | range | published | agrees |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for setting, by_model in _losses(results).items():
        for model, by_size in by_model.items():
            published = _published(setting, model)
            for size, losses in by_size.items():
                paper = published.get(size)
                mean = sum(losses) / len(losses)
                spread = f"{min(losses):.4f}-{max(losses):.4f}" if len(losses) > 1 else "-"
                cells = [setting, model, size, len(losses), f"{mean:.4f}", spread]
                if paper is None:
                    cells += ["-", "-"]
                elif math.isnan(paper):  # It divides 0 by 0 where our keys of sum zero write none.
                    cells += ["nan", "-"]
                else:
                    cells += [f"{paper:.4f}", "yes" if agrees(mean, paper) else "**no**"]
                lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def capacities(results: Sequence[Result]) -> str:
    """Where each curve leaves the floor: the largest S with a mean loss of at most 0.02.

    Beside it the last published S of at most 0.02 and the next one: the knee lies between them.
    """
    lines = ["| setting | model | holds S | not S | published |", "|---|---|---|---|---|"]
    for setting, by_model in _losses(results).items():
        for model, by_size in by_model.items():
            means = {size: sum(x) / len(x) for size, x in by_size.items()}
            cells = [" | ".join(_knee(means)), "-".join(_knee(_published(setting, model)))]
            lines.append(f"| {setting} | {model} | {cells[0]} | {cells[1]} |")
    return "\n".join(lines)


def _knee(losses):
    """The largest S with a loss of at most 0.02 and the next S, a blank for what there is not."""
    holds = [size for size in losses if losses[size] <= 0.02]
    rest = [size for size in losses if not holds or size > max(holds)]
    return [str(max(holds)) if holds else "", str(min(rest)) if rest else ""]


def draw(results: Sequence[Result]) -> Any:
    """Loss against S, one line per model through the means and a band of the seeds' range.

    Each has a colour, a marker and dashes of its own. Published points are hollow, with the same
    marker. Returns a matplotlib Figure.
    """
    from matplotlib.figure import Figure

    panels = {setting: by_model for setting, by_model in _losses(results).items() if by_model}
    figure = Figure(figsize=(7 * max(1, len(panels)), 5), layout="constrained")
    for index, (setting, by_model) in enumerate(panels.items()):
        axes = figure.add_subplot(1, len(panels), index + 1)
        axes.set(title=setting, xlabel="S", ylabel="best evaluation loss")
        # The fast weight memory loses up to S / 2; all others at most about 0.5.
        if any(model.endswith("_fwm") for model in by_model):
            axes.set_yscale("symlog", linthresh=0.6, linscale=2)
            axes.set_yticks(YTICKS, [f"{tick:g}" for tick in YTICKS])
        for number, (model, by_size) in enumerate(by_model.items()):
            style: dict[str, Any] = {"color": f"C{number}", "markersize": 5}
            style |= {"marker": MARKERS[number % len(MARKERS)]}
            sizes = sorted(by_size)
            means = [sum(by_size[size]) / len(by_size[size]) for size in sizes]
            dashes = DASHES[number % len(DASHES)]
            axes.plot(sizes, means, label=model, linestyle=dashes, **style)
            low, high = ([f(by_size[size]) for size in sizes] for f in (min, max))
            axes.fill_between(sizes, low, high, color=style["color"], alpha=0.2)
            published = _published(setting, model)
            style |= {"markersize": 9, "linestyle": "none", "markerfacecolor": "none"}
            axes.plot(list(published), list(published.values()), **style)
        axes.plot([], [], "o", color="black", markersize=9, mfc="none", label="published")
        axes.axhline(0.5, color="black", linewidth=0.8, linestyle=(0, (1, 3)))
        axes.margins(y=0.1)
        axes.annotate(
            "0.5: answers nothing", (0.99, 0.5), xycoords=("axes fraction", "data"), ha="right",
            xytext=(0, 7), textcoords="offset points", fontsize="small",
        )  # fmt: skip
        axes.grid(alpha=0.3)
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure
