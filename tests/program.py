"""main.py within this process, as a shell would call it, on a very small model and text."""

import contextlib
import hashlib
import io
import re
import sys

from absl import flags

import main

SIZES = {
    "model.d_model": 16, "model.n_head": 2, "model.d_head": 4, "model.d_inner": 32,
    "model.n_layer": 1, "train.batch_size": 4, "train.tgt_len": 8, "train.max_step": 4,
    "train.eval_interval": 2, "train.eval_batch_size": 2, "train.log_interval": 1,
    "train.warmup_step": 1, "data.name": "text",
}  # fmt: skip
DPFP = "configs/dpfp_delta.py"


def forget():
    """A process parses its flags once; here the overrides that an earlier call has defined go."""
    flags.FLAGS.unparse_flags()
    for name in list(flags.FLAGS):
        if name.startswith("config."):
            delattr(flags.FLAGS, name)


def parsed(*arguments):
    """The config that main.py makes of these arguments."""
    argv = sys.argv
    forget()
    try:
        return main.parse(["main.py", *map(str, arguments)])
    finally:
        sys.argv = argv


def call(*arguments):
    """main.py with these arguments: (status, standard output, standard error)."""
    out, err, argv = io.StringIO(), io.StringIO(), sys.argv
    forget()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main.main(["main.py", *map(str, arguments)])
        finally:
            sys.argv = argv
    return status, out.getvalue(), err.getvalue()


def write_text(folder, **splits):
    texts = {"train": "the cat sat on the mat\n" * 20, "valid": "the mat sat\n" * 6}
    folder.mkdir()
    for split, text in ({**texts, "test": "on the cat\n" * 5} | splits).items():
        if text is not None:
            data = text if isinstance(text, bytes) else text.encode()
            (folder / f"{split}.txt").write_bytes(data)
    return folder


def evaluate(mode, workdir, *arguments):
    return call(f"--mode={mode}", f"--workdir={workdir}", *arguments)


def contents(folder):
    """Every path under a folder, with a checksum of each file."""
    return {
        path: path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
    }


def refused(result, message):
    status, _, err = result
    assert status == 2
    assert re.fullmatch(r"error: [^\n]+\n", err), err
    assert "Traceback" not in err
    assert re.search(message, err), err
