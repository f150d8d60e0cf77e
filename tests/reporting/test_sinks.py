"""Weights & Biases, and what is left of an event file that cannot be written."""

import gc
import io
import json
import math
import resource
import shutil
import struct
import sys
import types

import pytest
from reports import CONFIG, make, rows, run

import main
from fwm.errors import UserError
from fwm.reporting import EventWriter

pytestmark = pytest.mark.quick  # see .ci/run


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
        del saved["written_by"]  # no setting
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


def test_wandb_that_fails_costs_one_warning(tmp_path, monkeypatch):
    calls = fake_wandb(monkeypatch)
    stream = io.StringIO()
    with make(tmp_path, stream, use_wandb=True) as reporter:
        sink = sys.modules["wandb"]
        run(reporter, [1])
        monkeypatch.setattr(type(reporter._sinks[-1]._run), "log", lambda *a, **k: sink.nothing)
        run(reporter, [2, 3])
    assert [call[0] for call in calls] == ["init", "log", "finish"]
    assert stream.getvalue().count("Warning: Weights & Biases could not be written (") == 1
    assert len(rows(tmp_path)) == 3


def test_an_event_writer_that_fails_leaves_nothing_to_be_written_later(tmp_path, monkeypatch):
    """Python 3.13 tells of what it cannot write when it drops a file."""
    told = []
    monkeypatch.setattr(sys, "unraisablehook", told.append)
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    writer = EventWriter(tmp_path)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200, hard))
        with pytest.raises(OSError, match="File too large"):
            writer.write_texts(1, {"long": "word " * 1000})
        del writer
        gc.collect()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert told == []
