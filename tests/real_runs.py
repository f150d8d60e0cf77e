"""Real processes that train a very small model with everything a run keeps from step to step."""

import csv
import os
import subprocess
import sys
import time
from pathlib import Path

import jax

from fwm.checkpoint import Checkpoints

ROOT = Path(__file__).parents[1]
SETTINGS = {
    "model.d_model": 16, "model.n_head": 2, "model.d_head": 4, "model.d_inner": 32,
    "model.n_layer": 1, "model.dropout": 0.2, "model.performer_proj_dim": 4, "model.no_pos": True,
    "train.carry_over_fast_weight": True, "train.batch_size": 4, "train.tgt_len": 8,
    "train.warmup_step": 2, "train.eval_batch_size": 2, "train.log_interval": 1,
    "data.name": "text",
}  # fmt: skip


def write_text(folder):
    """A text whose training part has ten segments to an epoch."""
    folder.mkdir()
    sentences = [" ".join(f"w{i * j % 23}" for j in range(1, 9)) for i in range(1, 12)]
    for split, lines in (("train", 40), ("valid", 5)):
        text = "\n".join(sentences[i * i % 11] for i in range(lines))
        (folder / f"{split}.txt").write_text(text + "\n")
    return folder


def on_devices(number):
    """The environment of a process like this one, but for its number of devices."""
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={number}"
    return {**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT / "tests" / "children")}


def start(text, workdir, *flags, devices=1, **settings):
    """Begin a training in a process of its own; what it says goes to `stdout`."""
    fields = SETTINGS | {"data.dir": text, "data.cache_dir": text / "cache"}
    fields |= {name.replace("__", "."): value for name, value in settings.items()}
    command = ["main.py", "--config=configs/performer_delta.py", f"--workdir={workdir}"]
    command += [*flags, *(f"--config.{name}={value}" for name, value in fields.items())]
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=ROOT,
        env=on_devices(devices),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def log_file(workdir):
    """Which file the log is: a run that goes on replaces it by the rows that still hold."""
    path = workdir / "train_log.csv"
    return path.stat().st_ino if path.exists() else None


def last_logged(workdir):
    """The step of the last row of the log, 0 where there is none."""
    try:
        *_, last, _ = (workdir / "train_log.csv").read_text().split("\n")
        return int(last.split(",")[0])
    except (OSError, ValueError):
        return 0


def wait_until(condition, *processes, every=0.01):
    """Poll, every so many seconds; fail if one of the processes ends before."""
    while not condition():
        for process in processes:
            assert process.poll() is None, process.stdout.read()
        time.sleep(every)


def wait_for_step(workdir, step, old_log, *processes):
    """Until a run that replaces `old_log` has logged a step."""
    wait_until(lambda: log_file(workdir) != old_log and last_logged(workdir) >= step, *processes)


def log(workdir):
    """The rows of train_log.csv, without the times."""
    with (workdir / "train_log.csv").open() as file:
        rows = list(csv.DictReader(file))
    return [{k: v for k, v in r.items() if k not in ("tokens_per_second", "seconds")} for r in rows]


def final_state(workdir):
    """Everything in the last checkpoint."""
    names = ("step", "rng", "params", "opt_state", "favor", "memory", "skipped")
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        return checkpoints.restore_subtree(names, "latest")[1]


def assert_same_bits(ours, expected):
    assert jax.tree.structure(ours) == jax.tree.structure(expected)
    for (path, a), b in zip(
        jax.tree.leaves_with_path(ours), jax.tree.leaves(expected), strict=True
    ):
        assert a.tobytes() == b.tobytes(), jax.tree_util.keystr(path)
