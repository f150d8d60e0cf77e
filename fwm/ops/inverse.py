"""(I + S)^-1 for strictly lower triangular S: what the delta rule solves in every chunk."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def unit_inverse(s: Float[Array, "*batch C C"]) -> Float[Array, "*batch C C"]:
    """(I + s)^-1 for strictly lower triangular s: 8 x 8 blocks by rows, then doubling.

    [[A, 0], [B, D]]^-1 = [[A^-1, 0], [-D^-1 B A^-1, D^-1]]. Stable for any keys, as the Neumann
    product is not.
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
        corner = -exact(lower, exact(corner, upper))
        top = jnp.concatenate([upper, jnp.zeros_like(upper)], axis=-1)
        inverse = jnp.concatenate([top, jnp.concatenate([corner, lower], axis=-1)], axis=-2)
        width *= 2
    return inverse[..., 0, :wanted, :wanted]


def unit_inverse_by_halves(s: Float[Array, "*batch C C"]) -> Float[Array, "*batch C C"]:
    """`unit_inverse` in few launches: halves down to 16 x 16, which the library solves, one each.

    Not larger ones: of many small matrices it is slow where a matmul is not.
    """
    size = s.shape[-1]
    if size <= 16:
        eye = jnp.broadcast_to(jnp.eye(size, dtype=s.dtype), s.shape)
        # Of the transpose, as the library counts columns first: so no array is transposed.
        return jax.lax.linalg.triangular_solve(
            s.mT, eye, left_side=True, lower=False, unit_diagonal=True
        ).mT
    if size % 2:
        padded = jnp.pad(s, [(0, 0)] * (s.ndim - 2) + [(0, 1)] * 2)
        return unit_inverse_by_halves(padded)[..., :size, :size]
    half = size // 2
    diagonal = jnp.stack([s[..., :half, :half], s[..., half:, half:]], axis=-3)
    upper, lower = jnp.moveaxis(unit_inverse_by_halves(diagonal), -3, 0)
    corner = -exact(lower, exact(s[..., half:, :half], upper))
    top = jnp.concatenate([upper, jnp.zeros_like(upper)], axis=-1)
    return jnp.concatenate([top, jnp.concatenate([corner, lower], axis=-1)], axis=-2)


def exact(
    a: Float[Array, "*batch I J"], b: Float[Array, "*batch J K"]
) -> Float[Array, "*batch I K"]:
    """a b in full float32 on GPU too: an error in the inverse is an error in every later state."""
    return jnp.einsum("...ij,...jk->...ik", a, b, precision="highest")
