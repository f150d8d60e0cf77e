"""A reporter of a made-up run, and what its files then hold."""

import io
import struct

from tensorboardX.proto.event_pb2 import Event

from fwm.reporting import COLUMNS, Reporter

CONFIG = {"seed": 1, "model": {"d_model": 8, "no_pos": True, "cutoffs": (2, 4)}, "note": None}


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
