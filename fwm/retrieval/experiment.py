"""Runs of the retrieval experiments: one row per evaluation, resumable, in several processes."""

import concurrent.futures
import csv
import functools
import io
import json
import math
import multiprocessing
import os
import runpy
import threading
import time
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fwm.errors import UserError
from fwm.files import lock_workdir, write_text
from fwm.limits import RATE, SEED, TEXT, Kind, one_of, several, whole
from fwm.retrieval import report
from fwm.retrieval.model import EVAL_INTERVAL, SETTINGS, Model, adam, init, train_and_evaluate
from fwm.terminal import say

LOG = "evaluations.csv"
SAID_EVERY = 10.0  # seconds, within a run


class Row(NamedTuple):
    """One evaluation, a line of evaluations.csv; `seconds` since the run's start."""

    setting: str
    model: str
    size: int
    seed: int
    step: int
    train_loss: float
    eval_loss: float
    seconds: float


def run(config: Mapping[str, Any], workdir: Path) -> int:
    """All runs of `config` that `workdir` does not have yet, then table and figure.

    Raises:
        UserError: an option that has no meaning, a workdir in use.
    """
    config = dict(config)
    _check(config)
    with lock_workdir(workdir):
        _run(config, workdir)
    return 0


def _run(config, workdir):
    _same_training(config, workdir / "config.json")
    runs = _by_run(read_log(workdir / LOG))
    done = {run: rows for run, rows in runs.items() if _stopped(rows, config["max_step"])}
    # What an interrupted run has left is dropped: it starts anew, and gives the same again.
    _write(workdir / LOG, [row for rows in done.values() for row in rows])
    jobs = [
        (name, size, seeds)
        for name in config["models"]
        for size in config["sizes"]
        if (seeds := [s for s in config["seeds"] if (config["setting"], name, size, s) not in done])
    ]
    # The longest first, so that no worker is left with it at the end; but rule fwm, which takes
    # longer than everything else together, after the rest.
    jobs.sort(key=lambda job: (job[0].endswith("_fwm"), -job[1]))
    train = functools.partial(_train, config, workdir / LOG)
    if config["workers"] == 1:
        for job in jobs:
            train(job)
    elif jobs:
        n_thread = max(1, (os.cpu_count() or 1) // config["workers"])
        with concurrent.futures.ProcessPoolExecutor(
            min(len(jobs), config["workers"]),
            multiprocessing.get_context("spawn"),
            begin_worker,
            (n_thread, config["registered_in"]),
        ) as pool:
            try:
                list(pool.map(train, jobs))
            except BaseException:  # Ctrl-C too: the pool would wait for every job that has begun
                for worker in multiprocessing.active_children():
                    worker.terminate()
                raise
    results = summary(read_log(workdir / LOG))
    say(report.text(results))  # Before it is written, which may fail.
    report.write(results, workdir)


def _different(kind: Kind, which: str) -> Kind:
    return Kind(
        f"a tuple of different {which}, at least one",
        lambda x: several(kind, which).fits(x) and len(x) == len(set(x)) > 0,
    )


LIMITS = {
    "setting": one_of(SETTINGS),
    "models": _different(TEXT, "names"),
    "sizes": _different(whole(2), "whole numbers from 2 on"),
    "seeds": _different(SEED, "whole numbers from 0 to 2**32 - 1"),
    "batch_size": whole(1),
    "lr": RATE,
    "max_step": Kind(
        f"a multiple of {EVAL_INTERVAL}, the steps between evaluations",
        lambda x: whole(1).fits(x) and x % EVAL_INTERVAL == 0,
    ),
    "workers": whole(1),
    "registered_in": TEXT,
}


def _check(config):
    for what, keys in (("lacks", LIMITS.keys() - config), ("has unknown", config.keys() - LIMITS)):
        if keys:
            raise UserError(
                f"a config of retrieval {what} {', '.join(sorted(keys))}: begin with get_config of "
                "configs/retrieval.py and change values."
            )
    for key, kind in LIMITS.items():
        kind.check(f"config.{key}", config[key])
    for name in config["models"]:
        Model.of(name)


def _same_training(config, path):
    """Runs of one workdir are trained alike; the other setting, models and so on may be added."""
    fields = {name: config[name] for name in ("batch_size", "lr", "max_step")}
    if not path.exists():
        write_text(path, json.dumps(fields))
    elif (saved := path.read_text(encoding="utf-8")) != json.dumps(fields):
        raise UserError(
            f"{path.parent} holds runs with {saved}, not {json.dumps(fields)}: give another "
            "--workdir or the same settings."
        )


def begin_worker(n_thread: int, registered_in: str = "") -> None:
    """A worker takes its share of the cores, and ends with the process that has started it.

    `registered_in`: the user's config file, where that registers something: it is run here, too.
    """
    # Read by XLA's backends when they start, after this.
    os.environ["PJRT_NPROC"] = str(n_thread)
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # workers share one GPU

    parent = multiprocessing.parent_process()
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    if registered_in:
        runpy.run_path(registered_in)


def _end_with(parent):
    # A killed parent cannot tell its workers, and one of them may be hours from its next job.
    parent.join()
    os._exit(1)


def _train(config, log, job):
    """Train one model at one size, a seed after the other: one compilation serves all."""
    name, size, seeds = job
    model = Model.of(name)
    lr, n_batch = config["lr"], config["batch_size"]
    if name == "tanh_fwm":  # does not train otherwise; published as such
        lr, n_batch = lr / 10, n_batch * 4
    for seed in seeds:
        started = time.perf_counter()
        init_key, key = jax.random.split(jax.random.key(seed))
        params = init(init_key, model, size)
        state = (jnp.int32(0), params, adam(lr).init(params))
        rows: list[Row] = []
        said = started
        while not _stopped(rows, config["max_step"]):
            state, train_loss, eval_loss = train_and_evaluate(
                model, config["setting"], size, n_batch, lr, state, key
            )
            seconds = round(time.perf_counter() - started, 2)
            step = (len(rows) + 1) * EVAL_INTERVAL
            run = (config["setting"], name, size, seed)
            rows.append(Row(*run, step, float(train_loss), float(eval_loss), seconds))
            with log.open("a", encoding="utf-8", newline="") as file:
                file.write(_csv(rows[-1:]))  # in one piece: other processes write here, too
            if time.perf_counter() - said >= SAID_EVERY:
                said = time.perf_counter()
                say(
                    f"{name} S={size} seed {seed}: step {step} of at most {config['max_step']}, "
                    f"loss {eval_loss:.4f}, best {_best(rows):.4f}, {seconds:.0f} s"
                )
        result = f"{_best(rows):.4f}, stopped at step {step} after {seconds:.0f} s"
        say(f"{name} S={size} seed {seed}: {result}")


def _best(rows):
    return min((row.eval_loss for row in rows if math.isfinite(row.eval_loss)), default=math.nan)


def _stopped(rows, max_step):
    """At a loss of 0.001, after more than 10 evaluations without a new best, or at `max_step`."""
    best, since = math.inf, 0
    for row in rows:
        since = 0 if row.eval_loss < best else since + 1
        best = min(best, row.eval_loss) if row.eval_loss == row.eval_loss else best
        if best <= 0.001 or since > 10 or row.step >= max_step:
            return True
    return False


def summary(rows: list[Row]) -> list[report.Result]:
    """One result per run: the best evaluation loss, the last step, its seconds."""
    return [
        report.Result(*run, round(_best(rows), 6), rows[-1].step, rows[-1].seconds)
        for run, rows in _by_run(rows).items()
    ]


def _by_run(rows: list[Row]) -> dict[tuple[str, str, int, int], list[Row]]:
    runs = defaultdict(list)
    for row in rows:
        runs[row[:4]].append(row)
    return runs


def read_log(path: Path) -> list[Row]:
    """The whole rows of evaluations.csv; none where there is no file.

    Raises:
        UserError: it is no such file.
    """
    if not path.exists():
        return []
    header, *lines = path.read_text(encoding="utf-8").split("\n")[:-1] or [""]
    try:
        if header != ",".join(Row._fields):
            raise ValueError("another header")
        kinds = Row.__annotations__.values()
        return [
            Row(*(kind(cell) for kind, cell in zip(kinds, line, strict=True)))
            for line in csv.reader(lines)
        ]
    except ValueError as error:
        raise UserError(
            f"{path} is not a log of retrieval runs ({error}): remove it or give another --workdir."
        ) from error


def _csv(rows):
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def _write(path, rows):
    write_text(path, _csv([Row._fields, *rows]))
