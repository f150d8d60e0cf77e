"""The sum and the delta rule by chunks of matmuls, the state that a layer carries, normalisation.

Within a chunk of C tokens that starts from W, with S the strictly lower part of diag(beta) K K^T,

    (I + S) U = diag(beta) (V - K W)        out = Q W + tril(Q K^T) U        W' = W + K^T U

(Yang et al. 2024, arXiv 2406.06484); the sum rule is the same with U = V. The backward pass is
written by hand: of the states it keeps those at the borders of groups of chunks only.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from fwm.errors import UserError
from fwm.ops import recurrent
from fwm.ops.softmax import rows_per_block


class FastWeightState(NamedTuple):
    """What a fast weight layer carries from one segment to the next."""

    weights: Float[Array, "B N K V"]
    key_sum: Float[Array, "B N K"]


def sum_rule(
    q: Float[Array, "B T N K"],
    k: Float[Array, "B T N K"],
    v: Float[Array, "B T N V"],
    weights: Float[Array, "B N K V"] | None = None,
    *,
    chunk_size: int | None = None,
) -> tuple[Float[Array, "B T N V"], Float[Array, "B N K V"]]:
    """W_t = W_(t-1) + k_t v_t^T; out_t = W_t^T q_t (paper, equations 17-18).

    Args:
        q: queries, already mapped to features, as k.
        k: keys.
        v: values.
        weights: the state before the first token; None: zeros.
        chunk_size: tokens per chunk; None: the fastest known for shape and backend.

    Returns:
        out in v's dtype, and the state after the last token, accumulated in float32.

    Raises:
        UserError: a chunk_size below 1, no token.
    """
    return _by_chunks(q, k, v, None, weights, chunk_size=chunk_size)


def delta_rule(
    q: Float[Array, "B T N K"],
    k: Float[Array, "B T N K"],
    v: Float[Array, "B T N V"],
    beta: Float[Array, "B T N"],
    weights: Float[Array, "B N K V"] | None = None,
    *,
    chunk_size: int | None = None,
) -> tuple[Float[Array, "B T N V"], Float[Array, "B N K V"]]:
    """W_t = W_(t-1) + beta_t k_t (v_t - W_(t-1)^T k_t)^T; out_t = W_t^T q_t (paper, section 4.2).

    Args and results as of `sum_rule`; beta holds the write strengths.
    """
    return _by_chunks(q, k, v, beta, weights, chunk_size=chunk_size)


class _Plan(NamedTuple):
    """How the tokens are cut: `n_group` groups, scanned, of `n_chunk` chunks of `size` tokens.

    What does not depend on the memory is computed for all chunks of a group at once. `n_row` rows
    of the batch go through all groups before the next ones do.
    """

    n_row: int
    n_group: int
    n_chunk: int
    size: int
    token_by_token: bool  # where no gradient is asked for


def _plan(
    shape: tuple[int, int, int, int], n_value: int, delta: bool, chunk_size: int | None
) -> _Plan:
    """The fastest cut known, from the measurements of `benchmarks/ops.py`.

    | backend | rule  | tokens per chunk      | chunks per group                        |
    |---------|-------|-----------------------|-----------------------------------------|
    | CPU     | sum   | 32                    | 1: what a group needs stays in cache    |
    | CPU     | delta | 16, from V = 64 on 32 | 2: half the number of groups and states |
    | others  | both  | 64 (not yet measured) | all: only the memory is sequential      |

    On CPU, where the memories of all rows take more than 1 MiB, rows are taken by blocks of at most
    half a MiB, which stays in a core's cache: a fifth less time at 96 x 256 tokens, K = 64, V = 16.
    Without a gradient on CPU, the delta rule of a small memory runs token by token (K <= 32 and
    K V <= 1024): the memory stays in the cache, and the plain recurrence has the least arithmetic.
    Larger chunks lose precision where keys are nearly equal and beta is near 1: then the gradient
    of k is right to 2e-6 with 32 tokens, 5e-6 with 64 and 1e-5 with 128.
    """
    if chunk_size is not None and chunk_size < 1:
        raise UserError(f"chunk_size={chunk_size} is not positive; give None or at least 1.")
    n_batch, length, n_head, n_key = shape
    if length < 1:
        raise UserError(f"there must be at least one token, got arrays of shape {shape}.")
    cpu = jax.default_backend() == "cpu"
    if chunk_size is None:
        on_cpu = 16 if delta and n_value < 64 else 32
        size = on_cpu if cpu else 64
    else:
        size = chunk_size
    size = min(size, length)
    n_chunk = -(-length // size)
    small = n_key <= 32 and n_key * n_value <= 1024
    token_by_token = cpu and delta and chunk_size is None and small
    per_group = min(2 if delta else 1, n_chunk) if cpu else n_chunk
    n_row, memory = n_batch, 4 * n_head * n_key * n_value
    if cpu and n_batch * memory > 2**20:
        n_row = rows_per_block(n_batch, max(1, 2**19 // memory))
    return _Plan(n_row, -(-n_chunk // per_group), per_group, size, token_by_token)


def _by_chunks(q, k, v, beta, weights, features=None, *, chunk_size=None):
    """Run the rule (beta None: sum) with heads and batch as one axis of small memories.

    Features much wider than q and k are computed chunk by chunk where a gradient is asked for, and
    again in the backward pass: those of all tokens never lie in memory. A step of dpfp_delta, where
    K = 4 H, at `small` then takes 3% less time on CPU, and half a GB less at 96 x 256 tokens. At
    K = 2 H (FAVOR+), and without a gradient, it would cost more than it saves.
    """
    n_batch, _, n_head, width = q.shape
    n_key = jax.eval_shape(partial(_mapped, features), q).shape[-1]
    if n_key < 4 * width:
        q, k, features = _mapped(features, q), _mapped(features, k), None
    n_value = v.shape[-1]
    dtype = np.promote_types(np.float32, v.dtype)
    if weights is None:
        weights = jnp.zeros((n_batch, n_head, n_key, n_value), dtype)
    plan = _plan((*q.shape[:-1], n_key), n_value, beta is not None, chunk_size)
    return _rule(plan, weights.astype(dtype), q, k, v, beta, features)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rule(plan, weights, q, k, v, beta, features):
    q, k = _mapped(features, q), _mapped(features, k)
    if plan.token_by_token:
        return recurrent.delta_rule(q, k, v, beta, weights)
    return _rule_forward(plan, weights, q, k, v, beta, None, keep=False)[0]


def _mapped(features, x):
    return x if features is None else features(x)


def _rule_forward(plan, weights, q, k, v, beta, features, keep=True):
    run = partial(_rows_forward, plan, features, keep=keep)
    (out, weights), kept = jax.lax.map(run, _split_rows(plan, (weights, q, k, v, beta)))
    return jax.tree.map(_merge_rows, (out, weights)), (features, kept, q, k, v, beta)


def _rows_forward(plan, features, inputs, keep):
    weights, q, k, v, beta = inputs
    tokens = _pad(plan, (q, k, v, None if beta is None else beta[..., None]))

    def step(carry, group):
        m, out = carry
        q, k, v, beta = jax.tree.map(partial(_cut, plan, group), tokens)
        m, part, kept = _forward(m, (_mapped(features, q), _mapped(features, k), v, beta))
        return (m, _put(plan, group, out, part)), checkpoint_name(kept, "memory") if keep else None

    start = (weights.mT.reshape(-1, *weights.mT.shape[2:]), jnp.zeros_like(tokens[2]))
    (m, out), kept = jax.lax.scan(step, start, jnp.arange(plan.n_group))
    return (out[:, : q.shape[1]], m.mT.reshape(weights.shape)), kept


def _rule_backward(plan, residuals, cotangents):
    features, kept, *tokens = residuals
    rows = _split_rows(plan, (tokens, cotangents))
    run = partial(_rows_backward, plan, features)
    return (*jax.tree.map(_merge_rows, jax.lax.map(run, (kept, *rows))), None)


def _rows_backward(plan, features, inputs):
    kept, (q, k, v, beta), (dout, dweights) = inputs
    tokens = _pad(plan, (q, k, v, None if beta is None else beta[..., None]))
    (dout,) = _pad(plan, (dout,))

    def step(carry, inputs):
        dm, gradients = carry
        group, kept = inputs
        cut = partial(_cut, plan, group)
        q, k, v, beta = jax.tree.map(cut, tokens)
        q, pull_q = jax.vjp(partial(_mapped, features), q)
        k, pull_k = jax.vjp(partial(_mapped, features), k)
        dm, (dq, dk, dv, dbeta) = _backward(dm, kept, (q, k, v, beta), cut(dout))
        (dq,), (dk,) = pull_q(dq.astype(q.dtype)), pull_k(dk.astype(k.dtype))
        parts = dq, dk, dv, dbeta
        return (dm, jax.tree.map(partial(_put, plan, group), gradients, parts)), None

    dm = dweights.mT.reshape(-1, *dweights.mT.shape[2:])
    start = (dm, jax.tree.map(jnp.zeros_like, tokens))
    groups = jnp.arange(plan.n_group)
    (dm, gradients), _ = jax.lax.scan(step, start, (groups, kept), reverse=True)
    dq, dk, dv, dbeta = jax.tree.map(lambda x: x[:, : q.shape[1]], gradients)
    dbeta = None if beta is None else dbeta[..., 0]
    return dm.mT.reshape(dweights.shape), dq, dk, dv, dbeta


_rule.defvjp(_rule_forward, _rule_backward)


# Blocks of rows run one after the other, so that the memories of one block stay in the cache.


def _split_rows(plan, inputs):
    return jax.tree.map(lambda x: x.reshape(-1, plan.n_row, *x.shape[1:]), inputs)


def _merge_rows(x):
    return x.reshape(-1, *x.shape[2:])


def _pad(plan, tokens):
    """Fill the last group with k = 0, which writes nothing."""

    def pad(x):
        missing = plan.n_group * plan.n_chunk * plan.size - x.shape[1]
        return jnp.pad(x, ((0, 0), (0, missing), (0, 0), (0, 0))) if missing else x

    return jax.tree.map(pad, tokens)


# Groups are cut out of the [B, T, N, F] arrays one at a time, and gradients written back in place:
# on CPU, whole copies in another layout cost more than all matmuls.


def _cut(plan, group, x):
    """One group of x [B, T, N, F], as [chunk, B N, C, F]."""
    n_batch, _, n_head, n_feature = x.shape
    length = plan.n_chunk * plan.size
    x = jax.lax.dynamic_slice_in_dim(x, group * length, length, axis=1)
    x = x.reshape(n_batch, plan.n_chunk, plan.size, n_head, n_feature).transpose(1, 0, 3, 2, 4)
    return x.reshape(plan.n_chunk, n_batch * n_head, plan.size, n_feature)


def _put(plan, group, x, part):
    """Write one group, as `_cut` made it, to its place in x [B, T, N, F]."""
    n_batch, _, n_head, n_feature = x.shape
    length = plan.n_chunk * plan.size
    part = part.reshape(plan.n_chunk, n_batch, n_head, plan.size, n_feature)
    part = part.transpose(1, 0, 3, 2, 4).reshape(n_batch, length, n_head, n_feature)
    return jax.lax.dynamic_update_slice_in_dim(x, part.astype(x.dtype), group * length, axis=1)


# Inside a group arrays are [chunk, B N, ...] and the memory is kept as M = W^T, [V, K]: so every
# matmul contracts the last axis of its left side. XLA's CPU backend is four times slower at the
# transposed product of small matrices; the transposes that remain are elementwise copies.


def _matmul(a, b):
    return jnp.einsum("...ij,...jk->...ik", a, b)


def _matmul_t(a, b):
    """a b^T."""
    return jnp.einsum("...ij,...kj->...ik", a, b)


def _copy_t(x):
    """x^T as an array of its own, which XLA does not fold into the matmul that reads it."""
    return jax.lax.optimization_barrier(x.mT)


def _forward(m, tokens):
    """One group: the memory after it, its outputs, and what its backward pass needs."""
    q, k, v, beta = jax.tree.map(lambda x: x.astype(m.dtype), tokens)
    reads = jnp.tril(_matmul_t(q, k))
    start = m
    if beta is None:
        written = _copy_t(v)
        m, before = _scan_chunks(lambda m, d: (m + d, m), m, _matmul(written, k))
        inverse = errors = None
    else:
        overlaps = jnp.tril(_matmul_t(k, k), -1)
        inverse = _unit_inverse(beta * overlaps)

        def step(m, chunk):
            k, v, beta, inverse = chunk
            change = _matmul_t(beta.mT * (v.mT - _matmul_t(m, k)), inverse)
            return m + _matmul(change, k), (m, change)

        m, (before, written) = _scan_chunks(step, m, (k, v, beta, inverse))
        # What each token finds wrong: written = beta * errors, but beta may be 0.
        errors = v.mT - _matmul_t(before, k) - _matmul_t(written, overlaps)
    out = _matmul_t(before, q) + _matmul_t(written, reads)
    return m, out.mT, (start, inverse, errors)


def _backward(dm, kept, tokens, dout):
    """The gradients of `_forward`: of the memory before the group and of the tokens."""
    q, k, v, beta = jax.tree.map(lambda x: x.astype(dm.dtype), tokens)
    dout = dout.astype(dm.dtype)
    dout_t = _copy_t(dout)
    start, inverse, errors = kept
    reads = jnp.tril(_matmul_t(q, k))
    dwritten, dm_reads = _matmul(dout_t, reads), _matmul(dout_t, q)
    written = _copy_t(v) if beta is None else beta.mT * errors
    before = _borders(start, written, k)
    if beta is None:
        # Exact also for a memory that was carried in: `before` holds it. The official CUDA kernel
        # restarts from zeros here, so that its dq lacks the carried part.
        dm, after = _scan_chunks(lambda dm, d: (dm + d, dm), dm, dm_reads, reverse=True)
        dv, dbeta = (dwritten + _matmul_t(after, k)).mT, None
        dreads = jnp.tril(_matmul_t(dout, v))
        dq = _matmul(dout, before) + _matmul(dreads, k)
        left, right = [dreads.mT, v], [q, after]
        dk = _matmul(jnp.concatenate(left, axis=-1), jnp.concatenate(right, axis=-2))
        return dm, (dq, dk, dv, dbeta)

    def step(dm, chunk):
        k, beta, inverse, dwritten, dm_reads = chunk
        derrors = _matmul(dwritten + _matmul_t(dm, k), inverse)
        return dm + dm_reads - _matmul(beta.mT * derrors, k), (dm, derrors)

    chunks = (k, beta, inverse, dwritten, dm_reads)
    dm, (after, derrors) = _scan_chunks(step, dm, chunks, reverse=True)
    dbeta = jnp.sum(errors * derrors, axis=-2)[..., None]
    dv = beta * derrors.mT
    both = _matmul(
        jnp.concatenate([dout, -dv], axis=-2), jnp.concatenate([written, before], axis=-1)
    )
    size = q.shape[-2]
    dreads = jnp.tril(both[..., :size, :size])
    doverlaps = jnp.tril(both[..., size:, :size], -1)
    dq = both[..., :size, size:] + _matmul(dreads, k)
    left = [dreads.mT, doverlaps + doverlaps.mT, written.mT]
    right = [q, k, after]
    dk = _matmul(jnp.concatenate(left, axis=-1), jnp.concatenate(right, axis=-2))
    return dm, (dq, dk + both[..., size:, size:], dv, dbeta)


def _borders(start, written, k):
    """The memory before each chunk of a group, from the one before the first."""
    if len(k) == 1:
        return start[None]
    return _scan_chunks(lambda m, d: (m + d, m), start, _matmul(written, k))[1]


def _scan_chunks(step, carry, chunks, reverse=False):
    """Scan over the chunks of a group; a few are unrolled."""
    n_chunk = len(jax.tree.leaves(chunks)[0])
    return jax.lax.scan(step, carry, chunks, reverse=reverse, unroll=n_chunk if n_chunk <= 8 else 1)


def _unit_inverse(s):
    """(I + s)^-1 for strictly lower triangular s [..., C, C]: 8 x 8 blocks by rows, then doubling.

    Stable for any keys, as the Neumann product is not.
    """
    *batch, wanted, _ = s.shape
    size = 1 << (wanted - 1).bit_length()
    s = jnp.pad(s, [(0, 0)] * len(batch) + [(0, size - wanted)] * 2)
    width = min(size, 8)

    def blocks(rows, columns):  # the blocks of s at these places, [..., n, width, width]
        places = zip(rows, columns, strict=True)
        cut = s.reshape(*batch, size // width, width, size // width, width)
        return jnp.stack([cut[..., i, :, j, :] for i, j in places], axis=-3)

    diagonal = blocks(range(size // width), range(size // width))
    rows: list[Array] = []
    for i in range(width):
        row = jnp.broadcast_to(
            jnp.asarray(np.eye(width)[i].reshape((1,) * (s.ndim - 1) + (width,)), s.dtype),
            (*diagonal.shape[:-2], width),
        )
        for j, earlier in enumerate(rows):
            row = row - diagonal[..., i, j, None] * earlier
        # Without the barrier XLA would compute each row anew inside all later ones.
        rows.append(jax.lax.optimization_barrier(row))
    inverse = jnp.stack(rows, axis=-2)
    while width < size:
        upper, lower = inverse[..., 0::2, :, :], inverse[..., 1::2, :, :]
        n_block = size // width
        corner = blocks(range(1, n_block, 2), range(0, n_block, 2))
        corner = -_exact(lower, _exact(corner, upper))
        top = jnp.concatenate([upper, jnp.zeros_like(upper)], axis=-1)
        inverse = jnp.concatenate([top, jnp.concatenate([corner, lower], axis=-1)], axis=-2)
        width *= 2
    return inverse[..., 0, :wanted, :wanted]


def _exact(a, b):
    # Full float32 on GPU too: an error in the inverse is an error in every later state.
    return jnp.einsum("...ij,...jk->...ik", a, b, precision="highest")


# (q, k, v, beta, weights, features) -> out, weights; beta is None for the sum rule.
UPDATE_RULES: dict[str, Callable] = {"sum": _by_chunks, "delta": _by_chunks}


def _unnormalized(rule, q, k, v, beta, state, features, eps):
    return rule(q, k, v, beta, state.weights, features)


def _normalize_output(rule, q, k, v, beta, state, features, eps):
    """Divide the output by z_t . q_t + eps."""
    q, k = _mapped(features, q), _mapped(features, k)
    key_sums = _key_sums(k, state.key_sum)
    out, weights = rule(q, k, v, beta, state.weights, None)
    return _divide(out, q, key_sums, eps), weights


def _normalize_output_and_key(rule, q, k, v, beta, state, features, eps):
    """As `output`; and with d_t = z_(t-1) . k_t, write k_t / (d_t + eps) with strength beta_t d_t.

    d_0 is 1 where no key has come in yet: nothing has been written that would have to be removed.
    """
    if beta is None:
        raise UserError(
            "attn_normalization 'output_and_key' rescales beta, which the sum rule does not have; "
            "use update_rule 'delta', or 'output' or 'none'."
        )
    dtype = state.key_sum.dtype
    q, k = _mapped(features, q), _mapped(features, k)
    key_sums = _key_sums(k, state.key_sum)
    before = jnp.concatenate([state.key_sum[:, None], key_sums[:, :-1]], axis=1)
    d = jnp.sum(before * k.astype(dtype), axis=-1)
    empty = jnp.all(state.key_sum == 0, axis=-1)
    d = d.at[:, 0].set(jnp.where(empty, 1, d[:, 0]))
    scaled = (k.astype(dtype) / (d + eps)[..., None]).astype(k.dtype)
    beta = (beta.astype(dtype) * d).astype(beta.dtype)
    out, weights = rule(q, scaled, v, beta, state.weights, None)
    return _divide(out, q, key_sums, eps), weights


ATTN_NORMALIZATIONS: dict[str, Callable] = {
    "none": _unnormalized,
    "output": _normalize_output,
    "output_and_key": _normalize_output_and_key,
}


def fast_weight_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T N H"],
    v: Float[Array, "B T N V"],
    beta: Float[Array, "B T N"] | None,
    state: FastWeightState | None,
    *,
    update_rule: str,
    attn_normalization: str,
    features: jax.tree_util.Partial | None = None,
    eps: float = 1e-5,
) -> tuple[Float[Array, "B T N V"], FastWeightState]:
    """Write the tokens into the memory by a rule, read it, and normalise (paper, section 4.2).

    Args:
        q: queries, as k.
        k: keys.
        v: values.
        beta: write strengths; None for the sum rule.
        state: what an earlier call returned; None or all zeros: nothing written yet.
        update_rule: a name in UPDATE_RULES.
        attn_normalization: a name in ATTN_NORMALIZATIONS; z_t is the sum of all keys up to t.
        features: the map of q and k [..., H] to features [..., K] (which, for the delta rule, sum
            to one); arrays that it holds get no gradient. None: q and k are features already.
        eps: added to each divisor.

    Raises:
        UserError: an unknown name, `output_and_key` without beta, beta missing or superfluous.
    """
    rule = _lookup(UPDATE_RULES, "update_rule", update_rule)
    normalization = _lookup(ATTN_NORMALIZATIONS, "attn_normalization", attn_normalization)
    if (beta is None) != (update_rule == "sum"):
        raise UserError("the sum rule has no beta, and every other rule needs one.")
    if state is None:
        dtype = np.promote_types(np.float32, v.dtype)
        n_batch, _, n_head, n_key = jax.eval_shape(partial(_mapped, features), k).shape
        state = FastWeightState(
            jnp.zeros((n_batch, n_head, n_key, v.shape[-1]), dtype),
            jnp.zeros((n_batch, n_head, n_key), dtype),
        )
    out, weights = normalization(rule, q, k, v, beta, state, features, eps)
    key_sum = state.key_sum + jnp.sum(_mapped(features, k).astype(state.key_sum.dtype), axis=1)
    return out, FastWeightState(weights, key_sum)


def _lookup(table: dict[str, Callable], field: str, name: str) -> Callable:
    if name not in table:
        raise UserError(f"{field}={name!r} is unknown; choose one of {', '.join(table)}.")
    return table[name]


def _divide(out, q, key_sums, eps):
    divisor = jnp.sum(key_sums * q.astype(key_sums.dtype), axis=-1, keepdims=True) + eps
    return (out.astype(divisor.dtype) / divisor).astype(out.dtype)


def _key_sums(k, key_sum):
    """The running sums of the keys, each token's own included, [B, T, N, K]: sums by chunk."""
    n_batch, length, n_head, n_key = k.shape
    size = min(length, 16)
    n_chunk = -(-length // size)
    chunks = jnp.pad(k, ((0, 0), (0, n_chunk * size - length), (0, 0), (0, 0)))
    chunks = chunks.reshape(n_batch, n_chunk, size, n_head * n_key).astype(key_sum.dtype)
    # A triangular matmul: XLA's cumsum is many times slower on every backend.
    within = jnp.einsum(
        "ts,bcsf->bctf", jnp.tri(size, dtype=key_sum.dtype), chunks, precision="highest"
    )
    totals = jnp.cumsum(within[:, :, -1], axis=1)
    start = jnp.concatenate([jnp.zeros_like(totals[:, :1]), totals[:, :-1]], axis=1)
    start = start + key_sum.reshape(n_batch, 1, -1)
    sums = (within + start[:, :, None]).reshape(n_batch, n_chunk * size, n_head, n_key)
    return sums[:, :length]
