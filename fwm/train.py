"""Training: a pure step, and the loop around it.

The batch, the dropout masks and the FAVOR+ projections of a step are functions of the seed and
the step alone, so a run that is resumed from a checkpoint goes on exactly as if never stopped.
"""

import datetime
import functools
import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int, UInt32

from fwm import data, parallel
from fwm.checkpoint import Checkpoints
from fwm.errors import UserError
from fwm.files import lock_workdir, read_json, write_json
from fwm.model import LanguageModel, build_config, empty_memory, redraw_projections
from fwm.ops.dropout import Dropout
from fwm.optimizer import Schedule, adam, learning_rate
from fwm.reporting import Reporter, parameter_table


class TrainState(NamedTuple):
    """All that changes during training; a checkpoint holds exactly this.

    Fields:
        step: updates done, int32.
        rng: data of the key that every random draw of the run comes from.
        params: parameters of the model.
        opt_state: Adam's moments.
        favor: the last FAVOR+ projections as variables, {} for models without.
        memory: what the next segment starts from, None unless it is carried over.
        skipped: updates dropped for numbers that are not finite: in total, and in a row.
    """

    step: Int[Array, ""]
    rng: UInt32[Array, " _"]
    params: Any
    opt_state: Any
    favor: Any
    memory: Any
    skipped: Int[Array | np.ndarray, "2"] = np.zeros(2, np.int32)


class Batch(NamedTuple):
    """One step's tokens; `first` rows begin anew, `rows` are their places in the global batch."""

    tokens: Int[Array | np.ndarray, "B T"]
    targets: Int[Array | np.ndarray, "B T"]
    first: Bool[Array | np.ndarray, " B"]
    rows: Int[Array | np.ndarray, " B"]


def init_state(
    model: LanguageModel, optimizer: optax.GradientTransformation, seed: int, memory_rows: int
) -> TrainState:
    """The state before the first step; `memory_rows` 0: no memory is carried over."""
    params_key, rng = jax.random.split(jax.random.key(seed))
    tokens = jnp.zeros((1, 1), jnp.int32)
    variables = dict(model.init(params_key, tokens, tokens))
    params = variables.pop("params")
    memory = empty_memory(model.config, memory_rows) if memory_rows else None
    step = jnp.zeros((), jnp.int32)
    return TrainState(
        step,
        jax.random.key_data(rng),
        params,
        optimizer.init(params),
        variables,
        memory,
        jnp.zeros(2, jnp.int32),
    )


