"""Causal softmax attention: the standard Transformer's mixer."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from fwm.layers.mixer import Mixer, Shared
from fwm.layers.parts import attention_dropout, project
from fwm.ops import softmax
from fwm.ops.checks import check
from fwm.ops.dropout import Dropout


class SoftmaxAttention(Mixer):
    """Causal softmax attention, scores scaled by 1/sqrt(d_head) (the standard Transformer)."""

    norms_itself = True

    n_head: int
    d_head: int
    dropatt: float = 0.0  # probability, on attention weights
    dtype: jax.typing.DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        carried: None = None,
        *,
        shared: Shared | None = None,
        dropout: Dropout | None = None,
        last: int | None = None,
        norm: Callable[[Array], Array] | None = None,
    ) -> tuple[Float[Array, "B _ D"], None]:
        """See `Mixer`; `norm`: k and v are made of norm(x), q of x."""
        check("SoftmaxAttention", x=(x, "B T D"))
        d = self.d_head
        projection = project((self.n_head, 3 * d), -1, self.dtype, "qkv")
        qkv = projection(x)
        kv = qkv if norm is None else projection(norm(x))
        q = qkv[..., :d] if last is None else qkv[:, -last:, :, :d]
        out = softmax.causal_attention(
            q,
            kv[..., d : 2 * d],
            kv[..., 2 * d :],
            scale=d**-0.5,
            dropout=attention_dropout(dropout, self.dropatt),
        )
        out = checkpoint_name(out, "mixed")
        return project((x.shape[-1],), (-2, -1), self.dtype, "out")(out), None

    def floats_per_token(self, length: int) -> int:
        """q, k, v and the scores."""
        return self.n_head * (6 * self.d_head + 2 * length)

    def flops(self, d_model: int, length: int) -> float:
        """Projections, and scores and values of half the segment."""
        return self.n_head * self.d_head * (8 * d_model + 2 * length)
