"""What an update rule is, and the rules one token at a time: the definition of all fast forms."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from fwm.errors import UserError
from fwm.ops.checks import check, vary

# Without a chunked form the backward pass keeps the state every so many tokens only.
KEPT_EVERY = 16


class Input(NamedTuple):
    """What a rule reads of every token and head besides q, k and v.

    Fields:
        name: for messages, and for the keyword of `fast_weight_attention`.
        activation: makes it from a layer's projection of the token, in float32.
        per_key: one number for each of the K key features instead of one.
        per_value: one number for each of the V value features instead of one.
        neutral: its value for a token that is not there, whose k and v are zero: with it the token
            must leave the memory as it is.
    """

    name: str
    activation: Callable[[Array], Array]
    per_key: bool = False
    neutral: float = 0.0
    per_value: bool = False

    @property
    def wide(self) -> bool:
        """Whether it has an axis of features."""
        return self.per_key or self.per_value

    def axes(self, tokens: str) -> str:
        """The axes of what it is of some tokens: "B T N" -> "B T N", "B T N K" or "B T N V"."""
        return tokens + " K" * self.per_key + " V" * self.per_value

    def width(self, n_key: int, n_value: int) -> int:
        """How many numbers it is of each token and head."""
        return n_key if self.per_key else n_value if self.per_value else 1


class Update(NamedTuple):
    """What tokens give to the one algebra: the arguments of `sum_rule` (beta None) or `delta_rule`.

    Fields:
        v: what is written under k.
        beta: write strengths, one per head.
        log_decay: of the memory before the write, per head or per key feature.
        erase_key: what is compared with v is read at it; None: at k.
    """

    v: Array
    beta: Array | None = None
    log_decay: Array | None = None
    erase_key: Array | None = None


class Rule(NamedTuple):
    """An update rule as a value: what one token does to the memory, and what is known beyond that.

    Fields:
        step: (w [B, N, K, V], k [B, N, K], v [B, N, V], *inputs) -> w: the definition. The inputs
            come in the order of `inputs`, each [B, N], [B, N, K] (per_key) or [B, N, V].
        inputs: what it reads besides q, k and v.
        key_norm: how a layer normalises the features of q and k, a name in KEY_NORMS.
        key_sums: (k [B, T, N, K], before [B, N, K], *inputs, last) -> [B, T, N, K]: the normalisers
            z_t, which must forget what the memory forgets; or the last one alone, [B, N, K]. None:
            the rule has none, and its output cannot be normalised.
        chunked: a `chunks.Chunked`, how it runs fast; None: token by token.
        flops: of one token for each number in the memory, by the least arithmetic: writing and
            reading it are 2 each.
        update: (k, v, *inputs) -> Update: it is one of the algebra's (`composed` makes the rest of
            it), and a layer can give it a decay and several writes a token. None: it is not.
    """

    step: Callable[..., Array]
    inputs: tuple[Input, ...] = ()
    key_norm: str = "none"
    key_sums: Callable[..., Array] | None = None
    chunked: Any = None
    flops: int = 4
    update: Callable[..., Update] | None = None


def sum_step(w: Array, k: Array, v: Array) -> Array:
    """W + k v^T (paper, equation 17)."""
    return w + k[..., :, None] * v[..., None, :]


def delta_step(w: Array, k: Array, v: Array, beta: Array) -> Array:
    """W + beta k (v - W^T k)^T (paper, section 4.2)."""
    return sum_step(w, k, beta[..., None] * (v - _read(w, k)))


class Switches(NamedTuple):
    """Which inputs a rule of the one algebra reads."""

    delta: bool
    decay: bool
    erase: bool


def by_name(switches: Switches, inputs: tuple[Array, ...]) -> list[Array | None]:
    """[beta, log_decay, erase_key], None where absent, from those that are there."""
    given = iter(inputs)
    return [next(given) if there else None for there in switches]


def general_step(switches: Switches, w: Array, k: Array, v: Array, *inputs: Array) -> Array:
    """W' = diag(exp(g)) W, then W' + k v^T or W' + beta k (v - W'^T p)^T."""
    beta, log_decay, p = by_name(switches, inputs)
    if log_decay is not None:
        w = w * jnp.exp(log_decay.reshape(*w.shape[:2], -1, 1))
    if beta is None:
        return sum_step(w, k, v)
    return sum_step(w, k, beta[..., None] * (v - _read(w, k if p is None else p)))


def switched(
    of: str,
    q: Any,
    k: Any,
    v: Any,
    beta: tuple[Any, ...],
    weights: Any,
    log_decay: Any,
    erase_key: Any,
) -> tuple[Switches, int, tuple[Array, ...]]:
    """What is there besides q, k and v, and how many writes a token has.

    Args:
        of: the name of the rule, for messages.
        q: as all others, an argument of the public rules.
        k: keys.
        v: values.
        beta: (beta,) for the delta rule, () for the sum rule.
        weights: the state before the first token.
        log_decay: one per token and head, or per feature too.
        erase_key: one for every write.

    Returns:
        The switches; n; what there is of beta, log_decay and erase_key.

    Raises:
        UserError: arrays that do not belong together.
    """
    arrays = {"q": (q, "B T N K"), "k": (k, "B S N K"), "v": (v, "B S N V")}
    if beta:
        arrays["beta"] = (beta[0], "B S N")
    if weights is not None:
        arrays["weights"] = (weights, "B N K V")
    if log_decay is not None:
        arrays["log_decay"] = (log_decay, "B T N K"[: 2 * np.ndim(log_decay) - 1])
    if erase_key is not None:
        arrays["erase_key"] = (erase_key, "B S N K")
    check(of, **arrays)
    length = q.shape[1]
    n = k.shape[1] // length
    if n < 1 or k.shape[1] != n * length:
        raise UserError(
            f"{of}: k of shape {k.shape} must have a whole number of writes for each token of q, "
            f"whose shape is {q.shape}: make its second axis a multiple of {length}."
        )
    given = (*(beta or (None,)), log_decay, erase_key)
    there = [x is not None for x in given]
    switches = Switches(there[0], there[1], there[2])
    return switches, n, tuple(x for x in given if x is not None)


def by_tokens(switches, n, q, k, v, inputs, weights):
    """The n writes of a token as n tokens, of which the first alone decays.

    It is read after the last one; the others have a q of zeros.
    """
    step, length = partial(general_step, switches), q.shape[1]
    inputs = tuple(among_zeros(x, n, 0) if x.shape[1] == length else x for x in inputs)
    out, weights = scan_tokens(step, among_zeros(q, n, n - 1), k, v, inputs, weights)
    return out.reshape(out.shape[0], length, n, *out.shape[2:])[:, :, -1], weights


def among_zeros(x: Array, n: int, place: int, axis: int = 1) -> Array:
    """x [..., T, ...] as one of n tokens, the others zero: [..., T n, ...]."""
    if n == 1:
        return x
    axis = axis % x.ndim
    around = [(0, 0)] * (x.ndim + 1)
    around[axis + 1] = (place, n - 1 - place)
    wide = jnp.pad(jnp.expand_dims(x, axis + 1), around)
    return wide.reshape(*x.shape[:axis], -1, *x.shape[axis + 1 :])


def sum_rule(
    q: Float[Array, "B T N K"],
    k: Float[Array, "B S N K"],
    v: Float[Array, "B S N V"],
    weights: Float[Array, "B N K V"] | None = None,
    *,
    log_decay: Float[Array, "..."] | None = None,
) -> tuple[Float[Array, "B T N V"], Float[Array, "B N K V"]]:
    """W_t = exp(g_t) W_(t-1) + k_t v_t^T; out_t = W_t^T q_t (paper, equations 17-18)."""
    switches, n, inputs = switched("sum_rule", q, k, v, (), weights, log_decay, None)
    return by_tokens(switches, n, q, k, v, inputs, weights)


def delta_rule(
    q: Float[Array, "B T N K"],
    k: Float[Array, "B S N K"],
    v: Float[Array, "B S N V"],
    beta: Float[Array, "B S N"],
    weights: Float[Array, "B N K V"] | None = None,
    *,
    log_decay: Float[Array, "..."] | None = None,
    erase_key: Float[Array, "..."] | None = None,
) -> tuple[Float[Array, "B T N V"], Float[Array, "B N K V"]]:
    """W_t = W' + beta_t k_t (v_t - W'^T p_t)^T, W' = exp(g_t) W_(t-1); out_t = W_t^T q_t.

    Paper, section 4.2; the arguments as of `fwm.ops.delta_rule`.
    """
    given = (weights, log_decay, erase_key)
    switches, n, inputs = switched("delta_rule", q, k, v, (beta,), *given)
    return by_tokens(switches, n, q, k, v, inputs, weights)


def _read(w, q):
    return jnp.einsum("bnk,bnkv->bnv", q, w, precision="highest")


def scan_tokens(
    step: Callable[..., Array],
    q: Float[Array, "B T N K"],
    k: Float[Array, "B T N _"],
    v: Float[Array, "B T N _"],
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
    weights = vary(weights, q, k, v, inputs)
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
