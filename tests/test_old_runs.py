"""Runs of earlier versions go on, and are evaluated, with the numbers they had then.

Each folder of `old_runs/` holds a run stopped at step 4 (made by commit ea90545 with jax 0.10.2,
on the text beside them), the settings it was trained with (`train.json`), the log of the same run
left alone, and what `--mode=valid` and `--mode=eval` said of its steps 4 and 8. They are never
made again: a version that cannot read them has lost its users' runs.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from program import call
from real_runs import log

from fwm.files import read_json

FOLDER = Path(__file__).parent / "old_runs"
RUNS = sorted(path.parent.name for path in FOLDER.glob("*/train.json"))
SAVED, END = 4, 8


def test_the_old_runs_are_found():
    assert RUNS == [
        "dpfp_delta", "linear_sum_no_pos", "performer_delta_carried", "transformer_xl"
    ]  # fmt: skip


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.quick] * ("_carried" in n)) for n in RUNS]
)
def test_goes_on_and_is_evaluated_as_before(name, place, tmp_path):
    old = FOLDER / name
    run = tmp_path / "run"
    shutil.copytree(old / "checkpoints", run / "checkpoints")
    for file in ("config.json", "vocab.txt"):
        shutil.copy(old / file, run)
    places = [f"--config.data.dir={FOLDER / 'text'}", f"--config.data.cache_dir={place / 'cache'}"]
    expected = read_json(old / "expected_results.json")

    def evaluate(step, mode, split):
        checkpoint = f"--config.eval.checkpoint={step}"
        status, _, err = call(f"--mode={mode}", f"--workdir={run}", checkpoint, *places)
        assert status == 0, err
        result, then = read_json(run / f"{split}_results.json"), expected[split][str(step)]
        assert (result["protocol"], result["tokens"]) == (then["protocol"], then["tokens"])
        np.testing.assert_allclose(result["mean_nll"], then["mean_nll"], rtol=0, atol=2e-6)

    evaluate(SAVED, "valid", "valid")
    trained = json.loads((old / "train.json").read_text())
    settings = [f"--config.{key}={value}" for key, value in trained["settings"].items()]
    status, out, err = call(
        f"--config=configs/{trained['config']}.py", f"--workdir={run}", *settings, *places
    )
    assert status == 0, err
    assert f"Resuming {run} at step {SAVED}." in out
    ours = log(run)
    (tmp_path / "then").mkdir()
    shutil.copy(old / "expected_log.csv", tmp_path / "then" / "train_log.csv")
    theirs = [row for row in log(tmp_path / "then") if int(row["step"]) > SAVED]
    assert [(row["step"], row["split"]) for row in ours] == [
        (row["step"], row["split"]) for row in theirs
    ]
    losses = [[float(row["loss"]) for row in rows] for rows in (ours, theirs)]
    np.testing.assert_allclose(*losses, rtol=0, atol=1e-5)
    evaluate(END, "eval", "test")
