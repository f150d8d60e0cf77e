"""One layer of a model: a mixer and the feed-forward network, each in a residual branch."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from fwm.layers.mixer import Mixer, Shared
from fwm.layers.parts import MIXER_SITE, FeedForward, Norm
from fwm.ops.dropout import Dropout, drop

NORMS = ("post", "pre", "pre_lnorm")


class Block(nn.Module):
    """A layer; the norm says how its two branches, mixer and feed-forward f, meet the residual.

    post: `x = LN(x + mixer(x)); x = LN(x + f(x))`, as in the paper.
    pre: `x = x + mixer(LN(x)); x = x + f(LN(x))`; a model then has one more norm at its end.
    pre_lnorm: the official toolkit's, without that one; it differs by mixer: `Mixer.norms_itself`.
    """

    mixer: Mixer
    d_inner: int
    dropout: float = 0.0
    norm: str = "post"
    dtype: jax.typing.DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        carried: Any = None,
        shared: Shared | None = None,
        source: Dropout | None = None,
        last: int | None = None,
    ) -> tuple[Float[Array, "B _ D"], Any]:
        """`[B, T, D]` and what this layer carries -> the same after the segment."""
        mixer_norm = Norm(self.dtype, name="mixer_norm")
        ff_norm = Norm(self.dtype, name="ff_norm")
        ff = FeedForward(self.d_inner, self.dropout, self.dtype, name="ff")
        arguments: dict[str, Any] = {"shared": shared, "dropout": source, "last": last}
        read = mixer_norm(x) if self.norm == "pre" else x
        if self.norm == "pre_lnorm" and self.mixer.norms_itself:
            arguments["norm"] = mixer_norm
        elif self.norm == "pre_lnorm":
            x = read = mixer_norm(x)
        out, carried = self.mixer(read, carried, **arguments)
        out = drop(out, source, MIXER_SITE, self.dropout)
        x = (x if last is None else x[:, -last:]) + out
        if self.norm == "post":
            x = mixer_norm(x)
            return ff_norm(x + ff(x, source)), carried
        return x + ff(ff_norm(x), source), carried
