"""Two affine maps with relu and dropout between them, and the gradient by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from fwm.ops.checks import vary
from fwm.ops.dropout import masked
from fwm.ops.forms import on_cpu


def definition(scale, x, keep, w_1, b_1, w_2, b_2):
    """W_2 (relu(W_1 x + b_1) keep scale) + b_2 of `x [M, D]`; `keep [M, F]`, or None for all."""
    y = jax.nn.relu(x @ w_1 + b_1[None])
    return (y if keep is None else masked(y, keep, scale)) @ w_2 + b_2[None]


def feed_forward(scale, x, keep, w_1, b_1, w_2, b_2):
    """`definition`, with a gradient by hand.

    Because of what automatic differentiation costs here: it keeps three arrays [M, F] for one
    (y > 0 says where relu and dropout let through), and XLA's CPU backend transposes those arrays
    in memory for the gradients of the matrices. On a GPU it passes over them more often.
    """
    # In float32 at least, where the gradients are sums over all tokens, and rounded only then.
    wide = lambda w: w.astype(np.promote_types(np.float32, w.dtype))
    parameters = (wide(w) for w in (w_1, b_1, w_2, b_2))
    scale = 1.0 if keep is None else scale
    form = _feed_forward if on_cpu() else _recomputed
    return form(scale, *vary((x, keep, *parameters)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _feed_forward(scale, x, keep, w_1, b_1, w_2, b_2):
    return _forward(scale, x, keep, w_1, b_1, w_2, b_2)[0]


def _forward(scale, x, keep, w_1, b_1, w_2, b_2):
    y = jax.nn.relu(x @ w_1.astype(x.dtype) + b_1.astype(x.dtype)[None])
    if keep is not None:
        y = masked(y, keep, scale)
    y = checkpoint_name(y, "inner")
    out = y @ w_2.astype(x.dtype) + b_2.astype(x.dtype)[None]
    return out, (x, y, w_1, w_2)


def _backward(scale, residuals, dout):
    x, y, w_1, w_2 = residuals
    # Sums over all tokens: accumulated in float32, with the narrow side in front, which is the
    # fast orientation; the barrier keeps XLA from turning it round.
    over_tokens = functools.partial(
        jnp.einsum, "md,mf->df", preferred_element_type=np.promote_types(np.float32, x.dtype)
    )

    def part(sums, tokens):
        x, y, dout = tokens
        dy = masked(jnp.einsum("md,fd->mf", dout, w_2.astype(x.dtype)), y > 0, scale)
        dx = jnp.einsum("mf,df->md", dy, w_1.astype(x.dtype))
        dw_1, dw_2 = over_tokens(x, dy), jax.lax.optimization_barrier(over_tokens(dout, y))
        db_1, db_2 = (jnp.sum(g, axis=0, dtype=dw_1.dtype) for g in (dy, dout))
        new = (dw_1, dw_2, db_1, db_2)
        return new if sums is None else jax.tree.map(jnp.add, sums, new), dx

    # A large batch by parts: dy is the widest array of the backward pass.
    n_part = -(-len(x) // 4096)
    if n_part <= 1 or len(x) % n_part:
        sums, dx = part(None, (x, y, dout))
    else:
        parts = jax.tree.map(lambda z: z.reshape(n_part, -1, z.shape[-1]), (x, y, dout))
        shapes = jax.eval_shape(lambda t: part(None, t)[0], jax.tree.map(lambda z: z[0], parts))
        zeros = jax.tree.map(lambda z: jnp.zeros(z.shape, z.dtype), shapes)
        sums, dx = jax.lax.scan(part, vary(zeros, parts), parts)
    dw_1, dw_2, db_1, db_2 = sums
    return dx.reshape(x.shape), None, dw_1, db_1, dw_2.T, db_2


_feed_forward.defvjp(_forward, _backward)


# Elsewhere than on a CPU reading [M, F] takes longer than a matmul that makes it: y is computed
# again. What stands after a matmul and reads arrays that exist is done within it: so masks are
# arrays, and the scale is applied where arrays are narrow.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _recomputed(scale, x, keep, w_1, b_1, w_2, b_2):
    return _recomputed_forward(scale, x, keep, w_1, b_1, w_2, b_2)[0]


def _recomputed_forward(scale, x, keep, w_1, b_1, w_2, b_2):
    out = _wide_product(_unscaled(x, keep, w_1, b_1), w_2) * scale
    out = (out + b_2.astype(out.dtype)[None]).astype(x.dtype)
    return out, (x, keep, w_1, b_1, w_2)


def _wide_product(x, w):
    """x w before it is rounded to x's dtype: of rounded sums XLA makes another pass."""
    wide = np.promote_types(np.float32, x.dtype)
    return jnp.matmul(x, w.astype(x.dtype), preferred_element_type=wide)


def _unscaled(x, keep, w_1, b_1):
    y = _wide_product(x, w_1)
    y = jax.nn.relu(y + b_1.astype(y.dtype)[None])
    y = y if keep is None else masked(y, jax.lax.optimization_barrier(keep), 1.0)
    return y.astype(x.dtype)


def _recomputed_backward(scale, residuals, dout):
    x, keep, w_1, b_1, w_2 = residuals
    over_tokens = functools.partial(
        jnp.einsum, "md,mf->df", preferred_element_type=np.promote_types(np.float32, x.dtype)
    )
    y = _unscaled(x, keep, w_1, b_1)
    # In 16 bits the matmul of an x that XLA takes for another one writes the gate sooner than y is
    # read for it.
    again = jax.lax.optimization_barrier(x) if x.dtype.itemsize == 2 else x
    through = jax.lax.optimization_barrier(_unscaled(again, keep, w_1, b_1) > 0)
    scaled = dout * jnp.asarray(scale, x.dtype)
    dy = masked(_wide_product(scaled, w_2.T), through, 1.0).astype(x.dtype)
    # The bias as one more feature, which is 1 (eight more, for the alignment): no pass of its own.
    ones = jnp.zeros((len(x), 8), x.dtype).at[:, 0].set(1)
    d_first = over_tokens(jnp.concatenate([x, ones], axis=1), dy)
    dw_1, db_1 = d_first[: len(w_1)], d_first[len(w_1)]
    dw_2 = over_tokens(y, scaled)
    db_2 = jnp.sum(dout, axis=0, dtype=dw_2.dtype)
    return dy @ w_1.astype(x.dtype).T, None, dw_1, db_1, dw_2, db_2


_recomputed.defvjp(_recomputed_forward, _recomputed_backward)
