"""The delta rule for all tokens at once: its form where few large launches are what counts.

The equations of `rules` for what each token finds wrong, E with U = diag(beta) E, so that beta is
nowhere but in G = diag(beta) K. With X = (I + tril(K G^T, -1))^-1 of a chunk and H = X^T G:

    W' = W + H^T (V - K W)        E = X (V - K W)        out = Q W + tril(Q G^T) E

From chunk to chunk go the [K, V] matrices of the first equation alone, as W + (H^T V - (H^T K) W);
all else is one matmul each for all chunks, on [R, C, F], where R are chunks times rows of the batch
times heads. The backward pass is the same backwards, and keeps X, E and the memories between
chunks.

With a decay per head, D what is left at token t of what s wrote, a of the memory before the chunk
at t, b at the chunk's end of what s wrote, and w there of that memory (`_Decays`), the products in
triangles are those times D, Q W and K W are a Q W and a K W, and W' = w W + (b G)^T E.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from fwm.ops.inverse import unit_inverse_by_halves


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def delta_whole(
    sizes: tuple[int, int],
    weights: Float[Array, "B N K V"],
    q: Float[Array, "B T N K"],
    k: Float[Array, "B T N K"],
    v: Float[Array, "B T N V"],
    beta: Float[Array, "B T N 1"],
    log_decay: Float[Array, "B T N 1"] | None = None,
) -> tuple[Float[Array, "B T N V"], Float[Array, "B N K V"]]:
    """`rules.delta_rule` by chunks of so many tokens, without and with a gradient.

    T is a multiple of both.
    Where v is bfloat16 so are the factors of matmuls, except in the inverse and between chunks.
    """
    return _forward(sizes[:1], weights, q, k, v, beta, log_decay)[0]


def _forward(sizes, weights, q, k, v, beta, log_decay):
    size = sizes[-1]
    product = _products(v, weights)
    decay = _decays(size, log_decay, weights.dtype)
    arrays = q_c, k_c, g, v_c = [_cut(size, x) for x in (q, k, _scaled(k, beta), v)]
    left = [] if decay.whole is None else [_decayed(k_c, decay.since), _decayed(g, decay.until)]
    q_c, k_c, g, v_c, *left = _existing(product, *arrays, *left)
    k_since, g_until = left or (k_c, g)
    overlaps = product("rtk,rsk->rts", k_c, g) * _lower(size, product.wide, -1)
    inverse = product.factor(unit_inverse_by_halves(_decayed(overlaps, decay.between)))
    h = product("rts,rtk->rsk", inverse, g_until)
    erase, change = product("rtk,rtj->rkj", h, k_since), product("rtk,rtv->rkv", h, v_c)
    last, before = _scan(weights, erase, change, decay.whole)
    before = product.factor(before)
    known = _decayed(product("rtk,rkv->rtv", k_c, before), decay.since)
    wrong = product.factor(product("rts,rsv->rtv", inverse, v_c.astype(last.dtype) - known))
    out = _decayed(product("rtk,rkv->rtv", q_c, before), decay.since)
    out = out + product("rts,rsv->rtv", _reads(product, q_c, g, decay), wrong)
    kept = checkpoint_name((inverse, before, wrong), "memory")
    given = (weights if log_decay is not None else None, q, k, v, beta, log_decay)
    return (_join(out, v), last), (kept, given)


def _backward(sizes, residuals, cotangents):
    size = sizes[-1]
    # What the forward pass made for itself is made anew, not kept: where one program holds both,
    # XLA would see that it is the same.
    kept, (weights, q, k, v, beta, log_decay) = jax.lax.optimization_barrier(residuals)
    inverse, before, wrong = kept
    dout, dweights = cotangents
    product = _products(v, dweights)
    decay = _decays(size, log_decay, dweights.dtype)
    arrays = q_c, k_c, g, _ = [_cut(size, x) for x in (q, k, _scaled(k, beta), dout)]
    left = []
    if decay.whole is not None:
        left = [_decayed(x, decay.since) for x in (q_c, k_c)] + [_decayed(g, decay.until)]
    q_c, k_c, g, dout, *left = _existing(product, *arrays, *left)
    q_since, k_since, g_until = left or (q_c, k_c, g)
    # z is the gradient of V - a K W, and so of V: first without what comes from later chunks.
    z = product("rts,rtv->rsv", _reads(product, q_c, g, decay), dout)
    z = product("rts,rtv->rsv", inverse, z)
    h = product("rts,rtk->rsk", inverse, g_until)
    erase = product("rtk,rtj->rkj", k_since, h)
    change = product("rtk,rtv->rkv", q_since, dout) - product("rtk,rtv->rkv", k_since, z)
    dweights, after = _scan(dweights, erase, change, decay.whole, reverse=True)
    z = z + product("rtk,rkv->rtv", h, after)
    dreads = product("rtv,rsv->rts", dout, wrong) * _lower(size, product.wide)
    dreads = _decayed(dreads, decay.between)
    doverlaps = product("rtv,rsv->rts", z, wrong) * _lower(size, product.wide, -1)
    doverlaps = _decayed(doverlaps, decay.between)
    dq = _decayed(product("rtv,rkv->rtk", dout, before), decay.since)
    dq = dq + product("rts,rsk->rtk", dreads, g)
    less_dk = product("rts,rsk->rtk", doverlaps, g)
    less_dk = less_dk + _decayed(product("rtv,rkv->rtk", z, before), decay.since)
    dg = product("rts,rtk->rsk", dreads, q_c)
    dg = dg - product("rts,rtk->rsk", doverlaps, k_c)
    dg = dg + _decayed(product("rtv,rkv->rtk", wrong, after), decay.until)
    dbeta = jnp.sum(dg * k_c.astype(dg.dtype), axis=-1, keepdims=True)
    beta_c = _cut(size, beta.astype(dg.dtype))
    dk = dg * beta_c - less_dk
    gradients = _join(dq, q), _join(dk, k), _join(z, v), _join(dbeta, beta)
    if log_decay is None:
        return dweights, *gradients, None
    ends = _dots(q_c, dq) - _dots(k_c, less_dk) - beta_c * dbeta
    carried = _carried(weights, before, dweights, after)
    return dweights, *gradients, _dlog_decay(size, log_decay, carried, ends)


delta_whole.defvjp(_forward, _backward)


# exp of it is 0, also in float64: a decay of -inf as a number that can be multiplied with 0.
_NOTHING = -1000.0
_LEAST = float(np.log(np.finfo(np.float32).tiny))


class _Decays(NamedTuple):
    """What is left of chunks after the decays of their tokens; None: all.

    Fields:
        between: [R, C, C], at token t of what token s <= t wrote; 0 for s > t.
        since: [R, C, 1], at token t of the memory before the chunk.
        until: [R, C, 1], at the chunk's end of what token s wrote.
        whole: [R, 1, 1], at the chunk's end of the memory before it.
    """

    between: Array | None
    since: Array | None
    until: Array | None
    whole: Array | None


def _decays(size, log_decay, dtype):
    """Exponentials of sums of what lies between, never of differences of longer sums.

    Between s and t is what comes after s in its block of 2^l tokens, and what comes up to t in
    t's, for the l with which these are the halves of a block.
    """
    if log_decay is None:
        return _Decays(None, None, None, None)
    log_decay = _cut(size, jnp.maximum(log_decay.astype(dtype), _NOTHING))[..., 0]
    t = np.arange(size)
    blocks = t >> np.arange((size - 1).bit_length() + 1)[:, None]  # [l, t]; of the last level one
    same = blocks.T[:, :, None] == blocks  # [j, l, t]
    late = t[:, None, None] > t
    total = partial(jnp.einsum, "rj,jlt->lrt", precision="highest")
    since = jnp.exp(total(log_decay, jnp.asarray(same & ~late, dtype)))
    until = jnp.exp(total(log_decay, jnp.asarray(same & late, dtype)))
    since, until = jax.lax.optimization_barrier((since, until))
    between = jnp.eye(size, dtype=dtype)[None]
    for level, block in enumerate(blocks[:-1]):
        halves = (block[:, None] == block + 1) & (block % 2 == 0)
        pairs = since[level, :, :, None] * until[level, :, None, :]
        between = between + jnp.where(halves, pairs, 0)
    since, until = since[-1, :, :, None], until[-1, :, :, None]
    # Arrays that exist, of these shapes: a matmul multiplies what it writes by no others.
    return jax.lax.optimization_barrier(_Decays(between, since, until, since[:, -1:]))


def _decayed(x, factor):
    """x by what is left of it."""
    return x if factor is None else x.astype(factor.dtype) * factor


def _existing(product, *arrays):
    """Factors as arrays that exist; all at once, as some are made of the same."""
    return jax.lax.optimization_barrier([product.factor(x) for x in arrays])


def _dots(a, b):
    return jnp.sum(a.astype(b.dtype) * b, axis=-1, keepdims=True)


def _carried(weights, before, dweights, after):
    """What the memory before each chunk gives: its product with its gradient, [R, 1, 1]."""
    weights, dweights = (x.reshape(-1, *x.shape[2:]) for x in (weights, dweights))
    n = len(weights)
    pairs = (weights, dweights), (before[n:], after[:-n])
    dots = [jnp.sum(a.astype(b.dtype) * b, axis=(1, 2), keepdims=True) for a, b in pairs]
    return jnp.concatenate(dots)


def _dlog_decay(size, log_decay, carried, ends):
    """The gradient of a log decay: of all that is written before it, what is read from it on.

    What is read at a token is its product with its gradient, as is what is written; `ends` is the
    first less the second. So what passes a token is what the memory before the chunk gives
    (`carried`) less the `ends` before the token: it is right to the rounding of what is read and
    written, not of what passes. Pairs of tokens would have two more [C, C] arrays.
    """
    before = jnp.einsum(
        "ts,rsf->rtf", jnp.tri(size, k=-1, dtype=ends.dtype), ends, precision="highest"
    )
    passing = _join(carried - before, log_decay)
    return jnp.where(log_decay > _LEAST, passing, 0)  # where nothing is left it is rounding


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


def _lower(size, dtype, diagonal=0):
    """1 in the lower triangle: an array that exists, so that a matmul multiplies what it writes."""
    return jax.lax.optimization_barrier(jnp.asarray(np.tri(size, k=diagonal), dtype))[None]


def _reads(product, q, g, decay):
    return _decayed(product("rtk,rsk->rts", q, g) * _lower(g.shape[1], product.wide), decay.between)


def _scan(weights, erase, change, keep, reverse=False):
    """W' = keep W + (change - erase W) from chunk to chunk: the last W, and the one before each."""
    start = weights.reshape(-1, *weights.shape[2:])
    chunks = jax.tree.map(lambda x: x.reshape(-1, len(start), *x.shape[1:]), (erase, change, keep))

    def step(w, chunk):
        erase, change, keep = chunk
        return _decayed(w, keep) + (change - jnp.einsum("rkj,rjv->rkv", erase, w)), w

    n_chunk = len(chunks[0])
    unroll = n_chunk if n_chunk <= 8 else 1  # an iteration of a loop has two launches more
    last, before = jax.lax.scan(step, start, chunks, reverse=reverse, unroll=unroll)
    return last.reshape(weights.shape), before.reshape(-1, *before.shape[2:])
