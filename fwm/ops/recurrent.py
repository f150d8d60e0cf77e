"""What an update rule is, and the rules one token at a time: the definition of all fast forms."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

# Without a chunked form the backward pass keeps the state every so many tokens only.
KEPT_EVERY = 16


class Input(NamedTuple):
    """What a rule reads of every token and head besides q, k and v.

    Fields:
        name: for messages, and for the keyword of `fast_weight_attention`.
        activation: makes it from a layer's projection of the token, in float32.
        per_key: one number for each of the K key features instead of one.
        neutral: its value for a token that is not there, whose k and v are zero: with it the token
            must leave the memory as it is.
    """

    name: str
    activation: Callable[[Array], Array]
    per_key: bool = False
    neutral: float = 0.0


class Rule(NamedTuple):
    """An update rule as a value: what one token does to the memory, and what is known beyond that.

    Fields:
        step: (w [B, N, K, V], k [B, N, K], v [B, N, V], *inputs) -> w: the definition. The inputs
            come in the order of `inputs`, each [B, N] or, if per_key, [B, N, K].
        inputs: what it reads besides q, k and v.
        key_norm: how a layer normalises the features of q and k, a name in KEY_NORMS.
        key_sums: (k [B, T, N, K], before [B, N, K], *inputs, last) -> [B, T, N, K]: the normalisers
            z_t, which must forget what the memory forgets; or the last one alone, [B, N, K]. None:
            the rule has none, and its output cannot be normalised.
        chunked: a `chunks.Chunked`, how it runs fast; None: token by token.
        flops: of one token for each number in the memory, by the least arithmetic: writing and
            reading it are 2 each.
    """

    step: Callable[..., Array]
    inputs: tuple[Input, ...] = ()
    key_norm: str = "none"
    key_sums: Callable[..., Array] | None = None
    chunked: Any = None
    flops: int = 4


def sum_step(w: Array, k: Array, v: Array) -> Array:
    """W + k v^T (paper, equation 17)."""
    return w + k[..., :, None] * v[..., None, :]


def delta_step(w: Array, k: Array, v: Array, beta: Array) -> Array:
    """W + beta k (v - W^T k)^T (paper, section 4.2)."""
    return sum_step(w, k, beta[..., None] * (v - _read(w, k)))


def sum_rule(
    q: Float[Array, "B T N K"],
    k: Float[Array, "B T N K"],
    v: Float[Array, "B T N V"],
    weights: Float[Array, "B N K V"] | None = None,
) -> tuple[Float[Array, "B T N V"], Float[Array, "B N K V"]]:
    """W_t = W_(t-1) + k_t v_t^T; out_t = W_t^T q_t (paper, equations 17-18)."""
    return scan_tokens(sum_step, q, k, v, (), weights)


def delta_rule(
    q: Float[Array, "B T N K"],
    k: Float[Array, "B T N K"],
    v: Float[Array, "B T N V"],
    beta: Float[Array, "B T N"],
    weights: Float[Array, "B N K V"] | None = None,
) -> tuple[Float[Array, "B T N V"], Float[Array, "B N K V"]]:
    """W_t = W_(t-1) + beta_t k_t (v_t - W_(t-1)^T k_t)^T; out_t = W_t^T q_t (section 4.2)."""
    return scan_tokens(delta_step, q, k, v, (beta,), weights)


def _read(w, q):
    return jnp.einsum("bnk,bnkv->bnv", q, w, precision="highest")


def scan_tokens(
    step: Callable[..., Array],
    q: Float[Array, "B T N K"],
    k: Float[Array, "B T N K"],
    v: Float[Array, "B T N V"],
    inputs: tuple[Array, ...],
    weights: Float[Array, "B N K V"] | None = None,
    *,
    kept_every: int = 1,
) -> tuple[Float[Array, "B T N V"], Float[Array, "B N K V"]]:
    """W_t = step(W_(t-1), k_t, v_t, *inputs_t); out_t = W_t^T q_t: any rule, in float32 at least.

    Args:
        step: a rule's.
        q: queries.
        k: keys.
        v: values.
        inputs: what the rule reads besides, each [B, T, N, ...].
        weights: the state before the first token; None: zeros.
        kept_every: tokens between two states that the backward pass keeps; the others it computes
            again.

    Returns:
        out in v's dtype, and the state after the last token.
    """
    dtype = np.promote_types(np.float32, v.dtype)
    if weights is None:
        weights = jnp.zeros((v.shape[0], v.shape[2], q.shape[3], v.shape[3]), dtype)
    tokens = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0).astype(dtype), (q, k, v, inputs))

    def token(w, token):
        q, k, v, inputs = token
        w = step(w, k, v, *inputs)
        return w, _read(w, q)

    def some(w, tokens):
        return jax.lax.scan(token, w, tokens)

    length = q.shape[1]
    whole = length - length % kept_every
    if kept_every == 1 or whole == 0:
        weights, out = some(weights.astype(dtype), tokens)
    else:
        parts = jax.tree.map(
            lambda x: x[:whole].reshape(whole // kept_every, kept_every, *x.shape[1:]), tokens
        )
        weights, out = jax.lax.scan(jax.checkpoint(some), weights.astype(dtype), parts)
        weights, rest = some(weights, jax.tree.map(lambda x: x[whole:], tokens))
        out = jnp.concatenate([out.reshape(whole, *out.shape[2:]), rest])
    return jnp.moveaxis(out, 0, 1).astype(v.dtype), weights
