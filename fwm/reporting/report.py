"""One page about runs: curves, results, samples, memories; one file that needs no network.

The page is `report.html` with what is made here put into it: tables, drawings (SVG) and the numbers
behind them (JSON), which `report.js` shows under the pointer. All that comes from a run, its
settings or its text is escaped, and the page's own policy lets nothing but that script run.
"""

import base64
import hashlib
import html
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Template
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from fwm.errors import UserError
from fwm.files import write_text
from fwm.reporting.compare import exact_perplexity, names_of, what_differs
from fwm.reporting.sinks import LOG, log_rows

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 360, 220, 52, 8, 8, 32  # of a chart
POINTS = 400  # of a line; of more every so-manieth is drawn
COLORS, HEADS = 6, 4
DASHES = ("", "6 3", "2 3", "8 3 2 3")
# Column of the log, and whether it is drawn on a logarithmic scale.
CURVES = {
    "perplexity": True, "loss": False, "learning_rate": False, "grad_norm": True,
    "tokens_per_second": False,
}  # fmt: skip


class Run(NamedTuple):
    """What the page is told of a run; its log and results are read from its workdir."""

    workdir: Path
    settings: Mapping[str, Any]  # with dotted keys
    paper: str = "-"
    texts: Mapping[str, Any] = MappingProxyType({})
    sample: str = ""  # what the model writes
    words: Sequence[str] = ()  # that the memories have read
    memories: Sequence[Any] = ()  # of its layers: `fwm.look.LayerMemory`
    note: str = ""  # why there is no sample or memory


