"""What a run tells: terminal, train_log.csv, TensorBoard, learning_curve.png, Weights & Biases.

A report that cannot be written, because the disk is full, costs a warning and never the run.
"""

from __future__ import annotations

import contextlib
import csv
import datetime
import io
import json
import math
import os
import secrets
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
from clu import parameter_overview
from tensorboardX import event_file_writer, summary
from tensorboardX.proto.event_pb2 import Event, SessionLog

from fwm.errors import UserError
from fwm.files import read_json, write_json

LOG = "train_log.csv"
CURVE = "learning_curve.png"
WANDB_ID = "wandb_id.json"
REDRAW_SECONDS = 0.2  # between two states of the live line
COLUMNS = (
    "step",
    "split",
    "loss",
    "perplexity",
    "learning_rate",
    "grad_norm",
    "tokens_per_second",
    "seconds",
)


class EventWriter:
    """TensorBoard events with the method names of `clu.metric_writers`, without TensorFlow.

    It writes when called: tensorboardX's own SummaryWriter has a thread that dies on a full disk,
    after which the training loop would wait for it without end.
    """

    def __init__(self, directory: Path, *, start_step: int = 0) -> None:
        suffix = f".{os.getpid()}.{secrets.token_hex(4)}"
        self._writer = event_file_writer.EventsWriter(str(directory / "events"), suffix)
        # TensorBoard then hides what a killed run has written after the step we go on from.
        log = SessionLog(status=SessionLog.START)
        self._write(Event(step=start_step + 1, session_log=log))

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """One point of each curve."""
        for name, value in scalars.items():
            self._write(Event(step=step, summary=summary.scalar(name, value)))
        self.flush()

    def write_hparams(self, hparams: Mapping[str, Any]) -> None:
        """Flat settings, shown beside the final losses in TensorBoard's HPARAMS tab."""
        known = {k: v if isinstance(v, int | float | str) else str(v) for k, v in hparams.items()}
        for part in summary.hparams(known, {"valid/loss": 0.0, "valid/perplexity": 0.0}):
            self._write(Event(summary=part))
        self.flush()

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        """Markdown texts."""
        for name, text in texts.items():
            self._write(Event(step=step, summary=summary.text(name, text)))
        self.flush()

    def flush(self) -> None:
        """Hand everything to the operating system."""
        self._writer.flush()

    def close(self) -> None:
        """Flush and close the file."""
        self._writer.close()

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        self._writer.write_event(event)


def _perplexity(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf


def _short(value: float) -> str:
    return f"{value:.2f}" if value < 1e5 else f"{value:.2e}"


def _duration(seconds: float) -> str:
    return str(datetime.timedelta(seconds=round(seconds)))


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def _log_rows(path: Path) -> list[dict[str, str]]:
    """The whole rows of a log, whatever a kill has left at its end."""
    header, *lines = path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1] or [""]
    rows = []
    for line in lines:
        row = dict(zip(header.split(","), line.split(","), strict=False))
        with contextlib.suppress(KeyError, ValueError):
            # The last column has to be there, for half a number is a number too.
            int(row["step"]), float(row["loss"]), float(row["perplexity"]), row[COLUMNS[-1]]
            rows.append(row)
    return rows


def _csv_text(rows: Sequence[Mapping[str, Any]], header: bool = False) -> str:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, COLUMNS, extrasaction="ignore", restval="", lineterminator="\n")
    if header:
        writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


