"""What the profiler sees of some steps."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax


class Trace:
    """Traces the steps `first` to `last`, both included, into `workdir/profile`; () for none.

    A resumed run traces those of them that it makes; a run that ends before the last one, what
    there was.
    """

    def __init__(self, steps: tuple[int, ...], workdir: Path, report: Callable[[str], None]):
        self.first, self.last = steps or (0, 0)
        self.folder, self.report = workdir / "profile", report
        self.began = 0

    def __enter__(self) -> "Trace":
        return self

    def __exit__(self, *_: object) -> None:
        if self.began:
            self.stop("the end")
        elif self.last:
            self.report(f"No trace: this run made none of the steps {self.first} to {self.last}.")

    @contextmanager
    def step(self, number: int, state: Any) -> Iterator[None]:
        """Around the update that makes step `number` from `state`."""
        if not self.first <= number <= self.last:
            yield
            return
        if not self.began:
            jax.block_until_ready(state)  # What was queued before is not part of the trace.
            try:
                jax.profiler.start_trace(self.folder)
                self.began = number
            except (OSError, RuntimeError) as error:
                # As where this process has a trace that could not be written: jax keeps it.
                self.last = 0
                self.report(f"Warning: no step can be traced ({error}); training goes on.")
        with jax.profiler.StepTraceAnnotation("train", step_num=number):
            yield

    def after(self, number: int, state: Any) -> None:
        """Write the trace if `number` was the last step of it."""
        if self.began and number == self.last:
            jax.block_until_ready(state)
            self.stop(f"step {number}")

    def stop(self, end: str) -> None:
        """Write the trace; a disk that is full costs a warning, not the run."""
        began, self.began, self.last = self.began, 0, 0
        try:
            jax.profiler.stop_trace()
        except (OSError, RuntimeError) as error:
            self.report(f"Warning: the trace could not be written ({error}); training goes on.")
            return
        self.report(f"Trace of step {began} to {end}: {self.folder}")
