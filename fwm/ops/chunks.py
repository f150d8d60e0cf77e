"""Any update rule by chunks of matmuls: cutting, padding, blocks of rows, the scan, its gradient.

The tokens are cut into groups of chunks. A scan goes over the groups; what a group does is the
rule's (`Chunked`), and what does not depend on the memory is computed for all its chunks at once.
Of the states the backward pass keeps those between groups only.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array

from fwm.errors import UserError
from fwm.ops import recurrent
from fwm.ops.checks import vary
from fwm.ops.forms import on_cpu
from fwm.ops.recurrent import Rule
from fwm.ops.softmax import rows_per_block

FORWARD_MODE = (
    "fwm.ops.recurrent has the update rules in forward mode, one token at a time; forward over "
    "reverse mode, as in jax.jvp(jax.grad(f), ...), works with the chunked form."
)


class Chunked(NamedTuple):
    """What a rule makes of a group of chunks.

    Inside a group arrays are [n, R, C, F]: n chunks of C tokens, R = B N rows of the batch times
    heads, F = K, V, or 1 for an input of one number per head. They have the dtype of the memory,
    which is kept as M = W^T, [R, V, K]: so every matmul can contract the last axis of its left
    side. XLA's CPU backend is four times slower at the transposed product of small matrices.

    Fields:
        forward: (m, q, k, v, *inputs) -> the memory after the group, its outputs [n, R, C, V], and
            what `backward` wants to know.
        backward: (dm, kept, dout, q, k, v, *inputs) -> the gradients of m and of the tokens (a
            tuple in the order of the arguments), with `kept` from `forward`. None: automatic
            differentiation of `forward`, which is then computed again.
        cpu_cut: V -> the fastest cut known on a CPU: tokens per chunk, chunks per group.
        small_by_tokens: whether without a gradient on a CPU a small memory is faster token by
            token: it stays in the cache, and the plain recurrence has the least arithmetic.
        whole: (sizes, weights [B, N, K, V], q, k, v, *inputs [B, T, N, F]) -> out, weights: in
            place of the two where there is no such cache (`forms`), for T a multiple of both sizes,
            with a gradient of its own. None: there too groups of chunks.
        whole_sizes: K -> tokens per chunk of `whole` without and with a gradient, the second a
            multiple of the first.
    """

    forward: Callable[..., Any]
    backward: Callable[..., Any] | None = None
    cpu_cut: Callable[[int], tuple[int, int]] = lambda n_value: (32, 1)
    small_by_tokens: bool = False
    whole: Callable[..., Any] | None = None
    whole_sizes: Callable[[int], tuple[int, int]] = lambda n_key: (64, 64)


class _Plan(NamedTuple):
    """How the tokens are cut: `n_group` groups, scanned, of `n_chunk` chunks of `size` tokens.

    `n_row` rows of the batch go through all groups before the next ones do.
    """

    n_row: int
    n_group: int
    n_chunk: int
    size: int
    by_tokens: bool  # where no gradient is asked for


def _plan(chunked: Chunked, shape: tuple[int, ...], n_value: int, chunk_size: int | None) -> _Plan:
    """The fastest cut known, from the measurements of `benchmarks/ops.py`.

    On CPU the rule says how many tokens make a chunk and how many chunks a group. Elsewhere (not
    yet measured) 64 tokens, and one group: only the memory is sequential.

    On CPU, where the memories of all rows take more than 1 MiB, rows are taken by blocks of at most
    half a MiB, which stays in a core's cache: a fifth less time at 96 x 256 tokens, K = 64, V = 16.
    Small: K <= 32 and K V <= 1024.
    """
    n_batch, length, n_head, n_key = shape
    cpu = on_cpu()
    cpu_size, cpu_chunks = chunked.cpu_cut(n_value)
    size = min(chunk_size or (cpu_size if cpu else 64), length)
    n_chunk = -(-length // size)
    per_group = min(cpu_chunks, n_chunk) if cpu else n_chunk
    small = n_key <= 32 and n_key * n_value <= 1024
    by_tokens = cpu and chunked.small_by_tokens and chunk_size is None and small
    n_row, memory = n_batch, 4 * n_head * n_key * n_value
    if cpu and n_batch * memory > 2**20:
        n_row = rows_per_block(n_batch, max(1, 2**19 // memory))
    return _Plan(n_row, -(-n_chunk // per_group), per_group, size, by_tokens)


def run(
    rule: Rule,
    q: Array,
    k: Array,
    v: Array,
    inputs: tuple[Array, ...] = (),
    weights: Array | None = None,
    features: jax.tree_util.Partial | None = None,
    *,
    chunk_size: int | None = None,
) -> tuple[Array, Array]:
    """The outputs [B, T, N, V] of a rule, in v's dtype, and its last state, in float32 at least.

    Args:
        rule: what to run; without a chunked form it goes token by token.
        q: queries [B, T, N, K], or [B, T, N, H] with `features`; as k.
        k: keys.
        v: values.
        inputs: what the rule reads besides, in its order.
        weights: the state before the first token; None: zeros.
        features: maps q and k [..., H] to features [..., K]; the arrays that it holds are floating
            point and have gradients as q and k do.
        chunk_size: tokens per chunk; None: the fastest known.

    Features much wider than q and k are computed chunk by chunk where a gradient is asked for, and
    again in the backward pass: those of all tokens never lie in memory. A step of dpfp_delta, where
    K = 4 H, at `small` then takes 3% less time on CPU, and half a GB less at 96 x 256 tokens. At
    K = 2 H (FAVOR+), and without a gradient, it would cost more than it saves.

    Raises:
        UserError: a chunk_size that is no integer above 0, no token.
    """
    whole = isinstance(chunk_size, int | np.integer) and not isinstance(chunk_size, bool)
    if chunk_size is not None and not (whole and chunk_size >= 1):
        raise UserError(f"chunk_size={chunk_size} is no integer above 0; give None or at least 1.")
    n_batch, length, n_head, width = q.shape
    if length < 1:
        raise UserError(f"there must be at least one token, got arrays of shape {q.shape}.")
    n_key = jax.eval_shape(partial(mapped, features), q).shape[-1]
    at_once = None if rule.chunked is None or on_cpu() else rule.chunked.whole
    if rule.chunked is None or n_batch == 0 or n_key < 4 * width or at_once is not None:
        q, k, features = mapped(features, q), mapped(features, k), None
    if rule.chunked is None or n_batch == 0:
        kept_every = recurrent.KEPT_EVERY
        return recurrent.scan_tokens(rule.step, q, k, v, inputs, weights, kept_every=kept_every)
    dtype = np.promote_types(np.float32, v.dtype)
    if weights is None:
        weights = jnp.zeros((n_batch, n_head, n_key, v.shape[-1]), dtype)
    plan = _plan(rule.chunked, (n_batch, length, n_head, n_key), weights.shape[-1], chunk_size)
    weights, tokens, features = vary((weights.astype(dtype), (q, k, v, *inputs), features))
    try:
        if at_once is not None:
            sizes = rule.chunked.whole_sizes(n_key)
            if chunk_size is not None or length < sizes[1]:
                sizes = (min(chunk_size or length, length),) * 2
            return _run_whole(rule, at_once, sizes, weights, tokens)
        return _run(rule, plan, weights, tokens, features)
    except TypeError as error:
        if "forward-mode" in str(error):  # JAX's own words do not say where there is a form for it
            error.add_note(FORWARD_MODE)
        raise


def _run_whole(rule, whole, sizes, weights, tokens):
    length, size = tokens[0].shape[1], sizes[1]
    plan = _Plan(1, -(-length // size), 1, size, by_tokens=False)
    out, weights = whole(sizes, weights, *_pad(rule, plan, tokens))
    return out[:, :length], weights


def mapped(features: jax.tree_util.Partial | None, x: Array) -> Array:
    """features(x); None: x has the features already."""
    return x if features is None else features(x)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _run(rule, plan, weights, tokens, features):
    q, k, v, *inputs = tokens
    q, k = mapped(features, q), mapped(features, k)
    if plan.by_tokens:
        return recurrent.scan_tokens(rule.step, q, k, v, tuple(inputs), weights)
    return _run_forward(rule, plan, weights, (q, k, v, *inputs), None, keep=False)[0]


def _run_forward(rule, plan, weights, tokens, features, keep=True):
    forward = partial(_rows_forward, rule, plan, features, keep=keep)
    (out, weights), kept = jax.lax.map(forward, _split_rows(plan, (weights, tokens)))
    return jax.tree.map(_merge_rows, (out, weights)), (features, kept, tokens)


def _rows_forward(rule, plan, features, inputs, keep):
    weights, tokens = inputs
    padded = _pad(rule, plan, tokens)
    length = tokens[0].shape[1]

    def step(carry, group):
        m, out = carry
        q, k, *rest = (_cut(plan, group, x) for x in padded)
        arrays = [*_addresses(plan, length, group, features, q, k), *rest]
        start = m
        m, part, kept = rule.chunked.forward(m, *(x.astype(m.dtype) for x in arrays))
        kept = start if rule.chunked.backward is None else kept
        return (m, _put(plan, group, out, part)), checkpoint_name(kept, "memory") if keep else None

    start = (
        weights.mT.reshape(-1, *weights.mT.shape[2:]),
        jnp.zeros((*padded[0].shape[:3], weights.shape[-1]), padded[2].dtype),
    )
    (m, out), kept = jax.lax.scan(step, vary(start, tokens), jnp.arange(plan.n_group))
    return (out[:, :length], m.mT.reshape(weights.shape)), kept


def _run_backward(rule, plan, residuals, cotangents):
    features, kept, tokens = residuals
    backward = partial(_rows_backward, rule, plan, features)
    rows = (kept, *_split_rows(plan, (tokens, cotangents)))
    dfeatures, gradients = jax.lax.map(backward, rows)
    dfeatures = jax.tree.map(
        lambda sums, x: jnp.sum(sums, axis=0).astype(x.dtype), dfeatures, features
    )
    return (*jax.tree.map(_merge_rows, gradients), dfeatures)


def _rows_backward(rule, plan, features, inputs):
    kept, tokens, (dout, dweights) = inputs
    padded = _pad(rule, plan, tokens)
    dout = _fill(plan, dout, 0.0, dout.shape[1])
    length = tokens[0].shape[1]

    def step(carry, inputs):
        dm, dfeatures, gradients = carry
        group, kept = inputs
        q, k, *rest = (_cut(plan, group, x) for x in padded)
        (q, k), pull = jax.vjp(partial(_addresses, plan, length, group), features, q, k)
        arrays = [x.astype(dm.dtype) for x in (q, k, *rest)]
        dpart = _cut(plan, group, dout).astype(dm.dtype)
        backward = rule.chunked.backward or partial(_differentiated, rule.chunked.forward)
        dm, (dq, dk, *drest) = backward(dm, kept, dpart, *arrays)
        change, dq, dk = pull((dq.astype(q.dtype), dk.astype(k.dtype)))
        dfeatures = jax.tree.map(lambda sums, x: sums + x.astype(sums.dtype), dfeatures, change)
        parts = (dq, dk, *drest)
        return (dm, dfeatures, jax.tree.map(partial(_put, plan, group), gradients, parts)), None

    dm = dweights.mT.reshape(-1, *dweights.mT.shape[2:])
    sums = jax.tree.map(
        lambda x: jnp.zeros(x.shape, np.promote_types(np.float32, x.dtype)), features
    )
    start = vary((dm, sums, tuple(jnp.zeros_like(x) for x in padded)), tokens)
    groups = jnp.arange(plan.n_group)
    (dm, dfeatures, gradients), _ = jax.lax.scan(step, start, (groups, kept), reverse=True)
    gradients = tuple(
        g[:, : x.shape[1]].reshape(x.shape) for g, x in zip(gradients, tokens, strict=True)
    )
    return dfeatures, (dm.mT.reshape(dweights.shape), gradients)


_run.defvjp(_run_forward, _run_backward)


def _differentiated(forward, dm, start, dout, *tokens):
    """`Chunked.backward` where a rule has none: `kept` is the memory before the group."""
    _, pull = jax.vjp(lambda m, *tokens: forward(m, *tokens)[:2], start, *tokens)
    dm, *gradients = pull((dm, dout))
    return dm, tuple(gradients)


# Blocks of rows run one after the other, so that the memories of one block stay in the cache.


def _split_rows(plan, inputs):
    return jax.tree.map(lambda x: x.reshape(-1, plan.n_row, *x.shape[1:]), inputs)


def _merge_rows(x):
    return x.reshape(-1, *x.shape[2:])


def _pad(rule, plan, tokens):
    """All tokens as [B, T, N, F], the last group filled up with tokens that change nothing."""
    neutral = (0.0, 0.0, 0.0, *(i.neutral for i in rule.inputs))
    wide = (x if x.ndim == 4 else x[..., None] for x in tokens)
    length = tokens[0].shape[1]
    return tuple(_fill(plan, x, value, length) for x, value in zip(wide, neutral, strict=True))


def _fill(plan, x, value, length):
    """x has a row, or several, for each of the `length` tokens."""
    missing = (plan.n_group * plan.n_chunk * plan.size - length) * (x.shape[1] // length)
    if not missing:
        return x
    return jnp.pad(x, ((0, 0), (0, missing), (0, 0), (0, 0)), constant_values=value)


def _addresses(plan, length, group, features, q, k):
    """The features of a group; 0 for the k of tokens that are not there: those of 0 need not be."""
    q, k = mapped(features, q), mapped(features, k)
    n_token = plan.n_chunk * plan.size
    if features is None or plan.n_group * n_token == length:
        return q, k
    there = group * n_token + jnp.arange(n_token) < length
    return q, jnp.where(there.reshape(plan.n_chunk, 1, plan.size, 1), k, 0)


# Groups are cut out of the [B, T, N, F] arrays one at a time, and gradients written back in place:
# on CPU, whole copies in another layout cost more than all matmuls.


def _cut(plan, group, x):
    """One group of x [B, T, N, F], as [chunk, B N, C, F]; or of x with several rows a token."""
    n_batch, rows, n_head, n_feature = x.shape
    length = rows // plan.n_group
    x = jax.lax.dynamic_slice_in_dim(x, group * length, length, axis=1)
    x = x.reshape(n_batch, plan.n_chunk, -1, n_head, n_feature).transpose(1, 0, 3, 2, 4)
    return x.reshape(plan.n_chunk, n_batch * n_head, -1, n_feature)


def _put(plan, group, x, part):
    """Write one group, as `_cut` made it, to its place in x [B, T, N, F]."""
    n_batch, rows, n_head, n_feature = x.shape
    length = rows // plan.n_group
    part = part.reshape(plan.n_chunk, n_batch, n_head, -1, n_feature)
    part = part.transpose(1, 0, 3, 2, 4).reshape(n_batch, length, n_head, n_feature)
    return jax.lax.dynamic_update_slice_in_dim(x, part.astype(x.dtype), group * length, axis=1)


def scan_chunks(step: Callable, carry: Any, chunks: Any, reverse: bool = False) -> Any:
    """`jax.lax.scan` over the chunks of a group; a few are unrolled."""
    n_chunk = len(jax.tree.leaves(chunks)[0])
    return jax.lax.scan(step, carry, chunks, reverse=reverse, unroll=n_chunk if n_chunk <= 8 else 1)


def copy_t(x: Array) -> Array:
    """x^T as an array of its own, which XLA does not fold into the matmul that reads it."""
    return jax.lax.optimization_barrier(x.mT)