def write_report(runs: Sequence[Run], out: Path) -> None:
    """Write the page.

    Raises:
        UserError: a result file is malformed, or the page cannot be written.
    """
    here = Path(__file__).parent
    script = (here / "report.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    settings = [run.settings for run in runs]
    differing, names = what_differs(settings), names_of([run.workdir for run in runs], settings)
    title = f"fwm: {', '.join(names)}"
    body = [
        f"<h1>{_escape(title)}</h1>",
        "<h2>Results</h2>", _results(runs, names, differing),
        "<h2>Curves</h2>", _curves(runs, names),
        "<h2>What it writes</h2>", *map(_sample, runs, names),
        "<h2>What the memories hold and overwrite</h2>", *map(_memories, runs, names),
    ]  # fmt: skip
    page = Template((here / "report.html").read_text(encoding="utf-8")).substitute(
        title=_escape(title),
        policy=f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{digest}'",
        body="\n".join(body),
        script=script,
    )
    try:
        # Half a character, as a damaged text may have, becomes a question mark.
        write_text(out, page.encode("utf-8", errors="replace").decode("utf-8"))
    except OSError as error:
        raise UserError(f"the report {out} cannot be written: {error}.") from error


def _escape(text: Any) -> str:
    return html.escape(str(text))


def _number(value: float) -> str:
    return f"{value:.4g}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    cells = lambda tag, row: "".join(f"<{tag}>{cell}</{tag}>" for cell in row)
    lines = [f"<tr>{cells('th', map(_escape, header))}</tr>"]
    lines += [f"<tr>{cells('td', row)}</tr>" for row in rows]
    return f'<div class="wide"><table>{"".join(lines)}</table></div>'


def _rows(run: Run) -> list[dict[str, str]]:
    path = run.workdir / LOG
    return log_rows(path) if path.is_file() else []


def _color(index: int) -> str:
    return f"var(--c{index % COLORS})"


def _results(runs: Sequence[Run], names: Sequence[str], differing: Sequence[str]) -> str:
    header = ["run", "steps", "last validation", "valid perplexity", "test perplexity",
              "paper (valid / test)", *differing, "folder"]  # fmt: skip
    rows = []
    for index, (run, name) in enumerate(zip(runs, names, strict=True)):
        log = _rows(run)
        steps = max((int(row["step"]) for row in log), default=0)
        valid = [row["perplexity"] for row in log if row["split"] == "valid"]
        now = (steps, run.settings, run.texts)
        exact = [exact_perplexity(run.workdir, split, *now) for split in ("valid", "test")]
        last = _number(float(valid[-1])) if valid else "-"
        of = f"{steps} of {run.settings.get('train.max_step', '?')}"
        own = [str(run.settings.get(key)) for key in differing]
        cells = [name, of, last, *exact, run.paper, *own, str(run.workdir)]
        key = f'<span class="key" style="background:{_color(index)}"></span>'
        rows.append([key + _escape(cells[0]), *map(_escape, cells[1:])])
    return _table(header, rows) + (
        "<p>Last validation: quick and approximate, perplexity. The two after it are exact, from "
        "--mode=valid and --mode=eval; - where there is none.</p>"
    )


def _curves(runs: Sequence[Run], names: Sequence[str]) -> str:
    charts = []
    for column, logarithmic in CURVES.items():
        series = []
        for index, (run, name) in enumerate(zip(runs, names, strict=True)):
            rows = _rows(run)
            for split in ("train", "valid"):
                points = _points(rows, split, column, logarithmic)
                if points:
                    series.append((f"{name}, {split}", index, split, points))
        if series:
            charts.append(_chart(column, logarithmic, series))
    if not charts:
        return "<p>Nothing is logged yet.</p>"
    keys = (
        f'<span class="key" style="background:{_color(i)}"></span>{_escape(name)} &nbsp; '
        for i, name in enumerate(names)
    )
    return (
        f"<p>{''.join(keys)}</p><p>Thick: validation, thin: training. Point at a curve for its "
        f'values.</p><div class="grid">{"".join(charts)}</div>'
    )


def _points(
    rows: Sequence[Mapping[str, str]], split: str, column: str, logarithmic: bool
) -> list[tuple[int, float]]:
    found = {}
    for row in rows:
        if row["split"] == split and row.get(column):
            value = float(row[column])
            if math.isfinite(value) and (value > 0 or not logarithmic):
                found[int(row["step"])] = value
    points = sorted(found.items())
    every = -(-len(points) // POINTS)
    return points if every < 2 else [*points[:-1:every], points[-1]]


def _ticks(low: float | int, high: float | int, logarithmic: bool) -> list[float]:
    """Some four to eight round numbers between two others."""
    if logarithmic:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        for steps in ((1, 1.5, 2, 3, 4, 5, 6, 8), (1, 2, 5), (1,)):
            ticks = [step * 10.0**d for d in decades for step in steps]
            ticks = [tick for tick in ticks if low * (1 - 1e-9) <= tick <= high * (1 + 1e-9)]
            if len(ticks) <= 8:
                break
        if len(ticks) > 1:
            return ticks[:: -(-len(ticks) // 8)]
    raw = (high - low) / 4
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(size * factor for factor in (1, 2, 5, 10) if size * factor >= raw * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _scale(values: Sequence[float | int]) -> tuple[float, float]:
    """The least and the greatest of the values, a little apart if they are one."""
    low, high = float(min(values)), float(max(values))
    if low < high:
        return low, high
    apart = 0.2 * abs(low) or 1.0
    return low - apart, high + apart


def _chart(column: str, logarithmic: bool, series: Sequence[Any]) -> str:
    of = math.log if logarithmic else float
    x_low, x_high = _scale([x for *_, points in series for x, _ in points])
    y_low, y_high = _scale([y for *_, points in series for _, y in points])
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    to_x = lambda x: LEFT + (x - x_low) / (x_high - x_low) * (right - LEFT)
    to_y = lambda y: bottom - (of(y) - of(y_low)) / (of(y_high) - of(y_low)) * (bottom - TOP)
    title = column.replace("_", " ")
    parts = []
    for tick in _ticks(y_low, y_high, logarithmic):
        y = f"{to_y(tick):.1f}"
        parts.append(f'<line class="axis" x1="{LEFT}" x2="{right}" y1="{y}" y2="{y}"/>')
        parts.append(
            f'<text x="{LEFT - 5}" y="{y}" dy="4" text-anchor="end">{_number(tick)}</text>'
        )
    ticks = _ticks(x_low, x_high, False)
    for tick in ticks:
        anchor = "end" if to_x(tick) > right - 18 else "middle"
        parts.append(
            f'<text x="{to_x(tick):.1f}" y="{bottom + 14}" text-anchor="{anchor}">{tick:g}</text>'
        )
    parts.append(
        f'<text x="{(LEFT + right) / 2}" y="{HEIGHT - 3}" text-anchor="middle">step</text>'
    )
    data = []
    for name, index, split, points in series:
        px, py = [round(to_x(x), 1) for x, _ in points], [round(to_y(y), 1) for _, y in points]
        style = f"stroke:{_color(index)};stroke-dasharray:{DASHES[index % len(DASHES)] or 'none'}"
        line = " ".join(f"{x},{y}" for x, y in zip(px, py, strict=True))
        parts.append(f'<polyline class="line {split}" style="{style}" points="{line}"/>')
        if len(points) == 1:
            style = f"fill:{_color(index)}"
            parts.append(f'<circle cx="{px[0]}" cy="{py[0]}" r="3" style="{style}"/>')
        values = {"x": [x for x, _ in points], "y": [_number(y) for _, y in points]}
        data.append({"name": name, "px": px, **values})
    parts.append(f'<line class="axis cursor" y1="{TOP}" y2="{bottom}" visibility="hidden"/>')
    numbers = json.dumps(data).replace("<", "\\u003c")
    return (
        f"<figure><h3>{title}</h3>"
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{title}">'
        f'{"".join(parts)}</svg><script type="application/json">{numbers}</script></figure>'
    )


def _sample(run: Run, name: str) -> str:
    said = f"<pre>{_escape(run.sample)}</pre>" if run.sample else f"<p>{_escape(run.note)}</p>"
    return f"<h3>{_escape(name)}</h3>{said}"


def _memories(run: Run, name: str) -> str:
    layers = []
    for number, memory in enumerate(run.memories, 1):
        title = f"<h3>{_escape(name)}: layer {number}, {_escape(memory.name)}</h3>"
        if memory.weights is None:
            layers.append(f"<div>{title}<p>It keeps no fast weights.</p></div>")
            continue
        shown = memory.weights[:HEADS]
        limit = float(np.abs(shown).max()) or 1.0
        images = "".join(_image(head, limit, n) for n, head in enumerate(shown, 1))
        n_head, n_key, n_value = memory.weights.shape
        sizes = np.linalg.norm(memory.weights, axis=(1, 2))
        caption = (
            f"{len(shown)} of {n_head} heads: {n_key} features of the key down, {n_value} values "
            f"across; blue above 0, red below, full at {_number(limit)}. Mean size "
            f"{_number(float(sizes.mean()))}, effective rank {_effective_rank(memory.weights):.1f} "
            f"of {min(n_key, n_value)}."
        )
        changed = "" if memory.changed is None else _overwriting(memory.changed, run.words)
        layers.append(
            f'<div>{title}<figure><div class="heads">{images}</div><figcaption>{caption}'
            f"</figcaption></figure>{changed}</div>"
        )
    if not layers:
        return f"<h3>{_escape(name)}</h3><p>{_escape(run.note)}</p>"
    return f'<div class="grid">{"".join(layers)}</div>'


def _effective_rank(weights: Float[np.ndarray, "N K V"]) -> float:
    """exp of the entropy of the normalised singular values, mean over the heads."""
    sizes = np.linalg.svd(weights, compute_uv=False)
    p = sizes / np.maximum(sizes.sum(axis=-1, keepdims=True), 1e-30)
    return float(np.exp(-np.sum(p * np.log(np.maximum(p, 1e-30)), axis=-1)).mean())


def _image(head: Float[np.ndarray, "K V"], limit: float, number: int) -> str:
    from matplotlib.image import imsave

    png = io.BytesIO()
    imsave(png, head, cmap="RdBu", vmin=-limit, vmax=limit, format="png")
    data = base64.b64encode(png.getvalue()).decode()
    return (
        f'<img src="data:image/png;base64,{data}" alt="head {number}" '
        f'data-tip="head {number}: {_number(float(head.min()))} to {_number(float(head.max()))}">'
    )


def _overwriting(changed: Float[np.ndarray, "T T"], words: Sequence[str]) -> str:
    """A triangle: a row per word, a column for each later one."""
    edge, size = 96, 264 / len(words)
    short = [word if len(word) < 13 else f"{word[:12]}…" for word in words]
    parts = []
    for i, word in enumerate(short):
        at = (i + 0.5) * size
        parts.append(
            f'<text x="{edge - 5}" y="{edge + at:.1f}" dy="4" text-anchor="end">{_escape(word)}'
            f'</text><text transform="translate({edge + at:.1f} {edge - 5}) rotate(-90)" dy="4">'
            f"{_escape(word)}</text>"
        )
        for j in range(i + 1, len(words)):
            share = float(changed[i, j])
            tip = _escape(f"“{words[j]}” ({j + 1}) changes {share:.0%} of “{word}” ({i + 1})")
            parts.append(
                f'<rect class="cell" x="{edge + j * size:.1f}" y="{edge + i * size:.1f}" '
                f'width="{size:.1f}" height="{size:.1f}" opacity="{min(share, 1.0):.3f}" '
                f'data-tip="{tip}"/>'
            )
    return (
        f'<figure><svg viewBox="0 0 {WIDTH} {WIDTH}" role="img" aria-label="overwriting">'
        f"{''.join(parts)}</svg><figcaption>How much of what a word's key read (rows) each later "
        "word (columns) has changed; mean over the heads, full at 100%.</figcaption></figure>"
    )
