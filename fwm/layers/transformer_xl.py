"""Transformer-XL's mixer: softmax attention over a memory and the segment, relative positions."""

from collections.abc import Callable
from types import MappingProxyType
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from fwm.errors import UserError
from fwm.layers.mixer import Mixer, Shared
from fwm.layers.parts import attention_dropout, countdown, project, sinusoid
from fwm.limits import whole
from fwm.ops import segments, softmax
from fwm.ops.checks import check
from fwm.ops.dropout import Dropout, drop


class SegmentMemory(NamedTuple):
    """Transformer-XL's memory: for each layer its inputs at the last `mem_len` positions.

    Fields:
        inputs: n_layer arrays [B, mem_len, D], the newest position last.
        length: how many positions, counted from the newest, are filled, [B] int32.
    """

    inputs: tuple[Float[Array, "B M D"], ...]
    length: Int[Array, " B"]


class RelativeAttention(Mixer):
    """Transformer-XL attention over a memory and the segment, with relative positions.

    Scores `((q + u) k + (q + w) r[distance]) / sqrt(d_head)` (Dai et al. 2019); u, w are shared by
    all layers. A layer carries (its inputs at the last `mem_len` positions [B, M, D], how many of
    these are filled [B]).
    """

    carries = "always"
    adds_positions = False
    norms_itself = True
    packs = True
    limits = MappingProxyType({"mem_len": whole(0)})

    n_head: int
    d_head: int
    mem_len: int = 0  # positions that are remembered
    clamp_len: int = -1
    same_length: bool = False  # every position sees as many others
    dropout: float = 0.0
    dropatt: float = 0.0  # probability, on attention weights
    dtype: jax.typing.DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        carried: tuple[Float[Array, "B M D"], Int[Array, " B"]] | None = None,
        *,
        shared: Shared | None = None,
        dropout: Dropout | None = None,
        last: int | None = None,
        norm: Callable[[Array], Array] = lambda x: x,
    ) -> tuple[Float[Array, "B _ D"], Any]:
        """See `Mixer`; `norm` is applied to what is remembered too, which is kept without it."""
        check("RelativeAttention", x=(x, "B T D"))
        if shared is None:
            raise UserError("the mixer of Transformer-XL needs `shared`: two biases of all layers.")
        d, (n_batch, length, d_model) = self.d_head, x.shape
        if carried is None:
            carried = self.empty(n_batch, d_model)
        memory, filled = carried
        context = jnp.concatenate([memory.astype(x.dtype), x], axis=1)
        qkv = project((self.n_head, 3 * d), -1, self.dtype, "qkv")(norm(context))
        positions = sinusoid(countdown(context.shape[1], self.clamp_len), d_model)
        if shared.key is not None:
            table = Dropout(shared.key, jnp.zeros((1,), jnp.int32))
            positions = drop(positions[None], table, 0, self.dropout)[0]
        r = project((self.n_head, d), -1, self.dtype, "r")(positions.astype(x.dtype))
        ids = shared.segment_ids
        slots = None  # those of the memory belong to the document 0
        if ids is not None:
            slots = jnp.pad(ids, ((0, 0), (memory.shape[1], 0)))
        out = softmax.relative_attention(
            qkv[:, -length:, :, :d],
            qkv[..., d : 2 * d],
            qkv[..., 2 * d :],
            r,
            shared.parameters["r_w_bias"].astype(x.dtype),
            shared.parameters["r_r_bias"].astype(x.dtype),
            length=filled,
            segment_ids=slots,
            mem_len=self.mem_len,
            same_length=self.same_length,
            scale=d**-0.5,
            dropout=attention_dropout(dropout, self.dropatt),
        )
        out = checkpoint_name(out, "mixed")
        out = project((d_model,), (-2, -1), self.dtype, "out")(out)
        out = out if last is None else out[:, -last:]
        # The memory is the past: no gradient flows into earlier segments, and none is kept for it.
        remembered = jax.lax.stop_gradient(jnp.concatenate([memory, x], axis=1))
        filled = segments.filled(filled, ids, length, self.mem_len)
        return out, (remembered[:, remembered.shape[1] - self.mem_len :], filled)

    def empty(self, batch_size: int, d_model: int) -> tuple[Array, Array]:
        """Places for `mem_len` positions, none of them filled."""
        inputs = jnp.zeros((batch_size, self.mem_len, d_model), self.dtype)
        return inputs, jnp.zeros((batch_size,), jnp.int32)

    def join(self, per_layer: tuple[Any, ...]) -> SegmentMemory:
        """All layers have seen as many positions."""
        return SegmentMemory(tuple(inputs for inputs, _ in per_layer), per_layer[0][1])

    def split(self, memory: SegmentMemory) -> tuple[Any, ...]:
        """See `Mixer`."""
        return tuple((inputs, memory.length) for inputs in memory.inputs)

    def shared_shapes(self) -> dict[str, tuple[int, ...]]:
        """The biases u and w, by their official names."""
        return dict.fromkeys(("r_w_bias", "r_r_bias"), (self.n_head, self.d_head))

    def check(self) -> None:
        """Something to see."""
        if self.same_length and self.mem_len == 0:
            raise UserError("same_length needs mem_len > 0: otherwise it masks everything.")

    def floats_per_token(self, length: int) -> int:
        """q, k, v of the segment, and the two kinds of scores."""
        return self.n_head * (6 * self.d_head + 4 * (length + self.mem_len))

    def flops(self, d_model: int, length: int) -> float:
        """As softmax attention; keys, values and positions of the memory too, and r . q."""
        memory, channels = self.mem_len / length, self.n_head * self.d_head
        scores = 6 * channels * (self.mem_len + length / 2)
        return scores + channels * d_model * (8 + 6 * memory + 2 * (1 + memory))
