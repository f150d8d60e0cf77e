"""Real processes, killed at random moments and started again, end like one that was left alone."""

import itertools
import re
import signal
import time

import numpy as np
import pytest
from real_runs import (
    assert_same_bits,
    final_state,
    last_logged,
    log,
    log_file,
    start,
    wait_for_step,
    wait_until,
    write_text,
)

from fwm.checkpoint import Checkpoints

SEED = 20260101
SAVE_EVERY = 4
STEPS_PER_KILL = 14


def half_written(workdir):
    folder = workdir / "checkpoints"
    return (folder / "saving.json").exists() or any(folder.glob("*.orbax-checkpoint-tmp*"))


def saved(workdir):
    return Checkpoints(workdir / "checkpoints").latest_step() or 0


@pytest.mark.timeout(1800)  # Twenty kills on a busy machine.
def test_killed_anywhere_and_stopped_it_ends_bit_for_bit_the_same(tmp_path, request):
    """SIGKILL while starting, training and saving, then Ctrl-C and SIGTERM; dropout is on."""
    kills = request.config.getoption("--kills")
    rng = np.random.default_rng(SEED)
    text, steps = write_text(tmp_path / "text"), STEPS_PER_KILL * (kills + 3)
    settings = {"train__max_step": steps, "train__eval_interval": SAVE_EVERY}
    run, halves = tmp_path / "run", 0
    moments = itertools.islice(itertools.cycle(["saving", "starting", "saving", "training"]), kills)
    for number, stop in enumerate([*moments, signal.SIGINT, signal.SIGTERM]):
        before, old_log = saved(run), log_file(run)
        process = start(text, run, **settings)
        if stop == "starting":
            time.sleep(rng.uniform(0.5, 3))
        elif stop == "saving" and number:
            # A later one than the first of this process.
            wait_until(lambda before=before: saved(run) > before, process)
        else:
            wait_for_step(run, before + rng.integers(1, 7), old_log, process)
        if stop == "saving":
            wait_until(lambda: half_written(run), process, every=0.001)
        time.sleep(rng.uniform(0, 0.03))
        at, began = last_logged(run), time.monotonic()
        process.send_signal(signal.SIGKILL if isinstance(stop, str) else stop)
        output, _ = process.communicate()
        half, after = half_written(run), saved(run)
        halves += half and stop != "starting"  # It may have left what it found.
        print(f"{number}: {stop!s}, from step {before} to {at}: {half=}, saved {after}")
        if stop != "starting":
            assert not before or re.search(rf"Resuming .* at step {before}\.", output)
        if isinstance(stop, str):
            assert process.returncode == -signal.SIGKILL
            # The write under way when step `at` was logged is lost, and no other.
            assert after >= max(before, at - 2 * SAVE_EVERY)
        else:
            assert process.returncode == (143 if stop == signal.SIGTERM else 0), output
            assert f"Stopped. Saved at step {after}: the same command" in output
            assert after >= at
            assert time.monotonic() - began < 30
    print(f"{halves} of {kills} kills left a checkpoint half written")
    assert halves

    # Not at the beginning: both would compile the same.
    whole = start(text, tmp_path / "whole", **settings)
    last = start(text, run, **settings)
    outputs = [process.communicate()[0] for process in (last, whole)]
    assert (last.returncode, whole.returncode) == (0, 0), outputs
    assert log(run) == log(tmp_path / "whole")
    for split, every in (("train", 1), ("valid", SAVE_EVERY)):
        numbers = [int(row["step"]) for row in log(run) if row["split"] == split]
        assert numbers == sorted({*range(every, steps + 1, every), steps})
    assert_same_bits(final_state(run), final_state(tmp_path / "whole"))
