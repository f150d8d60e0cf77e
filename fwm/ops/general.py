"""The update rules' one algebra: a decay, then n writes a token, each with a key to erase at.

With G_t the sum of the log decays of a chunk's tokens up to t, S_tj = beta_t p_t^T D_tj k_j over
pairs of writes j < t, and D_tj = diag(exp(G_t - G_j)),

    (I + S) U = diag(beta) (V - P' W)    out = Q' W + (q_t^T D_tj k_j)_(j <= t) U
    W_C = diag(exp(G_C)) W + K'^T U

where row t of P' and Q' is exp(G_t) times p_t and q_t, row j of K' exp(G_C - G_j) k_j (Yang et al.
2024, arXiv 2412.06464; Kimi Team 2025, arXiv 2510.26692); the sum rule is U = V. All differences
of G are sums of the decays between, never differences of sums: after a decay of exp(-100) those
would have lost the digits of the weak ones.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from fwm.ops import recurrent
from fwm.ops.chunks import Chunked, scan_chunks
from fwm.ops.inverse import unit_inverse
from fwm.ops.recurrent import Input, Rule, Switches, Update

# Pairs of tokens within so many are compared feature by feature where each has its own decay.
_BLOCK = 8
# exp of it is 0 in float64 too; a sum with -inf in it has no gradient.
_FORGETS = -1000.0


@cache
def rule(switches: Switches) -> Rule:
    """The rule with these inputs; several writes of a token lie side by side in its features."""
    names = [("beta", switches.delta), ("log_decay", switches.decay), ("erase_key", switches.erase)]
    return Rule(
        step=partial(recurrent.general_step, switches),
        inputs=tuple(Input(name, lambda x: x) for name, present in names if present),
        chunked=Chunked(
            partial(_forward, switches),
            cpu_cut=lambda n_value: (max(1, 32 // switches.n_write), 1),
        ),
    )


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
        switches, arrays = _switches(update(k, v, *given))
        return recurrent.general_step(switches, w, k, *arrays)

    def forward(m, q, k, v, *given):
        tokens = (x if i.wide else x[..., 0] for i, x in zip(inputs, given, strict=True))
        switches, arrays = _switches(update(k, v, *tokens))
        wide = (x if x.ndim == k.ndim else x[..., None] for x in arrays)
        return _forward(switches, m, q, k, *wide)

    cut = Chunked(forward, cpu_cut=lambda n_value: (32, 1))
    return Rule(step, inputs, chunked=cut, update=update, **fields)


def _switches(update):
    """What is there, and v and that."""
    there = [x is not None for x in update[1:]]
    return Switches(there[0], there[1], there[2], 1), [x for x in update if x is not None]


def _forward(switches, m, q, k, v, *inputs):
    n = switches.n_write
    beta, log_decay, erase = recurrent.by_name(switches, inputs)
    k, v = _unfold(k, n), _unfold(v, n)
    decay = None if log_decay is None else _Decay(log_decay)
    tail = k if decay is None else k * jnp.repeat(decay.until_end(), n, axis=-2)
    whole = jnp.ones_like(m[:1, :1, :1]) if decay is None else decay.since_start()[..., -1:, :]
    whole = jnp.broadcast_to(whole, (*k.shape[:2], 1, whole.shape[-1]))
    q_start = q if decay is None else q * decay.since_start()
    token = np.arange(k.shape[-2]) // n
    seen = np.arange(q.shape[-2])[:, None] >= token
    reads = jnp.where(seen, _products(decay, q, k, n), 0)
    solve: tuple[Array, ...] = ()
    if switches.delta:
        beta = _unfold(beta, n)
        p = k if erase is None else _unfold(erase, n)
        p_start = p if decay is None else p * jnp.repeat(decay.since_start(), n, axis=-2)
        inverse = _inverse(jnp.tril(beta * _products(decay, p, k, n), -1))
        solve = (beta, p_start, inverse)

    def step(m, chunk):
        v, tail, whole, solve = chunk
        written = v
        if solve:
            beta, p_start, inverse = solve
            written = _exact(inverse, beta * (v - _exact(p_start, m.mT)))
        return m * whole + _exact(written.mT, tail), (m, written)

    m, (before, written) = scan_chunks(step, m, (v, tail, whole, solve))
    return m, _exact(q_start, before.mT) + _exact(reads, written), None


class _Decay:
    """exp of sums of log decays [..., C, 1 or K] over runs of a chunk's tokens."""

    def __init__(self, log_decay: Float[Array, "*batch C F"]):
        self.log = jnp.maximum(log_decay, _FORGETS)

    def since_start(self):
        return jnp.exp(_sums(np.tri(self.log.shape[-2]), self.log))

    def until_end(self):
        return jnp.exp(_sums(np.tri(self.log.shape[-2], k=-1).T, self.log))


def _products(decay, x, k, n):
    """x_t^T D_tj k_j of all pairs, [..., C r, C n] for x of r rows a token; j > t: anything."""
    if decay is None:
        return _exact(x, k.mT)
    size = decay.log.shape[-2]
    r = x.shape[-2] // size
    if decay.log.shape[-1] == 1:
        between = jnp.exp(_between(decay.log)[..., 0])
        return _exact(x, k.mT) * jnp.repeat(jnp.repeat(between, r, axis=-2), n, axis=-1)
    # One factor per feature: exp(G_t) and exp(-G_j) apart would overflow. Rows of a block are taken
    # relative to where the block begins, which no j of an earlier block comes after.
    rows = []
    for start in range(0, size, _BLOCK):
        stop = min(start + _BLOCK, size)
        log = decay.log[..., start:stop, :]
        x_rows = x[..., start * r : stop * r, :]
        k_rows = k[..., start * n : stop * n, :]
        each = jnp.exp(_between(log))
        each = jnp.repeat(jnp.repeat(each, r, axis=-3), n, axis=-2)
        within = jnp.sum(x_rows[..., :, None, :] * (each * k_rows[..., None, :, :]), axis=-1)
        row = [within, jnp.zeros((*within.shape[:-1], (size - stop) * n), within.dtype)]
        if start:
            x_start = x_rows * jnp.repeat(_Decay(log).since_start(), r, axis=-2)
            until = jnp.repeat(_Decay(decay.log[..., :start, :]).until_end(), n, axis=-2)
            row = [_exact(x_start, (k[..., : start * n, :] * until).mT), *row]
        rows.append(jnp.concatenate(row, axis=-1))
    return jnp.concatenate(rows, axis=-2)


def _between(log):
    """Sums over the tokens after j up to t, [..., t, j, F]; 0 for j >= t."""
    t, j, i = np.ogrid[: log.shape[-2], : log.shape[-2], : log.shape[-2]]
    return _sums((j < i) & (i <= t), log)


def _sums(mask, x):
    return jnp.einsum("...i,bric->br...c", mask.astype(x.dtype), x, precision="highest")


def _unfold(x, n):
    """[..., C, n F] -> [..., C n, F]."""
    return x.reshape(*x.shape[:-2], x.shape[-2] * n, x.shape[-1] // n)


def _exact(a, b):
    return jnp.einsum("...ij,...jk->...ik", a, b, precision="highest")


@jax.custom_vjp
def _inverse(s):
    return unit_inverse(s)


def _inverse_forward(s):
    inverse = unit_inverse(s)
    return inverse, inverse


def _inverse_backward(inverse, dinverse):
    return (-jnp.tril(_exact(inverse.mT, _exact(dinverse, inverse.mT)), -1),)


_inverse.defvjp(_inverse_forward, _inverse_backward)
