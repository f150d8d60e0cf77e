"""Documents that are packed into one row: where each begins, and how far a token is from there."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def begins(segment_ids: Int[Array, "B T"]) -> Bool[Array, "B T"]:
    """Whether a token is the first of its document.

    A document is a run of equal ids; what was carried into the row belongs to one of the id 0.
    """
    first = segment_ids[:, :1] != 0
    return jnp.concatenate([first, segment_ids[:, 1:] != segment_ids[:, :-1]], axis=1)


def numbered(segment_ids: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """The same documents as 0 (what was carried in goes on), 1, 2, ...: no id comes again."""
    return jnp.cumsum(begins(segment_ids), axis=1, dtype=jnp.int32)


def since_begin(segment_ids: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """How many tokens of its own document stand before each in the row."""
    place = jnp.broadcast_to(jnp.arange(segment_ids.shape[1])[None], segment_ids.shape)
    return place - jax.lax.cummax(jnp.where(begins(segment_ids), place, 0), axis=1)


def forgetting(
    begins: Bool[Array, "B T"] | None, log_decay: Float[Array, "B T N *K"] | None, n_head: int
) -> Float[Array, "B T N *K"] | None:
    """The log decay with which a memory also forgets all that was before a document's first token.

    Args:
        begins: which tokens these are; None: none.
        log_decay: of the memory anyway; None: 0.
        n_head: of the memory.
    """
    if begins is None:
        return log_decay
    if log_decay is None:
        log_decay = jnp.zeros((*begins.shape, n_head))
    at = begins.reshape(*begins.shape, *(1,) * (log_decay.ndim - 2))
    return jnp.where(at, -jnp.inf, log_decay)


def filled(
    length: Int[Array, " B"], segment_ids: Int[Array, "B T"] | None, n_token: int, limit: int
) -> Int[Array, " B"]:
    """How many of the last tokens, at most `limit`, the document that a row ends with has.

    Args:
        length: how many were carried in.
        segment_ids: of the row's tokens; None: all go on with what was carried in.
        n_token: of the row.
        limit: places that there are.
    """
    if segment_ids is None:
        return jnp.minimum(length + n_token, limit)
    own = since_begin(segment_ids)[:, -1] + 1
    return jnp.minimum(jnp.where(segment_ids[:, -1] == 0, length + own, own), limit)
