"""Reports: the log after kills and resumes, terminal lines, TensorBoard, W&B, comparison."""

import io
import json
import math
import re
import shutil
import struct
import subprocess
import sys
import types
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from tensorboardX.proto.event_pb2 import Event

import main
from fwm.errors import UserError
from fwm.reporting import COLUMNS, Reporter, compare, parameter_table
from fwm.reporting import reporter as reporter_room

CONFIG = {"seed": 1, "model": {"d_model": 8, "no_pos": True, "cutoffs": (2, 4)}, "note": None}


class Terminal(io.StringIO):
    def isatty(self):
        return True


def make(workdir, stream=None, start_step=0, **options):
    stream = io.StringIO() if stream is None else stream
    options = {"config": CONFIG, "total_steps": 30, "stream": stream} | options
    return Reporter(workdir, start_step=start_step, **options)


def run(reporter, steps, valid_every=10):
    for step in steps:
        scalars = {"loss": 5.0 / step, "learning_rate": 1e-3, "grad_norm": 0.5, "skipped": 0}
        reporter.train(step, scalars, tokens_per_second=1234.5, seconds_left=3661.0)
        if step % valid_every == 0:
            reporter.valid(step, {"loss": 6.0 / step}, seconds=1.25)


def rows(workdir):
    header, *lines = (workdir / "train_log.csv").read_text().splitlines()
    assert header == ",".join(COLUMNS)
    return [dict(zip(COLUMNS, line.split(","), strict=True)) for line in lines]


def events(workdir):
    found = []
    for path in sorted(workdir.glob("events.out.tfevents.*")):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            event = Event()
            event.ParseFromString(data[12 : 12 + length])
            found.append(event)
            data = data[16 + length :]
    return found


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


def test_one_live_line_on_a_terminal(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    stream = Terminal()
    with make(tmp_path, stream) as reporter:
        run(reporter, [9])
        reporter.message("between")
        run(reporter, [10])
        text = stream.getvalue()
        monkeypatch.setattr(reporter_room, "REDRAW_SECONDS", 60.0)
        reporter.progress(19, 0.5, tokens_per_second=0.0, seconds_left=None)
        assert stream.getvalue() == text  # No faster than it can be read.
        monkeypatch.setattr(reporter_room, "REDRAW_SECONDS", 0.0)
        reporter.progress(20, 0.5, tokens_per_second=0.0, seconds_left=None)
        assert stream.getvalue() == text + "\r\x1b[Kstep 20/30  loss 0.5000  perplexity 1.65"
        run(reporter, [30])
        reporter.message("done")
    text = stream.getvalue()
    progress = "\r\x1b[Kstep 9/30  loss 0.5556  perplexity 1.74  1,234 tokens/s  1:"
    assert text.startswith(progress + "\r\x1b[Kbetween\nstep 9/30")
    assert "\x1b[1m>>> validation at step 10" in text
    # The last step is no progress any more.
    first, second, third = text.splitlines()[-3:]
    assert first.split("\x1b[K")[-1].startswith("step 30/30  loss 0.1667")
    assert second.startswith("\x1b[1m>>> validation at step 30")
    assert (third, text[-1]) == ("done", "\n")
    for line in text.replace("\n", "\r").split("\r"):
        visible = line.replace("\x1b[K", "").replace("\x1b[1m", "").replace("\x1b[0m", "")
        assert len(visible) < 60 or visible.startswith((">>>", "step 30/30"))


def test_nothing_of_a_live_line_remains(tmp_path):
    for stream, end in (Terminal(), "\r\x1b[K"), (io.StringIO(), " left\n"):
        with make(tmp_path, stream) as reporter:
            run(reporter, [9])
            lines = stream.getvalue()
            if not stream.isatty():
                reporter.progress(10, 0.5, tokens_per_second=1.0, seconds_left=1.0)
                assert stream.getvalue() == lines
        assert stream.getvalue().endswith(end)


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
from fwm.reporting import Reporter

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


def fake_wandb(monkeypatch, offline_only=False):
    calls: list[tuple] = []

    class Error(Exception):
        pass

    class Run:
        def log(self, values, step):
            calls.append(("log", step, values))

        def finish(self):
            calls.append(("finish",))

    def init(**options):
        calls.append(("init", options))
        if offline_only and options.get("mode") != "offline":
            raise Error("no network")
        return Run()

    module = types.SimpleNamespace(
        init=init,
        errors=types.SimpleNamespace(Error=Error),
        teardown=lambda: calls.append(("teardown",)),
    )
    monkeypatch.setitem(sys.modules, "wandb", module)
    return calls


def test_wandb_logs_and_resumes_under_the_same_id(tmp_path, monkeypatch):
    calls = fake_wandb(monkeypatch)
    names = {"use_wandb": True, "project_name": "lm", "job_name": "delta"}
    for start_step, step in ((0, 10), (10, 20), (0, 10)):
        with make(tmp_path, start_step=start_step, **names) as reporter:
            run(reporter, [step])
    assert [call[0] for call in calls] == ["init", "log", "log", "finish"] * 3
    first, second, third = (call[1] for call in calls if call[0] == "init")
    assert first == {
        "project": "lm",
        "name": "delta",
        "config": CONFIG,
        "id": first["id"],
        "resume": "allow",
        "dir": str(tmp_path),
    }
    assert second == first
    assert third["id"] != first["id"]
    _, step, values = calls[5]
    assert step == 20
    assert values["train/loss"] == 0.25
    assert calls[6][2]["valid/perplexity"] == math.exp(0.3)


def test_wandb_without_network_goes_offline(tmp_path, monkeypatch):
    calls = fake_wandb(monkeypatch, offline_only=True)
    stream = io.StringIO()
    with make(tmp_path, stream, use_wandb=True):
        pass
    assert calls[1:3] == [("teardown",), ("init", calls[0][1] | {"mode": "offline"})]
    assert "no network" in stream.getvalue()
    assert "wandb sync" in stream.getvalue()


def test_wandb_that_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="pip install wandb"):
        make(tmp_path / "run", use_wandb=True)
    assert not (tmp_path / "run").exists()


