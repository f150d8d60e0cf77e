"""The task, the models and 100 steps of training between two evaluations (paper, section 6.1).

Axis letters: B batch, T pairs in a sequence, Q queries, K key features, S distinct values.
"""

import functools
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, Key

from fwm import ops, optimizer
from fwm.errors import UserError

D_KEY = 64
EVAL_SEQUENCES, EVAL_QUERIES, EVAL_INTERVAL = 20, 200, 100
SETTINGS = ("capacity", "update_rule")
MAPS = {
    "linear": lambda x, size, projection: ops.elu_plus_one(x),
    "dpfp": lambda x, size, projection: ops.dpfp(x, size),
    "favor": lambda x, size, projection: ops.favor(x, projection, eps=0.0),
    "tanh": lambda x, size, projection: jnp.tanh(x),
}
MEMORIES = {
    "sum": lambda k, v, beta: ops.sum_rule(k, k, v)[1],
    "delta": lambda k, v, beta: ops.delta_rule(k, k, v, beta)[1],
    "fwm": ops.bounded_delta_rule,
}


class Model(NamedTuple):
    """A composition by its name: softmax, or <map><nu or m>_<rule> as in dpfp2_delta."""

    name: str
    feature_map: str
    size: int
    rule: str

    @classmethod
    def of(cls, name: str) -> "Model":
        """Parse a name.

        Raises:
            UserError: it is no model.
        """
        if name == "softmax":
            return cls(name, "", 0, name)
        match = re.fullmatch(r"(linear|tanh|dpfp(?=[1-9])|favor(?=[1-9]))(\d*)_(\w+)", name)
        if not match or match[3] not in MEMORIES or (match[2] and match[1] in ("linear", "tanh")):
            raise UserError(
                f"unknown retrieval model {name!r}: expected softmax, or a feature map (linear, "
                "tanh, dpfp<nu>, favor<m>), an underscore and a rule (sum, delta, fwm), as in "
                "dpfp2_delta."
            )
        return cls(name, match[1], int(match[2] or 0), match[3])


class Batch(NamedTuple):
    """Sequences of pairs, what is asked of them, and which queries count."""

    keys: Int[Array, "B T"]
    values: Int[Array, "B T"]
    queries: Int[Array, "B Q"]
    targets: Int[Array, "B Q"]
    counts: Bool[Array, "B Q"]


def training_batch(key: Key[Array, ""], setting: str, size: int, n_batch: int) -> Batch:
    """Sequences with one query each: the key at a random position, and its last value.

    `capacity`: S pairs, keys and values without replacement; `update_rule`: 2 S with replacement.
    """
    pairs_key, key = jax.random.split(key)
    length = size if setting == "capacity" else 2 * size
    keys, values = _pairs(pairs_key, setting, size, (n_batch, length))
    queries = jnp.take_along_axis(keys, jax.random.randint(key, (n_batch, 1), 0, length), axis=1)
    last = length - 1 - jnp.argmax((keys == queries)[:, ::-1], axis=1, keepdims=True)
    targets = jnp.take_along_axis(values, last, axis=1)
    return Batch(keys, values, queries, targets, jnp.ones_like(targets, bool))


def evaluation_batch(key: Key[Array, ""], setting: str, size: int) -> Batch:
    """20 sequences of S pairs in both settings, each asked for all of its keys.

    Of more than 200 distinct keys the lowest 200 are asked, wherever they stand.
    """
    keys, values = _pairs(key, setting, size, (EVAL_SEQUENCES, size))
    later = jnp.arange(size)[None, :] > jnp.arange(size)[:, None]
    is_last = ~jnp.any((keys[:, :, None] == keys[:, None, :]) & later[None], axis=-1)
    counts, at = jax.lax.top_k(jnp.where(is_last, size - keys, 0), min(size, EVAL_QUERIES))
    queries, targets = (jnp.take_along_axis(x, at, axis=1) for x in (keys, values))
    return Batch(keys, values, queries, targets, counts > 0)


