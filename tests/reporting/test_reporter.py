"""Reports: the log after kills and resumes, terminal lines, TensorBoard, a full disk."""

import io
import math
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from reports import events, make, rows, run

from fwm.reporting import parameter_table
from fwm.reporting import reporter as reporter_room

pytestmark = pytest.mark.quick  # see .ci/run


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_files_of_a_run(tmp_path):
    with make(tmp_path) as reporter:
        run(reporter, range(1, 21))
    log = rows(tmp_path)
    assert [(int(r["step"]), r["split"]) for r in log if r["split"] == "train"] == [
        (step, "train") for step in range(1, 21)
    ]
    assert [int(r["step"]) for r in log if r["split"] == "valid"] == [10, 20]
    assert float(log[2]["loss"]) == 5.0 / 3
    assert float(log[2]["perplexity"]) == math.exp(5.0 / 3)
    assert (log[2]["learning_rate"], log[2]["grad_norm"]) == ("0.001", "0.5")
    assert log[-1] == {
        "step": "20",
        "split": "valid",
        "loss": "0.3",
        "perplexity": repr(math.exp(0.3)),
        "learning_rate": "",
        "grad_norm": "",
        "tokens_per_second": "",
        "seconds": "1.25",
    }
    with Image.open(tmp_path / "learning_curve.png") as image:
        image.verify()
    scalars = {
        (event.step, value.tag): value.simple_value
        for event in events(tmp_path)
        for value in event.summary.value
        if value.HasField("simple_value")
    }
    assert scalars[3, "train/loss"] == pytest.approx(5 / 3)
    assert scalars[3, "train/tokens_per_second"] == 1234.5
    assert scalars[3, "train/skipped"] == 0
    assert scalars[20, "valid/perplexity"] == pytest.approx(math.exp(0.3))
    tags = {value.tag for event in events(tmp_path) for value in event.summary.value}
    assert {"config/text_summary", "_hparams_/session_start_info"} <= tags
    assert not list(tmp_path.glob("*.tmp"))


def test_device_memory_where_the_device_tells_it(tmp_path, monkeypatch):
    device = types.SimpleNamespace(memory_stats=lambda: {"peak_bytes_in_use": 3 * 2**29})
    monkeypatch.setattr(reporter_room.jax, "local_devices", lambda: [device])
    with make(tmp_path) as reporter:
        run(reporter, [1])
    found = {v.tag: v.simple_value for event in events(tmp_path) for v in event.summary.value}
    assert found["train/device_memory_gib"] == 1.5


def test_a_resumed_log_has_every_step_once(tmp_path):
    with make(tmp_path) as reporter:
        run(reporter, range(1, 28))
    whole = rows(tmp_path)[:22]
    with (tmp_path / "train_log.csv").open("a") as file:
        file.write("28,train,0.17")  # Killed in the middle of a row.
    with make(tmp_path, start_step=20) as reporter:
        assert rows(tmp_path) == whole
        run(reporter, range(21, 31))
    log = [(int(row["step"]), row["split"]) for row in rows(tmp_path)]
    assert len(log) == len(set(log)) == 33
    assert [step for step, split in log if split == "train"] == list(range(1, 31))
    assert [step for step, split in log if split == "valid"] == [10, 20, 30]
    starts = [event.step for event in events(tmp_path) if event.HasField("session_log")]
    assert sorted(starts) == [1, 21]
    # A run without a checkpoint starts over, and so does its log.
    with make(tmp_path) as reporter:
        run(reporter, [1])
    assert len(rows(tmp_path)) == 1


@pytest.mark.parametrize("missing", [1, 2, 3, 10, 21, 30, 45])
def test_a_log_cut_anywhere_keeps_its_whole_rows(tmp_path, missing):
    with make(tmp_path) as reporter:
        run(reporter, [1, 2])
    first = rows(tmp_path)[0]
    log = tmp_path / "train_log.csv"
    text = log.read_text()
    assert len(text.splitlines()[-1]) > 45
    log.write_bytes(text[:-missing].encode() + b"\xff\x00" * (missing % 2))
    with make(tmp_path, start_step=2):
        assert rows(tmp_path) == [first]
    log.write_bytes(b"")
    with make(tmp_path, start_step=2):
        assert rows(tmp_path) == []


