"""What is printed: it fails with a warning at most, and is plain text where that is asked for."""

import contextlib
import os
import sys
import weakref
from collections.abc import Callable
from typing import Any

_given_up: "weakref.WeakSet[Any]" = weakref.WeakSet()


def say(text: str = "", stream: Any = None, end: str = "\n") -> None:
    """Print to a stream, standard output if None, at once; as `attempt`."""
    stream = sys.stdout if stream is None else stream
    attempt(stream, lambda: print(text, end=end, file=stream))


def attempt(stream: Any, action: Callable[[], Any]) -> None:
    """Do what writes to a stream.

    Where that fails (a pipe that nobody reads, a full disk) the stream is given up: what is written
    later goes nowhere, and standard error says so once.
    """
    if stream in _given_up:
        return
    try:
        action()
        stream.flush()
    except OSError as error:
        give_up(stream)
        if stream is not sys.stderr:
            say(f"Warning: nothing more can be printed ({error}); the run goes on.", sys.stderr)


def give_up(stream: Any) -> None:
    """Let all that a stream holds and will be given go nowhere, at the exit too."""
    _given_up.add(stream)
    with contextlib.suppress(OSError):  # One within this process has no file.
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def open_streams() -> None:
    """Standard output and error that can be written to, however the shell has left them.

    A closed one goes nowhere, and characters that an encoding lacks are escaped.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def is_live(stream: Any) -> bool:
    """Whether a line of the stream may be drawn anew."""
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def is_colored(stream: Any) -> bool:
    """Whether it may be in bold and so on."""
    return is_live(stream) and not os.environ.get("NO_COLOR")
