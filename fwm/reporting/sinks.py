"""Where a report goes: train_log.csv, TensorBoard, Weights & Biases.

Each is a `Sink`; the reporter makes a warning of what fails.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import secrets
import socket
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tensorboardX import summary
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import RecordWriter

from fwm.errors import UserError
from fwm.files import flatten, read_json, write_json, write_text

LOG = "train_log.csv"
WANDB_ID = "wandb_id.json"
COLUMNS = (
    "step", "split", "loss", "perplexity", "learning_rate", "grad_norm", "tokens_per_second",
    "seconds",
)  # fmt: skip


class Row(NamedTuple):
    """One report: the numbers of a training step or of a validation, which took `seconds`."""

    step: int
    split: str
    values: Mapping[str, float]
    seconds: float

    def tagged(self) -> dict[str, float]:
        """The numbers as `split/name`."""
        return {f"{self.split}/{name}": value for name, value in self.values.items()}


class Sink:
    """What the reporter knows of a sink; a method that has nothing to do is left as it is here."""

    name: str  # in a warning
    failures: tuple[type[Exception], ...] = (OSError,)  # that cost a warning

    def begin(self, config: Mapping[str, Any]) -> None:
        """Before the first report, with all settings."""

    def write(self, row: Row) -> None:
        """One report."""

    def recover(self) -> None:
        """After a method that failed."""

    def close(self) -> None:
        """After the last report."""


def log_rows(path: Path) -> list[dict[str, str]]:
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


class CsvLog(Sink):
    """Rows that a full disk refuses are kept and written later: no gaps, no half rows."""

    name = LOG

    def __init__(self, workdir: Path, start_step: int) -> None:
        self._path, self._start_step = workdir / LOG, start_step
        self._unwritten = ""

    def begin(self, config: Mapping[str, Any]) -> None:
        """Drop the rows after the step that the run goes on from: their work was lost."""
        path, start = self._path, self._start_step
        rows = log_rows(path) if start > 0 and path.exists() else []
        # Later rows win, should a step stand there twice.
        kept = {(row["step"], row["split"]): row for row in rows if int(row["step"]) <= start}
        text = _csv_text(list(kept.values()), header=True)
        try:
            write_text(path, text)
        except OSError:
            self._unwritten = text
            path.unlink(missing_ok=True)  # All of its rows are in `text`.
            raise

    def write(self, row: Row) -> None:
        """Append a row, and those that could not be written before."""
        fields = {"step": row.step, "split": row.split, "seconds": round(row.seconds, 3)}
        self._unwritten += _csv_text([{**row.values, **fields}])
        size = self._path.stat().st_size if self._path.exists() else 0
        try:
            with self._path.open("a", encoding="utf-8", newline="") as file:
                file.write(self._unwritten)
        except OSError:
            os.truncate(self._path, size)
            raise
        self._unwritten = ""


class EventWriter:
    """TensorBoard events with the method names of `clu.metric_writers`, without TensorFlow.

    It writes when called: tensorboardX's own SummaryWriter has a thread that dies on a full disk,
    after which the training loop would wait for it without end. After an OSError it is closed.
    """

    def __init__(self, directory: Path, *, start_step: int = 0) -> None:
        unique = f"{socket.gethostname()}.{os.getpid()}.{secrets.token_hex(4)}"
        path = directory / f"events.out.tfevents.{int(time.time())}.{unique}"
        self._file = RecordWriter(str(path))
        # TensorBoard then hides what a killed run has written after the step we go on from.
        log = SessionLog(status=SessionLog.START)
        start = Event(step=start_step + 1, session_log=log)
        self._write([Event(file_version="brain.Event:2"), start])

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """One point of each curve."""
        self._write(Event(step=step, summary=summary.scalar(k, v)) for k, v in scalars.items())

    def write_hparams(self, hparams: Mapping[str, Any]) -> None:
        """Flat settings, shown beside the final losses in TensorBoard's HPARAMS tab."""
        known = {k: v if isinstance(v, int | float | str) else str(v) for k, v in hparams.items()}
        parts = summary.hparams(known, {"valid/loss": 0.0, "valid/perplexity": 0.0})
        self._write(Event(summary=part) for part in parts)

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        """Markdown texts."""
        self._write(Event(step=step, summary=summary.text(k, v)) for k, v in texts.items())

    def flush(self) -> None:
        """Hand everything to the operating system."""
        self._write([])

    def close(self) -> None:
        """Flush and close the file."""
        self._file.close()

    def _write(self, events: Iterable[Event]) -> None:
        try:
            for event in events:
                event.wall_time = time.time()
                self._file.write(event.SerializeToString())
            self._file.flush()
        except OSError:
            # What is left unwritten would be tried again when Python drops the file, and told.
            with contextlib.suppress(OSError):
                self._file.close()
            raise


class TensorBoard(Sink):
    """Curves, settings and their text; after a failure in another file."""

    name = "TensorBoard events"

    def __init__(self, workdir: Path, start_step: int) -> None:
        self._workdir, self._start_step = workdir, start_step
        self._writer: EventWriter | None = None

    def begin(self, config: Mapping[str, Any]) -> None:
        """The settings."""
        settings = json.dumps(config, indent=2, default=str)
        self._open().write_hparams(flatten(config))
        self._open().write_texts(self._start_step, {"config": f"```\n{settings}\n```"})

    def write(self, row: Row) -> None:
        """A point of each curve."""
        self._open().write_scalars(row.step, row.tagged())

    def recover(self) -> None:
        """The file may end in half a record: begin another one."""
        self._writer = None

    def close(self) -> None:
        """End the file."""
        if self._writer is not None:
            self._writer.close()

    def _open(self) -> EventWriter:
        if self._writer is None:
            self._writer = EventWriter(self._workdir, start_step=self._start_step)
        return self._writer


class WandB(Sink):
    """Logs under an id that is kept in the workdir; without a network into files there.

    Raises:
        UserError: the wandb package is not installed.
    """

    name = "Weights & Biases"
    failures = (Exception,)  # another program's, whatever they are

    def __init__(
        self,
        workdir: Path,
        start_step: int,
        project_name: str,
        job_name: str,
        report: Callable[[str], None],
    ) -> None:
        try:
            import wandb
        except ImportError as error:
            raise UserError(
                "report.use_wandb=True needs the wandb package: install it with "
                "`pip install wandb`, or set report.use_wandb=False."
            ) from error
        self._wandb, self._workdir, self._start_step = wandb, workdir, start_step
        self._report = report
        self._options: dict[str, Any] = {"project": project_name or None, "name": job_name or None}
        self._options |= {"resume": "allow", "dir": str(workdir)}
        self._run: Any = None

    def begin(self, config: Mapping[str, Any]) -> None:
        """Go on under the id of the run's beginning, or without a network in files."""
        path = self._workdir / WANDB_ID
        if self._start_step == 0 or not path.exists():
            write_json(path, secrets.token_hex(4))
        options = self._options | {"config": dict(config), "id": read_json(path)}
        try:
            self._run = self._wandb.init(**options)
        except self._wandb.errors.Error as error:
            self._report(
                f"Warning: Weights & Biases cannot be used online ({error}); logging offline, "
                f"send it later with `wandb sync {self._workdir}/wandb/offline-run-*`."
            )
            self._wandb.teardown()  # Else the id counts as in use.
            self._run = self._wandb.init(**options, mode="offline")

    def write(self, row: Row) -> None:
        """The numbers of a step."""
        if self._run is not None:
            self._run.log(row.tagged(), step=row.step)

    def close(self) -> None:
        """End the run there."""
        if self._run is not None:
            self._run.finish()
