"""Feature maps: from head vectors to the features that address a fast weight memory.

A new map is one function and one entry of FEATURE_MAPS, here or in one's own config file.
"""

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, UInt32

from fwm.errors import UserError
from fwm.registry import Table


def elu_plus_one(x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
    """elu(x) + 1: x + 1 above zero, exp(x) below (Katharopoulos et al. 2020)."""
    # The inner minimum keeps exp finite where it is not chosen, so its gradient is no NaN.
    return jnp.where(x > 0, x + 1, jnp.exp(jnp.minimum(x, 0)))


def dpfp(x: Float[Array, "*batch D"], n_roll: int) -> Float[Array, "*batch F"]:
    """Deterministic parameter-free projection with F = 2 D n_roll features (paper, section 5.3).

    With z = [relu(x), relu(-x)], feature j of part i = 1 ... n_roll is z_j z_(j-i), indices cyclic.
    The features of one vector can all be zero when n_roll = 1 and D is odd.
    From n_roll = 2 D on parts repeat, as they do in the official code.
    Raises UserError when n_roll is below 1.
    """
    if n_roll < 1:
        raise UserError(f"dpfp got n_roll={n_roll}: choose 1 or more.")
    z = jax.nn.relu(jnp.concatenate([x, -x], axis=-1))
    return jnp.concatenate([z * jnp.roll(z, i, axis=-1) for i in range(1, n_roll + 1)], axis=-1)


def favor(
    x: Float[Array, "*batch D"], projection: Float[Array, "D M"], *, eps: float = 1e-4
) -> Float[Array, "*batch F"]:
    """FAVOR+ features of the softmax kernel, F = 2 M (Choromanski et al. 2021).

    ([exp(x P - |x|^2 / 2), exp(-x P - |x|^2 / 2)] + eps) / sqrt(2 M), without scaling x first.
    """
    projected = jnp.matmul(x, projection.astype(x.dtype), precision=jax.lax.Precision.HIGHEST)
    half_square = jnp.sum(x * x, axis=-1, keepdims=True) / 2
    features = jnp.exp(jnp.concatenate([projected, -projected], axis=-1) - half_square)
    return (features + eps) * (2 * projection.shape[-1]) ** -0.5


def favor_projection(
    key: PRNGKeyArray | UInt32[Array, "2"], d_head: int, proj_dim: int
) -> Float[Array, "D M"]:
    """Draw the random projection [d_head, proj_dim] of `favor`.

    Its rows (one per input dimension) are orthogonal, each with the length of a Gaussian vector
    of size proj_dim; where proj_dim < d_head, independent orthogonal blocks are stacked.
    """
    blocks_key, lengths_key = jax.random.split(key)
    n_block = -(-d_head // proj_dim)
    blocks = jax.random.orthogonal(blocks_key, proj_dim, (n_block,), dtype=jnp.float32)
    rows = blocks.reshape(n_block * proj_dim, proj_dim)[:d_head]
    gaussian = jax.random.normal(lengths_key, (d_head, proj_dim), dtype=jnp.float32)
    return rows * jnp.linalg.norm(gaussian, axis=1, keepdims=True)


@jax.custom_jvp
def sum_normalize(x: Float[Array, "*batch F"]) -> Float[Array, "*batch F"]:
    """x / sum(x) over the last axis, without eps (paper, section 4.2).

    Where the sum is zero (an all-zero DPFP feature, NaN in the official code), result and gradient
    are zero: such a token writes nothing.
    """
    wide = x.astype(np.promote_types(np.float32, x.dtype))  # a sum in 16 bits overflows
    total = jnp.sum(wide, axis=-1, keepdims=True)
    return jnp.where(total == 0, 0, wide / jnp.where(total == 0, 1, total)).astype(x.dtype)


@sum_normalize.defjvp
def _sum_normalize_jvp(primals, tangents):
    # By hand: autodiff divides by the sum's square, which is 0 for the small features of FAVOR+.
    (x,), (dx,) = primals, tangents
    dtype, wide = x.dtype, np.promote_types(np.float32, x.dtype)
    x, dx = x.astype(wide), dx.astype(wide)
    out = sum_normalize(x)
    total = jnp.sum(x, axis=-1, keepdims=True)
    change = dx - out * jnp.sum(dx, axis=-1, keepdims=True)
    change = jnp.where(total == 0, 0, change / jnp.where(total == 0, 1, total))
    return out.astype(dtype), change.astype(dtype)


def l2_normalize(x: Float[Array, "*batch F"]) -> Float[Array, "*batch F"]:
    """x / sqrt(sum x^2 + 1e-6) over the last axis (Yang et al. 2024, arXiv 2406.06484)."""
    wide = x.astype(np.promote_types(np.float32, x.dtype))
    squares = jnp.sum(wide * wide, axis=-1, keepdims=True)
    return (wide * jax.lax.rsqrt(squares + 1e-6)).astype(x.dtype)


class FeatureMap(NamedTuple):
    """A feature map as a value.

    Fields:
        of: options -> the function from x [..., H] and, by name, the arrays below to [..., K]. The
            options are the fields of the layer that uses the map: `d_head`, which is H, and the
            map's own. K is whatever the function gives.
        parameters: arrays that learn, by name: (key, options) -> the first value.
        draws: arrays that every training step draws anew: (key, options) -> a value.
        label: options -> what a run's name says of the map's own settings.
    """

    of: Callable[[Any], Callable[..., Array]]
    parameters: Mapping[str, Callable[[Any, Any], Array]] = MappingProxyType({})
    draws: Mapping[str, Callable[[Any, Any], Array]] = MappingProxyType({})
    label: Callable[[Any], str] = lambda options: ""


FEATURE_MAPS: Table[FeatureMap] = Table("feature_map")
FEATURE_MAPS["elu"] = FeatureMap(lambda options: elu_plus_one)
FEATURE_MAPS["favor"] = FeatureMap(
    lambda options: favor,
    # One for all heads, queries and keys, as in the official toolkit.
    draws={"projection": lambda key, o: favor_projection(key, o.d_head, o.performer_proj_dim)},
    label=lambda options: f"m{options.performer_proj_dim}",
)
FEATURE_MAPS["dpfp"] = FeatureMap(
    lambda options: partial(dpfp, n_roll=options.dpfp_n_roll),
    label=lambda options: f"nu{options.dpfp_n_roll}",
)
FEATURE_MAPS["tanh"] = FeatureMap(lambda options: jnp.tanh)
FEATURE_MAPS["silu"] = FeatureMap(lambda options: jax.nn.silu)
FEATURE_MAPS["identity"] = FeatureMap(lambda options: lambda x: x)

# What the features of q and k are divided by.
KEY_NORMS: Table[Callable[[Array], Array]] = Table("key_norm")
KEY_NORMS["none"] = lambda x: x
KEY_NORMS["sum"] = sum_normalize
KEY_NORMS["l2"] = l2_normalize
