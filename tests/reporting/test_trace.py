"""The profiler's trace, where it cannot be written."""

import contextlib
import re

import jax
import jax.numpy as jnp
import pytest

from fwm.reporting import Trace

pytestmark = pytest.mark.quick  # see .ci/run


def test_traces_that_cannot_be_written_cost_warnings(tmp_path):
    """The second run of a process may find the first one's trace: jax 0.10 keeps it, 0.12 not."""
    lines, steps, workdir = [], [], tmp_path / "file"
    state = jnp.zeros(())
    workdir.write_text("mine")
    try:
        for _ in range(2):
            with Trace((1, 2), workdir, lines.append) as profile:
                for number in (1, 2):
                    with profile.step(number, state):
                        steps.append(number)
                    profile.after(number, state)
    finally:
        workdir.unlink()
        with contextlib.suppress(RuntimeError):  # Now it can: the next tests find none.
            jax.profiler.stop_trace()
    assert steps == [1, 2, 1, 2]
    first, second = lines
    unwritten = r"Warning: the trace could not be written \(.+\); training goes on\."
    kept = r"Warning: no step can be traced \(.+\); training goes on\."
    assert re.fullmatch(unwritten, first)
    assert re.fullmatch(f"{unwritten}|{kept}", second)
