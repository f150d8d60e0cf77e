"""The training loop through `fwm.train.run`: devices, resuming, accumulation, divergence."""

import csv
import functools
import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from configs import default
from fwm import train
from fwm.checkpoint import Checkpoints
from fwm.errors import UserError
from fwm.evaluate import carry_over
from fwm.model import LanguageModel, build_config
from fwm.reporting import Reporter

ROOT = Path(__file__).parents[1]
FAST_WEIGHT = {
    "model.feature_map": "favor",
    "model.attn_normalization": "output_and_key",
    "model.no_pos": True,
    "train.carry_over_fast_weight": True,
}
BASE = {
    "model.d_model": 16, "model.n_head": 2, "model.d_head": 4, "model.d_inner": 32,
    "model.n_layer": 2, "model.dropout": 0.2, "model.performer_proj_dim": 4,
    "train.batch_size": 8, "train.tgt_len": 8, "train.max_step": 18, "train.warmup_step": 2,
    "train.lr": 0.01, "train.eval_interval": 9, "train.eval_batch_size": 4,
    "train.log_interval": 1, "data.name": "text",
}  # fmt: skip
VARIANTS: dict[str, dict] = {
    # Everything that a fast weight run keeps from step to step: memory, projections, masks.
    "fast_weight": FAST_WEIGHT,
    "transformer_xl": {"model.mixer": "transformer_xl", "model.mem_len": 8, "model.dropatt": 0.1},
}
# The same run on one device, in a process of its own, while the tests on two devices run here.
ON_ONE_DEVICE: dict[str, dict] = {"whole": {}, "accumulated": {"train.batch_chunk": 4}}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A text whose training part has four segments to an epoch; compiled programs are shared."""
    folder = tmp_path_factory.mktemp("train")
    sentences = [" ".join(f"w{(i * j) % 23}" for j in range(1, 9)) for i in range(1, 12)]
    for split, lines in (("train", 30), ("valid", 9)):
        text = "\n".join(sentences[i * i % 11] for i in range(lines))
        (folder / f"{split}.txt").write_text(text + "\n")
    compilation_cache.reset_cache()
    jax.config.update("jax_compilation_cache_dir", str(folder / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    yield folder
    jax.config.update("jax_compilation_cache_dir", None)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
    compilation_cache.reset_cache()


def settings(folder, variant, **changes):
    config = default.defaults()
    fields = {"data.dir": str(folder), "data.cache_dir": str(folder / "cache")}
    config.update_from_flattened_dict(BASE | fields | VARIANTS[variant] | changes)
    return config


ONE_DEVICE = """
import json, sys
from pathlib import Path
import jax
from configs import default
from fwm import train

assert len(jax.devices()) == 1
for workdir, fields in json.load(sys.stdin).items():
    config = default.defaults()
    config.update_from_flattened_dict(fields)
    train.run(config, Path(workdir))
"""


@pytest.fixture(scope="module")
def one_device(place):
    """Waits for the runs on one device; they are started with the module's first test."""
    runs = {
        str(place / name): train.flatten(settings(place, "fast_weight", **changes).to_dict())
        for name, changes in ON_ONE_DEVICE.items()
    }
    process = subprocess.Popen(
        [sys.executable, "-c", ONE_DEVICE],
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": "--xla_backend_optimization_level=0"},
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
    )
    with process:
        process.stdin.write(json.dumps(runs).encode())
        process.stdin.close()

        def workdir(name):
            assert process.wait() == 0
            return place / name

        yield workdir
        process.kill()


@pytest.fixture(scope="module")
def whole(place, one_device):
    """An uninterrupted run of a variant, made once."""

    @functools.cache
    def run(variant):
        assert train.run(settings(place, variant), place / variant) == 0
        return place / variant

    return run


def log(workdir):
    """What train_log.csv says of every step, without the times."""
    with (workdir / "train_log.csv").open() as file:
        rows = list(csv.DictReader(file))
    return [{k: v for k, v in r.items() if k not in ("tokens_per_second", "seconds")} for r in rows]


def losses(workdir):
    return np.array([float(row["loss"]) for row in log(workdir)])


