"""The task, the models and 100 steps of training between two evaluations (paper, section 6.1).

Axis letters: B batch, T pairs in a sequence, Q queries, K key features, S distinct values.
"""

import functools
import itertools
import re
from collections import ChainMap
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, Key

from fwm import ops, optimizer
from fwm.errors import UserError
from fwm.ops import chunks
from fwm.ops.read_out import bounded_delta_step
from fwm.ops.rules import DELTA, SUM

D_KEY = 64
EVAL_SEQUENCES, EVAL_QUERIES, EVAL_INTERVAL = 20, 200, 100
SETTINGS = ("capacity", "update_rule")
# FAVOR+ as in the paper's code: no eps; the directions, here rows, are orthogonal in blocks of 64.
FAVOR = ops.FEATURE_MAPS["favor"]._replace(
    of=lambda o: functools.partial(ops.favor, eps=0.0),
    draws={"projection": lambda key, o: ops.favor_projection(key, o.performer_proj_dim, D_KEY).T},
)
# What is named only here, before all that is registered.
MAPS = ChainMap({"linear": ops.FEATURE_MAPS["elu"], "favor": FAVOR}, ops.FEATURE_MAPS)
FWM = ops.Rule(bounded_delta_step, DELTA.inputs)
RULES = ChainMap({"fwm": FWM}, ops.UPDATE_RULES)


class Model(NamedTuple):
    """A composition by its name: softmax, or <map><nu or m>_<rule> as in dpfp2_delta.

    The last three fields are the options of the feature map.
    """

    name: str
    feature_map: str
    rule: str
    dpfp_n_roll: int = 1
    performer_proj_dim: int = 1
    d_head: int = D_KEY

    @classmethod
    def of(cls, name: str) -> "Model":
        """Parse a name.

        Raises:
            UserError: it is no model.
        """
        if name == "softmax":
            return cls(name, "identity", name)
        for feature_map, rule in itertools.product(MAPS, RULES):
            number = "([1-9][0-9]*)" if _has_number(feature_map) else "()"
            match = re.fullmatch(f"{re.escape(feature_map)}{number}_{re.escape(rule)}", name)
            if match:
                return cls(name, feature_map, rule, *[int(match[1] or 1)] * 2)
        known = ", ".join(x + "<number>" * _has_number(x) for x in MAPS)
        raise UserError(
            f"unknown retrieval model {name!r}: expected softmax, or a feature map ({known}), an "
            f"underscore and a rule ({', '.join(RULES)}), as in dpfp2_delta."
        )

    @property
    def inputs(self) -> tuple[ops.Input, ...]:
        """What its rule reads besides keys and values."""
        return () if self.rule == "softmax" else RULES[self.rule].inputs


def _has_number(feature_map):
    """Whether the map's label depends on one of the options that a model's number sets."""
    label = MAPS[feature_map].label
    return label(Model("", "", "", 1, 1)) != label(Model("", "", "", 2, 2))


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
    inputs, own = model.inputs, MAPS[model.feature_map].parameters
    keys = jax.random.split(key, max(4, 3 + len(inputs) + len(own)))

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
    for (name, first), own_key in zip(own.items(), keys[3 + len(inputs) :], strict=False):
        params[f"feature_map_{name}"] = first(own_key, model)
    features = lambda x: _features(model, params, key)(x)
    n_key = jax.eval_shape(features, jnp.zeros(D_KEY)).shape[-1]
    for i, input_key in zip(inputs, keys[3:], strict=False):
        params[i.name] = layer(input_key, n_in, i.width(n_key, size), n_in**-0.5)
    return params


def _features(model: Model, params: dict, key: Key[Array, ""]) -> Callable[[Array], Array]:
    """The feature map with its parameters, and with what it draws, drawn anew."""
    feature_map = MAPS[model.feature_map]
    arrays = {name: params[f"feature_map_{name}"] for name in feature_map.parameters}
    for i, (name, draw) in enumerate(feature_map.draws.items()):
        arrays[name] = draw(jax.random.fold_in(key, i) if i else key, model)
    return functools.partial(feature_map.of(model), **arrays)


