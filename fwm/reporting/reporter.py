"""All that a training loop talks to: the terminal, and every sink.

A report that cannot be written, because the disk is full, costs a warning and never the run.
"""

from __future__ import annotations

import contextlib
import datetime
import math
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from clu import parameter_overview
from tqdm import tqdm

from fwm.perplexity import in_words, perplexity
from fwm.reporting.figures import draw_learning_curves
from fwm.reporting.sinks import LOG, CsvLog, Row, Sink, TensorBoard, WandB
from fwm.terminal import attempt, is_colored, is_live

CURVE = "learning_curve.png"
REDRAW_SECONDS = 0.2  # between two states of the live line
CURVE_SECONDS = 10  # between two learning curves; the last one is drawn in any case


class _LiveLine(tqdm):
    """tqdm's bar, drawn when the loop says so: without a thread that does."""

    monitor_interval = 0


class Reporter:
    """Everything that one training run tells; only the first process should be `active`.

    Args:
      workdir: where the files go.
      config: all settings, nested dicts of plain values.
      total_steps: where training ends.
      start_step: the step of the checkpoint that this run goes on from; later rows of
        train_log.csv come from work that was lost, and are dropped.
      use_wandb: log to Weights & Biases too, under `project_name` and `job_name`.
      unit: of the task; the lines of `character` have bits per character.
      stream: text stream (None: standard output); each report is one plain line unless it is a
        terminal, which has one live line, and a bold one for a validation unless NO_COLOR is set.
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
        unit: str = "",
        stream: Any = None,
        active: bool = True,
    ) -> None:
        self._active = active
        if not active:
            return
        self._workdir = workdir
        self._stream = sys.stdout if stream is None else stream
        self._terminal, self._bold = is_live(self._stream), is_colored(self._stream)
        self._live: _LiveLine | None = None
        self._unit = unit
        self._drawn, self._curve_drawn = -math.inf, time.monotonic()
        self._curve_is_old = False
        self._total_steps = total_steps
        self._started = time.monotonic()
        self._warned: set[str] = set()
        self._sinks: list[Sink] = [CsvLog(workdir, start_step), TensorBoard(workdir, start_step)]
        if use_wandb:
            self._sinks.append(WandB(workdir, start_step, project_name, job_name, self.message))
        workdir.mkdir(parents=True, exist_ok=True)
        self._to_sinks(lambda sink: sink.begin(config))

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
        values = {"perplexity": perplexity(scalars["loss"]), **scalars}
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
        if self._active and self._terminal and time.monotonic() - self._drawn > REDRAW_SECONDS:
            self._show_progress(step, loss, tokens_per_second, seconds_left)

    def valid(self, step: int, scalars: Mapping[str, float], seconds: float) -> None:
        """Report a validation, which took `seconds`, and redraw the learning curve.

        `scalars` has `loss`, and what else the task measures.
        """
        if not self._active:
            return
        values = {"perplexity": perplexity(scalars["loss"]), **scalars}
        others = "".join(f"{k} {v:.4f}  " for k, v in scalars.items() if k != "loss")
        line = (
            f">>> validation at step {step}: loss {values['loss']:.4f}  "
            f"{in_words(values['loss'], self._unit)}  {others}({seconds:.1f} s)"
        )
        self.message(f"\x1b[1m{line}\x1b[0m" if self._bold else line)
        self._record(step, "valid", values, seconds)
        self._curve_is_old = True
        if time.monotonic() - self._curve_drawn > CURVE_SECONDS:
            self._draw_curve()

    def message(self, text: str) -> None:
        """Print lines of text, above the live line if there is one."""
        if self._active:
            attempt(self._stream, lambda: _LiveLine.write(text, self._stream))

    def close(self) -> None:
        """Erase the live line; close every sink."""
        if not self._active:
            return
        self._erase()  # What comes now says where the run stands.
        if self._curve_is_old:
            self._draw_curve()
        self._to_sinks(lambda sink: sink.close())
        self._active = False

    def _show_progress(
        self, step: int, loss: float, tokens_per_second: float, seconds_left: float | None
    ) -> None:
        line = f"step {step}/{self._total_steps}  loss {loss:.4f}  {in_words(loss, self._unit)}"
        if tokens_per_second:  # Unknown after the first step, which compiles.
            line += f"  {tokens_per_second:,.0f} tokens/s"
        if seconds_left is not None:
            line += f"  {datetime.timedelta(seconds=round(seconds_left))} left"
        if self._terminal and step < self._total_steps:
            attempt(self._stream, lambda: self._draw(step, line))
        else:
            self._erase()
            self.message(line)
        self._drawn = time.monotonic()

    def _draw(self, step: int, line: str) -> None:
        columns = shutil.get_terminal_size().columns - 1  # now: a window's width changes
        if self._live is None:
            self._live = _LiveLine(
                desc=line, initial=step, total=self._total_steps, file=self._stream, leave=False,
                ncols=columns, bar_format="{desc} {bar:10}",
            )  # fmt: skip
        self._live.n, self._live.ncols = step, columns
        self._live.set_description_str(line)

    def _draw_curve(self) -> None:
        name = self._workdir.resolve().name
        with self._never_fatal(CURVE):
            draw_learning_curves({name: self._workdir / LOG}, self._workdir / CURVE)
        self._curve_drawn, self._curve_is_old = time.monotonic(), False

    def _erase(self) -> None:
        live, self._live = self._live, None
        if live is not None:
            attempt(self._stream, live.close)

    def _record(self, step: int, split: str, values: Mapping[str, float], seconds: float) -> None:
        row = Row(step, split, {name: float(value) for name, value in values.items()}, seconds)
        self._to_sinks(lambda sink: sink.write(row))

    def _to_sinks(self, action: Callable[[Sink], None]) -> None:
        for sink in self._sinks:
            with self._never_fatal(sink.name, sink.failures, sink.recover):
                action(sink)

    @contextlib.contextmanager
    def _never_fatal(
        self,
        name: str,
        failures: tuple[type[Exception], ...] = (OSError,),
        recover: Callable[[], None] = lambda: None,
    ) -> Iterator[None]:
        try:
            yield
        except failures as error:
            recover()
            if name not in self._warned:
                self.message(f"Warning: {name} could not be written ({error}); training goes on.")
            self._warned.add(name)


def parameter_table(params: Any) -> str:
    """Name, shape and size of every parameter, and their total."""
    return parameter_overview.get_parameter_overview(params, include_stats=False)
