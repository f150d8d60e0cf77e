"""Softmax attention: causal, and with the relative positions and the memory of Transformer-XL."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from fwm.errors import UserError
from fwm.ops.checks import check, vary
from fwm.ops.forms import on_cpu

# Queries per block of causal attention, which reads no key after its last query: of a CPU, whose
# cache holds the scores of so many, and elsewhere, where launches count.
_CPU_QUERIES, _QUERIES = 64, 256
# Scores that are never larger than this, either way, need no maximum before exp: its sums and
# products with values stay far within float32 and bfloat16.
_SMALL = 60.0
# Scores of a block of rows of relative attention. On CPU two rows of Transformer-XL at `small`:
# measured 25% faster than one, four or all at once; elsewhere what bounds the memory, not measured.
_CPU_SCORES, _SCORES = 2**21, 2**25


def causal_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S N H"],
    v: Float[Array, "B S N H"],
    *,
    scale: float,
    window: int = 0,
    segment_ids: Int[Array, "B S"] | None = None,
    dropout: Callable[[Array], Array] | None = None,
) -> Float[Array, "B T N H"]:
    """softmax(scale q k^T) v, a token seeing itself and what is before it; softmax in float32.

    The T queries are those of the last T of the S tokens.

    Args:
        q: queries.
        k: keys.
        v: values.
        scale: factor of the scores, 1 / sqrt(H) in the paper.
        window: how many tokens a token sees at most, its own included; 0: all.
        segment_ids: a token sees those with its own id only; None: all have the same.
        dropout: applied to the weights [B, N, T, S] before they are divided by their sum, all in
            one piece.

    Raises:
        UserError: arrays that do not fit each other.
    """
    check("causal_attention", q=(q, "B T N H"), k=(k, "B S N H"), v=(v, "B S N H"))
    _check_last("causal_attention", q, k)
    if segment_ids is not None:
        check("causal_attention", k=(k, "B S N H"), segment_ids=(segment_ids, "B S", jnp.integer))
    length, n_before = q.shape[1], k.shape[1] - q.shape[1]
    # Heads before time, as arrays of their own: XLA's CPU backend is three times slower at small
    # products whose batch axes lie apart.
    q, k, v = jax.lax.optimization_barrier(tuple(x.swapaxes(1, 2) for x in (q, k, v)))
    spans = [_Span(0, length, 0, k.shape[2])]  # in one piece, for dropout
    if dropout is None:
        size, spans = _CPU_QUERIES if on_cpu() else _QUERIES, []
        for start in range(0, length, size):
            stop = min(start + size, length)
            first = max(0, n_before + start + 1 - window) if window else 0
            spans.append(_Span(start, stop, first, n_before + stop))
    masks = [_seen(span, n_before, window, segment_ids) for span in spans]
    if dropout is None and not on_cpu():
        return _few_blocks(scale, tuple(spans), q, k, v, masks).swapaxes(1, 2)
    read: Callable[..., Array] = partial(_block, scale, dropout)
    if dropout is None:
        read = jax.checkpoint(read)
    blocks = []
    for span, mask in zip(spans, masks, strict=True):
        keys = slice(span.first, span.last)
        blocks.append(read(q[:, :, span.start : span.stop], k[:, :, keys], v[:, :, keys], mask))
    return checkpoint_name(jnp.concatenate(blocks, axis=2).swapaxes(1, 2), "mixed")


class _Span(NamedTuple):
    """Queries start ... stop, and the keys first ... last that one of them sees."""

    start: int
    stop: int
    first: int
    last: int


def _seen(span, n_before, window, segment_ids):
    """Whether queries see keys, [1 or B, 1, t, s]; n_before keys are before the first query."""
    query = n_before + jnp.arange(span.start, span.stop)[:, None]
    key = jnp.arange(span.first, span.last)[None, :]
    seen = key <= query
    if window:
        seen &= key > query - window
    if segment_ids is None:
        return seen[None, None]
    own = segment_ids[:, n_before + span.start : n_before + span.stop]
    theirs = segment_ids[:, span.first : span.last]
    return (seen[None] & (own[:, :, None] == theirs[:, None, :]))[:, None]


def _block(scale, dropout, q, k, v, seen):
    """What queries [B, N, t, H] read of keys [B, N, s, H]: the form for a CPU's cache."""
    scores = jnp.einsum("bnth,bnsh->bnts", q, k, preferred_element_type=_accumulator(q)) * scale
    scores = jnp.where(seen, scores, jnp.finfo(scores.dtype).min)
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
    total = weights.sum(axis=-1, keepdims=True)
    if dropout is not None:
        weights = dropout(weights)
    # Divided after the product: [T, H] divisions instead of [T, S].
    out = jnp.einsum(
        "bnts,bnsh->bnth", weights.astype(v.dtype), v, preferred_element_type=total.dtype
    )
    return (out / total).astype(v.dtype)