def test_plain_lines_when_not_on_a_terminal(tmp_path):
    stream = io.StringIO()
    with make(tmp_path, stream) as reporter:
        reporter.message("hello")
        run(reporter, [9, 10])
        reporter.train(11, {"loss": 800.0}, tokens_per_second=1e6, seconds_left=None)
    assert stream.getvalue().splitlines() == [
        "hello",
        "step 9/30  loss 0.5556  perplexity 1.74  1,234 tokens/s  1:01:01 left",
        "step 10/30  loss 0.5000  perplexity 1.65  1,234 tokens/s  1:01:01 left",
        ">>> validation at step 10: loss 0.6000  perplexity 1.82  (1.2 s)",
        "step 11/30  loss 800.0000  perplexity inf  1,000,000 tokens/s",
    ]


def screen(text, columns=200):
    """The lines that a terminal shows after `text`, none of which may be wider than it is."""
    lines, at = [""], 0
    for part in re.split("([\r\n])", re.sub("\x1b\\[[0-9]+m", "", text)):
        if part == "\n":
            lines.append("")
        if part in ("\r", "\n"):
            at = 0
            continue
        assert at + len(part) <= columns, part
        lines[-1] = lines[-1][:at].ljust(at) + part + lines[-1][at + len(part) :]
        at += len(part)
    return [line.rstrip() for line in lines]


