"""What a fast weight layer does between its projections: write by a rule, read, normalise."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from fwm.errors import UserError
from fwm.ops import segments
from fwm.ops.checks import check
from fwm.ops.chunks import mapped
from fwm.ops.rules import UPDATE_RULES, run, running_key_sums
from fwm.registry import Table


class FastWeightState(NamedTuple):
    """What a fast weight layer carries from one segment to the next."""

    weights: Float[Array, "B N K V"]
    key_sum: Float[Array, "B N K"]


# (rule, q, k, v, inputs, log_decay, begins, state, key_sums, eps) -> out, weights; q, k features.


def _normalize_output(rule, q, k, v, inputs, log_decay, begins, state, key_sums, eps):
    """Divide the output by z_t . q_t + eps."""
    wide = v.astype(key_sums.dtype)  # what is divided overflows 16 bits
    switches = {"log_decay": log_decay, "begins": begins}
    out, weights = run(rule, q, k, wide, inputs, state.weights, **switches)
    return _divide(out, q, key_sums, eps).astype(v.dtype), weights


def _normalize_output_and_key(rule, q, k, v, inputs, log_decay, begins, state, key_sums, eps):
    """As `output`; and with d_t = z_(t-1) . k_t, write k_t / (d_t + eps) with strength beta_t d_t.

    d_0 is 1 where no key has come in yet: nothing has been written that would have to be removed.
    """
    dtype = state.key_sum.dtype
    before = jnp.concatenate([state.key_sum[:, None], key_sums[:, :-1]], axis=1)
    d = jnp.sum(before * k.astype(dtype), axis=-1)
    empty = jnp.all(state.key_sum == 0, axis=-1)
    d = d.at[:, 0].set(jnp.where(empty, 1, d[:, 0]))
    if begins is not None:
        d = jnp.where(begins[..., None], 1, d)
    scaled = k.astype(dtype) / (d + eps)[..., None]
    inputs = tuple(
        x.astype(dtype) * d if i.name == "beta" else x
        for i, x in zip(rule.inputs, inputs, strict=True)
    )
    switches = {"log_decay": log_decay, "begins": begins}
    out, weights = run(rule, q, scaled, v.astype(dtype), inputs, state.weights, **switches)
    return _divide(out, q, key_sums, eps).astype(v.dtype), weights


def _divide(out, q, key_sums, eps):
    divisor = jnp.sum(key_sums * q.astype(key_sums.dtype), axis=-1, keepdims=True) + eps
    return (out.astype(divisor.dtype) / divisor).astype(out.dtype)


def _of_last_document(segment_ids, k, key_sum):
    """The keys and the sum of keys before them, zeros where they are of an earlier document."""
    documents = segments.numbered(segment_ids)
    own, carried = documents == documents[:, -1:], documents[:, -1] == 0
    return (
        jnp.where(own[..., None, None], k, 0),
        jnp.where(carried[:, None, None], key_sum, 0),
    )


# None: the output stays as it is.
ATTN_NORMALIZATIONS: Table[Callable | None] = Table("attn_normalization")
ATTN_NORMALIZATIONS["none"] = None
ATTN_NORMALIZATIONS["output"] = _normalize_output
ATTN_NORMALIZATIONS["output_and_key"] = _normalize_output_and_key


def check_composition(
    update_rule: str,
    attn_normalization: str,
    decays: bool = False,
    n_write: int = 1,
    documents: bool = False,
) -> None:
    """Raise `UserError` for an unknown name, or switches without meaning for the rule.

    Args:
        update_rule: a name in UPDATE_RULES.
        attn_normalization: a name in ATTN_NORMALIZATIONS.
        decays: whether the memory decays.
        n_write: writes of a token.
        documents: whether rows are packed with them.
    """
    rule = UPDATE_RULES[update_rule]
    if rule.update is None and (decays or n_write > 1):
        raise UserError(
            f"a decay and several writes a token are switches of rules that say their update, and "
            f"update_rule {update_rule} says its step only: make it with fwm.ops.composed."
        )
    if ATTN_NORMALIZATIONS[attn_normalization] is None:
        return
    if n_write > 1 or (decays and attn_normalization == "output_and_key"):
        raise UserError(
            f"attn_normalization={attn_normalization} has no meaning with "
            f"{'several writes a token' if n_write > 1 else 'a decay'}: use none."
        )
    if rule.key_sums is None:
        raise UserError(
            f"attn_normalization={attn_normalization} divides by a sum of keys, and update_rule "
            f"{update_rule} does not say how its own is made (key_sums): use none."
        )
    if decays and rule.key_sums is not running_key_sums:
        raise UserError(
            f"attn_normalization={attn_normalization} divides by a sum of keys that decays as the "
            f"memory does, and update_rule {update_rule} makes its own without: use none."
        )
    if documents and rule.key_sums is not running_key_sums:
        raise UserError(
            f"attn_normalization={attn_normalization} divides by a sum of keys that begins anew "
            f"with each document, and update_rule {update_rule} makes its own without: use none, "
            "or pack no documents."
        )
    if attn_normalization == "output_and_key" and "beta" not in [i.name for i in rule.inputs]:
        raise UserError(
            "attn_normalization=output_and_key rescales beta, the strength with which the delta "
            f"rule removes and writes, and update_rule {update_rule} has none: use output or none."
        )


def fast_weight_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S N H"],
    v: Float[Array, "B S N V"],
    beta: Float[Array, "B S N"] | None,
    state: FastWeightState | None,
    *,
    update_rule: str,
    attn_normalization: str,
    inputs: Mapping[str, Float[Array, "B S N *F"]] = MappingProxyType({}),
    log_decay: Float[Array, "B T N *F"] | None = None,
    features: jax.tree_util.Partial | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    eps: float = 1e-5,
) -> tuple[Float[Array, "B T N V"], FastWeightState]:
    """Write the tokens into the memory by a rule, read it, and normalise (paper, section 4.2).

    Args:
        q: queries, as k.
        k: keys; S = T n for n writes a token, those of one token one after the other.
        v: values.
        beta: write strengths; None where the rule reads none.
        state: what an earlier call returned; None or all zeros: nothing written yet.
        update_rule: a name in UPDATE_RULES.
        attn_normalization: a name in ATTN_NORMALIZATIONS; z_t is the sum of all keys up to t.
        inputs: what else the rule reads, by name.
        log_decay: of the memory before a token, at most 0, per head or per key feature; None: 0.
        features: the map of q and k [..., H] to features [..., K] (which, for the delta rule, sum
            to one). None: q and k are features already.
        segment_ids: documents that a row is packed with: memory and sums of keys begin anew where
            the id changes, and at the first token where it is not 0. None: one, which goes on.
        eps: added to each divisor.

    Returns:
        out, and the state: the memory, and the sum of all keys, decayed as the memory (zeros where
        the rule has none, and where nothing divides by it and there is a decay or n > 1).

    Raises:
        UserError: an unknown name, a normalisation without meaning for the rule, something that
            the rule reads missing or superfluous, arrays that do not fit each other, documents and
            sums of keys that the rule makes in a way of its own.
    """
    several = q.shape[1] != k.shape[1]
    packed = segment_ids is not None
    check_composition(update_rule, attn_normalization, log_decay is not None, 1 + several, packed)
    rule = UPDATE_RULES[update_rule]
    given = dict(inputs) if beta is None else {"beta": beta, **inputs}
    names = [i.name for i in rule.inputs]
    if set(given) != set(names):
        raise UserError(
            f"update_rule {update_rule} reads {', '.join(names) or 'nothing'} besides q, k and v, "
            f"and was given {', '.join(given) or 'nothing'}."
        )
    read = tuple(given[name] for name in names)
    # The width of q and k is that of the state's keys only where no map stands between.
    width = "K" if features is None else "H"
    writes = "B S N" if several else "B T N"
    arrays: dict[str, Any] = {
        "q": (q, f"B T N {width}"),
        "k": (k, f"{writes} {width}"),
        "v": (v, f"{writes} V"),
    }
    arrays |= {i.name: (given[i.name], i.axes(writes)) for i in rule.inputs}
    if state is not None:
        arrays["weights"] = (state.weights, "B N K V")
        arrays["key_sum"] = (state.key_sum, "B N K")
    if segment_ids is not None:
        arrays["segment_ids"] = (segment_ids, "B T", jnp.integer)
    check("fast_weight_attention", **arrays)
    normalization, begins = ATTN_NORMALIZATIONS[attn_normalization], None
    if segment_ids is not None:
        begins = segments.begins(segment_ids)
    if state is None:
        dtype = np.promote_types(np.float32, v.dtype)
        n_batch, _, n_head, n_key = jax.eval_shape(lambda k: mapped(features, k), k).shape
        state = FastWeightState(
            jnp.zeros((n_batch, n_head, n_key, v.shape[-1]), dtype),
            jnp.zeros((n_batch, n_head, n_key), dtype),
        )
    # What is summed over tokens is kept in float32, whatever was handed in.
    wide = lambda x: x.astype(np.promote_types(np.float32, x.dtype))
    state = FastWeightState(wide(state.weights), wide(state.key_sum))
    if normalization is None:
        switches = {"log_decay": log_decay, "begins": begins}
        out, weights = run(rule, q, k, v, read, state.weights, features, **switches)
        key_sum = state.key_sum
        if rule.key_sums is not None and log_decay is None and not several:
            k = mapped(features, k)
            if segment_ids is not None:
                k, key_sum = _of_last_document(segment_ids, k, key_sum)
            key_sum = rule.key_sums(k, key_sum, *read, last=True)
    else:
        q, k = mapped(features, q), mapped(features, k)
        assert rule.key_sums is not None  # check_composition has seen to it
        forgets = segments.forgetting(begins, log_decay, k.shape[2])
        decays = {} if forgets is None else {"log_decay": forgets}
        key_sums = rule.key_sums(k, state.key_sum, *read, **decays)
        out, weights = normalization(rule, q, k, v, read, log_decay, begins, state, key_sums, eps)
        key_sum = key_sums[:, -1]
    return out, FastWeightState(weights, key_sum)
