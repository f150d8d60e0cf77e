"""Dropout's random words, rates and places."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.random import threefry_2x32

from fwm.ops.dropout import Dropout, drop, keep_mask, site_words, threefry

ROWS = Dropout(jax.random.key(5), jnp.arange(4))
masked = jax.jit(drop, static_argnums=(2, 3))


def test_random_words_are_those_of_jax():
    key = jnp.array([1, 0xDEADBEEF], jnp.uint32)
    low = jnp.arange(1000, dtype=jnp.uint32)
    high = jnp.array([0, 77, 0xFFFFFFFF], jnp.uint32)
    words = jax.jit(threefry)(key, high[:, None], low[None])
    reference = jax.jit(threefry_2x32)
    for i in range(3):
        expected = reference(key, np.concatenate([np.full(1000, high[i]), low]))
        np.testing.assert_array_equal(np.concatenate([np.asarray(w)[i] for w in words]), expected)


@pytest.mark.parametrize("rate", [0.1, 0.4])
def test_dropout_keeps_the_mean_in_every_row(rate):
    x = jnp.ones((4, 300, 331))  # 99300 elements: not a multiple of four in every axis
    out = np.asarray(masked(x, ROWS, 1, rate))
    np.testing.assert_allclose(np.mean(out == 0, axis=(1, 2)), rate, atol=5e-3)
    np.testing.assert_allclose(np.mean(out, axis=(1, 2)), 1.0, atol=1e-2)
    masks = (out == 0).astype(np.float32).reshape(4, -1) - np.float32(rate)
    correlation = masks @ masks.T / masks.shape[1] / (rate * (1 - rate))
    np.testing.assert_allclose(correlation, np.eye(4), atol=2e-2)


def test_dropout_masks_belong_to_the_row_of_the_global_batch_and_to_the_site():
    x = jnp.ones((4, 5, 7))
    whole = np.asarray(masked(x, ROWS, 1, 0.5))
    half = masked(x[:2], Dropout(ROWS.key, jnp.array([2, 3])), 1, 0.5)
    np.testing.assert_array_equal(whole[2:], half)
    assert (masked(x, ROWS, 2, 0.5) != whole).any()
    words = jax.vmap(site_words, (None, 0))(ROWS.key, jnp.arange(3))
    np.testing.assert_array_equal(masked(x, ROWS._replace(words=words), 1, 0.5), whole)


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_dropout_rate_and_scale(rate):
    x = jnp.ones((4, 50, 101))
    source = Dropout(jax.random.key(3), jnp.arange(4))
    y = np.asarray(masked(x, source, 0, rate))
    scale = 2**16 / round((1 - rate) * 2**16)
    assert set(np.unique(y)) == {0.0, np.float32(scale)}
    assert scale == pytest.approx(1 / (1 - rate), rel=1e-4)
    for row in y:  # within five standard deviations
        assert np.mean(row == 0) == pytest.approx(
            rate, abs=5 * (rate * (1 - rate) / row.size) ** 0.5
        )
    other_site = np.asarray(masked(x, source, 1, rate))
    masks = np.concatenate([y, other_site]).reshape(8, -1) != 0
    correlations = np.corrcoef(masks) - np.eye(8)
    assert np.max(np.abs(correlations)) < 5 / masks.shape[1] ** 0.5
    # Neighbours come from one random word.
    assert abs(np.corrcoef(masks[:, :-1].ravel(), masks[:, 1:].ravel())[0, 1]) < 0.03


def test_masks_are_the_same_everywhere(monkeypatch):
    shapes = [(4, 5, 7), (4, 8), (0, 3)]
    make = lambda shape: keep_mask(Dropout(ROWS.key, jnp.arange(shape[0])), 1, 0.4, shape)
    here = [make(shape) for shape in shapes]
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    for shape, mask in zip(shapes, here, strict=True):
        np.testing.assert_array_equal(make(shape), mask)


def test_no_dropout_is_the_identity():
    x = jnp.ones((2, 3))
    assert drop(x, None, 0, 0.5) is x
    assert drop(x, Dropout(jax.random.key(0), jnp.arange(2)), 0, 0.0) is x
