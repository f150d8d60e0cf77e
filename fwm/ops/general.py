"""The update rules' one algebra: a decay, then a write, with a key of its own to erase at.

With G_t the sum of the log decays of a chunk's tokens up to t, S_tj = beta_t p_t^T D_tj k_j over
pairs of tokens j < t, and D_tj = diag(exp(G_t - G_j)),

    (I + S) U = diag(beta) (V - P' W)    out = Q' W + (q_t^T D_tj k_j)_(j <= t) U
    W_C = diag(exp(G_C)) W + K'^T U

where row t of P' and Q' is exp(G_t) times p_t and q_t, row j of K' exp(G_C - G_j) k_j (Yang et al.
2024, arXiv 2412.06464; Kimi Team 2025, arXiv 2510.26692); the sum rule is U = V. Several writes of
a token are tokens of their own, of which the first alone decays and the last alone is read.

All exponentials of differences are products of the decays between, never quotients: exp(G_t) and
exp(-G_j) apart would overflow, and after a decay of exp(-100) a difference of sums would have lost
the digits of the weak ones. D_tj is taken apart where the halves of the smallest block meet that
holds both t and j: the decays from there to t, and those from j to there; blocks are doubled.

Arrays are those of `chunks.Chunked`, with M = W^T: `written` is U^T.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from fwm.ops import recurrent
from fwm.ops.chunks import Chunked, copy_t, scan_chunks
from fwm.ops.inverse import exact, unit_inverse
from fwm.ops.recurrent import Input, Rule, Switches, Update

# Without barriers XLA would compute the levels anew, each inside all later ones.
_barrier = jax.lax.optimization_barrier


@cache
def rule(switches: Switches) -> Rule:
    """The rule with these inputs, one write a token."""
    names = [("beta", switches.delta), ("log_decay", switches.decay), ("erase_key", switches.erase)]

    def update(k, v, *inputs):
        return Update(v, *recurrent.by_name(switches, inputs))

    return Rule(
        step=partial(recurrent.general_step, switches),
        inputs=tuple(Input(name, lambda x: x) for name, present in names if present),
        chunked=_chunked(update),
    )


@cache
def several(rule: Rule, n: int) -> Rule:
    """The rule with n writes a token: k, v and inputs have n rows for each one of q.

    A log decay has one, and none if it is no input of theirs.
    """
    plain = rule.chunked

    def spread(size, inputs):
        return tuple(_among(x, n, 0) if x.shape[-2] == size else x for x in inputs)

    def forward(m, q, k, v, *inputs):
        wide = spread(q.shape[-2], inputs)
        m, out, kept = plain.forward(m, _among(q, n, n - 1), k, v, *wide)
        return m, _of_each(out, n, n - 1), kept

    def backward(dm, kept, dout, q, k, v, *inputs):
        wide = spread(q.shape[-2], inputs)
        dout, each = _among(dout, n, n - 1), _among(q, n, n - 1)
        dm, (dq, *rest) = plain.backward(dm, kept, dout, each, k, v, *wide)
        rest = [
            _of_each(dx, n, 0) if dx.shape[-2] != x.shape[-2] else dx
            for dx, x in zip(rest, (k, v, *inputs), strict=True)
        ]
        return dm, (_of_each(dq, n, n - 1), *rest)

    def cpu_cut(n_value):
        size, n_chunk = plain.cpu_cut(n_value)
        return max(1, size // n), n_chunk

    return rule._replace(chunked=Chunked(forward, backward, cpu_cut=cpu_cut))


_among = partial(recurrent.among_zeros, axis=-2)


def _of_each(x, n, place):
    return x.reshape(*x.shape[:-2], -1, n, x.shape[-1])[..., place, :]


def composed(inputs: tuple[Input, ...], update: Callable[..., Update], **fields: Any) -> Rule:
    """A rule of the algebra by what its tokens give to it; `step` and `chunked` are made of that.

    >>> decay = Input("decay", lambda x: -jax.nn.softplus(x))
    >>> decayed_sum = composed((decay,), lambda k, v, g: Update(v, log_decay=g))

    Args:
        inputs: what it reads besides q, k and v.
        update: (k [..., K], v [..., V], *inputs) -> Update; an input of one number a head is [...].
            Where k, v and the inputs are those of a token that is not there, it must write nothing.
        fields: others of the rule, such as `key_norm`.
    """

    def step(w, k, v, *given):
        of_token = update(k, v, *given)
        switches = Switches(*(x is not None for x in of_token[1:]))
        return recurrent.general_step(switches, w, k, *(x for x in of_token if x is not None))

    def of_chunk(k, v, *given):
        tokens = (x if i.wide else x[..., 0] for i, x in zip(inputs, given, strict=True))
        v, *rest = update(k, v, *tokens)
        return Update(v, *(x if x is None or x.ndim == k.ndim else x[..., None] for x in rest))

    return Rule(step, inputs, chunked=_chunked(of_chunk), update=update, **fields)


def _chunked(update):
    parts = partial(_parts, update)
    return Chunked(
        partial(_forward, parts),
        partial(_backward, parts),
        # Two chunks a group: what multiplies by decays is many small operations, which XLA's CPU
        # backend splits among cores only where they are large enough.
        cpu_cut=lambda n_value: (32, 2),
    )


class _Parts(NamedTuple):
    """What a group of chunks consists of, all but the memory; None: as if there were none."""

    v: Array
    q_start: Array  # Q'
    tail: Array  # K'
    reads: Array  # (q_t^T D_tj k_j)_(j <= t)
    whole: Array | None  # exp(G_C)
    beta: Array | None
    p_start: Array | None  # P'
    overlaps: Array | None  # S


def _parts(update, q, k, v, *inputs):
    v, beta, log_decay, p = update(k, v, *inputs)
    rows = [q] if beta is None else [q, k if p is None else p]
    if log_decay is None:
        starts, tail, whole = rows, k, None
        products = [jnp.tril(_matmul_t(x, k)) for x in rows]
    else:
        size = q.shape[-2]
        fill = (1 << (size - 1).bit_length()) - size
        levels = _levels(_pad(log_decay, fill))
        since, until = (x[..., :size, :] for x in levels[-1])
        starts, tail, whole = [x * since for x in rows], k * until, since[..., -1:, :]
        if log_decay.shape[-1] == 1:
            ones = jnp.ones_like(levels[0][0])
            (between,) = _pairs(levels, [ones], ones)
            products = [_matmul_t(x, k) * between[..., :size, :size] for x in rows]
        else:
            products = _pairs(levels, [_pad(x, fill) for x in rows], _pad(k, fill))
            products = [x[..., :size, :size] for x in products]
    if beta is None:
        return _Parts(v, starts[0], tail, products[0], whole, None, None, None)
    overlaps = beta * jnp.tril(products[1], -1)
    return _Parts(v, starts[0], tail, products[0], whole, beta, starts[1], overlaps)


@jax.custom_vjp
def _levels(log_decay):
    """For blocks of 1, 2, 4, ... tokens: the factors from the block's beginning up to each token,
    its own included, and those after it up to the block's end.
    """
    factors = jnp.exp(log_decay)
    since, until = _barrier((factors, jnp.ones_like(factors)))
    levels, size = [(since, until)], 1
    while size < factors.shape[-2]:
        since, until = _halves(since, size), _halves(until, size)
        early = since[..., 0, -1:, :]
        late = since[..., 1, -1:, :]
        since = jnp.stack([since[..., 0, :, :], since[..., 1, :, :] * early], axis=-3)
        until = jnp.stack([until[..., 0, :, :] * late, until[..., 1, :, :]], axis=-3)
        since, until = _barrier((since.reshape(factors.shape), until.reshape(factors.shape)))
        levels.append((since, until))
        size *= 2
    return levels


def _levels_forward(log_decay):
    levels = _levels(log_decay)
    return levels, levels


def _levels_backward(levels, dlevels):
    # A product's gradient to the log of each of its factors is itself times its own: sums over
    # the tokens of a block, all levels in one matmul. Autodiff takes five times as long.
    t = np.arange(levels[0][0].shape[-2])
    later, earlier = t[None] >= t[:, None], t[None] < t[:, None]
    masks, products, size = [], [], 1
    for (since, until), (dsince, duntil) in zip(levels, dlevels, strict=True):
        block = t[:, None] // size == t[None] // size
        masks += [block & later, block & earlier]
        products += [since * dsince, until * duntil]
        size *= 2
    joined = jnp.concatenate(products, axis=-2)
    mask = np.concatenate(masks, axis=1).astype(joined.dtype)
    return (jnp.einsum("ti,...if->...tf", mask, joined, precision="highest"),)


_levels.defvjp(_levels_forward, _levels_backward)


def _pairs(levels, rows, k):
    """x_t^T D_tj k_j for j <= t, 0 for j > t, of each x of `rows`."""
    blocks = [_barrier(jnp.sum(x * k, axis=-1))[..., None, None] for x in rows]
    size = 1
    for since, until in levels[:-1]:
        early = _barrier(_halves(k * until, size)[..., 0, :, :])
        late = [_barrier(_halves(x * since, size)[..., 1, :, :]) for x in rows]
        corners = jnp.split(_matmul_t(jnp.concatenate(late, axis=-2), early), len(rows), axis=-2)
        blocks = [
            _barrier(_double(block, corner)) for block, corner in zip(blocks, corners, strict=True)
        ]
        size *= 2
    return [block[..., 0, :, :] for block in blocks]


def _double(blocks, corners):
    left, right = blocks[..., 0::2, :, :], blocks[..., 1::2, :, :]
    top = jnp.concatenate([left, jnp.zeros_like(left)], axis=-1)
    return jnp.concatenate([top, jnp.concatenate([corners, right], axis=-1)], axis=-2)


def _halves(x, size):
    """[..., C, F] -> [..., C / (2 size), 2, size, F]."""
    return x.reshape(*x.shape[:-2], -1, 2, size, x.shape[-1])


def _pad(x, fill):
    return jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, fill), (0, 0)])


def _forward(parts, m, q, k, v, *inputs):
    c, start = parts(q, k, v, *inputs), m
    inverse = None if c.overlaps is None else unit_inverse(c.overlaps)

    def step(m, chunk):
        v, tail, whole, beta, p_start, inverse = chunk
        written = wrong = v.mT
        if beta is not None:
            wrong = v.mT - _matmul_t(m, p_start)
            written = _matmul_t(beta.mT * wrong, inverse)
        return _next(m, written, tail, whole), (m, written, wrong)

    chunks = (c.v, c.tail, c.whole, c.beta, c.p_start, inverse)
    m, (before, written, wrong) = scan_chunks(step, m, chunks)
    out = (_matmul_t(before, c.q_start) + _matmul_t(written, c.reads)).mT
    return m, out, (start, inverse, None if c.beta is None else wrong)


def _backward(parts, dm, kept, dout, q, k, v, *inputs):
    start, inverse, wrong = kept
    c, pull = jax.vjp(parts, q, k, v, *inputs)
    written = copy_t(c.v) if wrong is None else _matmul_t(c.beta.mT * wrong, inverse)
    before = start[None]
    if len(q) > 1:
        forth = lambda m, chunk: (_next(m, *chunk), m)
        _, before = scan_chunks(forth, start, (written, c.tail, c.whole))
    dout_t = copy_t(dout)

    def step(dm, chunk):
        tail, whole, beta, p_start, inverse, dwritten, dm_reads = chunk
        after = dm
        dwritten = dwritten + _matmul_t(dm, tail)
        dm = dm_reads + (dm if whole is None else dm * whole)
        if beta is not None:
            dwritten = exact(dwritten, inverse)
            dm = dm - exact(beta.mT * dwritten, p_start)
        return dm, (after, dwritten)

    dwritten, dm_reads = exact(dout_t, c.reads), exact(dout_t, c.q_start)
    each = (c.tail, c.whole, c.beta, c.p_start, inverse, dwritten, dm_reads)
    dm, (after, dwritten) = scan_chunks(step, dm, each, reverse=True)
    dtail = exact(copy_t(written), after)
    dwhole = None
    if c.whole is not None:
        dwhole = jnp.sum(after * before, axis=-2, keepdims=True)
        if c.whole.shape[-1] == 1:
            dwhole = jnp.sum(dwhole, axis=-1, keepdims=True)
    left, right = [dout], jnp.concatenate([written, before], axis=-1)
    if c.beta is not None:
        left.append(-dwritten.mT)
    both = exact(jnp.concatenate(left, axis=-2), right)
    size = q.shape[-2]
    dreads, dq_start = both[..., :size, :size], both[..., :size, size:]
    if c.beta is None:
        dparts = _Parts(dwritten.mT, dq_start, dtail, dreads, dwhole, None, None, None)
    else:
        doverlaps, dp_start = both[..., size:, :size], c.beta * both[..., size:, size:]
        dbeta = jnp.sum(wrong * dwritten, axis=-2)[..., None]
        dv = c.beta * dwritten.mT
        dparts = _Parts(dv, dq_start, dtail, dreads, dwhole, dbeta, dp_start, doverlaps)
    dq, dk, dv, *rest = pull(dparts)
    return dm, (dq, dk, dv, *rest)


def _next(m, written, tail, whole):
    return exact(written, tail) + (m if whole is None else m * whole)


def _matmul_t(a, b):
    """a b^T."""
    return jnp.einsum("...ij,...kj->...ik", a, b, precision="highest")