def train_step(
    model: LanguageModel,
    optimizer: optax.GradientTransformation,
    schedule: Schedule,
    state: TrainState,
    batch: Batch,
    *,
    batch_chunk: int = 1,
    skip: bool = False,
    average: Callable[[Any], Any] = lambda tree: tree,
) -> tuple[TrainState, dict[str, Array]]:
    """One update on the mean nll of the batch.

    Args:
        model: the language model.
        optimizer: its updates.
        schedule: rate of update t, for the metrics.
        state: before the step.
        batch: rows of this device.
        batch_chunk: equal parts of the rows that are computed one after another, their gradients
            averaged; the result is the same, the memory smaller.
        skip: drop an update (parameters, moments, memory) whose loss or gradient is not finite;
            the rates of later updates then count from the updates made.
        average: over the devices.

    Returns:
        The state after the step; loss (nats per token), grad_norm before clipping, learning_rate,
        and with `skip` the state's `skipped`.
    """
    key = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
    favor_key, dropout_key = jax.random.split(key)
    favor = redraw_projections(model.config, favor_key)

    def reset(leaf: Array) -> Array:
        first = batch.first.reshape(-1, *(1,) * (leaf.ndim - 1))
        return jnp.where(first, jnp.zeros((), leaf.dtype), leaf)

    def loss(params: Any, batch: Batch, memory: Any) -> tuple[Array, Any]:
        source = Dropout(dropout_key, batch.rows)
        nll, memory = model.apply(
            {"params": params, **favor}, batch.tokens, batch.targets, memory, source
        )
        return nll.mean(), None if state.memory is None else memory

    value_and_grad = jax.value_and_grad(loss, has_aux=True)

    def part(total: Any, inputs: tuple[Batch, Any]) -> tuple[Any, Any]:
        (value, memory), grads = value_and_grad(state.params, *inputs)
        return jax.tree.map(jnp.add, total, (value, grads)), memory

    memory = jax.tree.map(reset, state.memory)
    if batch_chunk == 1:
        (value, new_memory), grads = value_and_grad(state.params, batch, memory)
    else:
        cut = lambda x: x.reshape(batch_chunk, -1, *x.shape[1:])
        zeros = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, state.params))
        sums, parts = jax.lax.scan(part, zeros, jax.tree.map(cut, (batch, memory)))
        value, grads = jax.tree.map(lambda x: x / batch_chunk, sums)
        new_memory = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), parts)
    value, grads = average((value, grads))
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    metrics = {
        "loss": value,
        "grad_norm": optax.tree.norm(grads),
        "learning_rate": schedule((state.step + 1 - state.skipped[0]).astype(jnp.float32)),
    }
    new = (optax.apply_updates(state.params, updates), opt_state, new_memory)
    skipped = jnp.asarray(state.skipped)
    if skip:
        # The averages are the same on every device, and so is the choice.
        good = jnp.isfinite(value) & jnp.isfinite(metrics["grad_norm"])
        old = (state.params, state.opt_state, memory)
        new = jax.tree.map(functools.partial(jnp.where, good), new, old)
        skipped = jnp.where(good, skipped * jnp.array([1, 0]), skipped + 1)
        metrics["skipped"] = skipped
    params, opt_state, memory = new
    state = TrainState(state.step + 1, state.rng, params, opt_state, favor, memory, skipped)
    return state, metrics


def valid_step(
    model: LanguageModel, params: Any, favor: Any, tokens, targets, mask, memory
) -> tuple[Float[Array, ""], Any]:
    """Sum of nll where `mask`, over all devices, and the memory for the next segment."""
    nll, new = model.apply({"params": params, **favor}, tokens, targets, memory)
    total = parallel.total(jnp.sum(jnp.where(mask, nll, 0.0)))
    return total, None if memory is None else new


def validate(
    step: Callable, state: TrainState, stream: np.ndarray, rows: int, tgt_len: int, memory: Any
) -> float:
    """Mean nll of consecutive segments in `rows` rows; `memory`: empty, of own rows, or None.

    Quick, and approximate: unlike the sliding window, the first tokens of a segment see less
    context than a window would show them, and rows begin in the middle of the text.
    """
    memory = parallel.split(memory)
    total = 0.0
    for segment in data.eval_segments(stream, rows, tgt_len, parallel.rows(rows)):
        nll, memory = step(state.params, state.favor, *parallel.split(segment), memory)
        total += float(parallel.first(nll))
    return total / (len(stream) - 1)


# --- the run --------------------------------------------------------------------------------------

# What may differ when a run is resumed: where things are, what is reported, and what another
# machine may need; none of it changes what the run is about.
FREE_FIELDS = (
    "data.dir", "data.cache_dir", "data.download", "report.", "eval.", "generate.", "model.dtype",
    "train.batch_chunk", "train.eval_batch_size", "train.nan_policy", "train.profile_steps",
)  # fmt: skip
NAN_POLICIES = ("stop", "skip")
# Steps after compilation that the duration is estimated from.
ESTIMATED_FROM = 3
# So many updates in a row that had to be dropped are no accident.
MAX_SKIPPED = 10


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one with dotted keys; lists as tuples, as JSON does not know the latter."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = tuple(value) if isinstance(value, list) else value
    return flat


def saved_config(workdir: Path) -> dict[str, Any]:
    """The settings of the run in `workdir`, with dotted keys.

    Raises:
        UserError: there are none, or the file is damaged.
    """
    saved = read_json(workdir / "config.json")
    if not isinstance(saved, dict):
        raise UserError(f"{workdir}/config.json is damaged: expected groups of settings.")
    return flatten(saved)


