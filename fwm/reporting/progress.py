"""What is made of each step's numbers: averages, pace and time left, the end of a divergence."""

import contextlib
import datetime
import math
import time
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from fwm import parallel
from fwm.errors import UserError
from fwm.reporting.reporter import Reporter

# Steps after compilation that the duration is estimated from.
ESTIMATED_FROM = 3
# So many updates in a row that had to be dropped are no accident.
MAX_SKIPPED = 10


class Numbers(NamedTuple):
    """What one step says, on the host; `skipped` None where no update is ever dropped."""

    loss: float
    grad_norm: float
    learning_rate: float
    skipped: int | None
    in_a_row: int

    @classmethod
    def fetch(cls, metrics: Mapping[str, Any]) -> "Numbers":
        """From the devices, waiting for the step."""
        names = ("loss", "grad_norm", "learning_rate")
        loss, norm, rate = (float(parallel.first(metrics[name])) for name in names)
        if "skipped" not in metrics:
            return cls(loss, norm, rate, None, 0)
        return cls(loss, norm, rate, *np.asarray(parallel.first(metrics["skipped"])).tolist())

    @property
    def finite(self) -> bool:
        """Whether the update was one that could be made."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)

    def __str__(self) -> str:
        return (
            f"loss {self.loss}, gradient norm {self.grad_norm}, "
            f"learning rate {self.learning_rate:.3g}"
        )

    def scalars(self) -> dict[str, float]:
        """What a report has beside the loss."""
        found: dict[str, float] = {
            "grad_norm": self.grad_norm,
            "learning_rate": self.learning_rate,
        }
        return found if self.skipped is None else found | {"skipped": self.skipped}


class Pace:
    """How fast training alone is: its clock starts anew at every line of the log, and whenever
    something else took time.
    """

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """What came before was not training."""
        self._started, self.timed = time.monotonic(), 0

    def tick(self) -> None:
        """One more step is done."""
        self.timed += 1

    @property
    def steps_per_second(self) -> float:
        """0 where nothing has been timed."""
        return self.timed / max(time.monotonic() - self._started, 1e-9)


class Progress:
    """Between the loop and the reporter: it is told of every step, and reports some.

    Args:
        reporter: what is reported goes there.
        t: `config.train`.

    Raises:
        UserError: (from `step`, `flush`, `paused`) training has diverged.
    """

    def __init__(self, reporter: Reporter, t: Any) -> None:
        self._reporter, self._t = reporter, t
        self._pending: tuple[int, Mapping[str, Any]] | None = None
        self._losses: list[float] = []
        self._pace = Pace()
        self._compiled = self._estimated = False
        # The clock starts anew at every line of the log and at every validation.
        self._estimated_from = min(ESTIMATED_FROM, t.log_interval, t.eval_interval)
        self.last = ""

    def step(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Take a step's metrics, on the devices, and fetch those of the step before.

        A step late, so that the device never waits for the host.
        """
        self.flush()
        self._pending = step, metrics

    def flush(self) -> None:
        """Fetch the metrics of the last step, refuse what is not finite, report every interval."""
        if self._pending is None:
            return
        (step, metrics), self._pending = self._pending, None
        numbers = Numbers.fetch(metrics)
        self.last = str(numbers)
        self._check(step, numbers)
        self._time(step)
        self._report(step, numbers)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Around what is not training; all steps before it have been reported."""
        self.flush()
        yield
        self._pace.restart()

    def _check(self, step: int, numbers: Numbers) -> None:
        """Keep a finite loss for the average; stop at another, or say that it was dropped."""
        if numbers.finite:
            self._losses.append(numbers.loss)
            return
        if self._t.nan_policy == "stop" or numbers.in_a_row >= MAX_SKIPPED:
            row = numbers.in_a_row
            which = f"the last of {row} dropped updates in a row: " * bool(row)
            raise UserError(
                f"training diverged at step {step}: {which}{numbers}; the checkpoints "
                "before it are kept: try a smaller config.train.lr or a longer "
                "config.train.warmup_step."
            )
        self._reporter.message(
            f"Warning: the update of step {step} was dropped ({numbers}), "
            f"the {numbers.skipped}. in this run."
        )

    def _time(self, step: int) -> None:
        """Count the step, unless it is the first, which compiles; estimate the duration once."""
        self._pace.tick()
        if not self._compiled:
            self._compiled = True
            self._pace.restart()
        elif not self._estimated and self._pace.timed == self._estimated_from:
            self._estimated = True
            left = self._t.max_step - step
            seconds = left / self._pace.steps_per_second
            self._reporter.message(
                f"Estimated duration: {datetime.timedelta(seconds=round(seconds))} for the "
                f"{left:,} steps left, validations not counted."
            )

    def _report(self, step: int, numbers: Numbers) -> None:
        """A line of the log with the mean loss since the last one, or a move of the live line."""
        t, speed = self._t, self._pace.steps_per_second
        loss = sum(self._losses) / len(self._losses) if self._losses else numbers.loss
        pace = {
            "tokens_per_second": speed * t.batch_size * t.tgt_len,
            "seconds_left": (t.max_step - step) / speed if speed else None,
        }
        if step % t.log_interval and step != t.max_step:
            self._reporter.progress(step, loss, **pace)
            return
        self._reporter.train(step, {"loss": loss} | numbers.scalars(), **pace)
        self._losses = []
        self._pace.restart()
