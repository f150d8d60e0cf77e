"""Adaptive embedding and softmax as flax modules (Baevski and Auli 2019; Dai et al. 2019)."""

from collections.abc import Sequence
from itertools import pairwise

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from fwm.errors import UserError
from fwm.ops.adaptive_softmax import Cluster, log_probs, nll, take
from fwm.ops.checks import check, nan_where_invalid


def _bounds(n_token: int, cutoffs: Sequence[int]) -> tuple[int, ...]:
    bounds = (0, *cutoffs, n_token)
    if any(low >= high for low, high in pairwise(bounds)):
        raise UserError(
            f"cutoffs {tuple(cutoffs)} do not fit a vocabulary of {n_token} words: they must "
            f"ascend from above 0 to below {n_token}; leave them empty for a plain softmax."
        )
    return bounds


class _Tables(nn.Module):
    """What the embedding and the softmax have in common: the shapes of the tables."""

    n_token: int
    d_embed: int
    d_model: int
    cutoffs: tuple[int, ...] = ()
    div_val: int = 1

    @property
    def _projected(self) -> bool:
        return self.div_val > 1 or self.d_embed != self.d_model

    def _shapes(self) -> list[tuple[int, int]]:
        bounds = _bounds(self.n_token, self.cutoffs)
        if self.div_val == 1:
            return [(self.n_token, self.d_embed)]
        sizes = [high - low for low, high in pairwise(bounds)]
        return [(size, self.d_embed // self.div_val**i) for i, size in enumerate(sizes)]

    def _new_tables(self) -> tuple[Array, ...]:
        init = nn.initializers.normal(0.02)
        return tuple(self.param(f"table_{i}", init, s) for i, s in enumerate(self._shapes()))


class AdaptiveEmbedding(_Tables):
    """Rows of a table, projected to d_model where widths differ; always for div_val > 1.

    With div_val 1 there is one table [n_token, d_embed]; otherwise cluster i has its own,
    [size_i, d_embed // div_val**i]. The attributes `tables` and `projs` are what a tied
    `AdaptiveSoftmax` takes. Raises `UserError` if the cutoffs do not ascend within the vocabulary.
    """

    def setup(self):
        """Make the parameters table_i and proj_i."""
        init = nn.initializers.normal(0.01)
        self.tables = self._new_tables()
        widths = [width for _, width in self._shapes()] if self._projected else []
        self.projs = tuple(
            self.param(f"proj_{i}", init, (width, self.d_model)) for i, width in enumerate(widths)
        )

    def __call__(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Embed, not yet multiplied by sqrt(d_model)."""
        return self.with_tables(tokens)[0]

    def with_tables(
        self, tokens: Int[Array, "B T"]
    ) -> tuple[Float[Array, "B T D"], tuple[Array, ...]]:
        """The embedding, and `tables` for a tied softmax.

        The same values as `tables`, but the gradients of both uses go into one buffer. NaN for an
        id outside the vocabulary.
        """
        check("AdaptiveEmbedding", tokens=(tokens, "B T", jnp.integer))
        if self.div_val == 1:
            x, table = take(self.tables[0], tokens)
            x = x @ self.projs[0] if self.projs else x
            return nan_where_invalid(x, tokens, self.n_token), (table,)
        bounds = _bounds(self.n_token, self.cutoffs)
        x, tables = jnp.zeros((*tokens.shape, self.d_model)), []
        for i, (low, high) in enumerate(pairwise(bounds)):
            mine = (tokens >= low) & (tokens < high)
            rows, table = take(self.tables[i], jnp.where(mine, tokens - low, 0))
            x = jnp.where(mine[..., None], rows @ self.projs[i], x)
            tables.append(table)
        return nan_where_invalid(x, tokens, self.n_token), tuple(tables)


class AdaptiveSoftmax(_Tables):
    """Negative log-likelihood of targets, exact, at a cost in proportion to each cluster's tokens.

    The embedding's tables are used if `tie_weight`, its projection (transposed) for cluster i if
    `tie_projs[i]`; others are own parameters. Biases are always own ones. Computes in the dtype of
    `hidden`; logits, sums and gradients of parameters are float32. Raises `UserError` if the
    cutoffs do not ascend within the vocabulary, or `tie_projs` has not one entry per cluster.
    """

    tie_weight: bool = True
    tie_projs: tuple[bool, ...] = (False,)

    def setup(self):
        """Make the parameters bias_i, cluster_weight, cluster_bias, and table_i, proj_i if own."""
        n_cluster = len(self.cutoffs) + 1
        if len(self.tie_projs) != n_cluster:
            raise UserError(
                f"tie_projs has {len(self.tie_projs)} entries for {n_cluster} clusters: give one "
                "per cluster, as in (False, True, True, True) for three cutoffs."
            )
        normal, zeros = nn.initializers.normal, nn.initializers.zeros
        self.biases = tuple(
            self.param(f"bias_{i}", zeros, s[:1]) for i, s in enumerate(self._shapes())
        )
        if self.cutoffs:
            shape = (n_cluster - 1, self.d_embed)
            self.cluster_weight = self.param("cluster_weight", normal(0.02), shape)
            self.cluster_bias = self.param("cluster_bias", zeros, shape[:1])
        else:
            self.cluster_weight, self.cluster_bias = jnp.zeros((0, self.d_embed)), jnp.zeros(0)
        self.own_tables = () if self.tie_weight else self._new_tables()
        widths = [self.d_embed // self.div_val**i for i in range(n_cluster)]
        self.own_projs = tuple(
            self.param(f"proj_{i}", normal(0.01), (self.d_model, width))
            if self._projected and not tied
            else None
            for i, (width, tied) in enumerate(zip(widths, self.tie_projs, strict=True))
        )

    def _parts(self, hidden, tables, projs):
        """Clusters, the hidden states [N, d_i] that differ between them, and tables."""
        bounds = _bounds(self.n_token, self.cutoffs)
        clusters: list[Cluster] = []
        hiddens: list[Array] = []
        place: dict[tuple, int] = {}
        for i, (low, high) in enumerate(pairwise(bounds)):
            table, own = (i if self.div_val > 1 else 0), self.own_projs[i]
            name = ("own", i) if own is not None else ("tied", table)
            if name not in place:
                place[name] = len(hiddens)
                proj = own if own is not None else projs[table].T if self._projected else None
                hiddens.append(hidden if proj is None else hidden @ proj.astype(hidden.dtype))
            start = 0 if self.div_val > 1 else low
            clusters.append(Cluster(table, place[name], start, high - low))
        return (
            tuple(clusters),
            tuple(hiddens),
            tuple(tables if self.tie_weight else self.own_tables),
        )

    def __call__(
        self,
        hidden: Float[Array, "B T D"],
        targets: Int[Array, "B T"],
        tables: Sequence[Array] = (),
        projs: Sequence[Array] = (),
    ) -> Float[Array, "B T"]:
        """-log p(target), float32; `tables` and `projs` are the embedding's.

        NaN for a target outside the vocabulary.
        """
        axes = {"targets": (targets, "B T", jnp.integer)}
        check("AdaptiveSoftmax", hidden=(hidden, "B T D"), **axes)
        clusters, hiddens, tables = self._parts(hidden.reshape(-1, hidden.shape[-1]), tables, projs)
        own = self.biases, self.cluster_weight, self.cluster_bias
        found = nll(clusters, hiddens, tables, *own, targets.ravel()).reshape(targets.shape)
        return nan_where_invalid(found, targets, self.n_token)

    def log_probs(
        self,
        hidden: Float[Array, "*B D"],
        tables: Sequence[Array] = (),
        projs: Sequence[Array] = (),
    ) -> Float[Array, "*B n_token"]:
        """log p of every word, float32: for generation, where all of them are wanted."""
        clusters, hiddens, tables = self._parts(hidden.reshape(-1, hidden.shape[-1]), tables, projs)
        own = self.biases, self.cluster_weight, self.cluster_bias
        rows = log_probs(clusters, hiddens, tables, *own)
        return rows.reshape(*hidden.shape[:-1], self.n_token)
