"""The update rules one token at a time: the definition that the fast forms are tested against."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def sum_rule(
    q: Float[Array, "B T N K"],
    k: Float[Array, "B T N K"],
    v: Float[Array, "B T N V"],
    weights: Float[Array, "B N K V"] | None = None,
) -> tuple[Float[Array, "B T N V"], Float[Array, "B N K V"]]:
    """W_t = W_(t-1) + k_t v_t^T; out_t = W_t^T q_t (paper, equations 17-18)."""

    def step(w, token):
        q, k, v = token
        w = w + k[..., :, None] * v[..., None, :]
        return w, jnp.einsum("bnk,bnkv->bnv", q, w, precision="highest")

    return _scan_tokens(step, (q, k, v), v, weights)


def delta_rule(
    q: Float[Array, "B T N K"],
    k: Float[Array, "B T N K"],
    v: Float[Array, "B T N V"],
    beta: Float[Array, "B T N"],
    weights: Float[Array, "B N K V"] | None = None,
) -> tuple[Float[Array, "B T N V"], Float[Array, "B N K V"]]:
    """W_t = W_(t-1) + beta_t k_t (v_t - W_(t-1)^T k_t)^T; out_t = W_t^T q_t (section 4.2)."""

    def step(w, token):
        q, k, v, beta = token
        change = beta[..., None] * (v - jnp.einsum("bnk,bnkv->bnv", k, w, precision="highest"))
        w = w + k[..., :, None] * change[..., None, :]
        return w, jnp.einsum("bnk,bnkv->bnv", q, w, precision="highest")

    return _scan_tokens(step, (q, k, v, beta), v, weights)


def _scan_tokens(step, inputs, v, weights):
    """Scan `step` over time, in float32 at least, from `weights` or zeros."""
    dtype = np.promote_types(np.float32, v.dtype)
    if weights is None:
        weights = jnp.zeros((v.shape[0], v.shape[2], inputs[0].shape[3], v.shape[3]), dtype)
    tokens = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0).astype(dtype), inputs)
    weights, out = jax.lax.scan(step, weights.astype(dtype), tokens)
    return jnp.moveaxis(out, 0, 1).astype(v.dtype), weights
