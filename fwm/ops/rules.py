"""The update rules: their equations for a chunk, forward and backward, and the table of them.

Within a chunk of C tokens that starts from W, with S the strictly lower part of diag(beta) K K^T,

    (I + S) U = diag(beta) (V - K W)        out = Q W + tril(Q K^T) U        W' = W + K^T U

(Yang et al. 2024, arXiv 2406.06484); the sum rule is the same with U = V. Below, arrays are those
of `chunks.Chunked`, with M = W^T: `written` is U^T.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from fwm.errors import UserError
from fwm.ops import chunks, general, recurrent, segments
from fwm.ops.chunks import Chunked, copy_t, mapped, scan_chunks
from fwm.ops.general import composed
from fwm.ops.inverse import unit_inverse
from fwm.ops.recurrent import Input, Rule, Switches, Update
from fwm.ops.whole import delta_whole
from fwm.registry import Table


def _sum_forward(m, q, k, v):
    start, written = m, copy_t(v)
    m, before = scan_chunks(_add, m, _matmul(written, k))
    return m, _outputs(before, written, q, k), start


def _sum_backward(dm, start, dout, q, k, v):
    # Exact also for a memory that was carried in: `before` holds it. The official CUDA kernel
    # restarts from zeros here, so that its dq lacks the carried part.
    written, dout_t = copy_t(v), copy_t(dout)
    before = _before(start, written, k)
    dm, after = scan_chunks(_add, dm, _matmul(dout_t, q), reverse=True)
    dv = (_matmul(dout_t, _reads(q, k)) + _matmul_t(after, k)).mT
    dreads = jnp.tril(_matmul_t(dout, v))
    dq = _matmul(dout, before) + _matmul(dreads, k)
    dk = _matmul(jnp.concatenate([dreads.mT, v], -1), jnp.concatenate([q, after], -2))
    return dm, (dq, dk, dv)


def _delta_forward(m, q, k, v, beta):
    start = m
    overlaps = jnp.tril(_matmul_t(k, k), -1)
    inverse = unit_inverse(beta * overlaps)

    def step(m, chunk):
        k, v, beta, inverse = chunk
        written = _matmul_t(beta.mT * (v.mT - _matmul_t(m, k)), inverse)
        return m + _matmul(written, k), (m, written)

    m, (before, written) = scan_chunks(step, m, (k, v, beta, inverse))
    # What each token finds wrong: written = beta * errors, but beta may be 0.
    errors = v.mT - _matmul_t(before, k) - _matmul_t(written, overlaps)
    return m, _outputs(before, written, q, k), (start, inverse, errors)


def _delta_backward(dm, kept, dout, q, k, v, beta):
    start, inverse, errors = kept
    written, dout_t = beta.mT * errors, copy_t(dout)
    before = _before(start, written, k)

    def step(dm, chunk):
        k, beta, inverse, dwritten, dm_reads = chunk
        derrors = _matmul(dwritten + _matmul_t(dm, k), inverse)
        return dm + dm_reads - _matmul(beta.mT * derrors, k), (dm, derrors)

    each = (k, beta, inverse, _matmul(dout_t, _reads(q, k)), _matmul(dout_t, q))
    dm, (after, derrors) = scan_chunks(step, dm, each, reverse=True)
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
    dk = _matmul(jnp.concatenate(left, axis=-1), jnp.concatenate([q, k, after], axis=-2))
    return dm, (dq, dk + both[..., size:, size:], dv, dbeta)


def _outputs(before, written, q, k):
    """Q W + tril(Q K^T) U, for all chunks at once."""
    return (_matmul_t(before, q) + _matmul_t(written, _reads(q, k))).mT


def _reads(q, k):
    return jnp.tril(_matmul_t(q, k))


def _before(start, written, k):
    """The memory before each chunk of a group, from the one before the first."""
    if len(k) == 1:
        return start[None]
    return scan_chunks(_add, start, _matmul(written, k))[1]


def _add(m, change):
    return m + change, m


def _matmul(a, b):
    return jnp.einsum("...ij,...jk->...ik", a, b)


def _matmul_t(a, b):
    """a b^T."""
    return jnp.einsum("...ij,...kj->...ik", a, b)


def running_key_sums(
    k: Float[Array, "B T N K"],
    before: Float[Array, "B N K"],
    *inputs: Array,
    last: bool = False,
    log_decay: Float[Array, "B T N *K"] | None = None,
) -> Float[Array, "B *T N K"]:
    """z_t = exp(g_t) z_(t-1) + k_t from z_0 = before, with its own key; `last`: z_T alone.

    The sums of a chunk are a triangular matmul: XLA's cumsum is many times slower everywhere.
    """
    if log_decay is not None:
        return _decayed_key_sums(k, before, log_decay)
    if last:
        return before + jnp.sum(k.astype(before.dtype), axis=1)
    n_batch, length, n_head, n_key = k.shape
    size = min(length, 16)
    n_chunk = -(-length // size)
    cut = jnp.pad(k, ((0, 0), (0, n_chunk * size - length), (0, 0), (0, 0)))
    cut = cut.reshape(n_batch, n_chunk, size, n_head * n_key).astype(before.dtype)
    within = jnp.einsum(
        "ts,bcsf->bctf", jnp.tri(size, dtype=before.dtype), cut, precision="highest"
    )
    totals = jnp.cumsum(within[:, :, -1], axis=1)
    start = jnp.concatenate([jnp.zeros_like(totals[:, :1]), totals[:, :-1]], axis=1)
    start = start + before.reshape(n_batch, 1, -1)
    sums = (within + start[:, :, None]).reshape(n_batch, n_chunk * size, n_head, n_key)
    return sums[:, :length]


def _decayed_key_sums(k, before, log_decay):
    factors = jnp.exp(log_decay if log_decay.ndim == 4 else log_decay[..., None])
    k = k.astype(before.dtype)
    k = k.at[:, 0].add(factors[:, 0] * before)

    def then(early, late):
        return early[0] * late[0], early[1] * late[0] + late[1]

    return jax.lax.associative_scan(then, (factors, k), axis=1)[1]


SUM = Rule(
    step=recurrent.sum_step,
    key_sums=running_key_sums,
    # One chunk a group: what a group needs stays in the cache.
    chunked=Chunked(_sum_forward, _sum_backward, cpu_cut=lambda n_value: (32, 1)),
    update=lambda k, v: Update(v),
)

_BETA = Input("beta", jax.nn.sigmoid)


def _whole_sizes(n_key):
    # As wide as keys, between 16 and 128; chunks of 16 have more launches, of which a step with a
    # gradient has too many already (benchmarks/results/gpu_cost.md).
    size = min(128, max(16, 1 << (n_key - 1).bit_length()))
    return size, max(32, size)


DELTA = Rule(
    step=recurrent.delta_step,
    inputs=(_BETA,),
    key_norm="sum",
    key_sums=running_key_sums,
    # Two chunks a group: half the number of groups and states. Larger chunks lose precision where
    # keys are nearly equal and beta is near 1: then the gradient of k is right to 2e-6 with 32
    # tokens, 5e-6 with 64 and 1e-5 with 128.
    chunked=Chunked(
        _delta_forward,
        _delta_backward,
        cpu_cut=lambda n_value: (16 if n_value < 64 else 32, 2),
        small_by_tokens=True,
        whole=delta_whole,
        whole_sizes=_whole_sizes,
    ),
    flops=6,
    update=lambda k, v, beta: Update(v, beta),
)


def _error_free(k, v, beta):
    square = jnp.sum(k * k, axis=-1)
    small = square < 1e-7  # where (1 - exp(-beta l)) / l is beta
    strength = -jnp.expm1(-beta * square) / jnp.where(small, 1, square)
    return Update(v, jnp.where(small, beta, strength))


def _gated(k, v, erase, write):
    v = (write * v.astype(write.dtype)).astype(v.dtype)
    return Update(v, jnp.ones(k.shape[:-1], k.dtype), erase_key=erase * k)


UPDATE_RULES: Table[Rule] = Table("update_rule")
UPDATE_RULES["sum"] = SUM
UPDATE_RULES["delta"] = DELTA
_of_delta = {"key_norm": "l2", "key_sums": running_key_sums, "flops": 6}
# The strength with which one step of any length undoes all of the error that it should: not more
# than all of it however long a key is, which therefore has a say (arXiv 2512.12602).
UPDATE_RULES["error_free"] = composed((_BETA,), _error_free, **{**_of_delta, "key_norm": "none"})
# It removes less than it finds at the key: c of it (arXiv 2506.02475).
UPDATE_RULES["comba"] = composed(
    (_BETA, Input("correction", jax.nn.sigmoid)),
    lambda k, v, beta, c: Update(v, beta, erase_key=c[..., None] * k),
    **_of_delta,
)
# What is removed and what is written are gated feature by feature (arXiv 2605.22791).
UPDATE_RULES["gated_delta2"] = composed(
    (
        Input("erase", jax.nn.sigmoid, per_key=True),
        Input("write", jax.nn.sigmoid, per_value=True),
    ),
    _gated,
    **_of_delta,
)


def run(
    rule: Rule,
    q: Float[Array, "B T N _"],
    k: Float[Array, "B S N _"],
    v: Float[Array, "B S N V"],
    inputs: tuple[Array, ...] = (),
    weights: Float[Array, "B N K V"] | None = None,
    features: jax.tree_util.Partial | None = None,
    *,
    log_decay: Float[Array, "B T N *K"] | None = None,
    begins: Bool[Array, "B T"] | None = None,
) -> tuple[Float[Array, "B T N V"], Float[Array, "B N K V"]]:
    """As `chunks.run`, with a decay, S = T n for n writes a token, and documents.

    Where a document begins the memory is emptied before the token: by a log decay of -inf, or, of a
    rule that is no case of the algebra, token by token.

    Raises:
        UserError: there is a decay or are several writes, and the rule has a decay of its own.
    """
    several = q.shape[1] != k.shape[1]
    if log_decay is None and begins is None and not several:
        return chunks.run(rule, q, k, v, inputs, weights, features)
    q, k = mapped(features, q), mapped(features, k)
    if rule.update is None:  # then it has no other switches: fast_weights.check_composition
        assert begins is not None
        keep = jnp.broadcast_to(jnp.where(begins[..., None], 0.0, 1.0), k.shape[:3])
        step, every = partial(_step_anew, rule.step), recurrent.KEPT_EVERY
        return recurrent.scan_tokens(step, q, k, v, (keep, *inputs), weights, kept_every=every)
    v, beta, own, erase_key = rule.update(k, v, *inputs)
    if own is not None and (log_decay is not None or several):
        raise UserError(
            "this rule has a decay of its own: give it no other, and one write a token."
        )
    log_decay = segments.forgetting(begins, own if log_decay is None else log_decay, q.shape[2])
    if beta is None:
        return sum_rule(q, k, v, weights, log_decay=log_decay)
    return delta_rule(q, k, v, beta, weights, log_decay=log_decay, erase_key=erase_key)


def _step_anew(step, w, k, v, keep, *inputs):
    """A rule's step, from an empty memory where `keep` is 0."""
    return step(jnp.where(keep[..., None, None] > 0, w, 0), k, v, *inputs)


