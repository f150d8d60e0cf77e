"""What is checked at the door of a public function, once: shapes, dtypes, ids; in one sentence."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fwm.errors import UserError

_KINDS = {jnp.floating: "a floating point", jnp.integer: "an integer"}


def check(of: str, **arrays: tuple[Any, ...]) -> None:
    """Refuse arrays that do not fit each other: nothing broadcasts, nothing is padded or cast.

    Args:
        of: who asks, for the message.
        arrays: by name, (array, axes as in "B T N K", kind of dtype: `jnp.floating` unless given).
            An axis of the same name has the same size in all of them; only the
            batch, B, may be empty.

    Raises:
        UserError: no array, another dtype, rank or size, an axis without a size (export).
    """
    sizes: dict[str, tuple[int, str]] = {}
    for name, (x, axes, *kinds) in arrays.items():
        kind, letters = (kinds or [jnp.floating])[0], axes.split()
        wanted = f"{of}: {name} must be {_KINDS[kind]} array [{', '.join(letters)}]"
        if not isinstance(x, jax.Array | np.ndarray):
            raise UserError(f"{wanted}, got {type(x).__name__}.")
        if not jnp.issubdtype(x.dtype, kind) or len(x.shape) != len(letters):
            raise UserError(f"{wanted}, got {x.dtype} of shape {x.shape}.")
        for letter, size in zip(letters, x.shape, strict=True):
            if not isinstance(size, int):
                raise UserError(
                    f"{of}: {name} has the symbolic shape {x.shape}, and code depends on the "
                    "sizes: export once for every shape, with numbers."
                )
            if size == 0 and letter != "B":
                token = "there must be at least one token, " if letter in "TS" else ""
                raise UserError(f"{of}: {token}{name} of shape {x.shape} has an empty axis.")
            expected, other = sizes.setdefault(letter, (size, name))
            if size != expected:
                raise UserError(
                    f"{of}: {name} of shape {x.shape} does not fit {other} of shape "
                    f"{arrays[other][0].shape} in axis {letter}: they must be equal, nothing is "
                    "broadcast."
                )


def checked_ids(what: str, ids: Any, n_token: int) -> np.ndarray:
    """One row of ids that are on the host, as int32 of the same values.

    Raises:
        UserError: no integers, more than one axis, an id outside 0 ... n_token - 1.
    """
    array = np.asarray(ids)
    if array.size == 0 and array.ndim == 1:
        return array.astype(np.int32)
    if not np.issubdtype(array.dtype, np.integer) or array.ndim != 1:
        raise UserError(
            f"{what}: expected integer ids in one axis, got {array.dtype} of shape {array.shape}."
        )
    if array.min() < 0 or array.max() >= n_token:
        place = int(np.argmax((array < 0) | (array >= n_token)))
        raise UserError(
            f"{what}: id {array[place]} at place {place} is outside the vocabulary of "
            f"n_token={n_token}: ids must be 0 to {n_token - 1}."
        )
    return array.astype(np.int32, copy=False)


def nan_where_invalid(x: jax.Array, ids: jax.Array, n_token: int) -> jax.Array:
    """x [*ids.shape, ...], NaN where an id is outside the vocabulary and only a device knows it."""
    valid = (ids >= 0) & (ids < n_token)
    return jnp.where(valid.reshape(valid.shape + (1,) * (x.ndim - ids.ndim)), x, jnp.nan)


def vary(tree: Any, *like: Any) -> Any:
    """The tree, varying over all mesh axes of a `jax.shard_map` that itself or `like` varies over.

    A scan's carry must vary as its results do, and fresh zeros do not.
    """
    axes: frozenset = frozenset().union(*map(_varies_over, jax.tree.leaves((tree, like))))

    def varying(x):
        missing = tuple(sorted(axes - _varies_over(x)))
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(varying, tree)


def _varies_over(x):
    return jax.typeof(x).manual_axis_type.varying