def claim_workdir(workdir: Path, config: Any, vocab: data.Vocabulary, resume: bool) -> None:
    """Write config.json and vocab.txt into a workdir; if a run is resumed, refuse a different one.

    Raises:
        UserError: the workdir holds a run with other settings (each is listed) or another text.
    """
    path = workdir / "config.json"
    new = config.copy_and_resolve_references().to_dict()
    if resume:
        then, now = saved_config(workdir), flatten(new)
        differing = [
            f"{key} was {then.get(key)!r} and is now {now.get(key)!r}"
            for key in sorted(then.keys() | now.keys())
            if then.get(key) != now.get(key) and not key.startswith(FREE_FIELDS)
        ]
        if differing:
            raise UserError(
                f"{workdir} holds a run with other settings: {'; '.join(differing)}; "
                "use the same settings to resume it, or another --workdir."
            )
        old = data.Vocabulary.load(workdir / "vocab.txt")
        if old.symbols != vocab.symbols:
            raise UserError(
                f"{workdir} holds a run on another text: its vocabulary has {len(old)} entries, "
                f"this one {len(vocab)}; give the same text or another --workdir."
            )
    vocab.save(workdir / "vocab.txt")
    write_json(path, new)


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """A list that SIGTERM or Ctrl-C is put on, for the loop to look at; twice stops at once."""
    seen: list[int] = []

    def note(number: int, frame: Any) -> None:
        if seen:
            raise KeyboardInterrupt
        seen.append(number)

    # Signals reach only the main thread; a run in another one (a notebook's) has none.
    main = threading.current_thread() is threading.main_thread()
    signals = (signal.SIGTERM, signal.SIGINT) if main else ()
    old = {number: signal.signal(number, note) for number in signals}
    try:
        yield seen
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def run(config: Any, workdir: Path, job_name: str = "") -> int:
    """Train as `config` says into `workdir`, or go on where its last checkpoint is.

    `job_name` is the run's name on Weights & Biases where `config.report.job_name` is empty; by
    default the workdir's.

    With several processes (`parallel.start`) each reads its own rows of every batch; the first
    one alone writes to the workdir, from which all of them restore.

    Returns:
        The exit status: 0, 143 after SIGTERM, or 1 if stopping could not save.

    Raises:
        UserError: settings that do not fit each other, the devices, the text or the workdir,
            training that has diverged, and another process that was lost.
    """
    with parallel.naming_a_lost_process(), ExitStack() as held:
        with parallel.together():
            corpus, model, optimizer, schedule = _prepare(config)
            if parallel.is_first():
                held.enter_context(lock_workdir(workdir))
                resume = Checkpoints(workdir / "checkpoints").latest_step() is not None
                claim_workdir(workdir, config, corpus.vocab, resume)
        return _run(config, workdir, job_name, corpus, model, optimizer, schedule)


def _prepare(config: Any) -> tuple[data.Corpus, LanguageModel, Any, Schedule]:
    """Everything that settings and text decide, refused before anything is written."""
    c, t = config, config.train
    n_device = jax.device_count()
    for name in ("batch_size", "eval_batch_size"):
        parallel.check_divides(t[name], f"config.train.{name}", n_device)
    if t.batch_chunk < 1 or t.batch_size // n_device % t.batch_chunk:
        raise UserError(
            f"config.train.batch_chunk={t.batch_chunk} does not divide the "
            f"{t.batch_size // n_device} rows of a device: use one of their divisors."
        )
    for name in ("tgt_len", "max_step", "eval_interval", "log_interval"):
        if t[name] < 1:
            raise UserError(f"config.train.{name} must be at least 1, got {t[name]}.")
    if not 0 <= c.seed < 2**32:
        raise UserError(f"config.seed must be 0 or more and below 2**32, got {c.seed}.")
    if t.clip < 0:
        raise UserError(f"config.train.clip must be 0 (no clipping) or more, got {t.clip}.")
    if t.nan_policy not in NAN_POLICIES:
        raise UserError(
            f"unknown config.train.nan_policy {t.nan_policy!r}: expected one of "
            f"{', '.join(NAN_POLICIES)}."
        )
    steps = t.profile_steps
    whole = all(type(step) is int for step in steps)
    if steps and not (whole and len(steps) == 2 and 1 <= steps[0] <= steps[1]):
        raise UserError(
            "config.train.profile_steps must be the first and the last step to trace, such as "
            f"(10, 15), or () for none, got {steps}."
        )
    schedule = learning_rate(t.scheduler, t.lr, t.warmup_step, t.max_step)
    corpus = data.load(
        c.data.name,
        dir=c.data.dir,
        cache_dir=c.data.cache_dir,
        splits=("train", "valid"),
        download=c.data.download,
    )
    # Both refuse what does not fit.
    corpus.train_batch(0, t.batch_size, t.tgt_len, c.seed)
    model = LanguageModel(build_config(c.model.to_dict(), len(corpus.vocab)))
    model.config.carries(t.carry_over_fast_weight)
    return corpus, model, adam(schedule, t.clip), schedule


