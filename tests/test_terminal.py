"""What is printed is never fatal; what a machine refuses is a sentence."""

import contextlib
import errno
import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from program import call

import main
from fwm import terminal
from fwm.errors import UserError, sentence
from fwm.files import replacing, write_json, write_text

ROOT = Path(main.__file__).parent


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_is_drawn_on_unless_it_asks_for_plain_text(monkeypatch):
    for name in ("TERM", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    assert not terminal.is_live(io.StringIO())
    assert not terminal.is_colored(io.StringIO())
    for name, value, live, colored in (
        ("TERM", "xterm", True, True), ("TERM", "dumb", False, False),
        ("NO_COLOR", "", True, True), ("NO_COLOR", "1", True, False),
    ):  # fmt: skip
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            assert terminal.is_live(Terminal()) is live
            assert terminal.is_colored(Terminal()) is colored


def test_a_full_disk_is_said_once_and_the_rest_goes_nowhere(capsys):
    with open("/dev/full", "w") as full:
        for line in ("one", "two"):
            terminal.say(line, full)
    expected = "Warning: nothing more can be printed ([Errno 28] No space left on device); the run"
    err = capsys.readouterr().err
    assert err.startswith(expected)
    assert err.count("\n") == 1


def test_both_outputs_on_a_full_disk(monkeypatch):
    with open("/dev/full", "w") as out, open("/dev/full", "w") as err:
        monkeypatch.setattr(sys, "stdout", out)
        monkeypatch.setattr(sys, "stderr", err)
        terminal.say("one")
        terminal.say("two", err)
        monkeypatch.undo()


def test_closed_and_ascii_outputs(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "stdout", None)
    with open(tmp_path / "err", "w", encoding="ascii") as err:
        monkeypatch.setattr(sys, "stderr", err)
        terminal.open_streams()
        terminal.say("nowhere")
        terminal.say("caf\xe9 \udce9", err)
        sys.stdout.close()
        monkeypatch.undo()
    assert (tmp_path / "err").read_text() == "caf\\xe9 \\udce9\n"


@pytest.mark.parametrize("mode", ["--mode=valid", "--mode=compare", "--mode=retrieval"])
def test_what_the_machine_refuses_in_any_mode(mode, monkeypatch, tmp_path):
    for error, said in (
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device: make room"),
        (PermissionError(13, "Permission denied", "/a/b"), "/a/b cannot be used (Permission den"),
        (MemoryError("Unable to allocate 7 TiB"), "there is not enough memory (Unable to allo"),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory"), "there is not enough memory (RESOUR"),
    ):

        def fail(*_, error=error):
            raise error

        monkeypatch.setattr(main, "dispatch", fail)
        status, out, err = call(mode)
        assert (status, out, err.count("\n")) == (2, "", 1)
        assert err.startswith(f"error: {said}")
    for error in (OSError(errno.EBADF, "Bad file descriptor"), RuntimeError("a"), KeyError("b")):
        assert not sentence(error)  # The program's own faults keep their tracebacks.
    assert sentence(UserError("a\n b")) == "a b"


def test_the_current_folder_is_gone(monkeypatch, tmp_path):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    (tmp_path / "here").rmdir()
    with pytest.raises(FileNotFoundError) as caught:
        Path.cwd()
    assert sentence(caught.value).startswith("the current folder is gone")


def test_a_file_is_whole_or_old_and_nothing_stays_behind(monkeypatch, tmp_path):
    path = tmp_path / "a.json"
    write_json(path, 1)

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space") as caught:
        write_json(path, 2)
    assert sentence(caught.value).startswith(f"{path} cannot be used (No space left on device)")
    with pytest.raises(OSError, match="No space"):
        write_text(tmp_path / "b", "c")
    with contextlib.suppress(KeyboardInterrupt), replacing(tmp_path / "d") as partial:
        partial.touch()
        raise KeyboardInterrupt
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
    assert path.read_text() == "1\n"


def test_ctrl_c_during_the_imports_ends_at_once():
    # A child would inherit that it is ignored, as in the background of a script.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(
        [sys.executable, "-X", "importtime", "main.py", "--help"],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    signal.signal(signal.SIGINT, before)
    lines = []
    while not any("pathlib" in line for line in lines):  # The first import after the handler.
        lines.append(process.stderr.readline())
    time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert "Traceback" not in err
