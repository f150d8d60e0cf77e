"""Directories that are made once and never seen half-made, and the memory of files' contents."""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from fwm.errors import UserError
from fwm.files import expanded, write_json


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"The data cache {folder} cannot be written ({error.strerror}); make room there or"
            " choose another folder with --config.data.cache_dir."
        ) from error


def cache_folder(cache_dir: str) -> Path:
    """The folder that `config.data.cache_dir` names, `~` expanded; UserError where it is empty."""
    if not cache_dir:
        raise UserError("config.data.cache_dir is empty: give a folder, such as ~/.cache/fwm.")
    return expanded(cache_dir)


def build_once(final: Path, build: Callable[[Path], None]) -> None:
    """Make the directory `final` with `build(temporary)`, unless it exists.

    The work is done in a temporary directory beside it and renamed at the end: a kill or a full
    disk leaves nothing under the final name. Of two processes one works and the other waits.

    Raises:
      UserError: the directory cannot be written.
    """
    with _writing(final.parent):
        if final.exists():
            return
        locks = final.parent / "locks"
        locks.mkdir(parents=True, exist_ok=True)
        with open(locks / final.name, "w") as lock:
            # The kernel releases this lock when its holder dies, however it dies.
            fcntl.flock(lock, fcntl.LOCK_EX)
            if final.exists():
                return
            prefix = f"{final.name}.tmp-"
            for stale in final.parent.glob(f"{prefix}*"):
                shutil.rmtree(stale)
            # Not one fixed name: the orphaned workers of a killed run may still write into theirs.
            temporary = final.parent / f"{prefix}{os.getpid()}-{time.time_ns()}"
            temporary.mkdir()
            try:
                build(temporary)
                sync_directory(temporary)
                temporary.rename(final)
                sync_directory(final.parent)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)


def sync_directory(path: Path) -> None:
    """Flush all files of a directory and its entries to disk."""
    for entry in [*path.iterdir(), path]:
        if entry.is_file() or entry == path:
            descriptor = os.open(entry, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def file_digest(path: str, cache_dir: Path) -> str:
    """Return the hash of a file's content, remembered as long as the file is untouched.

    The change time, which no program can set back, is part of what must be the same.

    Raises:
      UserError: the file cannot be read, or the cache cannot be written.
    """
    name = hashlib.blake2b(os.path.abspath(path).encode(), digest_size=16).hexdigest()
    memory = cache_dir / "digests" / f"{name}.json"
    before = _state(path)
    with contextlib.suppress(OSError, json.JSONDecodeError):
        known = json.loads(memory.read_text())
        if known["state"] == before:
            return known["digest"]
    begin = time.time_ns()
    try:
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}); make it readable or give another folder."
        ) from error
    # A file changed a moment ago may change again within the same tick of the file system's clock.
    if before == _state(path) and before[2] < begin - 1_000_000_000:
        with _writing(cache_dir):
            memory.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileNotFoundError):  # Another process has just written it.
                write_json(memory, {"state": before, "digest": digest})
    return digest


def _state(path: str) -> list[int]:
    status = os.stat(path)
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
