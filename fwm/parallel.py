"""All of pmap and of several processes: rows of the batch split over devices, one program for all.

A replicated or split array has a leading axis of local devices, as pmap wants it; `mean` and
`total` go over the devices of all processes. Nothing here costs a single process anything.
"""

import atexit
import hashlib
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from fwm.errors import UserError

AXIS = "devices"
# A process that is silent for so long counts as dead, and the others stop.
HEARTBEAT_SECONDS = 20


def start(coordinator: str, processes: int | None, process: int | None) -> None:
    """Join the run of several processes; before anything else is asked of JAX.

    Args:
        coordinator: `host:port` of process 0, or `auto`: all from Slurm, Open MPI or Kubernetes.
        processes: how many there are.
        process: which of them this is, from 0.

    Raises:
        UserError: settings that make no sense, or the others could not be found in five minutes.
    """
    auto = coordinator == "auto"
    if auto != (processes is None) or auto != (process is None):
        raise UserError(
            "several processes need --coordinator_address=host:port with --num_processes and "
            "--process_id, or --coordinator_address=auto without them."
        )
    # It would take SIGTERM away from the training loop, which stops all processes together itself.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            None if auto else coordinator,
            processes,
            process,
            cluster_detection_method=None if auto else "deactivate",
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=HEARTBEAT_SECONDS,
        )
    except (ValueError, RuntimeError, IndexError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"the processes of this run cannot be joined ({reason}): check "
            "--coordinator_address, --num_processes and --process_id."
        ) from error


def is_first() -> bool:
    """Whether this process is the one that writes and reports."""
    return jax.process_index() == 0


def rows(batch_size: int) -> slice:
    """The rows of a global batch that are this process's own."""
    own = batch_size // jax.process_count()
    return slice(jax.process_index() * own, (jax.process_index() + 1) * own)


def gather(tree: Any) -> Any:
    """Arrays [B_own, ...] of every process as one [B, ...] on the host of each."""
    if jax.process_count() == 1:
        return tree
    return multihost_utils.process_allgather(tree, tiled=True)


@contextmanager
def together() -> Iterator[None]:
    """All processes leave this block, or none: what one of them refuses, all refuse.

    Raises:
        UserError: this process's own, or one that names the first other process that had one.
    """
    own = None
    try:
        yield
    except UserError as error:
        own = error
    failed = np.flatnonzero(gather(np.array([own is not None])))
    if own is not None:
        raise own
    if len(failed):
        raise UserError(f"process {failed[0]} has stopped: see its message.")


def check_same(value: str, what: str) -> None:
    """Raise `UserError` in every process unless `value` is the same in all of them."""
    digest = np.frombuffer(hashlib.sha256(value.encode()).digest(), np.uint8)
    other = np.flatnonzero((gather(digest[None]) != digest[None]).any(axis=1))
    if len(other):
        raise UserError(
            f"process {jax.process_index()} differs from process {other[0]} in {what}: start all "
            "processes with the same of each."
        )


@contextmanager
def naming_a_lost_process() -> Iterator[None]:
    """With several processes an error of the devices most likely means that one has died."""
    try:
        yield
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        reason = str(error).split("\n")[0]
        # XLA begins its errors with a status such as UNKNOWN, and makes some of them ValueErrors.
        if jax.process_count() == 1 or not re.match("[A-Z_]+: ", reason):
            raise
        # JAX would wait for the dead one at the exit, and then abort with a stack trace.
        atexit.register(os._exit, 2)
        raise UserError(
            f"process {jax.process_index()} has lost another process ({reason}): see the messages "
            "of the others and start all again, they go on from the last checkpoint."
        ) from error


class Vote:
    """The highest number that any process has called with, at the same step in all of them.

    It is that of the call before, so that no process waits for the vote under way; a process
    alone gets its own number at once.
    """

    def __init__(self) -> None:
        self._highest = pmap(lambda number: jax.lax.pmax(number, AXIS))
        self._result: Any = None

    def __call__(self, number: int) -> int:
        """Vote with `number`; every process must call, at every step. 0 before the first count."""
        if jax.process_count() == 1:
            return number
        before, self._result = self._result, self._highest(replicate(np.int32(number)))
        return 0 if before is None else int(first(before))


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
    """Average over all devices; call inside a pmapped function."""
    return jax.lax.pmean(tree, AXIS)


def total(tree: Any) -> Any:
    """Sum over all devices; call inside a pmapped function."""
    return jax.lax.psum(tree, AXIS)


def _sharding() -> NamedSharding:
    # A mesh whose axis has pmap's own name: anything else would compile every step twice.
    return NamedSharding(Mesh(np.array(jax.local_devices()), (AXIS,)), PartitionSpec(AXIS))


def replicate(tree: Any) -> Any:
    """A copy of each array on every device."""
    devices, sharding = jax.local_devices(), _sharding()

    def put(leaf: Any) -> Array:
        leaf = np.asarray(leaf)
        copies = [jax.device_put(leaf[None], device) for device in devices]
        shape = (len(devices), *leaf.shape)
        return jax.make_array_from_single_device_arrays(shape, sharding, copies)

    return jax.tree.map(put, tree)


def split(tree: Any) -> Any:
    """This process's rows [B, ...] as [devices, B / devices, ...], each device with its own."""
    n, sharding = len(jax.local_devices()), _sharding()
    put = lambda x: jax.device_put(np.asarray(x).reshape(n, -1, *np.shape(x)[1:]), sharding)
    return jax.tree.map(put, tree)


def first(tree: Any) -> Any:
    """One device's copy of a replicated tree, without a transfer."""
    return jax.tree.map(lambda leaf: leaf.addressable_shards[0].data.squeeze(0), tree)


def merge(tree: Any) -> Any:
    """The inverse of `split`, on the host."""
    return jax.tree.map(lambda leaf: np.asarray(leaf).reshape(-1, *leaf.shape[2:]), tree)