def test_one_live_line_on_a_terminal(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    stream = Terminal()
    shown = lambda: [line.replace("\u2588", "#") for line in screen(stream.getvalue())]
    with make(tmp_path, stream) as reporter:
        run(reporter, [9])
        live = "step 9/30  loss 0.5556  perplexity 1.74  1,234 tokens/s  1:01:01 left ###"
        assert shown() == [live]
        reporter.message("between")
        assert shown() == ["between", live]
        run(reporter, [10])
        said = ["between", ">>> validation at step 10: loss 0.6000  perplexity 1.82  (1.2 s)"]
        assert shown()[:-1] == said
        assert shown()[-1].startswith("step 10/30  loss 0.5000")
        text = stream.getvalue()
        assert f"\x1b[1m{said[1]}\x1b[0m" in text
        monkeypatch.setattr(reporter_room, "REDRAW_SECONDS", 60.0)
        reporter.progress(19, 0.5, tokens_per_second=0.0, seconds_left=None)
        assert stream.getvalue() == text  # No faster than it can be read.
        monkeypatch.setattr(reporter_room, "REDRAW_SECONDS", 0.0)
        reporter.progress(20, 0.5, tokens_per_second=0.0, seconds_left=None)
        assert shown()[-1].startswith("step 20/30  loss 0.5000  perplexity 1.65 ####")
        # The last step is no progress any more.
        run(reporter, [30])
        reporter.message("done")
    last = "step 30/30  loss 0.1667  perplexity 1.18  1,234 tokens/s  1:01:01 left"
    valid = ">>> validation at step 30: loss 0.2000  perplexity 1.22  (1.2 s)"
    assert shown() == [*said, last, valid, "done", ""]


@pytest.mark.parametrize("columns", [12, 30, 60])
def test_a_live_line_in_a_narrow_window(tmp_path, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    stream = Terminal()
    with make(tmp_path, stream) as reporter:
        for step in (1, 2, 3):
            run(reporter, [step])
        (line,) = screen(stream.getvalue(), columns)
        whole = "step 3/30  loss 1.6667  perplexity 5.29  1,234 tokens/s  1:01:01 left"
        assert whole.startswith(line)
        assert len(line) > columns - 4


def test_nothing_of_a_live_line_remains(tmp_path):
    for stream, left in (Terminal(), ""), (io.StringIO(), "1:01:01 left"):
        with make(tmp_path, stream) as reporter:
            run(reporter, [9])
            lines = stream.getvalue()
            if not stream.isatty():
                reporter.progress(10, 0.5, tokens_per_second=1.0, seconds_left=1.0)
                assert stream.getvalue() == lines
        assert "".join(screen(stream.getvalue())).endswith(left)
        assert bool(left) or screen(stream.getvalue()) == [""]


def test_no_colour_and_bits_per_character(tmp_path, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    stream = Terminal()
    with make(tmp_path, stream, unit="character") as reporter:
        run(reporter, [10])
        text = stream.getvalue()
    assert "\x1b" not in text
    assert "loss 0.5000  perplexity 1.65  0.7213 bits/character  1,234" in text
    assert ">>> validation at step 10: loss 0.6000  perplexity 1.82  0.8656 bits/ch" in text


def test_an_inactive_reporter_does_nothing(tmp_path):
    stream = io.StringIO()
    with make(tmp_path / "run", stream, active=False, use_wandb=True) as reporter:
        run(reporter, [10])
        reporter.message("hello")
    assert stream.getvalue() == ""
    assert not (tmp_path / "run").exists()


FULL_DISK = """
import sys
from pathlib import Path
from fwm.reporting import Reporter, reporter as module

module.CURVE_SECONDS = -1  # a curve for every validation
workdir = Path(sys.argv[1])
reporter = Reporter(workdir, config={}, total_steps=9, start_step=0)
scalars = {"loss": 1.0}
reporter.train(1, scalars, tokens_per_second=1.0, seconds_left=None)
ballast = (workdir / "ballast").open("wb", buffering=0)
for size in (65536, 4096):
    try:
        while True:
            ballast.write(bytes(size))
    except OSError:
        pass
for step in range(2, 300):
    reporter.train(step, scalars, tokens_per_second=1.0, seconds_left=None)
reporter.valid(299, scalars, 1.0)
ballast.truncate(0)
reporter.valid(300, scalars, 1.0)
reporter.close()
lines = (workdir / "train_log.csv").read_text().splitlines()
steps = [line.split(",")[0] for line in lines[1:]]
print(steps == [str(s) for s in range(1, 300)] + ["299", "300"], file=sys.stderr)
print((workdir / "learning_curve.png").exists(), file=sys.stderr)
"""


def test_a_full_disk_costs_a_warning_and_no_row(tmp_path):
    mount = f"mount -t tmpfs -o size=1m tmpfs {tmp_path}"
    unshare = ["unshare", "-rm", "sh", "-c"]
    if shutil.which("unshare") is None or subprocess.run([*unshare, mount]).returncode:
        pytest.skip("needs user namespaces to mount a small tmpfs")
    command = [*unshare, f'{mount} && exec "$0" "$@"', sys.executable, "-c", FULL_DISK, tmp_path]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    assert done.stderr.splitlines() == ["True", "True"]
    warnings = [line for line in done.stdout.splitlines() if "Warning" in line]
    assert len(warnings) == 3
    assert all("No space left on device" in line for line in warnings)


def test_validations_in_quick_succession_are_drawn_once_at_the_end(tmp_path):
    curve = tmp_path / "learning_curve.png"
    with make(tmp_path) as reporter:
        for step in (1, 2):
            reporter.valid(step, {"loss": 1.0}, 1.0)
        assert not curve.exists()
    assert curve.exists()


def test_parameter_table():
    params = {"embed": {"kernel": jnp.zeros((5, 4))}, "bias": np.zeros(3, np.float32)}
    table = parameter_table(params)
    assert "embed/kernel" in table
    assert "(5, 4)" in table
    assert "Total: 23" in table


def test_workdir_may_be_relative(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with make(Path("runs/a")) as reporter:
        run(reporter, [10])
    assert len(rows(tmp_path / "runs" / "a")) == 2


class Pipe(io.StringIO):
    """One that nobody reads from."""

    def write(self, text):
        raise BrokenPipeError(32, "Broken pipe")


def test_a_terminal_that_fails_costs_a_warning(tmp_path, capsys):
    with make(tmp_path, Pipe()) as reporter:
        run(reporter, [1, 10])
        reporter.message("hello")
    assert [(row["step"], row["split"]) for row in rows(tmp_path)] == [
        ("1", "train"), ("10", "train"), ("10", "valid")
    ]  # fmt: skip
    expected = "Warning: nothing more can be printed ([Errno 32] Broken pipe); the run goes on.\n"
    assert capsys.readouterr().err == expected


def test_what_else_a_task_measures(tmp_path):
    stream = io.StringIO()
    with make(tmp_path, stream) as reporter:
        reporter.valid(4, {"loss": 0.5, "accuracy": 0.25}, seconds=1.0)
    line = ">>> validation at step 4: loss 0.5000  perplexity 1.65  accuracy 0.2500  (1.0 s)\n"
    assert stream.getvalue() == line
    found = {v.tag: v.simple_value for event in events(tmp_path) for v in event.summary.value}
    assert found["valid/accuracy"] == 0.25
