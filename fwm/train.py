"""Training: the loop around the step.

The batch, the dropout masks and the FAVOR+ projections of a step are functions of the seed and
the step alone, so a run that is resumed from a checkpoint goes on exactly as if never stopped.
"""

import dataclasses
import functools
import json
import math
import os
import shlex
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

from fwm import parallel
from fwm.checkpoint import Checkpoints
from fwm.config import build_config, check
from fwm.errors import UserError
from fwm.files import flatten, lock_workdir
from fwm.model import LanguageModel, empty_memory
from fwm.optimizer import Schedule, adam, learning_rate
from fwm.perplexity import in_words
from fwm.registry import remembered
from fwm.reporting import Progress, Reporter, Trace, parameter_table
from fwm.step import (
    Batch,
    TrainState,
    init_state,
    portable,
    to_devices,
    to_host,
    train_step,
    valid_step,
)
from fwm.tasks import TASKS, Task
from fwm.terminal import say
from fwm.transfer import borrow, subwords
from fwm.workdir import claim_workdir, saved_config

# The step's names are importable from here too, as they were before it had a file of its own.
__all__ = ["Batch", "Run", "TrainState", "init_state", "prepare", "run", "train_step"]

# What each of several processes may have for itself. When they validate they must agree on.
OWN_FIELDS = (
    "data.dir", "data.file", "data.cache_dir", "data.download", "report.", "eval.", "generate.",
    "train.profile_steps", "registered_in",
)  # fmt: skip
# What a process can ask of all: a checkpoint, or above it, by its number, what a signal asks.
SAVE = 1


@dataclasses.dataclass
class Run:
    """One training: what it is made of, where it stands, and whom it tells."""

    config: Any
    workdir: Path
    task: Task
    model: LanguageModel
    optimizer: optax.GradientTransformation
    schedule: Schedule
    step: int  # updates done
    state: TrainState  # after them, on the devices
    checkpoints: Checkpoints
    reporter: Reporter
    progress: Progress
    trace: Trace
    stop: list[int]  # signals that have come
    clock: Callable[[], float]  # seconds


def run(
    config: Any,
    workdir: Path,
    job_name: str = "",
    *,
    extend: bool = False,
    clock: Callable[[], float] = time.monotonic,
) -> int:
    """Train as `config` says into `workdir`, or go on where its last checkpoint is.

    `job_name` is the run's name on Weights & Biases where `config.report.job_name` is empty; by
    default the workdir's. With `extend` a run that was to have fewer steps gets those of `config`.
    What `clock` says, in seconds, decides when `train.save_minutes` are over.

    With several processes (`parallel.start`) each reads its own rows of every batch; the first
    one alone writes to the workdir, from which all of them restore.

    Returns:
        The exit status: 0, 143 after SIGTERM or SIGHUP, or 1 if stopping could not save.

    Raises:
        UserError: settings that do not fit each other, the devices, the text or the workdir,
            training that has diverged, and another process that was lost.
    """
    with (
        parallel.naming_a_lost_process(),
        prepare(config, workdir, job_name, extend, clock) as this,
    ):
        halt = _loop(this)
        this.checkpoints.wait()
        saved = not parallel.is_first() or this.checkpoints.latest_step() == this.step
        if parallel.is_first():
            this.reporter.message(_farewell(this))
    return 143 if halt in (signal.SIGTERM, signal.SIGHUP) else 1 - saved


def _loop(this: Run) -> int:
    """Train to the end or to a signal, which is returned (0: none)."""
    t, own = this.config.train, parallel.rows(this.config.train.batch_size)
    skip = t.nan_policy == "skip"
    update = _update(train_step, this.model, this.optimizer, this.schedule, t.batch_chunk, skip)
    measure = functools.partial(valid_step, this.task.score, this.model, total=parallel.total)
    score = parallel.pmap(measure)
    vote, asked, saved = parallel.Vote(), 0, this.clock()
    while this.step < t.max_step and asked <= SAVE:
        batch = parallel.split(this.task.batch(this.step, own))
        with this.trace.step(this.step + 1, this.state):
            this.state, metrics = update(this.state, batch)
        this.step += 1
        this.trace.after(this.step, this.state)
        this.progress.step(this.step, metrics)
        now = this.clock()
        if this.step % t.eval_interval == 0 or this.step == t.max_step:
            with this.progress.paused():
                _save(this, _validate(this, score))
            saved = now
        # The first process alone says when: the others' clocks would ask a step sooner or later.
        due = parallel.is_first() and 0 < t.save_minutes <= (now - saved) / 60
        saved = now if due else saved
        asked = vote(SAVE + this.stop[0] if this.stop else SAVE * due)
        if asked:
            with this.progress.paused():
                _save(this, None)
    return max(asked - SAVE, 0)


