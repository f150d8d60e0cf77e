"""What the tests of the ops share: inputs of several kinds, gradients, a relative error."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest


def make_inputs(keys, n_batch=2, length=20, n_head=2, n_key=8, n_value=6):
    """q, k, v, beta, weights in float64; `keys` names a kind of keys and write strengths."""
    rng = np.random.default_rng(length)
    shape = (n_batch, length, n_head)
    q, k = rng.exponential(size=(2, *shape, n_key))
    q /= q.sum(-1, keepdims=True)
    beta = 1 / (1 + np.exp(-rng.normal(size=shape)))
    if keys == "simplex":
        k /= k.sum(-1, keepdims=True)
    elif keys == "nearly_equal":  # one unit vector, overwritten at nearly full strength
        k = k[:, :1] + 1e-2 * k
        k /= np.linalg.norm(k, axis=-1, keepdims=True)
        beta = 1 - 1e-3 * beta
    elif keys == "rescaled":  # as output_and_key makes them: strengths grow with t, far above 1
        k /= k.sum(-1, keepdims=True)
        d = ((np.cumsum(k, 1) - k) * k).sum(-1)
        d[:, 0] = 1
        beta, k = beta * d, k / (d + 1e-5)[..., None]
    v = rng.normal(size=(*shape, n_value))
    weights = rng.normal(size=(n_batch, n_head, n_key, n_value))
    return q, k, v, beta, weights


@partial(jax.jit, static_argnums=0)
def _values_and_gradients(rule, inputs, cotangents):
    values, pull = jax.vjp(rule, *inputs)
    rng = np.random.default_rng(7)
    given = (
        rng.normal(size=x.shape) if c is None else c
        for c, x in zip(cotangents, values, strict=True)
    )
    cotangents = tuple(jnp.asarray(c, x.dtype) for c, x in zip(given, values, strict=True))
    return [*values, *pull(cotangents)]


def results(rule, inputs, dout=None, dweights=None, dtype=np.float32):
    """[out, final state, the gradient to each input] of a rule, all as float64 numpy.

    What is compiled is shared by the calls with one and the same `rule`, inputs shaped alike.
    """
    inputs = [jnp.asarray(np.asarray(x, dtype)) for x in inputs]  # each cast would be compiled
    found = _values_and_gradients(rule, inputs, (dout, dweights))
    return [np.asarray(x, np.float64) for x in found]


def exact(rule, inputs, **cotangents):
    """The same in float64."""
    with jax.enable_x64(True):
        return results(rule, inputs, dtype=np.float64, **cotangents)


def float32(arrays):
    """The same tree of arrays as float32 jax arrays."""
    return jax.tree.map(lambda x: jnp.asarray(np.asarray(x, np.float32)), arrays)


def relative_error(actual, expected):
    """The largest difference over the largest value."""
    return np.max(np.abs(np.asarray(actual, np.float64) - expected)) / np.max(np.abs(expected))


@pytest.fixture
def golden(request):
    """The arrays of one golden file, the test's indirect parameter."""
    with np.load(request.param) as arrays:
        return dict(arrays)
