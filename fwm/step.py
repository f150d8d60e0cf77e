"""One training step: a pure function of a state and a batch with a mask, and nothing else.

`train_step` and `valid_step` know no devices: what goes over all of them (`average`, `total`) is
handed in. Beside the state stands what puts it on devices and fetches it: `to_devices`, `to_host`.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int, UInt32

from fwm import parallel
from fwm.model import LanguageModel, empty_memory, redraw_projections
from fwm.ops.dropout import Dropout
from fwm.optimizer import Schedule


class TrainState(NamedTuple):
    """All that changes during training; a checkpoint holds exactly this."""

    step: Int[Array, ""]  # updates done, int32
    rng: UInt32[Array, " _"]  # data of the key that every random draw of the run comes from
    params: Any
    opt_state: Any
    favor: Any  # the last FAVOR+ projections as variables, {} for models without
    memory: Any  # what the next segment starts from, None unless it is carried over
    # Updates dropped for numbers that are not finite: in total, and in a row.
    skipped: Int[Array | np.ndarray, "2"] = np.zeros(2, np.int32)


class Batch(NamedTuple):
    """One step's tokens, and what is to be predicted at each of them."""

    tokens: Int[Array | np.ndarray, "B T"]
    targets: Int[Array | np.ndarray, "B T"]
    first: Bool[Array | np.ndarray, " B"]  # a memory carried into these rows is forgotten
    rows: Int[Array | np.ndarray, " B"]  # places in the global batch
    mask: Bool[Array | np.ndarray, "B T"] | None = None  # targets that count; None: all
    # Documents that rows are packed with, see `LanguageModel`; None: each row is of one.
    segment_ids: Int[Array | np.ndarray, "B T"] | None = None


def init_state(
    model: LanguageModel, optimizer: optax.GradientTransformation, seed: int, memory_rows: int
) -> TrainState:
    """The state before the first step; `memory_rows` 0: no memory is carried over."""
    params_key, rng = jax.random.split(jax.random.key(seed))
    tokens = jnp.zeros((1, 1), jnp.int32)
    variables = dict(model.init(params_key, tokens, tokens))
    params = variables.pop("params")
    return TrainState(
        jnp.zeros((), jnp.int32),
        jax.random.key_data(rng),
        params,
        optimizer.init(params),
        variables,
        empty_memory(model.config, memory_rows) if memory_rows else None,
        jnp.zeros(2, jnp.int32),
    )


def restart(memory: Any, first: Bool[Array | np.ndarray, " B"]) -> Any:
    """The memory, empty in the rows that begin anew; None stays None."""
    begins = lambda leaf: first.reshape(-1, *(1,) * (leaf.ndim - 1))
    return jax.tree.map(lambda leaf: jnp.where(begins(leaf), jnp.zeros_like(leaf), leaf), memory)


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
    """One update on the mean nll of the batch: `sum(nll * mask) / sum(mask)` over all devices.

    Args:
        model: the language model.
        optimizer: its updates.
        schedule: rate of update t, for the metrics.
        state: before the step.
        batch: rows of this device.
        batch_chunk: equal parts of the rows that are computed one after another, their gradients
            added up; the result is the same, the memory smaller.
        skip: drop an update (parameters, moments, memory) whose loss or gradient is not finite;
            the rates of later updates then count from the updates made.
        average: over the devices.

    Returns:
        The state after the step; loss (nats per counted token), grad_norm before clipping,
        learning_rate, and with `skip` the state's `skipped`.
    """
    key = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
    favor_key, dropout_key = jax.random.split(key)
    favor = redraw_projections(model.config, favor_key)
    # Of an average device, as the sums of nll will be: rows need not have the same share of it.
    counted: Any = None
    if batch.mask is not None:
        counted = jnp.maximum(average(masked_sums(batch)["count"]), 1e-9)

    def loss(params: Any, batch: Batch, memory: Any) -> tuple[Array, Any]:
        source = Dropout(dropout_key, batch.rows)
        variables = {"params": params, **favor}
        nll, memory = model.apply(
            variables, batch.tokens, batch.targets, memory, source, batch.segment_ids
        )
        value = nll.mean() if batch.mask is None else masked_sums(batch, nll=nll)["nll"] / counted
        return value, None if state.memory is None else memory

    def value_and_grad(*inputs: Any) -> Any:
        with model.config.precision():  # of the backward pass too
            return jax.value_and_grad(loss, has_aux=True)(*inputs)

    def part(total: Any, inputs: tuple[Batch, Any]) -> tuple[Any, Any]:
        (value, memory), grads = value_and_grad(state.params, *inputs)
        return jax.tree.map(jnp.add, total, (value, grads)), memory

    memory = restart(state.memory, batch.first)
    if batch_chunk == 1:
        (value, new_memory), grads = value_and_grad(state.params, batch, memory)
    else:
        cut = lambda x: x.reshape(batch_chunk, -1, *x.shape[1:])
        zeros = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, state.params))
        sums, parts = jax.lax.scan(part, zeros, jax.tree.map(cut, (batch, memory)))
        # Means of the parts become the mean; shares of one sum are whole already.
        shares = batch_chunk if batch.mask is None else 1
        value, grads = jax.tree.map(lambda x: x / shares, sums)
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


def masked_sums(batch: Batch, **values: Float[Array, "B T"]) -> dict[str, Float[Array, ""]]:
    """The sum of each of `values` where the batch counts, and `count`, how many positions do."""
    mask = jnp.ones(batch.targets.shape, bool) if batch.mask is None else batch.mask
    sums = {name: jnp.sum(jnp.where(mask, value, 0.0)) for name, value in values.items()}
    return sums | {"count": jnp.sum(mask, dtype=jnp.float32)}


def valid_step(
    score: Callable[..., tuple[dict[str, Array], Any]],
    model: LanguageModel,
    params: Any,
    favor: Any,
    batch: Batch,
    memory: Any,
    *,
    total: Callable[[Any], Any] = lambda tree: tree,
) -> tuple[dict[str, Float[Array, ""]], Any]:
    """A task's `score` of a batch, summed by `total` over all devices, and the next memory."""
    sums, memory = score(model, {"params": params, **favor}, batch, memory)
    return total(sums), memory


def portable(state: TrainState) -> TrainState:
    """With the memory in float32, that every dtype of computing goes into and comes back from."""
    cast = lambda x: x.astype(np.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x
    return state._replace(memory=jax.tree.map(cast, state.memory))


def to_devices(state: TrainState, model: LanguageModel, batch_size: int) -> TrainState:
    """A copy on every device, and of the memory each device's own rows."""
    memory = None
    if state.memory is not None:
        like = jax.eval_shape(lambda: empty_memory(model.config, batch_size))
        own = parallel.rows(batch_size)
        memory = jax.tree.map(lambda x, y: x[own].astype(y.dtype), state.memory, like)
    rest = TrainState(*parallel.replicate(state._replace(memory=None)))
    return rest._replace(memory=parallel.split(memory))


def to_host(state: TrainState) -> dict[str, Any]:
    """What a checkpoint saves; every process must call it, for it gathers the rows of all."""
    memory = parallel.gather(parallel.merge(state.memory))
    rest = parallel.first(state._replace(memory=None))
    return portable(rest._replace(memory=memory))._asdict()
