"""What a stranger adds in one file: trained, resumed, evaluated, refused in a sentence."""

import json
import re
import shutil
from pathlib import Path

import pytest
from program import SIZES, call
from real_runs import assert_same_bits, final_state, log

from fwm import workdir as workdirs
from fwm.layers import MIXERS
from fwm.ops import FEATURE_MAPS, UPDATE_RULES
from fwm.tasks import TASKS

EXAMPLES = Path(__file__).parents[1] / "examples"


TASK = {"train__max_step": 4, "train__eval_interval": 2}
PARITY = TASK | {"train__eval_batch_size": 64}  # eight batches to a validation
OWN = {"own_rule": "update_rule", "own_mixer": "mixer", "own_feature_map": "feature_map"}
KEYS = {
    # Its layer carries what it convolves beside the memory.
    "own_rule": {"model__short_conv": 3, "model__output_gate": True},
    # Beside another one.
    "own_mixer": {
        "model__width": 3, "model__mixer": "('convolution', 'softmax')", "model__n_layer": 2,
        "model__attention_window": 4,
    },
    "own_feature_map": {},
}  # fmt: skip


def killed_and_resumed(train, folder, first, second, **changes):
    """Trained at once by the file `first`, and from its middle on by `second`: the same."""
    changes = TASK | changes
    status, out, err = train(folder / "whole", config=first, **changes)
    assert (status, err) == (0, "")
    # What a run leaves that is killed while its last checkpoint is written.
    shutil.copytree(folder / "whole", folder / "killed")
    shutil.rmtree(folder / "killed" / "checkpoints" / "4")
    assert final_state(folder / "killed")["step"] == 2
    status, resumed, err = train(folder / "killed", config=second, **changes)
    assert (status, err) == (0, "")
    assert "at step 2." in resumed
    assert log(folder / "killed") == log(folder / "whole")
    assert_same_bits(final_state(folder / "killed"), final_state(folder / "whole"))
    for name, file in (("whole", first), ("killed", second)):
        config = json.loads((folder / name / "config.json").read_text())
        assert config["registered_in"] == str(Path(file).absolute())
    return out


@pytest.mark.parametrize("name", OWN)
def test_what_is_ones_own_is_trained_resumed_evaluated_and_writes(
    name, train, place, tmp_path, monkeypatch
):
    file = EXAMPLES / f"{name}.py"
    monkeypatch.chdir(file.parent)
    carry = {} if name == "own_feature_map" else {"train__carry_over_fast_weight": True}
    killed_and_resumed(train, tmp_path, file, file.name, model__no_pos=True, **KEYS[name], **carry)
    whole, given = f"--workdir={tmp_path / 'whole'}", f"--config={file}"
    places = [
        f"--config.data.{k}={place / v}" for k, v in (("dir", "text"), ("cache_dir", "cache"))
    ]
    status, out, err = call("--mode=valid", whole, given, *places)
    assert (status, err) == (0, "")
    results = json.loads((tmp_path / "whole" / "valid_results.json").read_text())
    assert results["protocol"] == ("carry_over" if carry else "sliding_window")
    status, out, err = call("--mode=generate", whole, given, "--prompt=the cat", *places)
    assert status == 0
    assert out.startswith("the cat")
    assert re.search("note: 100 new tokens", err)

    # Without its file: one sentence that says which one it is.
    table = {"own_rule": UPDATE_RULES, "own_mixer": MIXERS, "own_feature_map": FEATURE_MAPS}[name]
    model = json.loads((tmp_path / "whole" / "config.json").read_text())["model"]
    assert model["mixer"] == (["convolution", "softmax"] if name == "own_mixer" else "fast_weight")
    monkeypatch.delitem(table, "convolution" if name == "own_mixer" else model[OWN[name]])
    status, out, err = call("--mode=valid", whole, *places)
    assert status == 2
    assert err.count("\n") == 1
    assert f"give --config={file}" in err