def _run(config, workdir, job_name, corpus, model, optimizer, schedule) -> int:
    c, t = config, config.train
    carry = t.carry_over_fast_weight or c.model.mem_len > 0
    init = functools.partial(init_state, model, optimizer, c.seed, t.batch_size if carry else 0)
    told = functools.partial(print, flush=True) if parallel.is_first() else lambda line: None
    checkpoints = Checkpoints(workdir / "checkpoints", told)
    with parallel.together():
        if checkpoints.latest_step() is None:
            step, state = 0, jax.jit(init)()
        else:
            like = jax.eval_shape(lambda: _portable(init()))
            step, saved = checkpoints.restore(like._asdict())
            state = TrainState(**saved)
            told(f"Resuming {workdir} at step {step}.")
    # The stream of one text lies under one name everywhere; settings decide the rest.
    own = {k: v for k, v in flatten(c.to_dict()).items() if not k.startswith(FREE_FIELDS)}
    text = [Path(stream.filename).parent.name for stream in corpus.streams.values()]
    parallel.check_same(
        json.dumps([own, text, corpus.vocab.text(), step, jax.local_device_count()]),
        "settings, text, last checkpoint (--workdir has to be one that all see) or device count",
    )

    reporter = Reporter(
        workdir,
        config=c.to_dict(),
        total_steps=t.max_step,
        start_step=step,
        use_wandb=c.report.use_wandb,
        project_name=c.report.project_name,
        job_name=c.report.job_name or job_name or workdir.name,
        active=parallel.is_first(),
    )
    # Closed in the other order: the trace's warning still has a reporter to go to.
    profile = _Profile(t.profile_steps if parallel.is_first() else (), workdir, reporter.message)
    with checkpoints, reporter, profile, stop_signals() as stop:
        checkpoints.report = reporter.message
        for warning in corpus.warnings:
            reporter.message(f"Warning: {warning}")
        if step == 0:
            reporter.message(parameter_table(state.params))
        reporter.message(_summary(c, corpus))
        state = _to_devices(state, model, t.batch_size)
        step, halt = _loop(
            c, corpus, model, optimizer, schedule, state, step, checkpoints, reporter, profile, stop
        )
        checkpoints.wait()
        saved = not parallel.is_first() or checkpoints.latest_step() == step
        if parallel.is_first():
            reporter.message(_farewell(workdir, checkpoints, t.max_step))
    return 143 if halt == signal.SIGTERM else 1 - saved


