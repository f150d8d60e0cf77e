"""The final memory alone: read by one query without the memory, and the rule of an earlier paper.

Where only the last state W_T counts, one query reads it in O(T (K + V)) instead of O(T K V):
W_T^T q is a sum of the values, and their weights need the keys only.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from fwm.ops.checks import check
from fwm.ops.recurrent import delta_step


def read_weights(
    q: Float[Array, "B N K"],
    k: Float[Array, "B T N K"],
    beta: Float[Array, "B T N"] | None = None,
) -> tuple[Float[Array, "B T N"], Float[Array, "B N K"]]:
    """What each value weighs when the memory that was written with `k` is read with `q`.

    The delta rule's recurrence runs on the query, backwards in time: from r = q, at every token
    c_t = beta_t k_t . r, then r <- r - c_t k_t. With the final state W_T of a rule that began in
    W_0, W_T^T q = sum_t c_t v_t + W_0^T r. The sum rule (`beta` None): c_t = k_t . q and r = q.

    Args:
        q: one query per row and head, already mapped to features, as k.
        k: the keys, in the order in which they were written.
        beta: write strengths of the delta rule; None for the sum rule.

    Returns:
        c and r, in float32 at least.
    """
    strengths = {} if beta is None else {"beta": (beta, "B T N")}
    check("read_weights", q=(q, "B N K"), k=(k, "B T N K"), **strengths)
    dtype = np.promote_types(np.float32, k.dtype)
    q, k = q.astype(dtype), k.astype(dtype)
    if beta is None:
        return jnp.einsum("bnk,btnk->btn", q, k, precision="highest"), q
    # Rows and heads as one axis: with an axis more XLA's CPU backend takes three times as long.
    k = jnp.moveaxis(k, 1, 0).reshape(k.shape[1], -1, k.shape[3])
    beta = jnp.moveaxis(beta.astype(dtype), 1, 0).reshape(k.shape[:2])
    c, r = _read_delta(q.reshape(k.shape[1:]), k, beta)
    return jnp.moveaxis(c.reshape(len(k), *q.shape[:2]), 0, 1), r.reshape(q.shape)


@jax.custom_vjp
def _read_delta(q, k, beta):
    return _read_delta_forward(q, k, beta)[0]


def _read_delta_forward(q, k, beta):
    def step(r, token):
        k, beta = token
        overlap = jnp.sum(k * r, axis=-1)
        return r - (beta * overlap)[..., None] * k, (overlap, r)

    r, (overlaps, queries) = jax.lax.scan(step, q, (k, beta), reverse=True)
    return (beta * overlaps, r), (k, beta, overlaps, queries)


def _read_delta_backward(kept, cotangents):
    # By hand a third faster than what autodiff makes of the scan: dk is written once.
    dc, dr = cotangents

    def step(dr, token):
        k, beta, overlap, r, dc = token
        derror = dc - jnp.sum(k * dr, axis=-1)
        doverlap, c = (beta * derror)[..., None], (beta * overlap)[..., None]
        return dr + doverlap * k, (doverlap * r - c * dr, overlap * derror)

    dq, (dk, dbeta) = jax.lax.scan(step, dr, (*kept, dc))
    return dq, dk, dbeta


_read_delta.defvjp(_read_delta_forward, _read_delta_backward)


def bounded_delta_step(w: Array, k: Array, v: Array, beta: Array) -> Array:
    """W + beta k (v - W^T k)^T, divided by max(|W|_F, 1), each head by itself."""
    w = delta_step(w, k, v, beta)
    return w / jnp.sqrt(jnp.maximum(jnp.sum(w * w, axis=(-2, -1), keepdims=True), 1.0))


def bounded_delta_rule(
    k: Float[Array, "B T N K"], v: Float[Array, "B T N V"], beta: Float[Array, "B T N"]
) -> Float[Array, "B N K V"]:
    """The final state of the fast weight memory of Schlag et al. 2021 (arXiv 2011.07831).

    From W = 0, at every token `bounded_delta_step`. (The synthetic experiments' published code does
    not divide after the very first token.) Reads nothing on the way; accumulates in float32 at
    least.

    By chunks, in which W_t = c W + sum_(s <= t) c_s k_s e_s^T with W the state before the chunk: a
    token needs W^T k_t, from one matmul for the whole chunk, the overlaps k_s . k_t, and the norm,
    from |W + k e^T|^2 = |W|^2 + 2 (W^T k) . e + |k|^2 |e|^2. Each division shrinks c and all c_s.
    """
    check("bounded_delta_rule", k=(k, "B T N K"), v=(v, "B T N V"), beta=(beta, "B T N"))
    dtype = np.promote_types(np.float32, v.dtype)
    n_batch, length, n_head, n_key = k.shape
    size = min(length, 16)

    def chunks(x):  # [chunk, B N, C, ...]
        # Zeros in front write nothing into the empty memory.
        x = jnp.moveaxis(x, 2, 1).astype(dtype).reshape(n_batch * n_head, length, *x.shape[3:])
        x = jnp.pad(x, [(0, 0), (-length % size, 0)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(len(x), -1, size, *x.shape[2:]), 1, 0)

    def step(carry, token):
        scale, scales, changes, square = carry
        i, read, overlap, v, beta = token
        read = scale * read + _product("rc,rcv->rv", overlap * scales, changes)
        change = beta[:, None] * (v - read)
        square += jnp.sum(
            change * (2 * read + overlap[:, i, None] * change), axis=-1, keepdims=True
        )
        # The maximum inside the root: at W = 0 the gradient of the root is infinite.
        norm = jnp.sqrt(jnp.maximum(square, 1.0))
        scales, changes = scales.at[:, i].set(1.0) / norm, changes.at[:, i].set(change)
        return (scale / norm, scales, changes, jnp.minimum(square, 1.0)), None

    @jax.checkpoint  # the backward pass keeps the states between chunks only
    def chunk(w, tokens):
        k, v, beta = tokens
        reads, overlaps = _product("rck,rkv->crv", k, w), _product("rck,rdk->crd", k, k)
        square = jnp.sum(w * w, axis=(1, 2))[:, None]
        start = jnp.ones_like(square), jnp.zeros_like(beta), jnp.zeros_like(v), square
        each = jnp.arange(size), reads, overlaps, v.swapaxes(0, 1), beta.T
        (scale, scales, changes, _), _ = jax.lax.scan(step, start, each)
        written = _product("rck,rcv->rkv", k, scales[..., None] * changes)
        return scale[..., None] * w + written, None

    start = jnp.zeros((n_batch * n_head, n_key, v.shape[-1]), dtype)
    weights, _ = jax.lax.scan(chunk, start, (chunks(k), chunks(v), chunks(beta)))
    return weights.reshape(n_batch, n_head, n_key, -1)


_product = functools.partial(jnp.einsum, precision="highest")
