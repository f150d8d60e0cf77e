"""The final memory's read-out against the rules that write it, gradients included."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import exact, make_inputs, relative_error, results

from fwm.ops import bounded_delta_rule, read_weights, recurrent, sum_normalize

KEYS = ["simplex", "nearly_equal", "rescaled"]


def last_token(x):
    return x[:, -1]


def by_rule(rule):
    """W_T^T q of a rule that begins in `weights`; and W_T, which is of no use here, as zero."""

    def read(q, k, v, beta, weights):
        beta = () if rule == "sum" else (beta,)
        _, weights = getattr(recurrent, f"{rule}_rule")(k, k, v, *beta, weights)
        return jnp.einsum("bnk,bnkv->bnv", q, weights, precision="highest"), jnp.zeros(())

    return read


def by_query(rule):
    def read(q, k, v, beta, weights):
        c, r = read_weights(q, k, None if rule == "sum" else beta)
        out = jnp.einsum("btn,btnv->bnv", c, v, precision="highest")
        return out + jnp.einsum("bnk,bnkv->bnv", r, weights, precision="highest"), jnp.zeros(())

    return read


@pytest.mark.parametrize("rule", ["sum", "delta"])
@pytest.mark.parametrize("keys", KEYS)
@pytest.mark.parametrize("length", [1, 63])
def test_one_query_reads_what_the_final_memory_holds(rule, keys, length):
    q, *inputs = make_inputs(keys, length=length)
    inputs = [last_token(q), *inputs]
    expected = exact(by_rule(rule), inputs)
    for dtype, tolerance in ((np.float64, 1e-12), (np.float32, 5e-6)):
        with jax.enable_x64(dtype == np.float64):
            actual = results(by_query(rule), inputs, dtype=dtype)
        for x, y in zip(actual, expected, strict=True):
            if np.any(y):
                assert relative_error(x, y) < tolerance
            else:  # what the rule does not use
                assert not np.any(x)


def test_a_read_can_be_split():
    q, k, _, beta, _ = map(jnp.float32, make_inputs("simplex"))
    whole, rest = read_weights(q[:, -1], k, beta)
    late, r = read_weights(q[:, -1], k[:, 13:], beta[:, 13:])
    early, r = read_weights(r, k[:, :13], beta[:, :13])
    np.testing.assert_allclose(jnp.concatenate([early, late], axis=1), whole, rtol=1e-6)
    np.testing.assert_allclose(r, rest, rtol=1e-6)


def bounded_by_token(k, v, beta):
    """The definition, one row and head at a time, in numpy."""
    n_batch, length, n_head, n_key = k.shape
    w = np.zeros((n_batch, n_head, n_key, v.shape[-1]))
    for t in range(length):
        for b, n in np.ndindex(n_batch, n_head):
            error = v[b, t, n] - w[b, n].T @ k[b, t, n]
            new = w[b, n] + beta[b, t, n] * np.outer(k[b, t, n], error)
            w[b, n] = new / max(np.linalg.norm(new), 1)
    return w


@pytest.mark.parametrize("length", [1, 16, 37])
@pytest.mark.parametrize("scale", [0.1, 2.0])
def test_bounded_delta_rule(length, scale):
    _, k, v, beta, _ = make_inputs("simplex", length=length)
    v = v * scale  # below the bound at first, and beyond it
    expected = bounded_by_token(k, v, beta)
    actual = bounded_delta_rule(*map(jnp.float32, (k, v, beta)))
    assert relative_error(actual, expected) < 2e-6


def test_gradient_of_the_bounded_delta_rule():
    _, k, v, beta, _ = make_inputs("simplex", length=37)
    with jax.enable_x64(True):
        direction = np.random.default_rng(1).normal(size=k.shape)
        value = jax.jit(
            lambda k: jnp.sum(jnp.sin(3 * bounded_delta_rule(k, 2 * jnp.array(v), jnp.array(beta))))
        )
        slope = jax.grad(value)(jnp.array(k))
        difference = value(jnp.array(k + 1e-6 * direction)) - value(jnp.array(k - 1e-6 * direction))
        np.testing.assert_allclose(jnp.sum(slope * direction), difference / 2e-6, rtol=1e-6)


def test_keys_too_small_for_the_square_of_their_sum_have_a_gradient():
    # Features of FAVOR+ at long keys: their sum's square is 0 in float32.
    x = 1e-25 * np.random.default_rng(2).exponential(size=(5, 8))
    value = lambda x: jnp.sum(jnp.sin(sum_normalize(x) * jnp.arange(8, dtype=x.dtype)[None]))
    with jax.enable_x64(True):
        expected = np.asarray(jax.grad(value)(jnp.array(x)))
    assert relative_error(jax.grad(value)(jnp.float32(x)), expected) < 2e-6