def answers(
    model: Model, params: dict, batch: Batch, size: int, key: Key[Array, ""]
) -> Float[Array, "B Q S"]:
    """What the model reads for each query; `key` draws what its feature map draws (FAVOR+)."""
    embedding = params["embedding"]
    tables = {  # of values and of keys: there are fewer of them than pairs
        name: (params[name]["kernel"][:size], embedding @ params[name]["kernel"][size:])
        for name in ("k", *(i.name for i in model.inputs))
    }

    def project(name, keys, values):
        value_table, key_table = tables[name]
        return value_table[values] + key_table[keys] + params[name]["bias"][None, None]

    features = _features(model, params, key)
    q = (embedding @ params["q"]["kernel"])[batch.queries] + params["q"]["bias"][None, None]
    q = features(q)
    if model.rule == "softmax":
        return read_softmax(q, project("k", batch.keys, batch.values), batch.values, size)
    rule = RULES[model.rule]
    norm = ops.KEY_NORMS[rule.key_norm]

    def written(keys, values):
        """What the rule reads of pairs: keys [B, T, 1, K], and besides [B, T, 1, ...]."""
        k = norm(features(project("k", keys, values)))
        inputs = ((i, i.activation(project(i.name, keys, values))) for i in rule.inputs)
        return k[:, :, None], *(x[:, :, None] if i.wide else x for i, x in inputs)

    by_sum = rule.key_norm == "sum"  # of the query only after the read, with an eps
    q = q if by_sum else norm(q)
    total: Array | None
    if q.shape[1] == 1 and rule in (SUM, DELTA):
        out, total = read_by_weights(written, q, batch, size)
    else:
        out, total = read_memory(rule, written, q, batch, size)
    if rule == FWM:
        return jax.nn.standardize(out, epsilon=1e-5)
    divisor = q.sum(axis=-1) if by_sum else total
    return out if divisor is None else out / (divisor[..., None] + 1e-6)


def read_softmax(
    q: Float[Array, "B Q D"], k: Float[Array, "B T D"], values: Int[Array, "B T"], size: int
) -> Float[Array, "B Q S"]:
    """Softmax attention."""
    weights = jax.nn.softmax(jnp.einsum("bqd,btd->bqt", q, k) / D_KEY**0.5)
    if q.shape[1] == 1:
        return _weighted(weights[:, 0], values, size)
    return jnp.einsum("bqt,bts->bqs", weights, jax.nn.one_hot(values, size))


def read_by_weights(
    written: Callable[..., tuple], q: Float[Array, "B 1 K"], batch: Batch, size: int
) -> tuple[Float[Array, "B 1 S"], Float[Array, "B 1"]]:
    """One query without the memory, from what each value weighs: sum and delta rule.

    By blocks of pairs: the features of a block stay in the cache, and are computed again in the
    backward pass: on CPU half the time of all at once.

    Returns:
        What the memory answers; the sum of the weights, for the sum rule q . sum_t k_t.
    """
    n_batch, length = batch.keys.shape
    block = max(n for n in range(1, 41) if length % n == 0)
    block = block if block >= 10 else length

    @jax.checkpoint
    def read(q, tokens):
        weights, q = ops.read_weights(q, *written(*tokens))
        return q, weights[:, :, 0]

    pairs = (batch.keys, batch.values)
    blocks = tuple(x.reshape(n_batch, -1, block).swapaxes(0, 1) for x in pairs)
    _, weights = jax.lax.scan(read, q, blocks, reverse=True)
    weights = weights.swapaxes(0, 1).reshape(n_batch, length)
    return _weighted(weights, batch.values, size), weights.sum(axis=1)[:, None]


def read_memory(
    rule: ops.Rule, written: Callable[..., tuple], q: Float[Array, "B Q K"], batch: Batch, size: int
) -> tuple[Float[Array, "B Q S"], Float[Array, "B Q"] | None]:
    """Any number of queries, any rule: the memory itself.

    Returns:
        What it answers; q times the rule's sum of the keys, None where it has none.
    """
    k, *inputs = written(batch.keys, batch.values)
    v = jax.nn.one_hot(batch.values, size)[:, :, None]
    if rule == FWM:
        memory = ops.bounded_delta_rule(k, v, *inputs)
    else:
        _, memory = chunks.run(rule, k, k, v, tuple(inputs))
    out = jnp.einsum("bqk,bks->bqs", q, memory[:, 0])
    if rule.key_sums is None:
        return out, None
    key_sum = rule.key_sums(k, jnp.zeros_like(k[:, 0]), *inputs, last=True)
    return out, jnp.einsum("bqk,bk->bq", q, key_sum[:, 0])


def _weighted(weights, values, size):
    """The sum [B, 1, S] of one-hot values [B, T] with weights [B, T]."""
    rows = jnp.arange(len(values))[:, None]
    return jnp.zeros((len(values), size), weights.dtype).at[rows, values].add(weights)[:, None]


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
    return optimizer.adam(optimizer.constant(lr, 0, 1), clip=0.0)


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
