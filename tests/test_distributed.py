"""Two real processes on CPU against one with two devices; one of them dies, stops or differs."""

import atexit
import os
import re
import signal
import socket
import time

import jax
import numpy as np
import pytest
from real_runs import final_state, log, log_file, start, wait_for_step, write_text

from fwm import parallel
from fwm.checkpoint import Checkpoints
from fwm.errors import UserError

STEPS, SAVE_EVERY = 40, 10
# Checkpoints by time too: all processes have to give their rows at the same step.
SETTINGS = {
    "train__max_step": STEPS, "train__eval_interval": SAVE_EVERY, "train__save_minutes": 0.002,
}  # fmt: skip


def explicit(port, i):
    address = f"--coordinator_address=localhost:{port}"
    return [address, "--num_processes=2", f"--process_id={i}"], {}


def slurm(port, i):
    """JAX takes the port from the job's number, of 4096."""
    names = {"SLURM_JOB_ID": port, "SLURM_STEP_NODELIST": "localhost,other", "SLURM_NTASKS": 2}
    names |= {"SLURM_PROCID": i, "SLURM_LOCALID": i, "SLURM_STEP_NUM_NODES": 1}
    return ["--coordinator_address=auto"], names


def open_mpi(port, i):
    names = {"OMPI_MCA_orte_hnp_uri": f"{port << 12}.0;tcp://127.0.0.1:1"}
    names |= {f"OMPI_COMM_WORLD_{k}": v for k, v in (("SIZE", 2), ("RANK", i), ("LOCAL_RANK", i))}
    return ["--coordinator_address=auto"], names


@pytest.fixture
def pair(tmp_path):
    """Start two processes with one device each, told in one of three ways who they are."""
    text, started = write_text(tmp_path / "text"), []

    def begin(tell):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        for i in range(2):
            flags, names = tell(port, i)
            with pytest.MonkeyPatch.context() as patch:
                for name, value in names.items():
                    patch.setenv(name, str(value))
                started.append(start(text, tmp_path / "pair", *flags, **SETTINGS))
        return started[-2:]

    yield begin
    for process in started:
        with process:
            process.kill()


def test_what_one_process_refuses_all_refuse(monkeypatch):
    """The same program runs in each; here the others' answers are put in."""
    monkeypatch.setattr(parallel, "gather", lambda x: np.concatenate([x, ~x]))
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    stopped = pytest.raises(UserError, match="process 1 has stopped: see its message")
    with stopped, parallel.together():
        pass
    with pytest.raises(UserError, match="my own"), parallel.together():
        raise UserError("my own")
    with pytest.raises(UserError, match="process 0 differs from process 1 in settings"):
        parallel.check_same("mine", "settings")
    for message in ("UNKNOWN: Gloo failed", "a bug"):
        with pytest.raises((UserError, ValueError)) as caught, parallel.naming_a_lost_process():
            raise ValueError(message)
        assert (caught.type is UserError) == ("Gloo" in message)
        atexit.unregister(os._exit)


@pytest.mark.timeout(900)
def test_two_processes_train_as_one_whatever_happens_to_them(pair, tmp_path):
    workdir = tmp_path / "pair"
    # One is killed: the other stops by itself, and what was saved is there.
    processes = pair(explicit)
    wait_for_step(workdir, SAVE_EVERY + 4, None, *processes)
    processes[1].kill()
    began = time.monotonic()
    output, _ = processes[0].communicate(timeout=60)
    assert processes[0].returncode == 2
    assert re.search(r"error: process 0 has lost another process .*start all again", output)
    print(f"the other process stopped after {time.monotonic() - began:.1f} s")

    # SIGTERM to one stops both at the same step.
    saved = Checkpoints(workdir / "checkpoints").latest_step() or 0
    old_log, processes = log_file(workdir), pair(slurm)
    wait_for_step(workdir, saved + 1, old_log, *processes)
    processes[1].send_signal(signal.SIGTERM)
    outputs = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [143, 143]
    assert "Stopped. Saved at step" in outputs[0]
    assert "step" not in outputs[1]

    processes = pair(open_mpi)
    with start(tmp_path / "text", tmp_path / "alone", devices=2, **SETTINGS) as alone:
        outputs = [process.communicate()[0] for process in (*processes, alone)]
    assert [process.returncode for process in (*processes, alone)] == [0, 0, 0], outputs
    ours, expected = log(workdir), log(tmp_path / "alone")
    assert [(r["step"], r["split"]) for r in ours] == [(r["step"], r["split"]) for r in expected]
    losses = [[float(row["loss"]) for row in rows] for rows in (ours, expected)]
    np.testing.assert_allclose(*losses, rtol=1e-6)
    print(f"largest difference of losses {np.abs(np.subtract(*losses)).max()}")
    ours, expected = final_state(workdir), final_state(tmp_path / "alone")
    assert ours["step"] == STEPS
    assert jax.tree.structure(ours) == jax.tree.structure(expected)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), ours, expected)
