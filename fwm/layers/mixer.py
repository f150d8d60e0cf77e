"""What a mixer is: the part of a layer that reads other tokens, and the table of all mixers.

Axis letters in this package: B batch, T time, N heads, H head width (d_head), D model width, F
feed-forward width.

A mixer is one class. Its dataclass fields are config keys of the group `model`: those that a model
has anyway (d_head, dropout, ...) are given to it by name, all others are its own, and what it
writes as their default is the default. A new one is one class and one entry of MIXERS, in
fwm/layers/mixers.py or in one's own config file.
"""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar, Literal, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from fwm.limits import PROBABILITY, SIZE, Kind, of_type, whole
from fwm.ops.dropout import Dropout
from fwm.registry import Table


def _is_float(dtype: Any) -> bool:
    try:
        return jnp.issubdtype(jnp.dtype(dtype), jnp.floating)
    except TypeError:
        return False


# Fields that a model has anyway, or several mixers.
COMMON = {
    "n_head": SIZE,
    "d_head": SIZE,
    "dropout": PROBABILITY,
    "dropatt": PROBABILITY,
    "clamp_len": whole(-1),
    "dtype": Kind("a dtype of floats", _is_float),
}


class Shared(NamedTuple):
    """What all layers read alike.

    Fields:
        parameters: of `Mixer.shared_shapes`, by name.
        key: of a dropout that is not drawn by rows; None evaluates.
        segment_ids: the documents that a row is packed with, numbered: 0 for the one that what is
            carried in belongs to, then 1, 2, ...; None: one document, which goes on.
    """

    parameters: Mapping[str, Array]
    key: Key[Array, ""] | None
    segment_ids: Int[Array, "B T"] | None = None


class Mixer(nn.Module):
    """The contract: `(x, carried, *, shared, dropout, last) -> (y, carried)`.

    x [B, T, D] is what the layer reads, y [B, T, D] what it has found, or with `last` n that of
    the last n positions only, [B, n, D]. `carried` comes from the segment before and goes to the
    next one; None: there was none. What is carried has the batch in front.

    Attributes:
        carries: whether a run carries it from segment to segment: never, `asked` (where
            `train.carry_over_fast_weight` is set) or always.
        adds_positions: whether the model adds absolute positions to the embedding (unless
            `no_pos`); False: the mixer knows the order by itself and no_pos has no meaning.
        packs: whether it keeps apart the documents of `shared.segment_ids`: no token reads anything
            of another document, and what is carried is of the last one alone.
        norms_itself: under `norm=pre_lnorm` the residual is x as it is, and the mixer, which gets
            x and a keyword `norm`, normalises what the official toolkit does. False: as in its
            fast weight layers, both the residual and what the mixer reads are the normalised x.
        limits: what its own fields may be, where their type does not say it all.

    Raises:
        UserError: (where it is made) a field of another type or out of range, or `check`'s.
    """

    adds_positions: ClassVar[bool] = True
    packs: ClassVar[bool] = False
    limits: ClassVar[Mapping[str, Kind]] = MappingProxyType({})

    def __post_init__(self) -> None:
        """Check the fields."""
        for field in dataclasses.fields(self):
            kind = COMMON.get(field.name) or self.limits.get(field.name)
            if kind is None and field.type in (bool, int, float, str, tuple):
                kind = of_type(field.type)
            if kind is not None:
                kind.check(field.name, getattr(self, field.name))
        super().__post_init__()
        self.check()

    def __call__(
        self,
        x: Float[Array, "B T D"],
        carried: Any = None,
        *,
        shared: Shared | None = None,
        dropout: Dropout | None = None,
        last: int | None = None,
    ) -> tuple[Float[Array, "B _ D"], Any]:
        """See the class."""
        raise NotImplementedError

    @property
    def carries(self) -> Literal["never", "asked", "always"]:
        """See the class."""
        return "never"

    @property
    def norms_itself(self) -> bool:
        """See the class."""
        return False

    def empty(self, batch_size: int, d_model: int) -> Any:
        """What a layer carries before the first token; None: nothing, ever."""
        return None

    def join(self, per_layer: tuple[Any, ...]) -> Any:
        """What the layers carry as the memory of a model."""
        return per_layer

    def split(self, memory: Any) -> tuple[Any, ...]:
        """The inverse of `join`."""
        return memory

    def shared_shapes(self) -> dict[str, tuple[int, ...]]:
        """Parameters that all layers read, in `shared.parameters`: their shapes by name."""
        return {}

    def draw(self, key: Key[Array, ""]) -> dict[str, Array]:
        """One layer's variables of the collection `favor`, which every training step draws anew."""
        return {}

    def check(self) -> None:
        """Raise `UserError` where the fields, each within its limits, have no meaning together."""

    def check_packs(self) -> None:
        """Raise `UserError` where the fields have no meaning for packed documents."""

    def name_parts(self, name: str) -> list[str]:
        """What a run's name says of a mixer called `name`."""
        return [name]

    def floats_per_token(self, length: int) -> int:
        """About how many numbers a token needs at the peak of an evaluation, for batch sizes."""
        return 0

    def flops(self, d_model: int, length: int) -> float:
        """FLOPs of one token's forward pass in a segment, a multiply-add counted as two."""
        raise NotImplementedError


MIXERS: Table[type[Mixer]] = Table("mixer")