def _few_blocks(scale, spans, q, k, v, masks):
    """The form for a GPU: heads are rows, [R, t, H], and the gradient is by hand."""
    n_batch, n_head = q.shape[:2]
    rows = lambda x: x.reshape(-1, *x.shape[2:])
    q, k, v = map(rows, (q, k, v))
    large, q, k, v = vary((_any_large(scale, q, k), q, k, v))

    def factor(mask):
        mask = mask.astype(_accumulator(q))
        if len(mask) > 1:
            mask = jnp.broadcast_to(mask, (n_batch, n_head, *mask.shape[2:]))
        return rows(mask)

    out = _attend(scale, spans, large, q, k, v, tuple(map(factor, masks)))
    return out.reshape(n_batch, n_head, *out.shape[1:])


def _any_large(scale, q, k):
    """Whether a score may be far from 0, by the lengths of queries and keys."""
    square = lambda x: jnp.max(jnp.sum(jnp.square(x.astype(_accumulator(x))), axis=-1), axis=-1)
    return ~jnp.all(scale**2 * square(q) * square(k) < _SMALL**2)


def _scaled(scale, q, k):
    """Scores of [R, T, H] and [R, S, H]."""
    return jnp.einsum("rth,rsh->rts", q, k, preferred_element_type=_accumulator(q)) * scale


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(scale, spans, large, q, k, v, masks):
    """softmax(scale q k^T) v of [R, T, H] and [R, S, H], by blocks of queries.

    The scores, which are what is wide here, are written once by the forward pass unless some may be
    `large`. The backward pass makes them again, from the logarithm of their sum. A mask
    [1 or R, t, s] is 1 where a key is seen, and 0.
    """
    return _attend_forward(scale, spans, large, q, k, v, masks)[0]


def _attend_forward(scale, spans, large, q, k, v, masks):
    outs, log_totals = [], []
    for span, mask in zip(spans, masks, strict=True):
        keys = slice(span.first, span.last)
        arrays = q[:, span.start : span.stop], k[:, keys], v[:, keys], mask
        out, log_total = _block_forward(scale, large, *arrays)
        outs.append(out)
        log_totals.append(log_total)
    out, log_total = jnp.concatenate(outs, axis=1), jnp.concatenate(log_totals, axis=1)
    out, log_total = checkpoint_name((out, log_total), "memory")
    return out, (q, k, v, masks, out, log_total)


