"""Models of the official toolkit from the command line: there and back, and what is refused."""

import json
import pickle
import sys

import jax
import numpy as np
import pytest
from program import SIZES, call, evaluate, refused

from configs import dpfp_delta
from fwm import train as training
from fwm import workdir
from fwm.files import read_json
from fwm.step import to_host

with_torch = pytest.mark.skipif(
    "not __import__('importlib').util.find_spec('torch')",
    reason="torch is not installed: it is several gigabytes, and nothing else needs it",
)


@pytest.fixture(scope="module")
def run(place):
    """A run whose weights are as they were drawn."""
    config, folder = dpfp_delta.get_config(), place / "drawn"
    fields = {"data.dir": str(place / "text"), "data.cache_dir": str(place / "cache")}
    config.update_from_flattened_dict(SIZES | fields)
    with training.prepare(config, folder) as this:
        this.checkpoints.save(0, to_host(this.state), valid_loss=None)
    return folder


@pytest.fixture
def exported(run, tmp_path):
    """The folder of its three files."""
    status, out, err = evaluate("export", run, f"--official={tmp_path / 'lm' / 'model.npz'}")
    assert (status, err) == (0, "")
    assert out.startswith(f"{run}, step 0, as the official toolkit has it: {tmp_path}")
    return tmp_path / "lm"


def import_(file, folder, *arguments):
    return call("--mode=import", f"--official={file}", f"--workdir={folder}", *arguments)


def same_parameters(ours, theirs):
    a, b = (jax.device_get(workdir.open(x).variables["params"]) for x in (ours, theirs))
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_there_and_back(run, place, exported, tmp_path):
    arguments = read_json(exported / "arguments.json")
    assert (arguments["attn_type"], arguments["n_roll"], arguments["tgt_len"]) == (26, 2, 8)
    data = [f"--config.data.dir={place / 'text'}", "--config.data.name=text"]
    data += [f"--config.data.cache_dir={place / 'cache'}"]
    status, out, err = import_(exported / "model.npz", tmp_path / "a copy", *data)
    assert (status, err) == (0, "")
    assert f" parameters, 6 words, now a run in {tmp_path / 'a copy'}.\n" in out
    assert out.endswith(f"--mode=valid --workdir='{tmp_path / 'a copy'}'\n")
    same_parameters(run, tmp_path / "a copy")
    origin = read_json(tmp_path / "a copy" / "config.json")["begun_from"]
    assert origin == {"official": str(exported / "model.npz")}
    # It is evaluated as the run that it came from is.
    for folder in (run, tmp_path / "a copy"):
        assert evaluate("valid", folder)[0] == 0
    ours, theirs = (read_json(f / "valid_results.json") for f in (tmp_path / "a copy", run))
    assert ours["mean_nll"] == theirs["mean_nll"]
    assert (ours["window"], ours["tokens"]) == (8, 23)
    # And goes back as it came.
    again = tmp_path / "again" / "model.npz"
    assert evaluate("export", tmp_path / "a copy", f"--official={again}")[0] == 0
    for name in ("arguments.json", "vocab.txt"):
        assert (again.parent / name).read_bytes() == (exported / name).read_bytes()
    with np.load(again) as a, np.load(exported / "model.npz") as b:
        assert a.keys() == b.keys()
        assert all(np.array_equal(a[name], b[name]) for name in a)


def test_what_is_refused(run, exported, tmp_path, monkeypatch):
    file, new = exported / "model.npz", tmp_path / "new"
    arguments, words = (exported / name for name in ("arguments.json", "vocab.txt"))
    good = read_json(arguments)
    refused(import_(file, run), "holds a run already: give --mode=import another --workdir")
    refused(
        import_(exported / "no.pt", new), r"no\.pt is no file: expected a state_dict, model\.pt"
    )
    refused(
        import_(file, new, "--config.train.lr=1"), r"config\.train\.lr has no meaning for --mode"
    )
    refused(
        call("--mode=import", f"--workdir={new}"), "--official=model.pt belongs to --mode=import"
    )
    refused(
        evaluate("valid", run, "--official=a.pt"), "and the mode is valid: give both or neither"
    )
    refused(
        call("--mode=export", f"--official={file}"), "--mode=export needs the --workdir of a tr"
    )
    refused(evaluate("export", run, f"--official={file}"), "is there already: give --official in a")
    refused(evaluate("export", run, f"--official={new / 'a.bin'}"), r"ends with \.pt or \.npz")
    for change, message in (
        ({"tgt_len": None}, "among them tgt_len, the context"),
        ({"n_token": 7}, r"vocab\.txt has 6 words and the model 7: give the vocabulary"),
        ({"n_layer": 2}, r"the state_dict lacks layers\.1"),
        ({"attn_typ": 3}, "unknown arguments of the official model: attn_typ"),
    ):
        arguments.write_text(json.dumps(good | change))
        refused(import_(file, new), message)
    arguments.write_text(json.dumps(good))
    # Without torch.
    monkeypatch.setitem(sys.modules, "torch", None)
    (exported / "model.pt").write_bytes(b"")
    message = (
        r"needs torch, which is not installed: pip install torch, or use a file of numpy\.savez"
    )
    refused(import_(exported / "model.pt", new), message)
    refused(evaluate("export", run, f"--official={tmp_path / 'c' / 'model.pt'}"), message)
    # Nothing that a file contains is executed.
    mark = tmp_path / "mark"
    file.write_bytes(pickle.dumps(Bomb(mark)))
    refused(import_(file, new), "is no file of arrays that numpy can read")
    words.write_text("the\nthe\n")
    refused(import_(file, new), r"vocabulary file .*vocab\.txt is damaged")
    assert not new.exists()
    assert not mark.exists()


class Bomb:
    """Unpickling it leaves a file behind."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return open, (str(self.mark), "w")


@with_torch
def test_files_of_torch(run, tmp_path):
    import torch

    file = tmp_path / "lm" / "model.pt"
    assert evaluate("export", run, f"--official={file}")[0] == 0
    tensors = torch.load(file, weights_only=True)
    assert {x.dtype for x in tensors.values()} == {torch.float32}
    # Of half precision on another device, as the toolkit's --fp16 leaves it, and a plain one.
    assert import_(file, tmp_path / "b")[0] == 0
    same_parameters(run, tmp_path / "b")
    torch.save({name: x.to(torch.bfloat16) for name, x in tensors.items()}, file)
    assert import_(file, tmp_path / "half")[0] == 0
    # What the toolkit saves is a whole module.
    mark = tmp_path / "mark"
    for whole in (torch.nn.Linear(2, 3), Bomb(mark), [1, 2], {"step": 3}):
        torch.save(whole, file)
        result = import_(file, tmp_path / "c")
        refused(
            result,
            r"is no state_dict that torch can read without executing .* write one with torch\.save",
        )
    assert not mark.exists()
    assert not (tmp_path / "c").exists()
