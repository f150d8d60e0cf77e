"""What newer layers have around the rule: a short convolution, a log decay, a norm with a gate."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


def short_convolution(
    x: Float[Array, "B T *C"],
    taps: Float[Array, "W *C"],
    before: Float[Array, "B P *C"],
    segment_ids: Int[Array, "B T"] | None = None,
) -> tuple[Float[Array, "B T *C"], Float[Array, "B P *C"]]:
    """y_t = sum_i taps_i x_(t - W + 1 + i): causal, each channel by itself; the last tap is now.

    Args:
        x: inputs.
        taps: W of them for each channel.
        before: the P = W - 1 inputs before the first one; zeros where there are none.
        segment_ids: documents that a row is packed with, by numbers that do not come again, 0 for
            what is before it: each is convolved as if nothing stood before it. None: one.

    Returns:
        y in x's dtype, summed in float32 at least; the last P inputs, for the next call.
    """
    length, dtype = x.shape[1], np.promote_types(np.float32, x.dtype)
    seen = jnp.concatenate([before.astype(x.dtype), x], axis=1)
    ids = None
    if segment_ids is not None:
        ids = jnp.pad(segment_ids, ((0, 0), (before.shape[1], 0)))

    def of_document(start: int, end: int | None, document: Any) -> Array:
        """The inputs of these places, zeros where they are of another document."""
        part = seen[:, start:end]
        if ids is None:
            return part
        own = ids[:, start:end] == document
        return jnp.where(own.reshape(own.shape + (1,) * (x.ndim - 2)), part, 0)

    y = sum(
        tap * of_document(i, i + length, segment_ids).astype(dtype)
        for i, tap in enumerate(taps[:, None, None])
    )
    last = None if segment_ids is None else segment_ids[:, -1:]
    return y.astype(x.dtype), of_document(length, None, last).astype(before.dtype)


def log_decay(
    x: Float[Array, "*batch N F"], log_rate: Float[Array, " N"], bias: Float[Array, "N F"]
) -> Float[Array, "*batch N F"]:
    """g = -exp(log_rate) softplus(x + bias) <= 0: what a memory loses before a token.

    Gu and Dao 2023, arXiv 2312.00752 (A and dt), as Gated DeltaNet has it (arXiv 2412.06464).
    """
    rate = jnp.exp(log_rate)[:, None]
    lead = (1,) * (x.ndim - 2)
    return -rate.reshape(*lead, *rate.shape) * jax.nn.softplus(x + bias.reshape(*lead, *bias.shape))


def gated_rms_norm(
    x: Float[Array, "*batch V"],
    gate: Float[Array, "*batch V"],
    scale: Float[Array, " V"],
    eps: float = 1e-6,
) -> Float[Array, "*batch V"]:
    """x / sqrt(mean(x^2) + eps) * scale * SiLU(gate), in float32 at least; in x's dtype."""
    dtype = np.promote_types(np.float32, x.dtype)
    wide = x.astype(dtype)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    scale = scale.reshape((1,) * (x.ndim - 1) + scale.shape)
    return (wide * scale * jax.nn.silu(gate.astype(dtype))).astype(x.dtype)