def sum_rule(
    q: Float[Array, "B T N K"],
    k: Float[Array, "B S N K"],
    v: Float[Array, "B S N V"],
    weights: Float[Array, "B N K V"] | None = None,
    *,
    log_decay: Float[Array, "..."] | None = None,
    chunk_size: int | None = None,
) -> tuple[Float[Array, "B T N V"], Float[Array, "B N K V"]]:
    """W_t = exp(g_t) W_(t-1) + k_t v_t^T; out_t = W_t^T q_t (paper, equations 17-18).

    Args:
        q: queries, already mapped to features, as k.
        k: keys; S = T n for n writes a token, those of one token one after the other.
        v: values, as many as keys.
        weights: the state before the first token; None: zeros.
        log_decay: g [B, T, N] or, for each feature, [B, T, N, K], at most 0; before a token's
            first write; -inf forgets all that was. None: 0.
        chunk_size: tokens per chunk; None: the fastest known for shape and backend.

    Returns:
        out in v's dtype, and the state after the last token, accumulated in float32.

    Raises:
        UserError: a chunk_size that is no integer above 0, no token, arrays that do not fit each
            other: nothing broadcasts.
    """
    switched = recurrent.switched("sum_rule", q, k, v, (), weights, log_decay, None)
    return _run_switched(*switched, q, k, v, weights, chunk_size)


