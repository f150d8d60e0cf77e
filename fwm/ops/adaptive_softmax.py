"""Adaptive softmax (Grave et al. 2017; Dai et al. 2019) on arrays, with its gradient by hand.

The vocabulary, sorted by falling frequency, is cut into a head and tail clusters 1, 2, ...:

    log p(w) = log_softmax([head words, clusters])[w]                               w in the head
    log p(w) = log_softmax([head words, clusters])[-i] + log_softmax(cluster i)[w]  w in cluster i

The first cluster takes the last of the head's cluster columns, as in the official code.
`log_probs` and `definition` are this formula; `nll` is what training and evaluation run.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial, reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from fwm.ops.checks import vary
from fwm.ops.forms import on_cpu


class _Blocks(NamedTuple):
    """Logits exist in blocks of tokens by words only.

    Tokens are taken in the first of these sizes while they last, the rest in the next: a tail has
    few tokens, and padding costs.

    tail_tokens None: a tail has one block, for about as many tokens as texts have there; the
    device is asked once whether there are more, and only then goes over more such blocks.
    """

    head_tokens: tuple[int, ...]
    tail_tokens: tuple[int, ...] | None
    head_words: int
    tail_words: int


# Small enough for the cache: found by measurement (benchmarks/adaptive.py).
_CPU = _Blocks((512, 64), (128, 32, 8), 1024, 2048)
# A GPU wants few large launches, and waits where the number of blocks depends on the targets
# (benchmarks/results/gpu_cost.md).
_GPU = _Blocks((8192,), None, 20480, 2**18)


class Cluster(NamedTuple):
    """Words `start : start + size` of a table, scored against one of the hidden states."""

    table: int
    hidden: int
    start: int
    size: int


def log_probs(
    clusters: Sequence[Cluster],
    hiddens: Sequence[Float[Array, "N _"]],
    tables: Sequence[Float[Array, "_ _"]],
    biases: Sequence[Float[Array, "_"]],
    cluster_weight: Float[Array, "C D"],
    cluster_bias: Float[Array, " C"],
) -> Float[Array, "N n_token"]:
    """log p of every word: the formula, with all logits at once."""
    columns = _logits(hiddens[0], cluster_weight, cluster_bias)
    parts = []
    for i, c in enumerate(clusters):
        rows = slice(c.start, c.start + c.size)
        words = _logits(hiddens[c.hidden], tables[c.table][rows], biases[c.table][rows])
        if i:
            parts.append(columns[:, -i][:, None] + jax.nn.log_softmax(words))
        else:
            head = jax.nn.log_softmax(jnp.concatenate([words, columns], axis=1))
            columns = head[:, c.size :]
            parts.append(head[:, : c.size])
    return jnp.concatenate(parts, axis=1)


def definition(
    clusters, hiddens, tables, biases, cluster_weight, cluster_bias, targets
) -> Float[Array, " N"]:
    """-log p of each target."""
    row = log_probs(clusters, hiddens, tables, biases, cluster_weight, cluster_bias)
    return -jnp.take_along_axis(row, targets[:, None], axis=1)[:, 0]


class _Span(NamedTuple):
    """Cluster number i: its rows of the table, and where its tokens are among the sorted ones."""

    i: Any
    start: Any
    size: Any
    first: Any
    count: Any


class _Sorted(NamedTuple):
    """Tokens by cluster, so that those of each are neighbours; padded at the end."""

    which: Array  # cluster of each token
    word: Array  # target within its cluster
    spans: Array  # [clusters, 5]
    total: int
    sort: Callable[[Array], Array]
    unsort: Callable[[Array], Array]


def _by_cluster(clusters: Sequence[Cluster], groups: list["_Group"], targets: Array) -> _Sorted:
    ends = jnp.cumsum(jnp.array([c.size for c in clusters]))
    which = jnp.searchsorted(ends, targets, side="right", method="compare_all")
    word = targets - jnp.concatenate([jnp.zeros(1, ends.dtype), ends[:-1]])[which]
    order = jnp.argsort(which, stable=True)
    inverse = jnp.argsort(order)
    number = jnp.arange(len(clusters))
    count = jnp.sum(which[None, :] == number[:, None], axis=1)
    place = jnp.array([(c.start, c.size) for c in clusters]).T
    spans = jnp.stack([number, *place, jnp.cumsum(count) - count, count], axis=1)
    # No block may reach beyond the end.
    pad = max(group.tokens[-1] for group in groups)

    def sort(x):
        return jnp.pad(x[order], ((0, pad),) + ((0, 0),) * (x.ndim - 1))

    return _Sorted(sort(which), sort(word), spans, targets.size, sort, lambda x: x[inverse])


class _Group(NamedTuple):
    """Clusters of one table and one hidden state: one loop, compiled once."""

    kind: str
    clusters: tuple[tuple[int, Cluster], ...]  # with their numbers
    tokens: tuple[int, ...]  # sizes of blocks
    words: int  # size of a block: no cluster is smaller
    fixed: bool  # one block of tokens, and more where they do not suffice

    def over_clusters(self, by: _Sorted, body: Callable, carry: Any) -> Any:
        """body(span, carry) for each cluster; the head takes all tokens."""
        i, only = self.clusters[0]
        # Numbers, not arrays: loops then have ends that the compiler knows.
        if self.kind == "head":
            return body(_Span(0, only.start, only.size, 0, by.total), carry)
        if self.fixed:
            return body(_Span(i, only.start, only.size, *by.spans[i, 3:]), carry)
        spans = by.spans[jnp.array([i for i, _ in self.clusters])]
        return lax.fori_loop(0, len(spans), lambda k, c: body(_Span(*spans[k]), c), carry)

    def over_words(self, span: _Span, body: Callable, carry: Any) -> Any:
        """body(row, new, carry) over blocks of the table's rows, if the cluster has any tokens.

        The last block is moved back to end with the cluster; `new` excludes rows already seen.
        """

        def step(j, carry):
            begin = jnp.minimum(j * self.words, span.size - self.words)
            new = begin + jnp.arange(self.words) >= j * self.words
            return body(span.start + begin, new, carry)

        blocks = (span.size + self.words - 1) // self.words
        if self.kind == "tail" and not self.fixed:
            blocks = jnp.where(span.count > 0, blocks, 0)
        return lax.fori_loop(0, blocks, step, carry)

    def over_tokens(self, by: _Sorted, span: _Span, body: Callable, carry: Any) -> Any:
        """body(begin, size, carry) over blocks that cover the tokens of the cluster."""
        first, count, (*large, smallest) = span.first, span.count, self.tokens
        if self.fixed and self.kind == "tail":
            further = lambda k, c: body(first + k * smallest, smallest, c)
            rest = lambda c: lax.fori_loop(1, (count + smallest - 1) // smallest, further, c)
            return lax.cond(count > smallest, rest, lambda c: c, body(first, smallest, carry))
        for size in [s for s in large if s <= by.total] + [smallest]:
            blocks = (count + size - 1) // size if size == smallest else count // size
            start = first
            carry = lax.fori_loop(
                0,
                blocks,
                lambda k, c, start=start, size=size: body(start + k * size, size, c),
                carry,
            )
            first, count = first + blocks * size, count - blocks * size
        return carry


def _groups(clusters: Sequence[Cluster], blocks: _Blocks, n_token: int) -> list[_Group]:
    fixed = blocks.tail_tokens is None
    # A head of its own; of tails those of one place together, unless their blocks are their own.
    places = [(i if fixed else min(i, 1), c.table, c.hidden) for i, c in enumerate(clusters)]
    groups = []
    for place in sorted(set(places)):
        members = tuple((i, clusters[i]) for i, p in enumerate(places) if p == place)
        kind = "tail" if place[0] else "head"
        words = blocks.head_words if kind == "head" else blocks.tail_words
        tokens = blocks.head_tokens if kind == "head" else blocks.tail_tokens
        if tokens is None:
            low = sum(c.size for c in clusters[: members[0][0]])
            tokens = (_usual_tokens(n_token, low, low + members[0][1].size),)
        elif fixed:
            n_block = max(1, -(-n_token // tokens[0]))
            tokens = (max(1, -(-n_token // n_block)),)
        smallest = min(c.size for _, c in members)
        even = -(-smallest // -(-smallest // words))
        groups.append(_Group(kind, members, tokens, even, fixed))
    return groups


def _usual_tokens(n_token: int, low: int, high: int) -> int:
    """How many of n_token targets are words low ... high by frequency, and a quarter and 64 more.

    As in WikiText-103: 7% lie beyond 20,000 words, and the share beyond a rank falls as its power
    -0.82 (benchmarks/adaptive.py).
    """
    beyond = lambda rank: min(1.0, 0.07 * (rank / 20_000) ** -0.82)
    wanted = 1.25 * n_token * (beyond(low) - beyond(high)) + 64
    return max(1, min(n_token, 64 * math.ceil(wanted / 64)))


def _rows(x: Array, start: Array, size: int) -> Array:
    return lax.dynamic_slice_in_dim(x, start, size)


def _put(x: Array, rows: Array, start: Array) -> Array:
    return lax.dynamic_update_slice_in_dim(x, rows, start, 0)


def _dot(subscripts: str, a: Array, b: Array) -> Array:
    return jnp.einsum(subscripts, a, b, preferred_element_type=jnp.float32)


def _logits(h: Array, w: Array, b: Array) -> Array:
    return _dot("td,vd->tv", h, w.astype(h.dtype)) + b[None, :]


@jax.custom_jvp
def _logsumexp_once(x: Array) -> Array:
    """logsumexp of each row in one pass over it: largest so far, and sum relative to that."""
    least = jnp.finfo(x.dtype).min

    def join(a, b):
        largest = jnp.maximum(a[0], b[0])
        return largest, a[1] * jnp.exp(a[0] - largest) + b[1] * jnp.exp(b[0] - largest)

    start = jnp.asarray(least, x.dtype), jnp.asarray(0, x.dtype)
    pairs = jnp.maximum(x, least), jnp.ones_like(x)
    largest, total = lax.reduce(pairs, start, join, (1,))
    return largest + jnp.log(total)


@_logsumexp_once.defjvp
def _logsumexp_once_jvp(primals, tangents):
    total = _logsumexp_once(*primals)
    return total, jnp.sum(jnp.exp(primals[0] - total[:, None]) * tangents[0], axis=1)


def _add_lse(group: _Group, by: _Sorted, h, table, bias, lse: Array) -> Array:
    """lse <- log(exp(lse) + sum of exp(logit) over the words of the token's cluster)."""

    def cluster(span, lse):
        def words(row, new, lse):
            w, b = _rows(table, row, new.size), _rows(bias, row, new.size)

            def tokens(begin, size, lse):
                block = jnp.where(new[None, :], _logits(_rows(h, begin, size), w, b), -jnp.inf)
                old = _rows(lse, begin, size)
                total = _logsumexp_once(block) if group.fixed else jax.nn.logsumexp(block, axis=1)
                lse_b = jnp.logaddexp(old, total)
                if group.kind == "tail":  # the last block may reach into the next cluster
                    lse_b = jnp.where(_rows(by.which, begin, size) == span.i, lse_b, old)
                return _put(lse, lse_b, begin)

            return group.over_tokens(by, span, tokens, lse)

        return group.over_words(span, words, lse)

    return group.over_clusters(by, cluster, lse)


# Compiled as a whole also where the caller does not compile: loop by loop it takes twice as long.
@partial(jax.jit, static_argnums=(0, 1))
def _forward(clusters, blocks, hiddens, tables, biases, cluster_weight, cluster_bias, targets):
    """nll [N]; of sorted tokens the log-sum-exp of head and own tail, and the target's logit."""
    groups = _groups(clusters, blocks, targets.size)
    by = _by_cluster(clusters, groups, targets)
    hs = [by.sort(h) for h in hiddens]
    columns = _logits(hs[0], cluster_weight, cluster_bias)
    empty = vary(jnp.full(by.which.shape, -jnp.inf), hs)
    lse = {"head": reduce(jnp.logaddexp, columns.T, empty), "tail": empty}
    chosen = own = jnp.zeros(by.which.shape)
    for i in range(1, len(clusters)):
        chosen = jnp.where(by.which == i, columns[:, -i], chosen)
    for group in groups:
        members, (_, place) = jnp.array([i for i, _ in group.clusters]), group.clusters[0]
        h, table, bias = hs[place.hidden], tables[place.table], biases[place.table]
        lse[group.kind] = _add_lse(group, by, h, table, bias, lse[group.kind])
        mine = jnp.any(by.which[:, None] == members[None, :], axis=1)
        row = jnp.where(mine, by.spans[by.which, 1] + by.word, 0)
        logit = _dot("td,td->t", h, table[row].astype(h.dtype)) + bias[row]
        own = own + jnp.where(mine, logit, 0)
    nll = lse["head"] + jnp.where(by.which > 0, lse["tail"], 0) - (chosen + own)
    # Without the padding, whose size differs between platforms.
    lse = {kind: x[: by.total] for kind, x in lse.items()}
    return by.unsort(nll), (lse, own[: by.total])


def _blocks() -> _Blocks:
    return _CPU if on_cpu() else _GPU


def nll(clusters, hiddens, tables, biases, cluster_weight, cluster_bias, targets):
    """`definition`, with its gradient, at a cost in proportion to the tokens of each cluster."""
    # In float32, as the gradients are sums over all tokens, and rounded only then.
    parameters = jax.tree.map(
        lambda x: x.astype(jnp.float32), (tables, biases, cluster_weight, cluster_bias)
    )
    return _nll(clusters, *vary((hiddens, *parameters, targets)))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _nll(clusters, *arguments):
    return _forward(clusters, _blocks(), *arguments)[0]


def _nll_fwd(clusters, *arguments):
    nll, kept = _forward(clusters, _blocks(), *arguments)
    return nll, (arguments, *kept)


def _d_logits(h, w, b, hit, lse, g, own, new):
    """g (softmax - onehot), written by the matmul that makes the logits, in the dtype of h.

    It is where it reads arrays that exist, one after the other: so the target's comes from its
    logit, `own`, and not from softmax - 1.
    """
    d_hit = g * jnp.minimum(jnp.exp(own - lse) - 1, 0)
    arrays = hit, lse, g, d_hit, b, new.astype(jnp.float32)[None, :]
    hit, lse, g, d_hit, b, new = lax.optimization_barrier(arrays)
    return (jnp.where(hit, d_hit, jnp.exp(_logits(h, w, b) - lse) * g) * new).astype(h.dtype)


def _add_gradients(group: _Group, by: _Sorted, h, table, bias, g, lse, own, gradients):
    """Add the group's part to the gradients of its hidden states, table and bias, in place.

    d logit = g (softmax - onehot), with the logits of each block computed again.
    """

    def cluster(span, gradients):
        mine = by.which == span.i
        word = jnp.where(mine, by.word, -1)
        # Tokens of others in the last block of a tail: softmax and gradient 0.
        tail = group.kind == "tail"
        g_c, lse_c = (jnp.where(mine, g, 0), jnp.where(mine, lse, jnp.inf)) if tail else (g, lse)

        def words(row, new, carry):
            d_h, d_table, d_bias = carry
            w, b = _rows(table, row, new.size).astype(h.dtype), _rows(bias, row, new.size)
            index = row - span.start + jnp.arange(new.size)

            def tokens(begin, size, carry):
                d_h, d_w, d_b = carry
                h_b, at = _rows(h, begin, size), lambda x: _rows(x, begin, size)[:, None]
                hit = at(word) == index[None, :]
                if group.fixed:
                    d = _d_logits(h_b, w, b, hit, at(lse_c), at(g_c), at(own), new)
                    # The bias as one more feature of h (eight more, for the alignment).
                    ones = jnp.zeros((size, 8), h.dtype).at[:, 0].set(1)
                    both = _dot("tv,td->vd", d, jnp.concatenate([h_b, ones], axis=1))
                    d_w, d_b = d_w + both[:, :-8], d_b + both[:, -8]
                else:
                    p = jnp.exp(_logits(h_b, w, b) - at(lse_c))
                    d = jnp.where(new[None, :], at(g_c) * (p - hit.astype(p.dtype)), 0)
                    d_b = d_b + d.sum(0)
                    d = d.astype(h.dtype)
                    d_w = d_w + _dot("tv,td->vd", d, h_b)
                d_h = _put(d_h, _rows(d_h, begin, size) + _dot("tv,vd->td", d, w), begin)
                return d_h, d_w, d_b

            block = d_h, _rows(d_table, row, new.size), _rows(d_bias, row, new.size)
            if group.fixed and new.size == span.size:  # its rows are still zeros
                block = d_h, *vary(jax.tree.map(jnp.zeros_like, block[1:]), h)
            d_h, d_w, d_b = group.over_tokens(by, span, tokens, block)
            return d_h, _put(d_table, d_w, row), _put(d_bias, d_b, row)

        return group.over_words(span, words, gradients)

    return group.over_clusters(by, cluster, gradients)


def _nll_bwd(clusters, saved, g):
    return *_backward(clusters, _blocks(), saved, g), None


@partial(jax.jit, static_argnums=(0, 1))
def _backward(clusters, blocks, saved, g):
    (hiddens, tables, biases, cluster_weight, cluster_bias, targets), lse, own = saved
    hiddens = lax.optimization_barrier(hiddens)  # else XLA would keep logits of the forward pass
    groups = _groups(clusters, blocks, targets.size)
    by = _by_cluster(clusters, groups, targets)
    g, hs = by.sort(g), [by.sort(h) for h in hiddens]
    beyond = by.which.size - by.total
    lse = {k: jnp.pad(x, (0, beyond), constant_values=jnp.inf) for k, x in lse.items()}
    own = jnp.pad(own, (0, beyond))
    zeros = lambda x: vary(jnp.zeros(x.shape, jnp.float32), hs)
    d_hs, d_tables, d_biases = ([zeros(x) for x in part] for part in (hs, tables, biases))

    n_tail = len(clusters) - 1
    p = jnp.exp(_logits(hs[0], cluster_weight, cluster_bias) - lse["head"][:, None])
    hit = by.which[:, None] == n_tail - jnp.arange(n_tail)[None, :]
    d = g[:, None] * (p - hit.astype(p.dtype))
    d_cluster_bias = d.sum(0)
    d = d.astype(hs[0].dtype)
    d_cluster_weight = _dot("tc,td->cd", d, hs[0])
    d_hs[0] = _dot("tc,cd->td", d, cluster_weight.astype(d.dtype))

    for group in groups:
        j, i = group.clusters[0][1][:2]
        gradients = d_hs[i], d_tables[j], d_biases[j]
        d_hs[i], d_tables[j], d_biases[j] = _add_gradients(
            group, by, hs[i], tables[j], biases[j], g, lse[group.kind], own, gradients
        )
    d_hiddens = tuple(by.unsort(d).astype(h.dtype) for d, h in zip(d_hs, hiddens, strict=True))
    return d_hiddens, tuple(d_tables), tuple(d_biases), d_cluster_weight, d_cluster_bias


_nll.defvjp(_nll_fwd, _nll_bwd)


def take(table: Array, index: Array) -> tuple[Array, Array]:
    """table[index], and the table itself for its next user.

    The next user's gradient comes back first and the rows are added into it in place; two separate
    gradients of a large table would each be a buffer full of zeros.
    """
    return _take(*vary((table, index)))


@jax.custom_vjp
def _take(table, index):
    return table[index], table


def _take_bwd(index, gradients):
    d_rows, d_table = gradients
    wide = np.promote_types(np.float32, d_table.dtype)  # a row may be read by many tokens
    total = d_table.astype(wide).at[index].add(d_rows.astype(wide))
    return total.astype(d_table.dtype), None


_take.defvjp(lambda table, index: ((table[index], table), index), _take_bwd)