def _block_forward(scale, large, q, k, v, mask):
    # An array that exists, so that a product multiplies what it writes.
    mask = jax.lax.optimization_barrier(mask)

    def less_largest(q, k):
        scores = jnp.where(mask > 0, _scaled(scale, q, k), jnp.finfo(mask.dtype).min)
        largest = jnp.max(scores, axis=-1)
        return jnp.exp(scores - largest[..., None]), largest

    def as_they_are(q, k):
        return jnp.exp(_scaled(scale, q, k)) * mask, jnp.zeros(q.shape[:2], mask.dtype)

    weights, largest = jax.lax.cond(large, less_largest, as_they_are, q, k)
    # The sum is one more column of the product (eight, for the alignment).
    wide = jnp.concatenate([v, jnp.ones_like(v, shape=(*v.shape[:2], 8))], axis=-1)
    out = jnp.einsum(
        "rts,rsh->rth", weights.astype(v.dtype), wide, preferred_element_type=mask.dtype
    )
    total = out[..., v.shape[-1]]
    out = (out[..., : v.shape[-1]] / total[..., None]).astype(v.dtype)
    return out, largest + jnp.log(total)


def _attend_backward(scale, spans, kept, dout):
    # Nothing is made before it is wanted: the scores of all blocks at once would fill memory.
    (q, k, v, masks, out, log_total), dout = jax.lax.optimization_barrier((kept, dout))
    dqs, (dk, dv) = [], (jnp.zeros_like(x, log_total.dtype) for x in (k, v))
    for span, mask in zip(spans, masks, strict=True):
        queries, keys = slice(span.start, span.stop), slice(span.first, span.last)
        arrays = q[:, queries], k[:, keys], v[:, keys], mask
        dq, *parts = _block_backward(
            scale, *arrays, out[:, queries], log_total[:, queries], dout[:, queries]
        )
        around = ((0, 0), (span.first, k.shape[1] - span.last), (0, 0))
        dk, dv = (jnp.pad(x, around) + sums for x, sums in zip(parts, (dk, dv), strict=True))
        dqs.append(dq)
        if len(spans) > 1:
            q, dk, dv, dqs = jax.lax.optimization_barrier((q, dk, dv, dqs))
    dq = jnp.concatenate(dqs, axis=1)
    return None, dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


def _block_backward(scale, q, k, v, mask, out, log_total, dout):
    mask, wide = jax.lax.optimization_barrier(mask), log_total.dtype
    product = partial(jnp.einsum, preferred_element_type=wide)
    # What is not seen may be larger than the sum by any amount.
    weights = jnp.exp(jnp.minimum(_scaled(scale, q, k) - log_total[..., None], 0)) * mask
    change = jnp.sum(dout.astype(wide) * out.astype(wide), axis=-1, keepdims=True)
    weights, change = jax.lax.optimization_barrier((weights.astype(v.dtype), change))
    dscores = (product("rth,rsh->rts", dout, v) - change) * weights.astype(wide) * scale
    dscores = jax.lax.optimization_barrier(dscores.astype(q.dtype))
    dq, dk = product("rts,rsh->rth", dscores, k), product("rts,rth->rsh", dscores, q)
    return dq, dk, product("rts,rth->rsh", weights, dout)


_attend.defvjp(_attend_forward, _attend_backward)


