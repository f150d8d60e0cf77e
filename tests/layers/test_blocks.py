"""How a layer's two branches meet the residual, written out with the layer's own parts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fwm.layers import Block, FastWeightAttention, FeedForward, Norm, RelativeAttention, Shared
from fwm.layers import SoftmaxAttention as Softmax

X = jnp.asarray(np.random.default_rng(0).normal(size=(2, 7, 16)), jnp.float32)
SHARED = Shared(dict.fromkeys(("r_w_bias", "r_r_bias"), jnp.full((2, 8), 0.1)), None)
FAST = {"n_head": 2, "d_head": 8, "feature_map": "elu"}
MIXERS = {
    "fast weights": FastWeightAttention(**FAST, parent=None),
    "quadratic": FastWeightAttention(
        **FAST, update_rule="sum", attn_normalization="output", scale_output=False, parent=None
    ),
    "softmax": Softmax(2, 8, parent=None),
    "transformer_xl": RelativeAttention(2, 8, mem_len=5, parent=None),
}


@pytest.mark.parametrize("norm", ["post", "pre", "pre_lnorm"])
@pytest.mark.parametrize("name", MIXERS)
def test_residuals(name, norm):
    block = Block(MIXERS[name], d_inner=12, norm=norm)
    init = lambda: block.init(jax.random.key(1), X, None, SHARED)["params"]
    rng = np.random.default_rng(2)
    # About what they begin with: scales of norms at 1, the rest at 0.
    params = jax.tree.map_with_path(
        lambda path, p: jnp.asarray(
            (path[-1].key == "scale") + 0.4 * rng.normal(size=p.shape), jnp.float32
        ),
        jax.eval_shape(init),
    )
    run = lambda x, carried=None: block.apply({"params": params}, x, carried, SHARED)
    mix = lambda x, carried=None: MIXERS[name].apply(
        {"params": params["mixer"]}, x, carried, shared=SHARED
    )[0]
    ln_1, ln_2 = (
        lambda x, n=n: Norm().apply({"params": params[n]}, x) for n in ("mixer_norm", "ff_norm")
    )
    ff = lambda x: FeedForward(12).apply({"params": params["ff"]}, x)

    def expected(x):
        if norm == "post":
            x = ln_1(x + mix(x))
            return ln_2(x + ff(x))
        if norm == "pre_lnorm" and name == "fast weights":
            x = ln_1(x)
            x = x + mix(x)
        elif norm == "pre_lnorm" and name in ("quadratic", "softmax"):
            # The official toolkit makes q of x as it is.
            kernel = params["mixer"]["qkv"]["kernel"]
            q = jnp.einsum("btd,dnh->btnh", x, kernel[..., :8])
            k, v = jnp.split(jnp.einsum("btd,dnh->btnh", ln_1(x), kernel[..., 8:]), 2, axis=-1)
            if name == "softmax":
                weights = jnp.exp(jnp.einsum("btnh,bsnh->bnts", q, k) / 8**0.5)
            else:
                q, k = (jax.nn.elu(z) + 1 for z in (q, k))
                weights = jnp.einsum("btnh,bsnh->bnts", q, k) / 8**0.5
            weights = weights * jnp.tri(7)[None, None]
            eps = 0.0 if name == "softmax" else 1e-5
            weights = weights / (weights.sum(-1, keepdims=True) + eps)
            out = jnp.einsum("bnts,bsnh->btnh", weights, v)
            x = x + jnp.einsum("btnh,nhd->btd", out, params["mixer"]["out"]["kernel"])
        else:
            x = x + mix(ln_1(x))
        return x + ff(ln_2(x))

    @jax.jit
    def everything(x):
        whole, wanted = run(x)[0], expected(x)
        if MIXERS[name].carries == "never":
            return whole, wanted, whole[:, 4:]
        # In two parts as at once; what Transformer-XL remembers sees its memory alone.
        _, carried = run(x[:, :4])
        return whole, wanted, run(x[:, 4:], carried)[0]

    whole, wanted, second = jax.device_get(everything(X))
    np.testing.assert_allclose(whole, wanted, atol=2e-5)
    np.testing.assert_allclose(second, whole[:, 4:], atol=2e-5)
