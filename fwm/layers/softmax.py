"""Causal softmax attention: the standard Transformer's mixer."""

from collections.abc import Callable
from types import MappingProxyType
from typing import Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fwm.layers.mixer import Mixer, Shared
from fwm.layers.parts import Heads, attention_dropout, project
from fwm.limits import none_or_several
from fwm.ops import segments, softmax
from fwm.ops.checks import check
from fwm.ops.dropout import Dropout

WINDOW = none_or_several("a token sees all before it", "itself and the one before")


class WindowMemory(NamedTuple):
    """What a layer with a window of W tokens carries: the W - 1 that the next token sees too.

    Fields:
        keys: of the last W - 1 tokens, the newest last.
        values: as keys.
        length: how many of these there are, counted from the newest, int32.
    """

    keys: Float[Array, "B M N H"]
    values: Float[Array, "B M N H"]
    length: Int[Array, " B"]


class SoftmaxAttention(Mixer):
    """Causal softmax attention, scores scaled by 1/sqrt(d_head) (the standard Transformer).

    With a window it carries a `WindowMemory`, without one nothing: all keys would have to be kept.
    """

    norms_itself = True
    packs = True
    limits = MappingProxyType({"attention_window": WINDOW})

    n_head: int
    d_head: int
    attention_window: int = 0  # tokens that a token sees, its own included; 0: all
    dropatt: float = 0.0  # probability, on attention weights
    dtype: jax.typing.DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        carried: WindowMemory | None = None,
        *,
        shared: Shared | None = None,
        dropout: Dropout | None = None,
        last: int | None = None,
        norm: Callable[[Array], Array] | None = None,
    ) -> tuple[Float[Array, "B _ D"], WindowMemory | None]:
        """See `Mixer`; `norm`: k and v are made of norm(x), q of x."""
        check("SoftmaxAttention", x=(x, "B T D"))
        d = self.d_head
        projection = Heads(self.n_head, (d, d, d), self.dtype, name="qkv")
        q, k, v = projection(x)
        if norm is not None:
            _, k, v = projection(norm(x))
        if last is not None:
            q = q[:, -last:]
        memory = None
        ids = None if shared is None else shared.segment_ids
        if self.attention_window:
            past = self._nothing(len(x)) if carried is None else carried
            keys, values = (
                jnp.concatenate([old.astype(new.dtype), new], axis=1)
                for old, new in ((past.keys, k), (past.values, v))
            )
            length, n_past = x.shape[1], self.attention_window - 1
            filled = segments.filled(past.length, ids, length, n_past)
            memory = WindowMemory(keys[:, length:], values[:, length:], filled)
            if carried is not None:
                there = jnp.arange(n_past)[None, :] >= n_past - past.length[:, None]
                k, v = keys, values
                own = jnp.zeros(x.shape[:2], jnp.int32) if ids is None else ids
                ids = jnp.concatenate([jnp.where(there, 0, -1), own], axis=1)
        out = softmax.causal_attention(
            q,
            k,
            v,
            scale=d**-0.5,
            window=self.attention_window,
            segment_ids=ids,
            dropout=attention_dropout(dropout, self.dropatt),
        )
        return project((x.shape[-1],), (-2, -1), self.dtype, "out")(out), memory

    @property
    def carries(self) -> Literal["never", "asked"]:
        """See the class."""
        return "asked" if self.attention_window else "never"

    def empty(self, batch_size: int, d_model: int) -> WindowMemory | None:
        """A window of no tokens."""
        return self._nothing(batch_size) if self.attention_window else None

    def _nothing(self, batch_size: int) -> WindowMemory:
        shape = (batch_size, self.attention_window - 1, self.n_head, self.d_head)
        nothing = jnp.zeros(shape, self.dtype)
        return WindowMemory(nothing, nothing, jnp.zeros((batch_size,), jnp.int32))

    def name_parts(self, name: str) -> list[str]:
        """The name, and the window if there is one."""
        window = self.attention_window
        return [name, f"window{window}"] if window else [name]

    def floats_per_token(self, length: int) -> int:
        """q, k, v and the scores."""
        return self.n_head * (6 * self.d_head + 2 * min(length, self.attention_window or length))

    def flops(self, d_model: int, length: int) -> float:
        """Projections, and scores and values of what a token sees on average."""
        window = min(length, self.attention_window or length)
        seen = window - window * window / (2 * length)
        return self.n_head * self.d_head * (8 * d_model + 4 * seen)
