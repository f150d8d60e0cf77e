"""A checkpoint made with the oldest jax that fwm supports goes on with the installed one.

`checkpoints/jax_0_10/` holds a text, a run with everything that a run keeps from step to step
(carried memory, FAVOR+ projections, dropout) stopped at step 4, and the log of the same run left
alone. Where a setting is new, or the state has another shape, the run is refused as any older run
is; then make it again, with jax 0.10 installed:

    PYTHONPATH=. python tests/test_versions.py
"""

import shutil
from pathlib import Path

import jax
import numpy as np
from real_runs import ROOT, log, start, write_text

from fwm.checkpoint import read_json, write_json

FOLDER = Path(__file__).parent / "checkpoints" / "jax_0_10"
STEPS, SAVED = 8, 4
SETTINGS = {"train__max_step": STEPS, "train__eval_interval": SAVED}


def test_a_checkpoint_of_jax_0_10_goes_on_with_the_same_losses(tmp_path):
    workdir = shutil.copytree(FOLDER / "run", tmp_path / "run")
    cache = tmp_path / "cache"
    process = start(FOLDER / "text", workdir, data__cache_dir=cache, **SETTINGS)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    assert f"Resuming {workdir} at step {SAVED}." in output
    ours = log(workdir)
    expected = [row for row in log(FOLDER) if int(row["step"]) > SAVED]
    assert [(row["step"], row["split"]) for row in ours] == [
        *((str(step), "train") for step in range(SAVED + 1, STEPS + 1)),
        (str(STEPS), "valid"),
    ]
    losses, theirs = ([float(row["loss"]) for row in rows] for rows in (ours, expected))
    np.testing.assert_allclose(losses, theirs, rtol=0, atol=1e-5)


def make():
    """Replace the folder by what the installed jax, 0.10, makes of the present code."""
    assert jax.__version__.startswith("0.10."), jax.__version__
    shutil.rmtree(FOLDER, ignore_errors=True)
    run = FOLDER / "run"
    # Orbax writes the path into the checkpoint: this one tells nothing of the machine.
    made = Path("/proc/self/cwd") / FOLDER.relative_to(ROOT) / "made"
    FOLDER.mkdir(parents=True)
    text = write_text(FOLDER / "text")
    process = start(text, made, **SETTINGS)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    shutil.copytree(made / "checkpoints" / f"{SAVED}", run / "checkpoints" / f"{SAVED}")
    shutil.copy(made / "vocab.txt", run)
    shutil.copy(made / "train_log.csv", FOLDER)
    config = read_json(made / "config.json")
    write_json(
        run / "config.json", config | {"data": config["data"] | {"dir": "", "cache_dir": ""}}
    )
    shutil.rmtree(made)
    shutil.rmtree(text / "cache")


if __name__ == "__main__":
    make()
