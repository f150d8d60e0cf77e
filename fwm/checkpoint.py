"""All of Orbax: checkpoints that survive kills, full disks and damaged files.

Layout of a workdir, as far as this file goes (JSON and arrays only, nothing is ever unpickled):

    lock                              host and process id of the run that writes here
    checkpoints/<step>/state/         the arrays, written by Orbax
    checkpoints/<step>/metrics/       the validation loss, if known
    checkpoints/<step>/checksums.json blake2b of every file of the step, written last
    checkpoints/saving.json           the step being written; gone when its checksums are written
    damaged_checkpoints/<step>/       steps that failed their checksums, set aside by the next save
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from fwm.errors import UserError
from fwm.files import files_below, read_json, write_json
from fwm.terminal import say

MAX_FAILURES = 3
CHECKSUMS = "checksums.json"
SAVING = "saving.json"

PyTree = Any
Which = Literal["latest", "best"] | int


@contextlib.contextmanager
def _orbax_log_silenced() -> Iterator[None]:
    """An error comes back as exception; Orbax would also log several tracebacks of each."""
    from_elsewhere = lambda record: "orbax" not in record.pathname
    logger = logging.getLogger("absl")
    logger.addFilter(from_elsewhere)
    try:
        yield
    finally:
        logger.removeFilter(from_elsewhere)


_blake2b = functools.partial(hashlib.blake2b, digest_size=16)


def _checksums(directory: Path) -> dict[str, str]:
    """Relative name -> checksum of every file, and under its own name that of this table."""
    sums = {}
    for path in files_below(directory):
        if path != directory / CHECKSUMS:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, _blake2b)
            sums[path.relative_to(directory).as_posix()] = digest.hexdigest()
    sums[CHECKSUMS] = _own_checksum(sums)
    return sums


def _own_checksum(sums: Mapping[str, Any]) -> str:
    others = {name: checksum for name, checksum in sums.items() if name != CHECKSUMS}
    return _blake2b(json.dumps(others).encode()).hexdigest()


def _flat(tree: PyTree) -> dict[str, str]:
    """Leaf name -> "dtype[shape]", for trees of arrays and for what Orbax tells of saved ones."""
    leaves = ocp.tree.to_flat_dict(tree, sep="/")
    return {name: f"{x.dtype}{list(x.shape)}" for name, x in leaves.items() if x is not None}


class Checkpoints:
    """The checkpoints of one run: the latest two and the best by validation loss.

    Reading changes nothing on disk, so a run can be evaluated while it trains. Each process acts
    for itself: with several hosts, only the first one saves.

    Args:
      directory: where the steps lie; made at the first save.
      report: takes each warning as one line of text.
    """

    def __init__(self, directory: Path, report: Callable[[str], None] = say) -> None:
        self._directory = directory.absolute()
        self.report = report
        self._damaged: set[int] = set()
        self._failures = 0
        self._manager: ocp.CheckpointManager | None = None
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: tuple[int, Future[None]] | None = None
        this_process = jax.process_index()
        self._processes = ocp.options.MultiprocessingOptions(
            primary_host=this_process, active_processes={this_process}
        )
        self._handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=self._processes)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Wait for the last write; raises as `wait` does."""
        try:
            self.wait()
        finally:
            self._writer.shutdown()
            self._close_manager()
            self._handler.close()

    def save(self, step: int, state: Mapping[str, PyTree], *, valid_loss: float | None) -> None:
        """Start writing `state`; returns as soon as it is copied to the host.

        A write that fails is reported at the next call of `save`, `wait` or `close`, and training
        goes on. A step that is already saved is left as it is.

        Args:
          step: number of updates done.
          state: dict of pytrees of arrays (no typed PRNG keys, no empty arrays); may hold None.
          valid_loss: what "best" means (smaller is better); None or NaN: never the best.

        Raises:
          UserError: the third write in a row has failed.
        """
        self.wait()
        if step in self.steps() and step not in self._damaged:
            return
        # A real copy: on CPU the arrays may share memory with buffers that the next step reuses.
        host_state = jax.tree.map(np.array, jax.device_get(dict(state)))
        empty = [name for name, x in ocp.tree.to_flat_dict(host_state).items() if np.size(x) == 0]
        if empty:
            raise ValueError(f"Orbax cannot save arrays without elements: {empty}.")
        metrics = {}
        if valid_loss is not None and math.isfinite(valid_loss):
            metrics["valid_loss"] = valid_loss
        self._pending = step, self._writer.submit(self._write, step, host_state, metrics)

    def wait(self) -> None:
        """Wait for the write under way; UserError if it is the third in a row that failed."""
        if self._pending is None:
            return
        step, future = self._pending
        error = future.exception()
        self._pending = None  # Only now: an interrupt while waiting must not forget the write.
        if error is None:
            self._failures = 0
            return
        # TensorStore tells of a full disk as ValueError, the rest of Orbax as OSError.
        if not isinstance(error, OSError | ValueError):
            raise error
        self._failures += 1
        self._close_manager()
        self._remove_unfinished()
        # Of an OSError what it is; its text ends with the path.
        told = isinstance(error, OSError) and error.strerror
        reason = told or " ".join(str(error).split()).rsplit(": ", 1)[-1]
        if self._failures >= MAX_FAILURES:
            raise UserError(
                f"The checkpoint of step {step} could not be written to {self._directory} "
                f"({reason}), the last of {self._failures} failures in a row: make room there and "
                f"run the same command again, it goes on from step {self.latest_step()}."
            ) from error
        self.report(
            f"Warning: the checkpoint of step {step} could not be written ({reason}); "
            f"training goes on, the last saved step is {self.latest_step()}."
        )

    def steps(self) -> list[int]:
        """Steps whose saving was finished, in order; sound or not, for `restore` checks that.

        A save that was killed half-way leaves nothing here.
        """
        if not self._directory.is_dir():
            return []
        found = [int(path.name) for path in self._directory.iterdir() if path.name.isdecimal()]
        return sorted(step for step in found if not self._unfinished(step))

    def latest_step(self) -> int | None:
        """The last saved step, or None if there is none."""
        return max(self.steps(), default=None)

    def best_step(self) -> int | None:
        """The step with the smallest validation loss; without any loss the latest one."""
        return next(iter(self._candidates("best")), None)

    def restore(self, template: PyTree, which: Which = "latest") -> tuple[int, PyTree]:
        """Load a whole state: (step, numpy arrays in the structure of `template`).

        Checksums are verified before anything is loaded. With "latest" and "best", a damaged
        checkpoint is reported, naming the file, and the next one (older, or second best) is tried.

        Args:
          template: arrays or ShapeDtypeStructs with the expected shapes and dtypes.
          which: "latest", "best" or a saved step.

        Raises:
          UserError: no checkpoint, none that is sound, no such step, or one that does not fit.
        """
        step = self._sound_step(which)
        self._check_fits(step, self._saved_tree(step), template)
        return step, self._load(step, template)

    def restore_subtree(
        self, names: tuple[str, ...], which: Which, like: PyTree | None = None
    ) -> tuple[int, dict[str, Any]]:
        """Load some top-level entries: (step, nested dicts of numpy arrays).

        Tuples and NamedTuples come back as lists and dicts. Damaged checkpoints are treated, and
        errors raised, as in `restore`; an entry that was not saved is a UserError too, and so are
        arrays that are not as in `like`, where that is given.
        """
        step = self._sound_step(which)
        saved = self._saved_tree(step)
        missing = [name for name in names if name not in saved]
        if missing:
            raise UserError(
                f"Checkpoint {step} in {self._directory} has no {', '.join(missing)}: it holds "
                f"{', '.join(sorted(saved))}."
            )
        wanted = {name: saved[name] for name in names}
        if like is not None:
            self._check_fits(step, wanted, like)
        return step, self._load(step, wanted)

    def _check_fits(self, step: int, saved: PyTree, template: PyTree) -> None:
        here = _flat(jax.tree.map(lambda x: x if hasattr(x, "dtype") else np.asarray(x), template))
        there = _flat(saved)
        differing = [name for name in here | there if here.get(name) != there.get(name)]
        if differing:
            listed = "; ".join(
                f"{name} is {there.get(name, 'absent')} there and {here.get(name, 'absent')} here"
                for name in differing[:3]
            )
            raise UserError(
                f"Checkpoint {step} in {self._directory} does not fit this run in {len(differing)} "
                f"arrays ({listed}): use the settings it was trained with or another --workdir."
            )

    def _load(self, step: int, item: PyTree) -> PyTree:
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)
        # Entries that were not asked for are the caller's choice: `restore` has compared names.
        args = ocp.args.PyTreeRestore(item=item, restore_args=as_numpy, partial_restore=True)
        return self._handler.restore(epath.Path(self._directory / str(step) / "state"), args=args)

    def _saved_tree(self, step: int) -> dict[str, Any]:
        metadata = self._handler.metadata(epath.Path(self._directory / str(step) / "state"))
        return dict(metadata.tree)

    def _unfinished(self, step: int) -> bool:
        """Committed by Orbax, but killed before its checksums (a moment later) were written."""
        directory = self._directory / str(step)
        if (directory / CHECKSUMS).exists():
            return False
        try:
            return bool(read_json(self._directory / SAVING) == step)
        except UserError:  # No save is under way, then: the checksums were lost otherwise.
            return False

    def valid_loss(self, step: int) -> float:
        """The validation loss that `step` was saved with; infinity where there is none."""
        try:
            metrics = read_json(self._directory / str(step) / "metrics" / "metrics")
            return float(metrics.get("valid_loss", math.inf))
        except (UserError, AttributeError, TypeError, ValueError):
            return math.inf  # Damaged: the last choice, and the checksums will tell.

    def _candidates(self, which: Which) -> list[int]:
        newest_first = self.steps()[::-1]
        if which == "latest":
            return newest_first
        if which == "best":
            return sorted(newest_first, key=self.valid_loss)
        return [step for step in newest_first if step == which]

    def _sound_step(self, which: Which) -> int:
        self.wait()
        saved = self.steps()
        if not saved:
            raise UserError(f"{self._directory} holds no checkpoint: train there first.")
        candidates = self._candidates(which)
        if not candidates:
            raise UserError(
                f"{self._directory} has no checkpoint {which}: choose latest, best or one of "
                f"{saved}."
            )
        for step in candidates:
            problem = self._problem(step)
            if problem is None:
                return step
            self._damaged.add(step)
            self.report(f"Warning: checkpoint {step} is damaged ({problem}) and is not used.")
        raise UserError(
            f"No sound checkpoint among {candidates} in {self._directory} (see the warnings "
            "above): bring a copy back or use another --workdir to start over."
        )

    def _problem(self, step: int) -> str | None:
        """What is wrong with a saved step, naming the file; None if every checksum agrees."""
        directory = self._directory / str(step)
        try:
            expected = read_json(directory / CHECKSUMS)
            found = _checksums(directory)
        except (UserError, OSError) as error:
            return str(error)
        if not isinstance(expected, dict) or expected.get(CHECKSUMS) != _own_checksum(expected):
            return f"{CHECKSUMS} has the wrong checksum"
        for name in expected.keys() - {CHECKSUMS}:
            if name not in found:
                return f"{name} is missing"
            if found[name] != expected[name]:
                return f"{name} has the wrong checksum"
        return None

    def _write(self, step: int, state: dict[str, PyTree], metrics: dict[str, float]) -> None:
        """Runs in the writer thread, where Orbax is called and its errors are collected."""
        self._directory.mkdir(parents=True, exist_ok=True)
        if self._damaged:
            self._close_manager()
        if self._manager is None:
            self._remove_unfinished()
            self._set_damaged_aside()
            self._manager = self._open_manager()
        write_json(self._directory / SAVING, step)
        args = ocp.args.Composite(state=ocp.args.PyTreeSave(state))
        with _orbax_log_silenced():
            # force: without it Orbax skips a step before its latest one, and says nothing.
            self._manager.save(step, args=args, metrics=metrics, force=True)
        directory = self._directory / str(step)
        write_json(directory / CHECKSUMS, _checksums(directory))
        (self._directory / SAVING).unlink()

    def _open_manager(self) -> ocp.CheckpointManager:
        loss = lambda metrics: metrics.get("valid_loss", math.inf)
        managers = ocp.checkpoint_managers
        best = managers.BestN(
            get_metric_fn=loss, reverse=True, n=1, keep_checkpoints_without_metrics=False
        )
        options = ocp.CheckpointManagerOptions(
            preservation_policy=managers.AnyPreservationPolicy([managers.LatestN(2), best]),
            best_fn=loss,
            best_mode="min",
            create=False,
            cleanup_tmp_directories=True,
            # The writer thread makes it asynchronous, so that the checksums belong to the write.
            enable_async_checkpointing=False,
            multiprocessing_options=self._processes,
        )
        return ocp.CheckpointManager(self._directory, options=options)

    def _close_manager(self) -> None:
        if self._manager is not None:
            self._manager.close()
            self._manager = None

    def _remove_unfinished(self) -> None:
        """Delete what a failed or killed save left; it never was a checkpoint."""
        if not self._directory.is_dir():
            return
        for path in list(self._directory.iterdir()):
            unfinished = path.name.isdecimal() and self._unfinished(int(path.name))
            if unfinished or ".orbax-checkpoint-tmp" in path.name:
                # Threads of a write that failed may still be at it, for a moment.
                for _ in range(100):
                    shutil.rmtree(path, ignore_errors=True)
                    if not path.exists():
                        break
                    time.sleep(0.01)
        (self._directory / SAVING).unlink(missing_ok=True)

    def _set_damaged_aside(self) -> None:
        """Out of the way of Orbax, which would count them among the latest two."""
        for step in self.steps():
            directory = self._directory / str(step)
            if step in self._damaged or not (directory / CHECKSUMS).exists():
                aside = self._directory.with_name("damaged_checkpoints") / str(step)
                aside.parent.mkdir(exist_ok=True)
                shutil.rmtree(aside, ignore_errors=True)
                directory.rename(aside)
        self._damaged.clear()
