"""All of pmap: one program on every local device, rows of the batch split between them.

A replicated or split array has a leading axis of local devices, as pmap wants it. The step
functions themselves are plain: they only call `mean` or `total`, which do nothing outside pmap.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from fwm.errors import UserError

AXIS = "devices"


def check_divides(batch_size: int, what: str, devices: int) -> None:
    """Raise `UserError` unless `batch_size` rows split evenly over the devices."""
    if batch_size < 1 or batch_size % devices:
        raise UserError(
            f"{what}={batch_size} does not split evenly over {devices} devices: "
            f"use a multiple of {devices}."
        )


def pmap(function: Callable, donate_argnums: tuple[int, ...] = ()) -> Callable:
    """`function` on every local device at once."""
    return jax.pmap(function, axis_name=AXIS, donate_argnums=donate_argnums)


def mean(tree: Any) -> Any:
    """Average over the devices; call inside a pmapped function."""
    return jax.lax.pmean(tree, AXIS)


def total(tree: Any) -> Any:
    """Sum over the devices; call inside a pmapped function."""
    return jax.lax.psum(tree, AXIS)


def _sharding() -> NamedSharding:
    # A mesh whose axis has pmap's own name: anything else would compile every step twice.
    return NamedSharding(Mesh(np.array(jax.local_devices()), (AXIS,)), PartitionSpec(AXIS))


def replicate(tree: Any) -> Any:
    """A copy of each array on every device."""
    devices = jax.local_devices()
    sharding = _sharding()

    def put(leaf: Any) -> Array:
        leaf = np.asarray(leaf)
        copies = [jax.device_put(leaf[None], device) for device in devices]
        shape = (len(devices), *leaf.shape)
        return jax.make_array_from_single_device_arrays(shape, sharding, copies)

    return jax.tree.map(put, tree)


def split(tree: Any) -> Any:
    """Arrays [B, ...] as [devices, B / devices, ...], each device with its own rows."""
    n = len(jax.local_devices())
    sharding = _sharding()
    put = lambda x: jax.device_put(np.asarray(x).reshape(n, -1, *np.shape(x)[1:]), sharding)
    return jax.tree.map(put, tree)


def first(tree: Any) -> Any:
    """One device's copy of a replicated tree, without a transfer."""
    return jax.tree.map(lambda leaf: leaf.addressable_shards[0].data.squeeze(0), tree)


def merge(tree: Any) -> Any:
    """The inverse of `split`, on the host."""
    return jax.tree.map(lambda leaf: np.asarray(leaf).reshape(-1, *leaf.shape[2:]), tree)
