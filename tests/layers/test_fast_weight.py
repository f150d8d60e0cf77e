"""The wider family's layers: any split, token by token, gradients, training; what they refuse."""

import importlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_configs import WIDER

from fwm.layers import FastWeightAttention
from fwm.model import build_config

B, T, D, SPLIT = 2, 9, 8, 2  # the first part is shorter than a convolution


def layer(variant, **changes):
    fields = importlib.import_module(f"configs.{variant}").get_config().model.to_dict()
    fields |= {"d_model": D, "n_head": 2, "d_head": 4} | changes
    return build_config(fields, 9).make_mixers()[0]


@pytest.mark.parametrize("variant", WIDER)
def test_any_split_token_by_token_and_training(variant):
    mixer = layer(variant)
    rng = np.random.default_rng(1)
    x, other, target = rng.normal(size=(3, B, T, D)).astype(np.float32)

    @jax.jit
    def everything(params, x):
        def loss(params):
            first, carried = mixer.apply(params, x[:, :SPLIT], mixer.empty(B, D))
            second, carried = mixer.apply(params, x[:, SPLIT:], carried)
            y = jnp.concatenate([first, second], axis=1)
            return jnp.mean((y - target) ** 2), (y, carried)

        def update(params, _):
            (value, parts), grads = jax.value_and_grad(loss, has_aux=True)(params)
            return jax.tree.map(lambda p, g: p - 0.02 * jnp.sign(g), params, grads), (
                value, parts, grads
            )  # fmt: skip

        def token(carried, x):
            y, carried = mixer.apply(params, x[:, None], carried)
            return carried, y[:, 0]

        _, (losses, *first) = jax.lax.scan(update, params, length=20)
        parts, grads = jax.tree.map(lambda leaf: leaf[0], first)
        carried, outs = jax.lax.scan(token, mixer.empty(B, D), x.swapaxes(0, 1))
        whole = mixer.apply(params, x)
        return whole, parts, (outs.swapaxes(0, 1), carried), losses, grads

    params = jax.jit(mixer.init)(jax.random.key(1), x)
    moved = lambda p: p + 0.3 * rng.normal(size=p.shape).astype(np.float32)
    params = jax.tree.map(moved, jax.device_get(params))
    whole, parts, tokens, losses, grads = jax.device_get(everything(params, x))
    assert np.ptp(whole[0]) > 0.1
    for found in (parts, tokens):
        jax.tree.map(partial(np.testing.assert_allclose, atol=2e-5), found, whole)
    assert losses[-1] < 0.8 * losses[0]
    for path, gradient in jax.tree.leaves_with_path(grads):
        assert np.isfinite(gradient).all(), path
        assert np.any(gradient != 0), path
    # Later tokens change nothing before them, not one bit.
    later = np.concatenate([x[:, :SPLIT], other[:, SPLIT:]], axis=1)
    changed, before = (np.asarray(y[0][0]) for y in (everything(params, later), [whole]))
    np.testing.assert_array_equal(changed[:, :SPLIT], before[:, :SPLIT])
    assert np.all(changed[:, SPLIT:] != before[:, SPLIT:])


def test_what_older_layers_carry_stays_as_it_was():
    state = FastWeightAttention(n_head=2, d_head=4, parent=None).empty(B, D)
    assert jax.tree.map(jnp.shape, state) == ((B, 2, 16, 4), (B, 2, 16))
