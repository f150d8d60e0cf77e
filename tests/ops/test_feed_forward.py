"""The feed-forward network, its gradient by hand, against its definition."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fwm.layers import Dropout, FeedForward
from fwm.layers.parts import INNER_SITE, OUTER_SITE
from fwm.ops import feed_forward
from fwm.ops.dropout import drop, keep_mask, keep_scale

ROWS = Dropout(jax.random.key(5), jnp.arange(4))


@cache
def make(rate, wide=12, dtype=jnp.float32):
    """The module, and its parameters with some noise."""
    module = FeedForward(wide, dropout=rate, dtype=dtype)

    @jax.jit
    def parameters():
        params = module.init(jax.random.key(1), jnp.zeros((1, 1, 8), dtype))
        noise = lambda p: 0.3 * jax.random.normal(jax.random.key(2), p.shape)
        return jax.tree.map(lambda p: p + noise(p), params)

    return module, parameters()


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def plain(params, x, source, rate):
    """The definition, differentiated by jax."""
    affine = [
        params["params"][name][part] for name in ("inner", "outer") for part in ("kernel", "bias")
    ]
    keep = None
    if source is not None:
        shape = (*x.shape[:-1], affine[0].shape[1])
        keep = keep_mask(source, INNER_SITE, rate, shape).reshape(-1, shape[-1])
    rows = x.reshape(-1, x.shape[-1])
    out = feed_forward.definition(keep_scale(rate), rows, keep, *affine)
    return drop(out.reshape(x.shape), source, OUTER_SITE, rate)


@pytest.mark.parametrize(
    "length", [6, 3000, 2057], ids=["one part", "three parts", "no even parts"]
)
@pytest.mark.parametrize("source", [None, ROWS], ids=["evaluation", "dropout"])
@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_feed_forward_and_its_gradients(platform, source, length, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    x, weights = normal(0, 4, length, 8), normal(3, 4, length, 8)
    module, params = make(0.3)

    def fast(params, x):
        return jnp.mean(module.apply(params, x, source) * weights)

    def slow(params, x):
        return jnp.mean(plain(params, x, source, 0.3) * weights)

    @jax.jit
    def both(params, x):
        return jax.value_and_grad(fast, (0, 1))(params, x), jax.value_and_grad(slow, (0, 1))(
            params, x
        )

    (fast_value, fast_gradient), (slow_value, slow_gradient) = both(params, x)
    np.testing.assert_allclose(fast_value, slow_value, rtol=1e-5, atol=1e-7)
    for a, b in zip(jax.tree.leaves(fast_gradient), jax.tree.leaves(slow_gradient), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6 * np.abs(b).max())


def test_feed_forward_in_bfloat16_sums_gradients_in_float32():
    x = normal(0, 4, 512, 8).astype(jnp.bfloat16)
    module, params = make(0.0, dtype=jnp.bfloat16)

    def loss(params):
        return jnp.mean(module.apply(params, x).astype(jnp.float32) ** 2)

    for g in map(np.asarray, jax.tree.leaves(jax.jit(jax.grad(loss))(params))):
        assert g.dtype == np.float32
        assert (g.astype(jnp.bfloat16).astype(np.float32) != g).any()


def test_the_backward_pass_keeps_one_wide_array():
    """Of the [M, F] arrays only the dropped-out relu survives the forward pass."""
    x = jnp.ones((4, 16, 8))
    module = FeedForward(64, dropout=0.3)
    params = jax.eval_shape(module.init, jax.random.key(1), x)
    apply = lambda p, x: module.apply(p, x, ROWS)
    pull = jax.eval_shape(lambda p, x: jax.vjp(apply, p, x)[1], params, x)
    wide = [leaf for leaf in jax.tree.leaves(pull) if leaf.size >= 4 * 16 * 64]
    assert len(wide) == 1