def _loop(c, corpus, model, optimizer, schedule, state, step, checkpoints, reporter, profile, stop):
    """Train to the end or to a signal; returns the last step and the signal (0: none)."""
    t, own = c.train, parallel.rows(c.train.batch_size)
    bound = functools.partial(train_step, model, optimizer, schedule)
    bound = functools.partial(
        bound, batch_chunk=t.batch_chunk, skip=t.nan_policy == "skip", average=parallel.mean
    )
    update = parallel.pmap(bound, donate_argnums=(0,))
    judge = parallel.pmap(functools.partial(valid_step, model))
    rows = np.arange(t.batch_size, dtype=np.int32)[own]
    empty = None
    if state.memory is not None:
        eval_rows = t.eval_batch_size // jax.process_count()
        empty = jax.device_get(empty_memory(model.config, eval_rows))
    log, vote = _Log(t, reporter, step), parallel.Vote()
    pending, halt = None, 0

    def save(valid_loss: float | None) -> None:
        host = _to_host(state)
        if parallel.is_first():
            checkpoints.save(step, host, valid_loss=valid_loss)

    while step < t.max_step and not halt:
        tokens, targets, first = corpus.train_batch(step, t.batch_size, t.tgt_len, c.seed, own)
        batch = Batch(tokens, targets, np.full(len(rows), first), rows)
        with profile.step(step + 1, state):
            state, metrics = update(state, parallel.split(batch))
        profile.after(step + 1, state)
        # A step late, so that the device never waits for the host.
        log.add(pending)
        step += 1
        pending = step, metrics
        if step % t.eval_interval == 0 or step == t.max_step:
            log.add(pending)
            pending = None
            started = time.monotonic()
            stream = corpus.streams["valid"]
            valid_loss = validate(judge, state, stream, t.eval_batch_size, t.tgt_len, empty)
            if not math.isfinite(valid_loss):
                raise UserError(
                    f"training diverged at step {step}: validation loss {valid_loss}, {log.last}; "
                    "the checkpoints before it are kept: try a smaller config.train.lr."
                )
            reporter.valid(step, {"loss": valid_loss}, time.monotonic() - started)
            save(valid_loss)
            log.restart()
        halt = vote(stop[0] if stop else 0)
    log.add(pending)
    if halt:
        save(None)
    return step, halt


class _Profile:
    """Traces the steps `first` to `last`, both included, into `workdir/profile`; () for none.

    A resumed run traces those of them that it makes; a run that ends before the last one, what
    there was.
    """

    def __init__(self, steps: tuple[int, ...], workdir: Path, report: Callable[[str], None]):
        self.first, self.last = steps or (0, 0)
        self.folder, self.report = workdir / "profile", report
        self.began = 0

    def __enter__(self) -> "_Profile":
        return self

    def __exit__(self, *_: object) -> None:
        if self.began:
            self.stop("the end")
        elif self.last:
            self.report(f"No trace: this run made none of the steps {self.first} to {self.last}.")

    @contextmanager
    def step(self, number: int, state: TrainState) -> Iterator[None]:
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

    def after(self, number: int, state: TrainState) -> None:
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