def _pairs(key, setting, size, shape):
    if setting == "update_rule":
        return jax.random.randint(key, (2, *shape), 0, size)
    return jnp.argsort(jax.random.bits(key, (2, *shape)), axis=-1)


def init(key: Key[Array, ""], model: Model, size: int) -> dict:
    """Parameters for S keys and values; kernels apply to [one-hot value, key embedding].

    PyTorch's defaults, except U(-1/8, 1/8) (softmax: Xavier) for the kernels of k and q.
    The paper's table has 2 S key embeddings, of which S are never used.
    """
    width = int(2.2 * size)
    keys = jax.random.split(key, 4)

    def layer(key, n_in, n_out, bound):
        kernel_key, bias_key = jax.random.split(key)
        uniform = functools.partial(jax.random.uniform, minval=-1.0, maxval=1.0)
        bias = n_in**-0.5 * uniform(bias_key, (n_out,))
        return {"kernel": bound * uniform(kernel_key, (n_in, n_out)), "bias": bias}

    def bound(n_in):
        return (6 / (n_in + D_KEY)) ** 0.5 if model.rule == "softmax" else D_KEY**-0.5

    n_in = size + width
    params = {
        "embedding": jax.random.normal(keys[0], (size, width)),
        "k": layer(keys[1], n_in, D_KEY, bound(n_in)),
        "q": layer(keys[2], width, D_KEY, bound(width)),
    }
    if model.rule in ("delta", "fwm"):
        params["beta"] = layer(keys[3], n_in, 1, n_in**-0.5)
    return params


def answers(
    model: Model, params: dict, batch: Batch, size: int, key: Key[Array, ""]
) -> Float[Array, "B Q S"]:
    """What the model reads for each query; `key` draws the projection of FAVOR+."""
    embedding = params["embedding"]
    tables = {  # of values and of keys: there are fewer of them than pairs
        name: (params[name]["kernel"][:size], embedding @ params[name]["kernel"][size:])
        for name in ("k", "beta")
        if name in params
    }

    def layer(name, keys, values):
        value_table, key_table = tables[name]
        return value_table[values] + key_table[keys] + params[name]["bias"][None, None]

    q = (embedding @ params["q"]["kernel"])[batch.queries] + params["q"]["bias"][None, None]
    if model.rule == "softmax":
        k = layer("k", batch.keys, batch.values)
        weights = jax.nn.softmax(jnp.einsum("bqd,btd->bqt", q, k) / D_KEY**0.5)
        if q.shape[1] == 1:
            return _weighted(weights[:, 0], batch.values, size)[:, None]
        return jnp.einsum("bqt,bts->bqs", weights, jax.nn.one_hot(batch.values, size))

    projection = None
    if model.feature_map == "favor":  # the directions, here rows, are orthogonal in blocks of 64
        projection = ops.favor_projection(key, model.size, D_KEY).T
    features = functools.partial(MAPS[model.feature_map], size=model.size, projection=projection)

    def pairs(keys, values):  # features of the keys [B, T, 1, K], write strengths [B, T, 1]
        k = features(layer("k", keys, values))
        k = ops.sum_normalize(k) if model.rule == "delta" else k
        beta = jax.nn.sigmoid(layer("beta", keys, values)) if "beta" in params else None
        return k[:, :, None], beta

    q = features(q)
    if q.shape[1] == 1 and model.rule != "fwm":
        weights = _read(pairs, q, batch.keys, batch.values)
        out = _weighted(weights, batch.values, size)[:, None]
        total = weights.sum(axis=1)[:, None]  # of the sum rule, q . sum_t k_t
    else:  # many queries, or a memory that must be looked at: the memory itself
        k, beta = pairs(batch.keys, batch.values)
        memory = MEMORIES[model.rule](k, jax.nn.one_hot(batch.values, size)[:, :, None], beta)
        out = jnp.einsum("bqk,bks->bqs", q, memory[:, 0])
        total = jnp.einsum("bqk,bk->bq", q, k[:, :, 0].sum(axis=1))
    if model.rule == "fwm":
        return jax.nn.standardize(out, epsilon=1e-5)
    total = q.sum(axis=-1) if model.rule == "delta" else total
    return out / (total[..., None] + 1e-6)