@remembered
def _update(
    step: Callable,
    model: LanguageModel,
    optimizer: Any,
    schedule: Schedule,
    batch_chunk: int,
    skip: bool,
) -> Callable:
    """`step` of what stays the same, on all devices; runs alike in one process compile it once."""
    step = functools.partial(
        step, model, optimizer, schedule, batch_chunk=batch_chunk, skip=skip, average=parallel.mean
    )
    return parallel.pmap(step, donate_argnums=(0,))


@remembered
def _first(init: Callable, *parts: Any) -> Callable[[], TrainState]:
    """The state before the first step, compiled once for runs alike."""
    return jax.jit(functools.partial(init, *parts))


def _validate(this: Run, score: Callable) -> float:
    """Report what the model scores on the validation split, quickly; returns its mean nll."""
    started, state, n_row = time.monotonic(), this.state, this.config.train.eval_batch_size
    memory = None
    if state.memory is not None:
        empty = empty_memory(this.model.config, n_row // jax.process_count())
        memory = parallel.split(jax.device_get(empty))
    sums: Counter[str] = Counter()
    for batch in this.task.batches("valid", parallel.rows(n_row)):
        found, memory = score(state.params, state.favor, parallel.split(batch), memory)
        sums.update({name: float(value) for name, value in parallel.first(found).items()})
    metrics = this.task.metrics(sums)
    if not math.isfinite(metrics["loss"]):
        raise UserError(
            f"training diverged at step {this.step}: validation loss {metrics['loss']}, "
            f"{this.progress.last}; the checkpoints before it are kept: try a smaller "
            "config.train.lr."
        )
    this.reporter.valid(this.step, metrics, time.monotonic() - started)
    return metrics["loss"]


def _save(this: Run, valid_loss: float | None) -> None:
    host = to_host(this.state)
    if parallel.is_first():
        this.checkpoints.save(this.step, host, valid_loss=valid_loss)


@contextmanager
def prepare(
    config: Any,
    workdir: Path,
    job_name: str = "",
    extend: bool = False,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Run]:
    """All that a training is made of, where its last checkpoint left it; closed at the end.

    Arguments as `run`.

    Raises:
        UserError: as `run`; what settings and text decide is refused before anything is written.
    """
    c, t, first = config, config.train, parallel.is_first()
    told = say if first else lambda line: None
    with ExitStack() as held:
        with parallel.together():
            _check(config)
            schedule = learning_rate(t.scheduler, t.lr, t.warmup_step, t.max_step, t.decay_step)
            begun = Checkpoints(workdir / "checkpoints").latest_step() is not None
            task = TASKS[c.task](config, ("train", "valid"), subwords(c, workdir, begun))
            # Both refuse what does not fit.
            batch = task.batch(0, parallel.rows(t.batch_size))
            model = LanguageModel(build_config(c.model.to_dict(), len(task.vocab)))
            if batch.segment_ids is not None:
                model.config.check_packs()
            optimizer = adam(schedule, t.clip, t.weight_decay)
            carries = model.config.carries(t.carry_over_fast_weight)
            empty = jax.eval_shape(functools.partial(empty_memory, model.config, t.batch_size))
            # A Transformer-XL of mem_len 0 carries on, but nothing that could be kept.
            carries = carries and all(leaf.size for leaf in jax.tree.leaves(empty))
            rows = t.batch_size if carries else 0
            init = _first(init_state, model, optimizer, c.seed, rows)
            _check_memory(init.eval_shape())
            if c.init_checkpoint != "best" and not (c.init_from or begun):
                raise UserError(
                    f"config.init_checkpoint={c.init_checkpoint} is one of config.init_from, which "
                    "is not given: give both or neither."
                )
            # A run that has begun needs the other one no more.
            other = None
            if c.init_from and not begun:
                drawn = init().params
                other = borrow(c, drawn, model.config, task.vocab, task.unit)
            planned = t.max_step
            if first:
                held.enter_context(lock_workdir(workdir))
                resume = Checkpoints(workdir / "checkpoints").latest_step() is not None
                planned = saved_config(workdir)["train.max_step"] if resume else planned
                claim_workdir(
                    workdir, config, task.vocab, resume, task.texts,
                    begun_from=other and other.origin, extend=extend,
                )  # fmt: skip
        checkpoints = held.enter_context(Checkpoints(workdir / "checkpoints", told))
        with parallel.together():
            step, state = _begin(init, checkpoints)
        if other:
            state = state._replace(params=other.params)
            told(other.line)
        if step:
            told(f"Resuming {workdir} at step {step}.")
        if planned < t.max_step:
            told(_extension(t, planned, schedule, step))
        own = {k: v for k, v in flatten(c.to_dict()).items() if not k.startswith(OWN_FIELDS)}
        parallel.check_same(
            json.dumps([own, task.identity(), step, jax.local_device_count()]),
            "settings, text, last checkpoint (--workdir has to be one that all see) or device "
            "count",
        )
        reporter = Reporter(
            workdir,
            config=c.to_dict(),
            total_steps=t.max_step,
            start_step=step,
            use_wandb=c.report.use_wandb,
            project_name=c.report.project_name,
            job_name=c.report.job_name or job_name or workdir.name,
            unit=task.unit,
            active=first,
        )
        held.enter_context(reporter)
        # Closed in the other order: the trace's warning still has a reporter to go to.
        trace = Trace(t.profile_steps if first else (), workdir, reporter.message)
        held.enter_context(trace)
        stop = held.enter_context(stop_signals())
        checkpoints.report = reporter.message
        for warning in task.warnings:
            reporter.message(f"Warning: {warning}")
        if step == 0:
            reporter.message(parameter_table(state.params))
        reporter.message(_summary(config, task))
        if t.warmup_step > t.max_step:
            reporter.message(
                f"Warning: train.warmup_step={t.warmup_step} is more than "
                f"train.max_step={t.max_step}: the learning rate never comes to train.lr={t.lr:g}."
            )
        state = to_devices(state, model, t.batch_size)
        this = Run(
            config, workdir, task, model, optimizer, schedule, step, state,
            checkpoints, reporter, Progress(reporter, t), trace, stop, clock,
        )  # fmt: skip
        del state  # Else it would be kept until the end.
        yield this


def _begin(init: Callable[[], TrainState], checkpoints: Checkpoints) -> tuple[int, TrainState]:
    if checkpoints.latest_step() is None:
        return 0, init()
    like = jax.eval_shape(lambda: portable(init()))
    step, saved = checkpoints.restore(like._asdict())
    return step, TrainState(**saved)


def _extension(t: Any, planned: int, schedule: Schedule, step: int) -> str:
    """What more steps do to the rate of the next one, in a line."""
    before = learning_rate(t.scheduler, t.lr, t.warmup_step, planned, t.decay_step)
    was, now = (float(rate(jnp.float32(step + 1))) for rate in (before, schedule))
    return (
        f"Longer: {t.max_step:,} steps in place of {planned:,}. The schedule {t.scheduler} now "
        f"goes to the new end: the learning rate of step {step + 1:,} is {now:.3g}, "
        f"it would have been {was:.3g}."
    )


def _check(config: Any) -> None:
    """Refuse settings, and rows that do not fit the devices."""
    check(config.to_dict())
    t, n_device = config.train, jax.device_count()
    for name in ("batch_size", "eval_batch_size"):
        parallel.check_divides(t[name], f"config.train.{name}", n_device)
    if t.batch_size // n_device % t.batch_chunk:
        raise UserError(
            f"config.train.batch_chunk={t.batch_chunk} does not divide the "
            f"{t.batch_size // n_device} rows of a device: use one of their divisors."
        )


def _check_memory(state: Any) -> None:
    """Refuse a model whose parameters, gradients and moments alone are more than a device holds."""
    kept = jax.tree.leaves((state.params, state.params, state.opt_state))
    needed = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in kept)
    stats = jax.local_devices()[0].memory_stats() or {}
    # A CPU tells no limit.
    there = stats.get("bytes_limit") or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        raise UserError(
            f"the parameters, gradients and moments of this model need {needed / 2**30:,.1f} GiB, "
            f"and there are {there / 2**30:,.1f}: make one of config.model's sizes smaller."
        )


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """A list that SIGTERM, Ctrl-C or a closed terminal's SIGHUP is put on, for the loop to look at.

    A second one stops at once. Where SIGHUP is ignored (`nohup`), it stays so.
    """
    seen: list[int] = []

    def note(number: int, frame: Any) -> None:
        if seen:
            raise KeyboardInterrupt
        seen.append(number)

    # Signals reach only the main thread; a run in another one (a notebook's) has none.
    main = threading.current_thread() is threading.main_thread()
    signals = [signal.SIGTERM, signal.SIGINT] if main else []
    if main and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        signals.append(signal.SIGHUP)
    old = {number: signal.signal(number, note) for number in signals}
    try:
        yield seen
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def _summary(c: Any, task: Task) -> str:
    """Three lines on data, devices and the length of training."""
    t, device = c.train, jax.local_devices()[0]
    tokens = t.batch_size * t.tgt_len
    times = f", {t.max_step * tokens / task.size:.1f} times the text" if task.size else ""
    return (
        f"{task.summary()}\n"
        f"Devices: {jax.device_count()} x {device.device_kind}, {c.model.dtype}, "
        f"{t.batch_size // jax.device_count()} rows of {t.tgt_len} tokens each.\n"
        f"Training: {t.max_step:,} steps of {tokens:,} tokens{times}."
    )


def _farewell(this: Run) -> str:
    checkpoints, workdir = this.checkpoints, this.workdir
    flag = f"--workdir={shlex.quote(str(workdir))}"
    step, best = checkpoints.latest_step(), checkpoints.best_step()
    if step != this.config.train.max_step or best is None:
        return f"Stopped. Saved at step {step}: the same command with {flag} goes on."
    loss = checkpoints.valid_loss(best)
    return (
        f"Done. Best validation {in_words(loss, this.task.unit)} (approximate, step {best}); the "
        f"run lies in {workdir}.\nExact perplexity: python main.py --mode=valid {flag}"
    )
