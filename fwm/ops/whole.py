"""The delta rule for all tokens at once: its form where few large launches are what counts.

The equations of `rules` for what each token finds wrong, E with U = diag(beta) E, so that beta is
nowhere but in G = diag(beta) K. With X = (I + tril(K G^T, -1))^-1 of a chunk and H = X^T G:

    W' = W + H^T (V - K W)        E = X (V - K W)        out = Q W + tril(Q G^T) E

From chunk to chunk go the [K, V] matrices of the first equation alone, as W + (H^T V - (H^T K) W);
all else is one matmul each for all chunks, on [R, C, F], where R are chunks times rows of the batch
times heads. The backward pass is the same backwards, and keeps X, E and the memories between
chunks.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from fwm.ops.inverse import unit_inverse_by_halves


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def delta_whole(
    sizes: tuple[int, int],
    weights: Float[Array, "B N K V"],
    q: Float[Array, "B T N K"],
    k: Float[Array, "B T N K"],
    v: Float[Array, "B T N V"],
    beta: Float[Array, "B T N 1"],
) -> tuple[Float[Array, "B T N V"], Float[Array, "B N K V"]]:
    """`rules.delta_rule` by chunks of so many tokens, without and with a gradient.

    T is a multiple of both.
    Where v is bfloat16 so are the factors of matmuls, except in the inverse and between chunks.
    """
    return _forward(sizes[:1], weights, q, k, v, beta)[0]


def _forward(sizes, weights, q, k, v, beta):
    size = sizes[-1]
    product = _products(v, weights)
    arrays = (q, k, _scaled(k, beta), v)
    q_c, k_c, g, v_c = jax.lax.optimization_barrier([product.factor(_cut(size, x)) for x in arrays])
    lower = _lower(size, -1)
    inverse = product.factor(unit_inverse_by_halves(product("rtk,rsk->rts", k_c, g) * lower))
    h = product("rts,rtk->rsk", inverse, g)
    erase, change = product("rtk,rtj->rkj", h, k_c), product("rtk,rtv->rkv", h, v_c)
    weights, before = _scan(weights, erase, change)
    before = product.factor(before)
    wrong = v_c.astype(weights.dtype) - product("rtk,rkv->rtv", k_c, before)
    wrong = product.factor(product("rts,rsv->rtv", inverse, wrong))
    out = product("rtk,rkv->rtv", q_c, before)
    out = out + product("rts,rsv->rtv", _reads(product, q_c, g), wrong)
    kept = checkpoint_name((inverse, before, wrong), "memory")
    return (_join(out, v), weights), (kept, (q, k, v, beta))


def _backward(sizes, residuals, cotangents):
    size = sizes[-1]
    # What the forward pass made for itself is made anew, not kept: where one program holds both,
    # XLA would see that it is the same.
    (inverse, before, wrong), (q, k, v, beta) = jax.lax.optimization_barrier(residuals)
    dout, dweights = cotangents
    product = _products(v, dweights)
    arrays = (q, k, _scaled(k, beta), dout)
    q_c, k_c, g, dout = jax.lax.optimization_barrier(
        [product.factor(_cut(size, x)) for x in arrays]
    )
    # z is the gradient of V - K W, and so of V: first without what comes from later chunks.
    z = product("rts,rtv->rsv", _reads(product, q_c, g), dout)
    z = product("rts,rtv->rsv", inverse, z)
    h = product("rts,rtk->rsk", inverse, g)
    erase = product("rtk,rtj->rkj", k_c, h)
    change = product("rtk,rtv->rkv", q_c, dout) - product("rtk,rtv->rkv", k_c, z)
    dweights, after = _scan(dweights, erase, change, reverse=True)
    z = z + product("rtk,rkv->rtv", h, after)
    dreads = product("rtv,rsv->rts", dout, wrong) * _lower(size)
    doverlaps = product("rtv,rsv->rts", z, wrong) * _lower(size, -1)
    dq = product("rtv,rkv->rtk", dout, before)
    dq = dq + product("rts,rsk->rtk", dreads, g)
    less_dk = product("rts,rsk->rtk", doverlaps, g)
    less_dk = less_dk + product("rtv,rkv->rtk", z, before)
    dg = product("rts,rtk->rsk", dreads, q_c)
    dg = dg - product("rts,rtk->rsk", doverlaps, k_c)
    dg = dg + product("rtv,rkv->rtk", wrong, after)
    dbeta = jnp.sum(dg * k_c.astype(dg.dtype), axis=-1, keepdims=True)
    dk = dg * _cut(size, beta.astype(dg.dtype)) - less_dk
    return dweights, _join(dq, q), _join(dk, k), _join(z, v), _join(dbeta, beta)


delta_whole.defvjp(_forward, _backward)


def _scaled(k, beta):
    """diag(beta) k, in k's dtype."""
    wide = np.promote_types(np.float32, k.dtype)
    return (k.astype(wide) * beta.astype(wide)).astype(k.dtype)


def _cut(size, x):
    """[B, T, N, F] as [R, C, F], R chunks times B times N."""
    n_batch, length, n_head, width = x.shape
    x = x.reshape(n_batch, length // size, size, n_head, width)
    return x.transpose(1, 0, 3, 2, 4).reshape(-1, size, width)


def _join(x, like):
    """The inverse of `_cut`, for an array of the shape and dtype of `like`."""
    n_batch, _, n_head, _ = like.shape
    x = x.astype(like.dtype).reshape(-1, n_batch, n_head, *x.shape[1:])
    return x.transpose(1, 0, 3, 2, 4).reshape(like.shape)


class _Products(NamedTuple):
    """Matmuls whose factors are rounded to `low` and whose sums are made in `wide`."""

    low: jax.typing.DTypeLike
    wide: jax.typing.DTypeLike

    def factor(self, x: Array) -> Array:
        """x, rounded."""
        return x.astype(self.low)

    def __call__(self, subscripts: str, a: Array, b: Array) -> Array:
        """An einsum of two arrays that exist."""
        # XLA would make one product of two that share a factor, copying the other two together.
        a, b = jax.lax.optimization_barrier((self.factor(a), self.factor(b)))
        return jnp.einsum(subscripts, a, b, preferred_element_type=self.wide)


def _products(v: Array, weights: Array) -> _Products:
    return _Products(v.dtype if v.dtype == jnp.bfloat16 else weights.dtype, weights.dtype)


def _lower(size, diagonal=0):
    """1 in the lower triangle: an array that exists, so that a matmul multiplies what it writes."""
    return jax.lax.optimization_barrier(jnp.tri(size, k=diagonal))[None]


def _reads(product, q, g):
    return product("rtk,rsk->rts", q, g) * _lower(g.shape[1])


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