def _read(pairs, q, keys, values):
    """The weights of the values [B, T] for one query each [B, 1, K], by blocks of pairs.

    The features of a block stay in the cache, and are computed again in the backward pass: on
    CPU half the time of all at once.
    """
    n_batch, length = keys.shape
    block = max(n for n in range(1, 41) if length % n == 0)
    block = block if block >= 10 else length

    @jax.checkpoint
    def read(q, tokens):
        weights, q = ops.read_weights(q, *pairs(*tokens))
        return q, weights[:, :, 0]

    blocks = (x.reshape(n_batch, -1, block).swapaxes(0, 1) for x in (keys, values))
    _, weights = jax.lax.scan(read, q, tuple(blocks), reverse=True)
    return weights.swapaxes(0, 1).reshape(n_batch, length)


def _weighted(weights, values, size):
    """The sum [B, S] of one-hot values [B, T] with weights [B, T]."""
    rows = jnp.arange(len(values))[:, None]
    return jnp.zeros((len(values), size), weights.dtype).at[rows, values].add(weights)


def loss(
    model: Model, params: dict, batch: Batch, size: int, key: Key[Array, ""]
) -> Float[Array, ""]:
    """The mean over the queries of 0.5 |y - v|^2."""
    return _half_square(answers(model, params, batch, size, key), batch, size)


def evaluation_loss(
    model: Model, params: dict, batch: Batch, size: int, key: Key[Array, ""]
) -> Float[Array, ""]:
    """As `loss`, but every sequence is a forward pass with a FAVOR+ projection of its own.

    That matters: the loss under a single projection scatters more, and a run's best evaluation is
    the lowest of many. The published code draws one for every 32 queries of a sequence, and takes
    the mean over these passes, also where the last has fewer queries.
    """
    rows = jax.tree.map(lambda x: x[:, None], batch)
    keys = jax.random.split(key, len(batch.keys))
    one = lambda row, key: answers(model, params, row, size, key)[0]
    return _half_square(jax.vmap(one)(rows, keys), batch, size)


def _half_square(answers, batch, size):
    errors = answers - jax.nn.one_hot(batch.targets, size)
    return jnp.mean(0.5 * jnp.sum(errors**2, axis=-1), where=batch.counts)


def adam(lr: float) -> optax.GradientTransformation:
    """The optimizer: Adam at a constant rate."""
    return optimizer.adam(optimizer.constant(lr, 0, 0), clip=0.0)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4), donate_argnums=(5,))
def train_and_evaluate(
    model: Model,
    setting: str,
    size: int,
    n_batch: int,
    lr: float,
    state: tuple,
    key: Key[Array, ""],
) -> tuple[tuple, Float[Array, ""], Float[Array, ""]]:
    """100 steps from `state` (step, params, optimizer state); then one evaluation.

    Random numbers depend on `key`, the run's own, and on the step only.

    Returns:
        The state, the mean training loss of the 100 steps, the evaluation loss.
    """

    def step(state, _):
        count, params, moments = state
        data_key, projection_key = jax.random.split(jax.random.fold_in(key, 2 * count))
        batch = training_batch(data_key, setting, size, n_batch)
        value, grads = jax.value_and_grad(loss, argnums=1)(
            model, params, batch, size, projection_key
        )
        updates, moments = adam(lr).update(grads, moments)
        return (count + 1, optax.apply_updates(params, updates), moments), value

    state, losses = jax.lax.scan(step, state, length=EVAL_INTERVAL)
    data_key, projection_key = jax.random.split(jax.random.fold_in(key, 2 * state[0] + 1))
    batch = evaluation_batch(data_key, setting, size)
    return state, losses.mean(), evaluation_loss(model, state[1], batch, size, projection_key)