@pytest.fixture(scope="module")
def parity(place):
    """A folder with a copy of the task's file, and what it has trained there."""
    folder = place / "parity"
    folder.mkdir()
    shutil.copy(EXAMPLES / "own_task.py", folder / "mine.py")
    settings = SIZES | {name.replace("__", "."): value for name, value in PARITY.items()}
    settings |= {"data.cache_dir": place / "cache", "data.dir": place / "text"}
    fields = [f"--config.{name}={value}" for name, value in settings.items()]
    status, _, err = call(f"--config={folder / 'mine.py'}", f"--workdir={folder / 'run'}", *fields)
    assert (status, err) == (0, "")
    return folder


def test_a_task_of_ones_own_is_trained_and_resumed(train, parity, tmp_path, monkeypatch):
    monkeypatch.chdir(parity)
    # The file that a run needs may lie elsewhere later.
    moved = shutil.copy(parity / "mine.py", parity / "moved.py")
    out = killed_and_resumed(train, tmp_path, "mine.py", moved, **PARITY)
    assert "Data: parity, sequences of 8 drawn anew for every step, 512 for valid" in out
    assert "Training: 4 steps of 32 tokens.\n" in out
    assert re.search(r">>> validation at step 4: loss .* accuracy 0\.\d{4}  \(", out)


def test_without_its_file_a_run_says_which_one_it_needs(parity, monkeypatch):
    monkeypatch.delitem(TASKS, "parity")
    arguments = ("--mode=generate", f"--workdir={parity / 'run'}")
    status, _, err = call(*arguments)
    assert status == 2
    assert re.fullmatch(
        rf"error: .*run was trained with {parity}/mine\.py, which registers task=parity: "
        rf"give --config={parity}/mine\.py too\.\n",
        err,
    )
    # The model alone needs no task.
    assert workdirs.open(parity / "run").vocab.symbols == ("0", "1")
    # With it the settings stay the run's, and there is no note that says that it is not used.
    status, out, err = call(*arguments, f"--config={EXAMPLES / 'own_task.py'}")
    assert (status, out) == (2, "")
    assert re.fullmatch(r"error: --mode=generate has no meaning for the task parity: .*\n", err)


def test_a_trained_task_is_scored_by_what_it_measures(parity):
    file = f"--config={EXAMPLES / 'own_task.py'}"
    status, _, err = call("--mode=valid,eval", f"--workdir={parity / 'run'}", file)
    assert (status, err) == (0, "")
    for split in ("valid", "test"):
        results = json.loads((parity / "run" / f"{split}_results.json").read_text())
        assert 0.3 < results["accuracy"] < 0.9
        assert results["protocol"] == "batches"
        assert 0.4 < results["tokens"] / (512 * 8) < 0.6


def test_what_counts_is_drawn_from_seed_split_and_index_alone(parity):
    config = workdirs.config_of_run(parity / "run", {})
    whole, part = (TASKS["parity"](config, ("train", "valid")) for _ in range(2))
    batch = whole.batch(3, slice(None))
    assert batch.tokens.shape == (4, 8)
    own = part.batch(3, slice(2, 4))
    assert (own.segment_ids, batch.segment_ids) == (None, None)
    for ours, theirs in zip(own[:-1], batch[:-1], strict=True):
        assert (ours == theirs[2:4]).all()
    assert (whole.batch(4, slice(None)).tokens != batch.tokens).any()
    assert (batch.targets == batch.tokens.cumsum(1) % 2).all()
    found = list(whole.batches("valid", slice(None)))
    assert len(found) == 8
    assert (found[0].tokens != next(whole.batches("test", slice(None))).tokens).any()
    # What fills the last batch up does not count.
    whole.n_eval = 3
    (last,) = whole.batches("valid", slice(None))
    assert last.mask[:3].any()
    assert not last.mask[3:].any()