def delta_rule(
    q: Float[Array, "B T N K"],
    k: Float[Array, "B S N K"],
    v: Float[Array, "B S N V"],
    beta: Float[Array, "B S N"],
    weights: Float[Array, "B N K V"] | None = None,
    *,
    log_decay: Float[Array, "..."] | None = None,
    erase_key: Float[Array, "..."] | None = None,
    chunk_size: int | None = None,
) -> tuple[Float[Array, "B T N V"], Float[Array, "B N K V"]]:
    """W_t = W' + beta_t k_t (v_t - W'^T p_t)^T, W' = exp(g_t) W_(t-1); out_t = W_t^T q_t.

    Paper, section 4.2, and the wider family (Yang et al. 2024, arXiv 2412.06464; Siems et al. 2025,
    arXiv 2502.10297). Args, results and errors as of `sum_rule`; beta [B, S, N] holds the write
    strengths, erase_key p [B, S, N, K] where the value to remove is read; None: at k.
    """
    given = (weights, log_decay, erase_key)
    switched = recurrent.switched("delta_rule", q, k, v, (beta,), *given)
    return _run_switched(*switched, q, k, v, weights, chunk_size)


def _run_switched(switches, n, inputs, q, k, v, weights, chunk_size):
    rule = DELTA if switches.delta else SUM
    if switches.decay or switches.erase:
        rule = general.rule(switches)
    per_head = Switches(delta=True, decay=True, erase=False)
    if switches == per_head and inputs[1].ndim == 3:
        at_once = rule.chunked._replace(whole=delta_whole, whole_sizes=_whole_sizes)
        rule = rule._replace(chunked=at_once)
    if n > 1 and q.shape[0] == 0:
        return recurrent.by_tokens(switches, n, q, k, v, inputs, weights)
    if n > 1:
        rule = general.several(rule, n)
    return chunks.run(rule, q, k, v, inputs, weights, chunk_size=chunk_size)