class Reporter:
    """Everything that one training run tells; only the first process should be `active`.

    Args:
      workdir: where the files go.
      config: all settings, nested dicts of plain values.
      total_steps: where training ends.
      start_step: the step of the checkpoint that this run goes on from; later rows of
        train_log.csv come from work that was lost, and are dropped.
      use_wandb: log to Weights & Biases too, under `project_name` and `job_name`.
      stream: text stream (None: standard output); each report is one plain line unless it is a
        terminal.
      active: False makes every method do nothing.

    Raises:
      UserError: `use_wandb` without the wandb package.
    """

    def __init__(
        self,
        workdir: Path,
        *,
        config: Mapping[str, Any],
        total_steps: int,
        start_step: int,
        use_wandb: bool = False,
        project_name: str = "",
        job_name: str = "",
        stream: Any = None,
        active: bool = True,
    ) -> None:
        self._active = active
        if not active:
            return
        self._workdir = workdir
        self._stream = sys.stdout if stream is None else stream
        self._live = self._stream.isatty()
        self._progress = ""
        self._drawn = -math.inf
        self._total_steps = total_steps
        self._started = time.monotonic()
        self._warned: set[str] = set()
        self._events: EventWriter | None = None
        self._start_step = start_step
        self._wandb = self._open_wandb(config, project_name, job_name) if use_wandb else None
        workdir.mkdir(parents=True, exist_ok=True)
        self._unwritten = self._shorten_log(start_step)
        settings = json.dumps(config, indent=2, default=str)
        with self._never_fatal("TensorBoard events"):
            self._event_writer().write_hparams(_flatten(config))
            self._event_writer().write_texts(start_step, {"config": f"```\n{settings}\n```"})

    def __enter__(self) -> Reporter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def train(
        self,
        step: int,
        scalars: Mapping[str, float],
        *,
        tokens_per_second: float,
        seconds_left: float | None,
    ) -> None:
        """Report a training step: `scalars` has `loss`, and learning_rate, grad_norm, ..."""
        if not self._active:
            return
        values = {"perplexity": _perplexity(scalars["loss"]), **scalars}
        values["tokens_per_second"] = tokens_per_second
        self._show_progress(step, scalars["loss"], tokens_per_second, seconds_left)
        memory = jax.local_devices()[0].memory_stats()
        if memory is not None:  # CPU has none.
            values["device_memory_gib"] = memory["peak_bytes_in_use"] / 2**30
        self._record(step, "train", values, time.monotonic() - self._started)

    def progress(
        self, step: int, loss: float, *, tokens_per_second: float, seconds_left: float | None
    ) -> None:
        """Move a terminal's live line on, between two reports; elsewhere nothing."""
        if self._active and self._live and time.monotonic() - self._drawn > REDRAW_SECONDS:
            self._show_progress(step, loss, tokens_per_second, seconds_left)

    def valid(self, step: int, scalars: Mapping[str, float], seconds: float) -> None:
        """Report a validation, which took `seconds`, and redraw the learning curve."""
        if not self._active:
            return
        values = {"perplexity": _perplexity(scalars["loss"]), **scalars}
        line = (
            f">>> validation at step {step}: loss {values['loss']:.4f}  "
            f"perplexity {_short(values['perplexity'])}  ({seconds:.1f} s)"
        )
        self.message(f"\x1b[1m{line}\x1b[0m" if self._live else line)
        self._record(step, "valid", values, seconds)
        with self._never_fatal(CURVE):
            draw_learning_curves({"": self._workdir / LOG}, self._workdir / CURVE)

    def message(self, text: str) -> None:
        """Print lines of text without breaking the progress line."""
        if not self._active:
            return
        if self._progress:
            self._stream.write(f"\r\x1b[K{text}\n{self._progress}")
        else:
            self._stream.write(f"{text}\n")
        self._stream.flush()

    def close(self) -> None:
        """Erase the progress line; end the event file and the W&B run."""
        if not self._active:
            return
        self._active = False
        if self._progress:
            # What comes now says where the run stands.
            self._stream.write("\r\x1b[K")
            self._stream.flush()
            self._progress = ""
        if self._events is not None:
            with self._never_fatal("TensorBoard events"):
                self._events.close()
        if self._wandb is not None:
            self._wandb.finish()

    def _show_progress(
        self, step: int, loss: float, tokens_per_second: float, seconds_left: float | None
    ) -> None:
        line = (
            f"step {step}/{self._total_steps}  loss {loss:.4f}  "
            f"perplexity {_short(_perplexity(loss))}"
        )
        if tokens_per_second:  # Unknown after the first step, which compiles.
            line += f"  {tokens_per_second:,.0f} tokens/s"
        if seconds_left is not None:
            line += f"  {_duration(seconds_left)} left"
        erase = "\r\x1b[K" if self._live else ""
        if self._live and step < self._total_steps:
            # A line that wraps could not be overwritten.
            self._progress = line[: shutil.get_terminal_size().columns - 1]
            self._stream.write(erase + self._progress)
        else:
            self._progress = ""
            self._stream.write(f"{erase}{line}\n")
        self._stream.flush()
        self._drawn = time.monotonic()

    def _record(self, step: int, split: str, values: Mapping[str, float], seconds: float) -> None:
        values = {name: float(value) for name, value in values.items()}
        row = values | {"step": step, "split": split, "seconds": round(seconds, 3)}
        self._append_to_log(_csv_text([row]))
        tagged = {f"{split}/{name}": value for name, value in values.items()}
        with self._never_fatal("TensorBoard events"):
            self._event_writer().write_scalars(step, tagged)
        if self._wandb is not None:
            self._wandb.log(tagged, step=step)

    def _append_to_log(self, text: str) -> None:
        """Rows that a full disk refuses are kept and written later: no gaps, no half rows."""
        path = self._workdir / LOG
        self._unwritten += text
        with self._never_fatal(LOG):
            size = path.stat().st_size if path.exists() else 0
            try:
                with path.open("a", encoding="utf-8", newline="") as file:
                    file.write(self._unwritten)
            except OSError:
                os.truncate(path, size)
                raise
            self._unwritten = ""

    def _shorten_log(self, start_step: int) -> str:
        """Drop the rows after `start_step`; returns what is still to be written."""
        path = self._workdir / LOG
        rows = _log_rows(path) if start_step > 0 and path.exists() else []
        # Later rows win, should a step stand there twice.
        kept = {(row["step"], row["split"]): row for row in rows if int(row["step"]) <= start_step}
        text = _csv_text(list(kept.values()), header=True)
        partial = path.with_name(path.name + ".tmp")
        with self._never_fatal(LOG):
            partial.write_text(text, encoding="utf-8", newline="")
            partial.replace(path)
            return ""
        path.unlink(missing_ok=True)  # All of its rows are in `text`.
        return text

    def _event_writer(self) -> EventWriter:
        if self._events is None:
            self._events = EventWriter(self._workdir, start_step=self._start_step)
        return self._events

    @contextlib.contextmanager
    def _never_fatal(self, name: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if name.startswith("TensorBoard"):
                self._events = None  # The file may end in half a record: begin another one.
            if name not in self._warned:
                self.message(f"Warning: {name} could not be written ({error}); training goes on.")
            self._warned.add(name)

    def _open_wandb(self, config: Mapping[str, Any], project_name: str, job_name: str) -> Any:
        try:
            import wandb
        except ImportError as error:
            raise UserError(
                "report.use_wandb=True needs the wandb package: install it with "
                "`pip install wandb`, or set report.use_wandb=False."
            ) from error
        self._workdir.mkdir(parents=True, exist_ok=True)
        path = self._workdir / WANDB_ID
        if self._start_step == 0 or not path.exists():
            write_json(path, secrets.token_hex(4))
        options = {
            "project": project_name or None,
            "name": job_name or None,
            "config": dict(config),
            "id": read_json(path),
            "resume": "allow",
            "dir": str(self._workdir),
        }
        try:
            return wandb.init(**options)
        except wandb.errors.Error as error:
            self.message(
                f"Warning: Weights & Biases cannot be used online ({error}); logging offline, "
                f"send it later with `wandb sync {self._workdir}/wandb/offline-run-*`."
            )
            wandb.teardown()  # Else the id counts as in use.
            return wandb.init(**options, mode="offline")


def draw_learning_curves(logs: Mapping[str, Path], out: Path) -> None:
    """Draw training and validation perplexity against the step, one colour per named log."""
    # Figure objects, not pyplot: no global state, no display, and a second saved at every start.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="perplexity", yscale="log")
    for index, (name, log) in enumerate(logs.items()):
        rows = _log_rows(log)
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
    partial = out.with_name(out.name + ".tmp")
    figure.savefig(partial, format=out.suffix[1:] or "png", dpi=120)
    partial.replace(out)


def compare(
    workdirs: Sequence[Path],
    out: Path,
    paper: Mapping[Path, str] = MappingProxyType({}),
    trained: Mapping[Path, Mapping[str, Any]] = MappingProxyType({}),
) -> str:
    """Draw the learning curves of several runs into `out`; returns a table of exact results.

    Args:
      workdirs: the runs.
      out: the figure; its suffix gives the format.
      paper: what the paper reports for a run, as text.
      trained: settings of a run, with dotted keys; a result that was found with another window,
        `mem_len` or `clamp_len` than these says so.

    Raises:
      UserError: a workdir has no train_log.csv, a result file is malformed, or the figure cannot
        be written.
    """
    table = [["run", "steps", "valid perplexity", "test perplexity", "paper (valid / test)"]]
    for workdir in workdirs:
        if not (workdir / LOG).is_file():
            raise UserError(f"{workdir} has no {LOG}: --workdir must list runs that were trained.")
        steps = max((int(row["step"]) for row in _log_rows(workdir / LOG)), default=0)
        settings = trained.get(workdir, {})
        valid = _exact_perplexity(workdir / "valid_results.json", settings)
        test = _exact_perplexity(workdir / "test_results.json", settings)
        table.append([str(workdir), str(steps), valid, test, paper.get(workdir, "-")])
    try:
        draw_learning_curves({str(workdir): workdir / LOG for workdir in workdirs}, out)
    except OSError as error:
        raise UserError(f"the figure {out} cannot be written: {error}.") from error
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    table.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in table
    )


def _exact_perplexity(path: Path, trained: Mapping[str, Any]) -> str:
    if not path.exists():
        return "-"
    result = read_json(path)
    if not isinstance(result, dict) or not isinstance(result.get("perplexity"), int | float):
        raise UserError(f"{path} has no number `perplexity`: write it again with --mode=valid.")
    # What other protocols than the paper's have found is not to be mistaken for it.
    notes = []
    if result.get("stride") not in (None, 1):
        notes.append(f"stride {result['stride']}")
    if result.get("split_stream"):
        notes.append("rows")
    for name, setting in (
        ("window", "train.tgt_len"),
        ("mem_len", "model.mem_len"),
        ("clamp_len", "model.clamp_len"),
    ):
        if name in result and result[name] != trained.get(setting, result[name]):
            notes.append(f"{name} {result[name]}")
    return f"{result['perplexity']:.3f}" + (f" ({', '.join(notes)})" if notes else "")


def parameter_table(params: Any) -> str:
    """Name, shape and size of every parameter, and their total."""
    return parameter_overview.get_parameter_overview(params, include_stats=False)
