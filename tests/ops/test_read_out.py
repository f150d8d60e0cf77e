"""The final memory's read-out against the rules that write it, gradients included."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import exact, make_inputs, relative_error, results

from fwm.ops import bounded_delta_rule, read_weights, recurrent, sum_normalize
from fwm.ops.read_out import bounded_delta_step

KEYS = ["simplex", "nearly_equal", "rescaled"]


def last_token(x):
    return x[:, -1]


@cache  # One object for all cases, so that they share what jit compiled.
def by_rule(rule):
    """W_T^T q of a rule that begins in `weights`; and W_T, which is of no use here, as zero."""

    def read(q, k, v, beta, weights):
        beta = () if rule == "sum" else (beta,)
        _, weights = getattr(recurrent, f"{rule}_rule")(k, k, v, *beta, weights)
        return jnp.einsum("bnk,bnkv->bnv", q, weights, precision="highest"), jnp.zeros(())

    return read


@cache
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
    read = jax.jit(read_weights)
    whole, rest = read(q[:, -1], k, beta)
    late, r = read(q[:, -1], k[:, 13:], beta[:, 13:])
    early, r = read(r, k[:, :13], beta[:, :13])
    np.testing.assert_allclose(np.concatenate([early, late], axis=1), whole, rtol=1e-6)
    np.testing.assert_allclose(r, rest, rtol=1e-6)


def bounded_by_token(k, v, beta):
    """The definition, one token at a time; and no second result, as zero."""
    _, weights = recurrent.scan_tokens(bounded_delta_step, k, k, v, (beta,))
    return weights, jnp.zeros(())


def bounded(k, v, beta):
    return bounded_delta_rule(k, v, beta), jnp.zeros(())


@pytest.mark.parametrize(
    ("length", "k_scale", "v_scale"),
    [(1, 1, 0.1), (16, 1, 2), (37, 1, 0.1), (37, 1, 2), (37, 16, 1), (37, 0, 1)],
)
def test_bounded_delta_rule(length, k_scale, v_scale):
    _, k, v, beta, _ = make_inputs("simplex", length=length)
    inputs = [k * k_scale, v * v_scale, beta]  # within the bound, beyond it, every write too far
    expected = exact(bounded_by_token, inputs)
    actual = results(bounded, inputs)
    for x, y in zip(actual, expected, strict=True):
        assert relative_error(x, y) < 5e-6 if np.any(y) else not np.any(x)


def test_keys_too_small_for_the_square_of_their_sum_have_a_gradient():
    # Features of FAVOR+ at long keys: their sum's square is 0 in float32.
    x = 1e-25 * np.random.default_rng(2).exponential(size=(5, 8))
    value = lambda x: jnp.sum(jnp.sin(sum_normalize(x) * jnp.arange(8, dtype=x.dtype)[None]))
    with jax.enable_x64(True):
        expected = np.asarray(jax.jit(jax.grad(value))(jnp.array(x)))
    assert relative_error(jax.jit(jax.grad(value))(jnp.float32(x)), expected) < 2e-6