def final_state(workdir):
    names = ("step", "rng", "params", "opt_state", "favor", "memory")
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        return checkpoints.restore_subtree(names, "latest")[1]


def stop_after(monkeypatch, step):
    """SIGTERM as soon as the metrics of a step are reported."""
    plain = Reporter.train

    def report(self, at, *args, **kwargs):
        plain(self, at, *args, **kwargs)
        if at == step:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Reporter, "train", report)


@pytest.mark.parametrize(
    ("variant", "signal_at", "saved"), [("fast_weight", 1, 2), ("transformer_xl", 9, 9)]
)
def test_resumed_run_equals_uninterrupted_run(
    place, whole, monkeypatch, tmp_path, capsys, variant, signal_at, saved
):
    # Saved in the middle of an epoch with a memory (2), or at a validation (9).
    with monkeypatch.context() as patch:
        stop_after(patch, signal_at)
        assert train.run(settings(place, variant), tmp_path) == 128 + signal.SIGTERM
    assert f"Stopped. Saved at step {saved}" in capsys.readouterr().out
    assert final_state(tmp_path)["step"] == saved
    assert train.run(settings(place, variant), tmp_path) == 0
    assert f"Resuming {tmp_path} at step {saved}" in capsys.readouterr().out

    assert log(tmp_path) == log(whole(variant))
    ours, expected = final_state(tmp_path), final_state(whole(variant))
    assert expected["step"] == 18
    assert (expected["favor"] == {}) == (variant == "transformer_xl")
    assert all(np.any(leaf) for leaf in jax.tree.leaves(expected["memory"]))
    assert jax.tree.structure(ours) == jax.tree.structure(expected)
    for (path, a), b in zip(
        jax.tree.leaves_with_path(ours), jax.tree.leaves(expected), strict=True
    ):
        assert a.tobytes() == b.tobytes(), jax.tree_util.keystr(path)


def test_loss_falls(whole):
    first, *_, last, valid = losses(whole("fast_weight"))
    assert max(last, valid) < first - 0.2


def test_quick_validation_is_the_mean_over_rows_with_memory(place, whole):
    """Against the evaluator of one chain of segments, on each of the rows."""
    config = settings(place, "fast_weight")
    corpus = train.data.load(
        "text", dir=str(place), cache_dir=config.data.cache_dir, splits=("valid",)
    )
    model = LanguageModel(build_config(config.model.to_dict(), len(corpus.vocab)))
    state, stream = final_state(whole("fast_weight")), corpus.streams["valid"]
    variables = {"params": state["params"], **state["favor"]}
    rows = config.train.eval_batch_size
    borders = (len(stream) - 1) * np.arange(rows + 1) // rows
    scores = [
        carry_over(model, variables, stream[a : b + 1], segment=8)
        for a, b in itertools.pairwise(borders)
    ]
    mean = sum(s.total_nll for s in scores) / sum(s.count for s in scores)
    row = log(whole("fast_weight"))[-1]
    assert row["split"] == "valid"
    assert float(row["loss"]) == pytest.approx(mean, rel=1e-6)


def test_divergence_stops_with_a_sentence(place, whole, monkeypatch, tmp_path):
    plain = train.init_state

    def broken(*args):
        state = plain(*args)
        return state._replace(params=jax.tree.map(lambda x: x * 1e30, state.params))

    monkeypatch.setattr(train, "init_state", broken)
    with pytest.raises(UserError, match=r"diverged at step 1: loss nan.*smaller config\.train\.lr"):
        train.run(settings(place, "fast_weight"), tmp_path)
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize("name", ON_ONE_DEVICE)
def test_one_device_and_parts_of_a_batch_give_the_same_losses(whole, one_device, name):
    """Rows of the batch are spread over 2 devices, or 1, or taken one after another."""
    ours, expected = log(one_device(name)), log(whole("fast_weight"))
    for column, tolerance in (("loss", 1e-5), ("grad_norm", 1e-4), ("learning_rate", 0)):
        a, b = ([float(row[column] or 0) for row in rows] for rows in (ours, expected))
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance, err_msg=column)
