"""What is written by hand in the layers: dropout's random bits, the feed-forward network."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.random import threefry_2x32

from fwm import layers
from fwm.layers import Dropout, FeedForward

ROWS = Dropout(jax.random.key(5), jnp.arange(4))


def test_random_words_are_those_of_jax():
    key = jnp.array([1, 0xDEADBEEF], jnp.uint32)
    low = jnp.arange(1000, dtype=jnp.uint32)
    high = jnp.array([0, 77, 0xFFFFFFFF], jnp.uint32)
    words = layers.threefry(key, high[:, None], low[None])
    for i in range(3):
        expected = threefry_2x32(key, jnp.concatenate([jnp.full(1000, high[i]), low]))
        np.testing.assert_array_equal(jnp.concatenate([w[i] for w in words]), expected)


@pytest.mark.parametrize("rate", [0.1, 0.4])
def test_dropout_keeps_the_mean_in_every_row(rate):
    x = jnp.ones((4, 300, 331))  # 99300 elements: not a multiple of four in every axis
    out = layers.dropout(x, ROWS, 1, rate)
    np.testing.assert_allclose(jnp.mean(out == 0, axis=(1, 2)), rate, atol=5e-3)
    np.testing.assert_allclose(jnp.mean(out, axis=(1, 2)), 1.0, atol=1e-2)
    masks = (out == 0).astype(jnp.float32).reshape(4, -1) - rate
    correlation = masks @ masks.T / masks.shape[1] / (rate * (1 - rate))
    np.testing.assert_allclose(correlation, np.eye(4), atol=2e-2)


def test_dropout_masks_belong_to_the_row_of_the_global_batch_and_to_the_site():
    x = jnp.ones((4, 5, 7))
    whole = layers.dropout(x, ROWS, 1, 0.5)
    half = layers.dropout(x[:2], Dropout(ROWS.key, jnp.array([2, 3])), 1, 0.5)
    np.testing.assert_array_equal(whole[2:], half)
    assert (layers.dropout(x, ROWS, 2, 0.5) != whole).any()


def plain(params, x, source, rate):
    """The feed-forward network as one writes it down, differentiated by jax."""
    inner, outer = params["params"]["inner"], params["params"]["outer"]
    y = nn.relu(x @ inner["kernel"] + inner["bias"][None, None])
    y = layers.dropout(y, source, layers.INNER_SITE, rate)
    out = y @ outer["kernel"] + outer["bias"][None, None]
    return layers.dropout(out, source, layers.OUTER_SITE, rate)


@pytest.mark.parametrize(
    "length", [6, 3000, 2057], ids=["one part", "three parts", "no even parts"]
)
@pytest.mark.parametrize("source", [None, ROWS], ids=["evaluation", "dropout"])
def test_feed_forward_and_its_gradients(source, length):
    x = jax.random.normal(jax.random.key(0), (4, length, 8))
    module = FeedForward(12, dropout=0.3)
    params = module.init(jax.random.key(1), x)
    params = jax.tree.map(lambda p: p + 0.3 * jax.random.normal(jax.random.key(2), p.shape), params)
    weights = jax.random.normal(jax.random.key(3), x.shape)

    def fast(params, x):
        return jnp.mean(module.apply(params, x, source) * weights)

    def slow(params, x):
        return jnp.mean(plain(params, x, source, 0.3) * weights)

    fast_value, fast_gradient = jax.value_and_grad(fast, (0, 1))(params, x)
    slow_value, slow_gradient = jax.value_and_grad(slow, (0, 1))(params, x)
    np.testing.assert_allclose(fast_value, slow_value, rtol=1e-5, atol=1e-7)
    for a, b in zip(jax.tree.leaves(fast_gradient), jax.tree.leaves(slow_gradient), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6 * float(jnp.abs(b).max()))


def test_feed_forward_in_bfloat16_sums_gradients_in_float32():
    x = jax.random.normal(jax.random.key(0), (4, 512, 8), jnp.bfloat16)
    module = FeedForward(12, dtype=jnp.bfloat16)
    params = module.init(jax.random.key(1), x)

    def loss(params):
        return jnp.mean(module.apply(params, x).astype(jnp.float32) ** 2)

    for g in jax.tree.leaves(jax.grad(loss)(params)):
        assert g.dtype == jnp.float32
        assert (g.astype(jnp.bfloat16).astype(jnp.float32) != g).any()


def test_the_backward_pass_keeps_one_wide_array():
    """Of the [M, F] arrays only the dropped-out relu survives the forward pass."""
    x = jnp.ones((4, 16, 8))
    module = FeedForward(64, dropout=0.3)
    params = module.init(jax.random.key(1), x)
    _, pull = jax.vjp(lambda p, x: module.apply(p, x, ROWS), params, x)
    wide = [leaf for leaf in jax.tree.leaves(pull) if leaf.size >= 4 * 16 * 64]
    assert len(wide) == 1
