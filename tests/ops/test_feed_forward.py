"""The feed-forward network, its gradient by hand, against its definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fwm.layers import Dropout, FeedForward
from fwm.layers.parts import INNER_SITE, OUTER_SITE
from fwm.ops import feed_forward
from fwm.ops.dropout import drop, keep_mask, keep_scale

ROWS = Dropout(jax.random.key(5), jnp.arange(4))


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
