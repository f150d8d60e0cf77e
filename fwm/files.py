"""JSON files that are whole or old, settings flat, and the lock of a workdir."""

import contextlib
import fcntl
import json
import os
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fwm.errors import UserError


def expanded(path: str | Path) -> Path:
    """The path with `~` and `~user` as that user's home; UserError if there is none."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UserError(
            f"{path} begins with a home folder that cannot be found: write the whole path."
        ) from error


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """An OSError inside says which file it is about: that of a full disk does not by itself."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Where to write what shall take the place of `path` at the end.

    A reader sees the old file or the new one, and whatever ends it leaves no part of one behind.
    """
    partial = path.with_name(path.name + ".tmp")
    try:
        with naming(path):
            yield partial
            partial.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def files_below(folder: Path) -> list[Path]:
    """Every file below a folder, in order; one that cannot be looked into is an OSError, not empty.

    `Path.rglob` leaves out what it has no permission for, and says nothing.
    """

    def refuse(error: OSError) -> None:
        raise error

    walk = os.walk(folder, onerror=refuse)
    return sorted(Path(where, name) for where, _, names in walk for name in names)


def write_text(path: Path, text: str) -> None:
    """Write a file as a whole, as it is, and to the disk."""
    with replacing(path) as partial, partial.open("w", encoding="utf-8", newline="") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON, as `write_text`."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file; a missing, unreadable or malformed one is a UserError that names it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path} is not valid JSON ({type(error).__name__}): restore it from a copy or "
            "start in another workdir."
        ) from error


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one with dotted keys; lists as tuples, as JSON does not know the latter."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = tuple(value) if isinstance(value, list) else value
    return flat


@contextlib.contextmanager
def lock_workdir(workdir: Path) -> Iterator[None]:
    """Hold the workdir for this process, or raise UserError naming the host and process that do.

    The lock belongs to the open file, so the kernel drops it when its owner dies in whatever way:
    the file that a dead process left is taken over, and a process id used again cannot deceive.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        file = (workdir / "lock").open("a+", encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"{workdir} cannot be written to ({error.strerror}): choose another --workdir."
        ) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            owner = file.read().strip() or "unknown, it has just started"
            raise UserError(
                f"{workdir} is in use by another run ({owner}): wait for it, stop it, or give "
                "this run another --workdir."
            ) from error
        except OSError as error:
            raise UserError(
                f"{workdir} cannot be locked ({error.strerror}): choose a --workdir on a file "
                "system with file locks."
            ) from error
        with naming(workdir / "lock"):
            file.truncate(0)
            file.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid()}))
            file.flush()
        yield