def relative_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S N H"],
    v: Float[Array, "B S N H"],
    r: Float[Array, "S N H"],
    r_w_bias: Float[Array, "N H"],
    r_r_bias: Float[Array, "N H"],
    *,
    length: Int[Array, " B"],
    mem_len: int,
    same_length: bool = False,
    segment_ids: Int[Array, "B S"] | None = None,
    scale: float,
    dropout: Callable[[Array], Array] | None = None,
) -> Float[Array, "B T N H"]:
    """Transformer-XL's attention: softmax(scale ((q + r_w) k + (q + r_r) r[distance])) v.

    Args:
        q: queries of the current segment.
        k: keys of the S - T slots of memory, then of the current segment.
        v: values, as k.
        r: position keys; r[j] belongs to the distance S - 1 - j.
        r_w_bias: content bias.
        r_r_bias: position bias.
        length: how many memory slots of each row are filled: the last ones.
        mem_len: the memory length that `same_length` refers to.
        same_length: let a query see the last mem_len positions only, its own included.
        segment_ids: a token sees those with its own id only; None: all have the same.
        scale: factor of the scores, 1 / sqrt(H) in the paper.
        dropout: applied to the probabilities [B, N, T, S].

    Raises:
        UserError: arrays that do not fit each other.
    """
    ids = {} if segment_ids is None else {"segment_ids": (segment_ids, "B S", jnp.integer)}
    check(
        "relative_attention",
        **{"q": (q, "B T N H"), "k": (k, "B S N H"), "v": (v, "B S N H"), "r": (r, "S N H")},
        **{"r_w_bias": (r_w_bias, "N H"), "r_r_bias": (r_r_bias, "N H")},
        length=(length, "B", jnp.integer),
        **ids,
    )
    _check_last("relative_attention", q, k)
    n_query, n_slot = q.shape[1], k.shape[1]
    n_memory = n_slot - n_query
    query = n_memory + jnp.arange(n_query)[:, None]
    slot = jnp.arange(n_slot)[None, :]
    seen = slot <= query
    if same_length:
        seen &= slot > query - mem_len

    def rows(q, k, v, length, ids):
        content = _scores(q + r_w_bias[None, None], k)
        position = jnp.einsum(
            "btnh,snh->bnts", q + r_r_bias[None, None], r, preferred_element_type=_accumulator(q)
        )
        scores = (content + _relative_shift(position)) * scale
        filled = jnp.arange(n_slot)[None, :] >= n_memory - length[:, None]
        visible = seen[None, None] & filled[:, None, None, :]
        if ids is not None:
            visible &= ids[:, None, n_memory:, None] == ids[:, None, None, :]
        return _read(scores, visible, v, dropout)

    n_batch, limit = q.shape[0], _CPU_SCORES if on_cpu() else _SCORES
    n_row = rows_per_block(n_batch, max(1, limit // (q.shape[2] * n_query * n_slot)))
    if dropout is not None or n_row == n_batch:
        return rows(q, k, v, length, segment_ids)
    # By blocks of rows, whose scores are computed again in the backward pass instead of kept.
    blocks = jax.tree.map(
        lambda x: x.reshape(-1, n_row, *x.shape[1:]), (q, k, v, length, segment_ids)
    )
    out = jax.lax.map(lambda block: jax.checkpoint(rows)(*block), blocks)
    return out.reshape(q.shape)


def rows_per_block(n_batch: int, fitting: int) -> int:
    """The largest divisor of the batch up to `fitting`; not, say, 97 blocks of one row."""
    divisor = max((n for n in range(1, min(fitting, n_batch) + 1) if n_batch % n == 0), default=0)
    return divisor if 4 * divisor >= min(fitting, n_batch) else n_batch


def _check_last(of, q, k):
    if q.shape[1] > k.shape[1]:
        raise UserError(
            f"{of}: q of shape {q.shape} has more tokens than k of shape {k.shape}: the queries "
            "are those of the last tokens."
        )


def _accumulator(x):
    return np.promote_types(np.float32, x.dtype)


def _scores(q, k):
    return jnp.einsum("btnh,bsnh->bnts", q, k, preferred_element_type=_accumulator(q))


def _read(scores, seen, v, dropout):
    # The smallest finite number instead of -inf: no NaN in gradients; exp makes both exactly 0.
    scores = jnp.where(seen, scores, jnp.finfo(scores.dtype).min)
    probabilities = jax.nn.softmax(scores, axis=-1)
    if dropout is not None:
        probabilities = dropout(probabilities)
    return jnp.einsum("bnts,bsnh->btnh", probabilities.astype(v.dtype), v)


def _relative_shift(x):
    """Row t, column s of the result is x[t, s + T - 1 - t]: one pad and one reshape, no gather."""
    n_batch, n_head, n_query, n_slot = x.shape
    x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (1, 0)))
    x = x.reshape(n_batch, n_head, n_slot + 1, n_query)[:, :, 1:]
    return x.reshape(n_batch, n_head, n_query, n_slot)
