"""What a stranger adds in one file: trained, stopped, resumed, evaluated, refused in a sentence."""

import json
import os
import re
import shutil
import signal
from pathlib import Path

import pytest
from program import call
from real_runs import assert_same_bits, final_state, log

from fwm import workdir as workdirs
from fwm.reporting import Reporter
from fwm.tasks import TASKS

EXAMPLES = Path(__file__).parents[1] / "examples"


def stop_after_the_first_step(monkeypatch):
    plain = Reporter.train

    def report(self, step, *args, **kwargs):
        plain(self, step, *args, **kwargs)
        if step == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Reporter, "train", report)


@pytest.fixture(scope="module")
def parity(place):
    """A folder with a copy of the example, and what the example has trained there."""
    folder = place / "parity"
    folder.mkdir()
    shutil.copy(EXAMPLES / "own_task.py", folder / "mine.py")
    return folder


TASK = {"train__max_step": 4, "train__eval_interval": 2}


def test_a_task_of_ones_own_is_trained_stopped_and_resumed(train, parity, monkeypatch):
    monkeypatch.chdir(parity)
    run = lambda name: train(parity / name, config="mine.py", **TASK)
    status, out, err = run("whole")
    assert (status, err) == (0, "")
    assert "Data: parity, sequences of 8 drawn anew for every step, 512 for valid" in out
    assert "Training: 4 steps of 32 tokens.\n" in out
    assert re.search(r">>> validation at step 4: loss .* accuracy 0\.\d{4}  \(", out)
    with monkeypatch.context() as patch:
        stop_after_the_first_step(patch)
        assert run("stopped")[0] == 143
    assert final_state(parity / "stopped")["step"] == 2
    # The file that a run needs may lie elsewhere later.
    shutil.copy(parity / "mine.py", parity / "moved.py")
    status, out, err = train(parity / "stopped", config=parity / "moved.py", **TASK)
    assert (status, err) == (0, "")
    assert "at step 2." in out
    assert log(parity / "stopped") == log(parity / "whole")
    assert_same_bits(final_state(parity / "stopped"), final_state(parity / "whole"))
    for name, file in (("whole", "mine.py"), ("stopped", "moved.py")):
        config = json.loads((parity / name / "config.json").read_text())
        assert (config["task"], config["registered_in"]) == ("parity", str(parity / file))


def test_without_its_file_a_run_says_which_one_it_needs(parity, monkeypatch):
    monkeypatch.delitem(TASKS, "parity")
    arguments = ("--mode=generate", f"--workdir={parity / 'whole'}")
    status, _, err = call(*arguments)
    assert status == 2
    assert re.fullmatch(
        rf"error: .*whole was trained with {parity}/mine\.py, which registers task=parity: "
        rf"give --config={parity}/mine\.py too\.\n",
        err,
    )
    # The model alone needs no task.
    assert workdirs.open(parity / "whole").vocab.symbols == ("0", "1")
    # With it the settings stay the run's, and there is no note that says that it is not used.
    status, out, err = call(*arguments, f"--config={EXAMPLES / 'own_task.py'}")
    assert (status, out) == (2, "")
    assert re.fullmatch(r"error: --mode=generate has no meaning for the task parity: .*\n", err)


def test_a_trained_task_is_scored_by_what_it_measures(parity):
    pytest.importorskip("fwm.score")
    file = f"--config={EXAMPLES / 'own_task.py'}"
    status, _, err = call("--mode=valid,eval", f"--workdir={parity / 'whole'}", file)
    assert (status, err) == (0, "")
    for split in ("valid", "test"):
        results = json.loads((parity / "whole" / f"{split}_results.json").read_text())
        assert 0.3 < results["accuracy"] < 0.9
        assert results["protocol"] == "batches"
        assert 0.4 < results["tokens"] / (512 * 8) < 0.6


def test_what_counts_is_drawn_from_seed_split_and_index_alone(parity):
    config = workdirs.config_of_run(parity / "whole", {})
    whole, part = (TASKS["parity"](config, ("train", "valid")) for _ in range(2))
    batch = whole.batch(3, slice(None))
    assert batch.tokens.shape == (4, 8)
    own = part.batch(3, slice(2, 4))
    for ours, theirs in zip(own, batch, strict=True):
        assert (ours == theirs[2:4]).all()
    assert (whole.batch(4, slice(None)).tokens != batch.tokens).any()
    assert (batch.targets == batch.tokens.cumsum(1) % 2).all()
    found = list(whole.batches("valid", slice(None)))
    assert len(found) == 256
    assert (found[0].tokens != next(whole.batches("test", slice(None))).tokens).any()
    # What fills the last batch up does not count.
    whole.n_eval = 3
    assert [b.mask.any(1).tolist() for b in whole.batches("valid", slice(None))][1][1] is False
