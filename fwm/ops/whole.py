"""The delta rule for all tokens at once: its form where few large launches are what counts.

The equations of `rules` in another order. With X = (I + S)^-1 of a chunk, H = diag(beta) X^T K:

    W' = W + H^T (V - K W)        U = X diag(beta) (V - K W)        out = Q W + tril(Q K^T) U

From chunk to chunk go the [K, V] matrices of the first equation alone, as W + (H^T V - (H^T K) W);
all else is one matmul each for all chunks, on [R, C, F], where R are chunks times rows of the batch
times heads. The backward pass is the same backwards, and keeps X, U and the memories between
chunks.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from fwm.ops.inverse import unit_inverse_by_halves


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def delta_whole(
    size: int,
    weights: Float[Array, "B N K V"],
    q: Float[Array, "B T N K"],
    k: Float[Array, "B T N K"],
    v: Float[Array, "B T N V"],
    beta: Float[Array, "B T N 1"],
) -> tuple[Float[Array, "B T N V"], Float[Array, "B N K V"]]:
    """`rules.delta_rule` by chunks of `size` tokens, of which T is a multiple.

    Where v is bfloat16 so are the factors of matmuls, except in the inverse and between chunks.
    """
    return _forward(size, weights, q, k, v, beta)[0]


def _forward(size, weights, q, k, v, beta):
    q_c, k_c, v_c, beta_c = (_cut(size, x, weights.dtype) for x in (q, k, v, beta))
    factor, product = _products(v.dtype, weights.dtype)
    inverse = factor(unit_inverse_by_halves(beta_c * _overlaps(product, k_c)))
    h = beta_c * product("rts,rtk->rsk", inverse, k_c)
    erase, change = product("rtk,rtj->rkj", h, k_c), product("rtk,rtv->rkv", h, v_c)
    weights, before = _scan(weights, erase, change)
    before = factor(before)
    errors = beta_c * (v_c - product("rtk,rkv->rtv", k_c, before))
    written = factor(product("rts,rsv->rtv", inverse, errors))
    out = product("rtk,rkv->rtv", q_c, before)
    out = out + product("rts,rsv->rtv", _reads(product, q_c, k_c), written)
    kept = checkpoint_name((inverse, before, written), "memory")
    return (_join(out, v), weights), (kept, (q, k, v, beta))


def _backward(size, residuals, cotangents):
    # What the forward pass made for itself is made anew, not kept: where one program holds both,
    # XLA would see that it is the same.
    (inverse, before, written), tokens = jax.lax.optimization_barrier(residuals)
    dout, dweights = cotangents
    q, k, v, beta, dout = (_cut(size, x, dweights.dtype) for x in (*tokens, dout))
    product = _products(tokens[2].dtype, dweights.dtype)[1]
    # z is the gradient of diag(beta) (V - K W): first without what comes from later chunks.
    z = product("rts,rtv->rsv", _reads(product, q, k), dout)
    z = product("rts,rtv->rsv", inverse, z)
    h, beta_k = product("rts,rtk->rsk", inverse, k), beta * k
    erase = product("rtk,rtj->rkj", beta_k, h)
    change = product("rtk,rtv->rkv", q, dout) - product("rtk,rtv->rkv", beta_k, z)
    dweights, after = _scan(dweights, erase, change, reverse=True)
    z = z + product("rtk,rkv->rtv", h, after)
    # What each token found wrong: U = beta errors, but beta may be 0.
    errors = v - product("rtk,rkv->rtv", k, before)
    errors = errors - product("rts,rsv->rtv", _overlaps(product, k), written)
    dbeta, dv = jnp.sum(z * errors, axis=-1, keepdims=True), beta * z
    dreads = product("rtv,rsv->rts", dout, written) * _lower(size)
    doverlaps = product("rtv,rsv->rts", dv, written) * _lower(size, -1)
    dq = product("rtv,rkv->rtk", dout, before)
    dq = dq + product("rts,rsk->rtk", dreads, k)
    dk = product("rts,rtk->rsk", dreads, q)
    dk = dk + product("rtv,rkv->rtk", written, after)
    dk = dk - product("rtv,rkv->rtk", dv, before)
    dk = dk - product("rts,rsk->rtk", doverlaps + doverlaps.mT, k)
    return dweights, *map(_join, (dq, dk, dv, dbeta), tokens)


delta_whole.defvjp(_forward, _backward)


def _cut(size, x, dtype):
    """[B, T, N, F] as [R, C, F], R chunks times B times N."""
    n_batch, length, n_head, width = x.shape
    x = x.astype(dtype).reshape(n_batch, length // size, size, n_head, width)
    return x.transpose(1, 0, 3, 2, 4).reshape(-1, size, width)


def _join(x, like):
    """The inverse of `_cut`, for an array of the shape and dtype of `like`."""
    n_batch, _, n_head, _ = like.shape
    x = x.astype(like.dtype).reshape(-1, n_batch, n_head, *x.shape[1:])
    return x.transpose(1, 0, 3, 2, 4).reshape(like.shape)


def _products(given, dtype):
    """What rounds a factor, and an einsum of rounded factors that sums in `dtype`."""
    low = given if given == jnp.bfloat16 else dtype
    factor = lambda x: x.astype(low)

    def product(subscripts, a, b):
        # XLA would make one product of two that share a factor, copying the other two together.
        a, b = jax.lax.optimization_barrier((factor(a), factor(b)))
        return jnp.einsum(subscripts, a, b, preferred_element_type=dtype)

    return factor, product


def _lower(size, diagonal=0):
    """1 in the lower triangle: an array that exists, so that a matmul multiplies what it writes."""
    return jax.lax.optimization_barrier(jnp.tri(size, k=diagonal))[None]


def _overlaps(product, k):
    return product("rtk,rsk->rts", k, k) * _lower(k.shape[1], -1)


def _reads(product, q, k):
    return product("rtk,rsk->rts", q, k) * _lower(k.shape[1])


def _scan(weights, erase, change, reverse=False):
    """W' = W + (change - erase W) from chunk to chunk: the last W, and the one before each."""
    start = weights.reshape(-1, *weights.shape[2:])
    erase, change = (x.reshape(-1, len(start), *x.shape[1:]) for x in (erase, change))

    def step(w, chunk):
        erase, change = chunk
        return w + (change - jnp.einsum("rkj,rjv->rkv", erase, w)), w

    n_chunk = len(erase)
    unroll = n_chunk if n_chunk <= 8 else 1  # an iteration of a loop has two launches more
    last, before = jax.lax.scan(step, start, (erase, change), reverse=reverse, unroll=unroll)
    return last.reshape(weights.shape), before.reshape(-1, *before.shape[2:])
