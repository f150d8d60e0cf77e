"""Softmax attention against plain numpy loops over what each query may see."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import relative_error

from fwm.ops import softmax as module
from fwm.ops.softmax import causal_attention, relative_attention


def softmax(scores):
    scores = np.exp(scores - scores.max())
    return scores / scores.sum()


def draw(*shapes):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=shape).astype(np.float32)) for shape in shapes]


@pytest.mark.parametrize(("length", "window"), [(1, 0), (50, 0), (300, 0), (1, 2), (150, 40)])
def test_causal_attention(length, window):
    q, k, v = draw(*[(2, length, 2, 4)] * 3)
    ids = np.cumsum(np.random.default_rng(1).random((2, length)) < 0.02, axis=1)
    plain, parted = np.zeros(v.shape), np.zeros(v.shape)
    q_, k_, v_ = map(np.float64, (q, k, v))
    for b, t, n in np.ndindex(2, length, 2):
        seen = np.arange(max(0, t + 1 - window) if window else 0, t + 1)
        for out, keys in ((plain, seen), (parted, seen[ids[b, seen] == ids[b, t]])):
            weights = softmax(0.5 * k_[b, keys, n] @ q_[b, t, n])
            out[b, t, n] = weights @ v_[b, keys, n]
    attend = jax.jit(partial(causal_attention, scale=0.5, window=window))
    assert relative_error(attend(q, k, v), plain) < 1e-6
    assert relative_error(attend(q, k, v, segment_ids=jnp.asarray(ids)), parted) < 1e-6
    # The queries of the last tokens alone.
    assert relative_error(attend(q[:, length // 2 :], k, v), plain[:, length // 2 :]) < 1e-6


@pytest.mark.parametrize("window", [0, 70])
def test_causal_attention_in_blocks_equals_one_piece(window):
    q, k, v, dout = draw(*[(2, 200, 2, 4)] * 4)
    ids = jnp.arange(400).reshape(2, 200) // 130 if window else None

    @partial(jax.jit, static_argnums=0)
    def run(dropout):
        out, pull = jax.vjp(
            lambda *x: causal_attention(
                *x, scale=0.5, window=window, segment_ids=ids, dropout=dropout
            ),
            *map(jnp.asarray, (q, k, v)),
        )
        return [out, *pull(dout)]

    for a, b in zip(run(None), run(lambda probabilities: probabilities), strict=True):
        assert relative_error(a, np.float64(b)) < 2e-6


def test_causal_attention_sees_no_future():
    q, k, v = draw(*[(1, 200, 1, 4)] * 3)
    gradients = jax.jit(
        jax.grad(
            lambda *x: jnp.sum(causal_attention(*x, scale=1.0)[:, :150] ** 2), argnums=(0, 1, 2)
        )
    )(q, k, v)
    for gradient in gradients:
        np.testing.assert_array_equal(gradient[:, 150:], 0.0)


@pytest.mark.parametrize("same_length", [False, True])
@pytest.mark.parametrize("n_memory", [0, 3, 9])
def test_relative_attention(same_length, n_memory):
    n_batch, n_query, n_head, width, mem_len = 3, 5, 2, 4, 4
    n_slot = n_memory + n_query
    q, k, v, r, r_w, r_r = draw(
        (n_batch, n_query, n_head, width),
        *[(n_batch, n_slot, n_head, width)] * 2,
        (n_slot, n_head, width),
        *[(n_head, width)] * 2,
    )
    lengths = np.minimum(np.array([0, 2, n_memory], np.int32), n_memory)
    expected = np.zeros(q.shape)
    q_, k_, v_, r_, r_w_, r_r_ = map(np.float64, (q, k, v, r, r_w, r_r))
    for b, t, n in np.ndindex(n_batch, n_query, n_head):
        # As the official code counts: only the slots that exist, positions from the first of them.
        n_key = lengths[b] + n_query
        shift = n_query - (n_key - mem_len) if n_key > mem_len else n_query
        seen = [
            j for j in range(n_key) if j <= t + lengths[b] and not (same_length and j <= t - shift)
        ]
        slots = [n_slot - n_key + j for j in seen]
        scores = [
            (q_[b, t, n] + r_w_[n]) @ k_[b, s, n]
            + (q_[b, t, n] + r_r_[n]) @ r_[n_slot - 1 - (t + lengths[b] - j), n]
            for j, s in zip(seen, slots, strict=True)
        ]
        expected[b, t, n] = softmax(0.5 * np.array(scores)) @ v_[b, slots, n]

    @jax.jit
    def attend(q, k, v):
        options = {"length": jnp.asarray(lengths), "mem_len": mem_len, "same_length": same_length}
        return relative_attention(q, k, v, r, r_w, r_r, scale=0.5, **options)

    assert relative_error(attend(q, k, v), expected) < 2e-6
    # Slots that hold nothing are never read: not even a gradient flows there.
    dk = jax.grad(lambda k: jnp.sum(attend(q, k, v) ** 2))(k)
    for b, length in enumerate(lengths):
        np.testing.assert_array_equal(dk[b, : n_memory - length], 0.0)
    assert np.isfinite(dk).all()


@pytest.mark.parametrize("rows", [1, 3])
def test_relative_attention_in_blocks_equals_one_piece(rows, monkeypatch):
    n_batch, n_query, n_head, width, n_memory = 6, 40, 2, 4, 30
    n_slot = n_memory + n_query
    monkeypatch.setattr(module, "_CPU_SCORES", rows * n_head * n_query * n_slot)
    *inputs, dout = draw(
        (n_batch, n_query, n_head, width),
        *[(n_batch, n_slot, n_head, width)] * 2,
        (n_slot, n_head, width),
        *[(n_head, width)] * 2,
        (n_batch, n_query, n_head, width),
    )
    options = {"length": jnp.arange(n_batch), "mem_len": 50, "scale": 0.5}

    @partial(jax.jit, static_argnums=0)
    def run(dropout):
        out, pull = jax.vjp(
            lambda *x: relative_attention(*x, dropout=dropout, **options), *map(jnp.asarray, inputs)
        )
        return [out, *pull(dout)]

    for a, b in zip(run(None), run(lambda probabilities: probabilities), strict=True):
        assert relative_error(a, np.float64(b)) < 2e-6


@pytest.mark.parametrize(
    ("n_batch", "fitting", "expected"),
    [(96, 16, 16), (96, 10, 8), (7, 100, 7), (97, 16, 97), (4, 1, 1), (0, 3, 0)],
)
def test_rows_per_block(n_batch, fitting, expected):
    assert module.rows_per_block(n_batch, fitting) == expected


def test_dropout_is_applied_to_the_probabilities():
    q, k, v = draw(*[(1, 6, 1, 4)] * 3)
    shapes = []

    def dropout(probabilities):
        shapes.append(probabilities.shape)
        return probabilities * 2

    doubled = causal_attention(q, k, v, scale=1.0, dropout=dropout)
    once = causal_attention(q, k, v, scale=1.0, dropout=lambda probabilities: probabilities)
    np.testing.assert_allclose(doubled, 2 * once, rtol=1e-6)
    # All in one piece, also those of keys before every window.
    causal_attention(q[:, -3:], k, v, scale=1.0, window=2, dropout=dropout)
    assert shapes == [(1, 1, 6, 6), (1, 1, 3, 6)]


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_causal_attention_with_scores_of_any_size(platform, monkeypatch):
    """Where a row's largest score is not taken off first, and where it is."""
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    arrays = draw(*[(1, 70, 2, 4)] * 4)

    def run(q, k, v, dout, dropout=None):
        attend = partial(causal_attention, scale=0.5, dropout=dropout)
        out, pull = jax.vjp(attend, q, k, v)
        return [out, *pull(dout)]

    for size in (1, 20):
        given = [size * arrays[0], *arrays[1:]]
        assert bool(module._any_large(0.5, *given[:2])) == (size > 1)
        with jax.enable_x64(True):
            wide = [jnp.asarray(x, jnp.float64) for x in given]
            expected = [np.asarray(x) for x in jax.jit(partial(run, dropout=lambda p: p))(*wide)]
        for a, b in zip(jax.jit(run)(*given), expected, strict=True):
            assert relative_error(a, b) < 2e-5
