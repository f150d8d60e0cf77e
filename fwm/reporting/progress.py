"""What is made of each step's numbers: averages, pace and time left, the end of a divergence."""

import contextlib
import datetime
import math
import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from fwm import parallel
from fwm.errors import UserError
from fwm.reporting.reporter import Reporter

# Steps after compilation that the duration is estimated from.
ESTIMATED_FROM = 3
# So many updates in a row that had to be dropped are no accident.
MAX_SKIPPED = 10


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
        self._restart_clock()
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
        # From the devices, waiting for the step.
        numbers = {k: np.asarray(parallel.first(x)).tolist() for k, x in metrics.items()}
        loss, norm, rate = (numbers[name] for name in ("loss", "grad_norm", "learning_rate"))
        self.last = f"loss {loss}, gradient norm {norm}, learning rate {rate:.3g}"
        others = {"grad_norm": norm, "learning_rate": rate}
        # No update is ever dropped where there is no such number.
        skipped, in_a_row = numbers.get("skipped", (0, 0))
        if "skipped" in numbers:
            others["skipped"] = skipped
        if math.isfinite(loss) and math.isfinite(norm):
            self._losses.append(loss)
        elif self._t.nan_policy == "stop" or in_a_row >= MAX_SKIPPED:
            which = f"the last of {in_a_row} dropped updates in a row: " * bool(in_a_row)
            raise UserError(
                f"training diverged at step {step}: {which}{self.last}; the checkpoints before it "
                "are kept: try a smaller config.train.lr or a longer config.train.warmup_step."
            )
        else:
            self._reporter.message(
                f"Warning: the update of step {step} was dropped ({self.last}), "
                f"the {skipped}. in this run."
            )
        self._time(step)
        self._report(step, loss, others)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Around what is not training; all steps before it have been reported."""
        self.flush()
        yield
        self._restart_clock()

    def _restart_clock(self) -> None:
        self._started, self._timed = time.monotonic(), 0

    def _steps_per_second(self) -> float:
        """Of training alone; 0 where nothing has been timed."""
        return self._timed / max(time.monotonic() - self._started, 1e-9)

    def _time(self, step: int) -> None:
        """Count the step, unless it is the first, which compiles; estimate the duration once."""
        self._timed += 1
        if not self._compiled:
            self._compiled = True
            self._restart_clock()
        elif not self._estimated and self._timed == self._estimated_from:
            self._estimated = True
            left = self._t.max_step - step
            duration = datetime.timedelta(seconds=round(left / self._steps_per_second()))
            self._reporter.message(
                f"Estimated duration: {duration} for the {left:,} steps left, validations not "
                "counted."
            )

    def _report(self, step: int, loss: float, others: Mapping[str, float]) -> None:
        """A line of the log with the mean loss since the last one, or a move of the live line."""
        t, speed = self._t, self._steps_per_second()
        loss = sum(self._losses) / len(self._losses) if self._losses else loss
        pace = {
            "tokens_per_second": speed * t.batch_size * t.tgt_len,
            "seconds_left": (t.max_step - step) / speed if speed else None,
        }
        if step % t.log_interval and step != t.max_step:
            self._reporter.progress(step, loss, **pace)
            return
        self._reporter.train(step, {"loss": loss, **others}, **pace)
        self._losses = []
        self._restart_clock()
