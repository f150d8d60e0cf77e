"""What mixers and blocks share: initialisation, projections, positions, norms, feed-forward."""

import itertools
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from fwm.ops.checks import check
from fwm.ops.dropout import Dropout, drop, keep_mask, keep_scale
from fwm.ops.feed_forward import feed_forward
from fwm.ops.forms import on_cpu

# The official initialisation (weights_init): matrices N(0, 0.02), norms N(1, 0.02), biases 0.
matrix_init = nn.initializers.normal(0.02)


def norm_init(key: Array, shape: Sequence[int], dtype=jnp.float32) -> Array:
    """Scale of a layer norm, N(1, 0.02)."""
    return 1.0 + 0.02 * jax.random.normal(key, shape, dtype)


# What the backward pass of a layer keeps of its forward pass, by name; the rest, all of it cheap
# (feature maps, norms, the narrow dropout masks), is computed anew.
KEPT = ("memory", "mixed", "sum", "inner")

# The places of dropout; each draws masks of its own from the same source.
ATTENTION_SITE, MIXER_SITE, INNER_SITE, OUTER_SITE, EMBEDDING_SITE, HIDDEN_SITE = SITES = range(6)


def attention_dropout(source: Dropout | None, rate: float) -> Callable[[Array], Array] | None:
    """Dropout on attention probabilities; None where there is none."""
    if source is None or rate == 0.0:
        return None
    return lambda probabilities: drop(probabilities, source, ATTENTION_SITE, rate)


def sinusoid(positions: Float[Array, " T"], d_model: int) -> Float[Array, "T D"]:
    """`[sin(p f_0), ..., cos(p f_0), ...]` with f_j = 10000^(-2j/D): halves, not interleaved."""
    frequencies = 1.0 / (10000.0 ** (jnp.arange(0, d_model, 2, dtype=jnp.float32) / d_model))
    angles = positions[:, None] * frequencies[None, :]
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


def countdown(length: int, clamp_len: int) -> Float[Array, " T"]:
    """Positions `length-1, ..., 1, 0`: the official code counts down; at most clamp_len if > 0."""
    positions = jnp.arange(length - 1, -1, -1, dtype=jnp.float32)
    return jnp.minimum(positions, clamp_len) if clamp_len > 0 else positions


def project(
    features: tuple[int, ...], axis: int | tuple[int, ...], dtype: jax.typing.DTypeLike, name: str
) -> nn.DenseGeneral:
    """A linear map without bias, from the axes `axis` to `features`."""
    return nn.DenseGeneral(
        features, axis=axis, use_bias=False, dtype=dtype, kernel_init=matrix_init, name=name
    )


class Heads(nn.Module):
    """A linear map without bias to `n_head` times the sum of `widths`, cut into those.

    The parameter is that of `project`. On a CPU one product is cut; elsewhere the parameter is,
    because slices of a wide array are read at 49 of, say, 392 columns: every reader then waits for
    all of them.
    """

    n_head: int
    widths: tuple[int, ...]
    dtype: jax.typing.DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> list[Float[Array, "B T N _"]]:
        """`[B, T, D]` -> `[B, T, N, width]` of each."""
        total = sum(self.widths)
        init = lambda *a: matrix_init(*a).reshape(-1, self.n_head, total)
        kernel = self.param("kernel", init, (x.shape[-1], self.n_head * total))
        x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
        ends = list(itertools.accumulate(self.widths))[:-1]
        product = lambda part: jnp.einsum("btd,dnw->btnw", x, part)
        if on_cpu():
            return jnp.split(product(kernel), ends, axis=-1)
        return [product(part) for part in jnp.split(kernel, ends, axis=-1)]


class Norm(nn.Module):
    """Layer norm, eps 1e-5; mean and variance in float32."""

    dtype: jax.typing.DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """`[B, T, D]` -> `[B, T, D]`."""
        # Not the fast variance E[x^2] - E[x]^2: it loses digits that the goldens have. And cast
        # here: flax itself would mix dtypes, which strict promotion refuses.
        norm = nn.LayerNorm(epsilon=1e-5, scale_init=norm_init, use_fast_variance=False)
        return norm(checkpoint_name(x, "sum").astype(jnp.float32)).astype(self.dtype)


class FeedForward(nn.Module):
    """`W_2 relu(W_1 x + b_1) + b_2`, dropout after each of the two."""

    d_inner: int
    dropout: float = 0.0
    dtype: jax.typing.DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], source: Dropout | None = None
    ) -> Float[Array, "B T D"]:
        """`[B, T, D]` -> `[B, T, D]`."""
        check("FeedForward", x=(x, "B T D"))
        *batch, d_model = x.shape
        inner = _Affine(d_model, self.d_inner, name="inner")()
        outer = _Affine(self.d_inner, d_model, name="outer")()
        keep, scale = None, 1.0
        if source is not None and self.dropout > 0.0:
            keep = keep_mask(source, INNER_SITE, self.dropout, (*batch, self.d_inner))
            keep, scale = keep.reshape(-1, self.d_inner), keep_scale(self.dropout)
        x_MxD = x.astype(self.dtype).reshape(-1, d_model)
        out = feed_forward(scale, x_MxD, keep, *inner, *outer)
        return drop(out.reshape(x.shape), source, OUTER_SITE, self.dropout)


class _Affine(nn.Module):
    """The parameters of an affine map, as `nn.Dense` names and draws them."""

    n_in: int
    n_out: int

    @nn.compact
    def __call__(self) -> tuple[Float[Array, "I O"], Float[Array, " O"]]:
        kernel = self.param("kernel", matrix_init, (self.n_in, self.n_out))
        return kernel, self.param("bias", nn.initializers.zeros, (self.n_out,))
