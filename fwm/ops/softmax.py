"""Softmax attention: causal, and with the relative positions and the memory of Transformer-XL."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from fwm.errors import UserError
from fwm.ops.checks import check

# Queries per block of causal attention: a block reads no key after its last query, and its
# scores are computed again in the backward pass instead of kept.
_QUERY_BLOCK = 64
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

    def block(q, k, v, ids, start, first):
        """Of queries from the place `start` and keys from `first` on, among the S tokens."""
        scores = jnp.einsum("bnth,bnsh->bnts", q, k, preferred_element_type=_accumulator(q)) * scale
        n_query, n_key = scores.shape[-2:]
        query, key = start + jnp.arange(n_query)[:, None], first + jnp.arange(n_key)[None, :]
        seen = (key <= query)[None]
        if window:
            seen &= (key > query - window)[None]
        if ids is not None:
            own, theirs = ids[:, start : start + n_query], ids[:, first : first + n_key]
            seen = seen & (own[:, :, None] == theirs[:, None, :])
        scores = jnp.where(seen[:, None], scores, jnp.finfo(scores.dtype).min)
        weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
        total = weights.sum(axis=-1, keepdims=True)
        if dropout is not None:
            weights = dropout(weights)
        # Divided after the product: [T, H] divisions instead of [T, S].
        out = jnp.einsum(
            "bnts,bnsh->bnth", weights.astype(v.dtype), v, preferred_element_type=total.dtype
        )
        return (out / total).astype(v.dtype)

    if dropout is not None:
        return block(q, k, v, segment_ids, n_before, 0).swapaxes(1, 2)
    blocks = []
    for start in range(0, length, _QUERY_BLOCK):
        stop = min(start + _QUERY_BLOCK, length)
        first = max(0, n_before + start + 1 - window) if window else 0
        part = jax.checkpoint(partial(block, start=n_before + start, first=first))
        seen = slice(first, n_before + stop)
        blocks.append(part(q[:, :, start:stop], k[:, :, seen], v[:, :, seen], segment_ids))
    return jnp.concatenate(blocks, axis=2).swapaxes(1, 2)


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
        visible = seen[None] & filled[:, None, :]
        if ids is not None:
            visible &= ids[:, n_memory:, None] == ids[:, None, :]
        return _read(scores, visible[:, None], v, dropout)

    n_batch, limit = q.shape[0], _CPU_SCORES if jax.default_backend() == "cpu" else _SCORES
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
