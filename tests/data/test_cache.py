"""What is kept of a text is made once, whole or not at all."""

import hashlib
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fwm.data import cache
from fwm.errors import UserError

ROOT = Path(__file__).parents[2]


def test_digest_is_remembered_only_for_settled_files(tmp_path, monkeypatch):
    path = tmp_path / "text"
    path.write_text("a")
    digest = cache.file_digest(str(path), tmp_path)
    assert not (tmp_path / "digests").exists()
    now = time.time_ns()
    monkeypatch.setattr(time, "time_ns", lambda: now + 10**10)
    assert cache.file_digest(str(path), tmp_path) == digest
    monkeypatch.setattr(hashlib, "file_digest", None)
    assert cache.file_digest(str(path), tmp_path) == digest


def test_failure_in_the_middle_leaves_nothing(tmp_path):
    def full_disk(folder):
        (folder / "half").write_text("x")
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match=r"No space left on device.*cache_dir"):
        cache.build_once(tmp_path / "entry", full_disk)
    assert [p.name for p in tmp_path.iterdir()] == ["locks"]
    cache.build_once(tmp_path / "entry", lambda folder: (folder / "f").touch())
    assert (tmp_path / "entry" / "f").exists()


BUILD = """
import sys, time
from pathlib import Path
from fwm.data.cache import build_once
def build(folder):
    (folder / "half").write_text("x")
    print("begun", flush=True)
    time.sleep(float(sys.argv[2]))
    (folder / "half").rename(folder / "whole")
build_once(Path(sys.argv[1]), build)
print("done", sorted(p.name for p in Path(sys.argv[1]).iterdir()), flush=True)
"""


def start(path, seconds):
    return subprocess.Popen(
        [sys.executable, "-c", BUILD, str(path), str(seconds)],
        cwd=ROOT, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_two_processes_at_once_build_once(tmp_path):
    processes = [start(tmp_path / "entry", 0.5) for _ in range(2)]
    outputs = [process.communicate(timeout=60)[0] for process in processes]
    assert sorted(outputs) == ["begun\ndone ['whole']\n", "done ['whole']\n"]


def test_kill_in_the_middle_leaves_nothing_that_looks_finished(tmp_path):
    process = start(tmp_path / "entry", 60)
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert not (tmp_path / "entry").exists()
    cache.build_once(tmp_path / "entry", lambda folder: (folder / "whole").touch())
    # The half-made directory of the killed run is cleared away too.
    assert sorted(p.name for p in tmp_path.iterdir()) == ["entry", "locks"]