def records(path):
    """What W&B has logged offline: its protobuf records, in blocks of a LevelDB log."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, record = path.read_bytes(), 7, b""
    while at < len(data):
        if 2**15 - at % 2**15 < 7:  # Headers are not divided between blocks.
            at += 2**15 - at % 2**15
            continue
        _, size, kind = struct.unpack_from("<IHB", data, at)
        record += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(record)
            record = b""


def test_real_wandb_offline(train, tmp_path, monkeypatch):
    for name, value in {"MODE": "offline", "SILENT": "true", "ERROR_REPORTING": "false"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    workdir = tmp_path / "run"
    for first, given in (1, {}), (3, {"project_name": "lm", "job_name": "delta"}):
        report = {"use_wandb": True} | given
        status, _, err = train(workdir, **{f"report__{k}": v for k, v in report.items()})
        assert (status, err) == (0, "")
        sys.modules["wandb"].teardown()  # Its own process writes the file, and ends when all is.
        (path,) = (workdir / "wandb").glob("offline-run-*/run-*.wandb")
        found = list(records(path))
        (run,) = (record.run for record in found if record.HasField("run"))
        assert run.run_id == json.loads((workdir / "wandb_id.json").read_text())
        by_default = main._describe(main.config_of_run(workdir, {}))
        assert by_default.startswith("text-dpfp-delta-none-nu2-L1-d16-")
        assert run.project == given.get("project_name", "fwm")
        assert run.display_name == given.get("job_name", by_default)
        # All settings, as they are in config.json.
        settings = {item.key: json.loads(item.value_json) for item in run.config.update}
        saved = json.loads((workdir / "config.json").read_text())
        assert settings == saved | {"_wandb": settings["_wandb"]}
        # All numbers, as they are in train_log.csv.
        logged = {
            (record.history.step.num, *item.nested_key[0].split("/")): json.loads(item.value_json)
            for record in found
            for item in record.history.item
        }
        for row in rows(workdir):
            step, split = int(row.pop("step")), row.pop("split")
            del row["seconds"]
            for name, value in row.items():
                assert not value or step < first or logged[step, split, name] == float(value)
        assert {key[0] for key in logged} == set(range(first, 5))
        # The second run goes on from step 2; a folder's name has the second in it.
        shutil.rmtree(workdir / "checkpoints" / "4")
        path.parent.rename(tmp_path / f"from {first}")


def test_compare(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    for workdir in (a, b):
        with make(workdir) as reporter:
            run(reporter, range(1, 11))
    (a / "valid_results.json").write_text('{"perplexity": 34.1234}')
    (a / "test_results.json").write_text('{"perplexity": 35}')
    text = compare([a, b], tmp_path / "out" / "curves.png", {a: "34.1 / 35.2"})
    header, line, first, second = text.splitlines()
    names = ["run", "steps", "valid perplexity", "test perplexity", "paper (valid / test)"]
    assert re.split(r"  +", header) == names
    assert set(line) == {"-", " "}
    assert first.split() == [str(a), "10", "34.123", "35.000", "34.1", "/", "35.2"]
    assert second.split() == [str(b), "10", "-", "-", "-"]
    with Image.open(tmp_path / "out" / "curves.png") as image:
        image.verify()
    # Other protocols than the paper's say so.
    results = {"perplexity": 34.5, "stride": 8, "split_stream": True}
    (b / "test_results.json").write_text(json.dumps(results))
    row = compare([b], tmp_path / "c.png").splitlines()[2]
    assert re.split(r"  +", row)[3] == "34.500 (stride 8, rows)"
    results = {"perplexity": 34.5, "window": 512, "mem_len": 4, "clamp_len": -1}
    (b / "test_results.json").write_text(json.dumps(results))
    for window, mem_len, clamp_len, notes in (
        (512, 4, -1, ""),
        (256, 4, -1, " (window 512)"),
        (256, 8, 9, " (window 512, mem_len 4, clamp_len -1)"),
    ):
        trained = {"train.tgt_len": window, "model.mem_len": mem_len, "model.clamp_len": clamp_len}
        row = compare([b], tmp_path / "c.png", trained={b: trained}).splitlines()[2]
        assert re.split(r"  +", row)[3] == f"34.500{notes}"
    with pytest.raises(UserError, match=r"the figure .*train_log\.csv/c\.png cannot be written"):
        compare([a], a / "train_log.csv" / "c.png")
    with pytest.raises(UserError, match=r"nothing has no train_log\.csv"):
        compare([a, tmp_path / "nothing"], tmp_path / "c.png")
    for malformed in ("{", "[]", '{"perplexity": "34"}'):
        (b / "valid_results.json").write_text(malformed)
        with pytest.raises(UserError, match=r"valid_results\.json"):
            compare([a, b], tmp_path / "c.png")


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