class _Log:
    """Averages the loss between two lines of the log and measures the speed of training alone."""

    def __init__(self, t: Any, reporter: Reporter, step: int):
        self.t, self.reporter, self.step = t, reporter, step
        self.losses: list[float] = []
        self.last = ""
        self.compiled = self.estimated = False
        # The clock starts anew at every line of the log and at every validation.
        self.estimated_from = min(ESTIMATED_FROM, t.log_interval, t.eval_interval)
        self.restart()

    def restart(self) -> None:
        """Start the clock anew: what came before was not training."""
        self.started, self.timed = time.monotonic(), 0

    def add(self, pending: tuple[int, dict] | None) -> None:
        """Fetch the metrics of a step, refuse what is not finite, report every log_interval."""
        if pending is None:
            return
        self.step, metrics = pending
        loss, norm, rate = (
            float(parallel.first(metrics[name])) for name in ("loss", "grad_norm", "learning_rate")
        )
        self.last = f"loss {loss}, gradient norm {norm}, learning rate {rate:.3g}"
        scalars = {"grad_norm": norm, "learning_rate": rate}
        skipped, in_a_row = 0, 0
        if "skipped" in metrics:
            skipped, in_a_row = np.asarray(parallel.first(metrics["skipped"])).tolist()
            scalars["skipped"] = skipped
        if math.isfinite(loss) and math.isfinite(norm):
            self.losses.append(loss)
        elif self.t.nan_policy == "stop" or in_a_row >= MAX_SKIPPED:
            which = f"the last of {in_a_row} dropped updates in a row: " * bool(in_a_row)
            raise UserError(
                f"training diverged at step {self.step}: {which}{self.last}; the checkpoints "
                "before it are kept: try a smaller config.train.lr or a longer "
                "config.train.warmup_step."
            )
        else:
            self.reporter.message(
                f"Warning: the update of step {self.step} was dropped ({self.last}), "
                f"the {skipped}. in this run."
            )
        self.timed += 1
        if not self.compiled:
            self.compiled = True
            self.restart()  # the first step compiles
        elif not self.estimated and self.timed == self.estimated_from:
            self.estimated = True
            left = (time.monotonic() - self.started) / self.timed * (self.t.max_step - self.step)
            duration = datetime.timedelta(seconds=round(left))
            self.reporter.message(
                f"Estimated duration: {duration} for the {self.t.max_step - self.step:,} steps "
                "left, validations not counted."
            )
        loss = sum(self.losses) / len(self.losses) if self.losses else loss
        speed = self.timed / max(time.monotonic() - self.started, 1e-9)
        pace = {
            "tokens_per_second": speed * self.t.batch_size * self.t.tgt_len,
            "seconds_left": (self.t.max_step - self.step) / speed if speed else None,
        }
        if self.step % self.t.log_interval and self.step != self.t.max_step:
            self.reporter.progress(self.step, loss, **pace)
            return
        self.reporter.train(self.step, {"loss": loss} | scalars, **pace)
        self.losses = []
        self.restart()


def _portable(state: TrainState) -> TrainState:
    """With the memory in float32, that every dtype of computing goes into and comes back from."""
    cast = lambda x: x.astype(np.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x
    return state._replace(memory=jax.tree.map(cast, state.memory))


def _to_devices(state: TrainState, model: LanguageModel, batch_size: int) -> TrainState:
    memory = None
    if state.memory is not None:
        like = jax.eval_shape(lambda: empty_memory(model.config, batch_size))
        own = parallel.rows(batch_size)
        memory = jax.tree.map(lambda x, y: x[own].astype(y.dtype), state.memory, like)
    rest = TrainState(*parallel.replicate(state._replace(memory=None)))
    return rest._replace(memory=parallel.split(memory))


def _to_host(state: TrainState) -> dict[str, Any]:
    memory = parallel.gather(parallel.merge(state.memory))
    rest = parallel.first(state._replace(memory=None))
    return _portable(rest._replace(memory=memory))._asdict()


def _summary(c: Any, corpus: data.Corpus) -> str:
    """Three lines on data, devices and the length of training."""
    t, device = c.train, jax.local_devices()[0]
    words = {"word": "words", "character": "characters"}[corpus.unit]
    length = len(corpus.streams["train"])
    tokens = t.batch_size * t.tgt_len
    return (
        f"Data: {corpus.name}, {length:,} training tokens, "
        f"{len(corpus.streams['valid']):,} validation tokens, {len(corpus.vocab):,} {words}.\n"
        f"Devices: {jax.device_count()} x {device.device_kind}, {c.model.dtype}, "
        f"{t.batch_size // jax.device_count()} rows of {t.tgt_len} tokens each.\n"
        f"Training: {t.max_step:,} steps of {tokens:,} tokens, "
        f"{t.max_step * tokens / length:.1f} times the text."
    )


def _farewell(workdir: Path, checkpoints: Checkpoints, max_step: int) -> str:
    step, best = checkpoints.latest_step(), checkpoints.best_step()
    if step != max_step or best is None:
        return f"Stopped. Saved at step {step}: the same command with --workdir={workdir} goes on."
    loss = checkpoints.valid_loss(best)
    return (
        f"Done. Best validation perplexity {math.exp(loss):.2f} (approximate, step {best}); "
        f"the run lies in {workdir}.\n"
        f"Exact perplexity: python main.py --mode=valid --workdir={workdir}"
    )
