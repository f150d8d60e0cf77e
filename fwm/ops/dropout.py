"""Dropout whose masks depend on the place in the global batch alone, and its random words.

The definition: `drop` is `x * keep / p` with keep ~ Bernoulli(p), p = 1 - rate; `threefry` gives
the words that jax's own generator gives.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Key, UInt32

from fwm.ops.forms import on_cpu


class Dropout(NamedTuple):
    """Source of all dropout masks of one forward pass; None in its place means evaluation.

    Masks are drawn per row of the *global* batch, so they do not depend on how many devices or
    gradient-accumulation chunks the rows are spread over.

    Fields:
        key: one key for the whole batch.
        rows: index of each row in the global batch, [B].
        words: `site_words` of the key and each site, where they were drawn for many layers at once.
    """

    key: Key[Array, ""]
    rows: Int[Array | np.ndarray, " B"]
    words: UInt32[Array, "S 2"] | None = None


def site_words(key: Key[Array, ""], site: int | Int[Array, ""]) -> UInt32[Array, "2"]:
    """What the masks of one site are drawn with."""
    return jax.random.bits(jax.random.fold_in(key, site), (2,), jnp.uint32)


def drop(x: Array, source: Dropout | None, site: int, rate: float) -> Array:
    """Zero each element of `x [B, ...]` with probability `rate`, scale the others by 1/(1-rate).

    `site` tells apart the places of one layer. The rate is met to 2^-16: two masks are cut from
    each 32-bit random word, which halves the cost of the generator; the scale is exact for it.
    """
    if source is None or rate == 0.0:
        return x
    return masked(x, keep_mask(source, site, rate, x.shape), keep_scale(rate))


def masked(x: Array, keep: Array, scale: float) -> Array:
    """x where `keep`, times scale; 0 elsewhere."""
    # A product, not a where: XLA lifts the where's zeros out of the loop over layers and keeps
    # them in memory, as many as x has elements.
    return x * (keep.astype(x.dtype) * jnp.asarray(scale, x.dtype))


def _threshold(rate: float) -> int:
    return round((1.0 - rate) * 2**16)


def keep_scale(rate: float) -> float:
    """1 over the probability, a multiple of 2^-16, with which an element is kept."""
    return 2**16 / _threshold(rate)


def keep_mask(source: Dropout, site: int, rate: float, shape: tuple[int, ...]) -> Array:
    """The mask of one site for `[B, ...]`: True with probability 1 - rate."""
    key = site_words(source.key, site) if source.words is None else source.words[site]
    size = math.prod(shape[1:])
    counter = jnp.arange(-(-size // 4), dtype=jnp.uint32)[None, :]
    rows = jnp.asarray(source.rows, jnp.uint32)[:, None]
    words = threefry(key, rows, counter)
    halves = [half for word in words for half in (word & 0xFFFF, word >> 16)]
    kept = [half < _threshold(rate) for half in halves]
    if on_cpu():
        mask = jnp.concatenate(kept, axis=1)
    else:
        # One byte for four elements, as an array: else each of them computes its word anew.
        bit = np.arange(4, dtype=np.uint8)[None, :, None]
        parts = (k.astype(np.uint8) << i for k, i in zip(kept, bit.ravel(), strict=True))
        packed = jax.lax.optimization_barrier(functools.reduce(jnp.bitwise_or, parts))
        mask = ((packed[:, None, :] >> bit) & np.uint8(1) != 0).reshape(
            len(rows), 4 * packed.shape[1]
        )
    return mask[:, :size].reshape(shape)


def threefry(
    key: UInt32[Array, "2"], high: UInt32[Array, "B 1"], low: UInt32[Array, "1 M"]
) -> tuple[UInt32[Array, "B M"], UInt32[Array, "B M"]]:
    """Threefry-2x32 with 20 rounds (Salmon et al. 2011) of all pairs of words (high, low).

    The same bits as jax's own generator, which on CPU runs the rounds as a loop over arrays in
    memory: written out, they become one loop over registers, measured five times faster.
    """
    rotations = ((13, 15, 26, 6), (17, 29, 16, 24))
    keys = (key[0], key[1], key[0] ^ key[1] ^ 0x1BD11BDA)
    high, low = high + keys[0], low + keys[1]
    for step in range(1, 6):
        for rotation in rotations[(step - 1) % 2]:
            high = high + low
            low = high ^ (low << rotation | low >> (32 - rotation))
        high = high + keys[step % 3]
        low = low + keys[(step + 1) % 3] + np.uint32(step)
    return high, low
