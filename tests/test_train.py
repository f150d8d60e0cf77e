"""The training loop through `fwm.train.run`: devices, resuming, accumulation, divergence."""

import functools
import itertools
import os
import resource
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from real_runs import assert_same_bits, final_state, log

from configs import default
from fwm import data, train
from fwm.checkpoint import Checkpoints
from fwm.errors import UserError
from fwm.evaluate import carry_over
from fwm.model import LanguageModel, build_config
from fwm.reporting import Reporter
from fwm.step import Batch, init_state

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


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A text whose training part has four segments to an epoch."""
    folder = tmp_path_factory.mktemp("train")
    sentences = [" ".join(f"w{(i * j) % 23}" for j in range(1, 9)) for i in range(1, 12)]
    for split, lines in (("train", 30), ("valid", 9)):
        text = "\n".join(sentences[i * i % 11] for i in range(lines))
        (folder / f"{split}.txt").write_text(text + "\n")
    return folder


def settings(folder, variant, **changes):
    config = default.defaults()
    fields = {"data.dir": str(folder), "data.cache_dir": str(folder / "cache")}
    config.update_from_flattened_dict(BASE | fields | VARIANTS[variant] | changes)
    return config


@pytest.fixture(scope="module")
def saves():
    """By variant, what `whole` has saved: each step, and whether it was validated."""
    return {}


@pytest.fixture(scope="module")
def whole(place, saves):
    """An uninterrupted run of a variant, made once."""

    @functools.cache
    def run(variant):
        plain, saves[variant] = Checkpoints.save, []

        def save(self, step, state, *, valid_loss):
            saves[variant].append((step, valid_loss is not None))
            plain(self, step, state, valid_loss=valid_loss)

        config = settings(place, variant, **{"train.save_minutes": 4.0})
        minutes = itertools.count(0, 60)  # seconds; a step takes a minute
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Checkpoints, "save", save)
            assert train.run(config, place / variant, clock=lambda: next(minutes)) == 0
        return place / variant

    return run


def test_checkpoints_by_time(whole, saves):
    """Beside those of the validations, from which their time is counted too; the best is of these.

    That they change nothing else show the other tests: those runs have none.
    """
    checkpoints = Checkpoints(whole("fast_weight") / "checkpoints")
    by_time, validated = False, True
    assert saves["fast_weight"] == [
        (4, by_time), (8, by_time), (9, validated), (13, by_time), (17, by_time), (18, validated),
    ]  # fmt: skip
    assert checkpoints.best_step() in (9, 18)
    assert set(checkpoints.steps()) == {17, 18, checkpoints.best_step()}


def losses(workdir):
    return np.array([float(row["loss"]) for row in log(workdir)])


def test_a_closed_terminal_stops_a_run_unless_nohup_ignores_it():
    with train.stop_signals() as seen:
        os.kill(os.getpid(), signal.SIGHUP)
        assert seen == [signal.SIGHUP]
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with train.stop_signals() as seen:
            os.kill(os.getpid(), signal.SIGHUP)
            assert seen == []
    finally:
        signal.signal(signal.SIGHUP, before)


def stop_after(monkeypatch, step, number=signal.SIGTERM):
    """A signal as soon as the metrics of a step are reported."""
    plain = Reporter.train

    def report(self, at, *args, **kwargs):
        plain(self, at, *args, **kwargs)
        if at == step:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(Reporter, "train", report)


@pytest.mark.parametrize(
    ("variant", "number", "status", "signal_at", "saved"),
    [
        ("fast_weight", signal.SIGTERM, 143, 1, 2),
        ("transformer_xl", signal.SIGINT, 0, 9, 9),
    ],
)
def test_resumed_run_equals_uninterrupted_run(
    place, whole, monkeypatch, tmp_path, capsys, variant, number, status, signal_at, saved
):
    # Saved in the middle of an epoch with a memory (2), or at a validation (9).
    with monkeypatch.context() as patch:
        stop_after(patch, signal_at, number)
        assert train.run(settings(place, variant), tmp_path) == status
    assert f"Stopped. Saved at step {saved}" in capsys.readouterr().out
    assert final_state(tmp_path)["step"] == saved
    assert train.run(settings(place, variant), tmp_path) == 0
    assert f"Resuming {tmp_path} at step {saved}" in capsys.readouterr().out

    assert log(tmp_path) == log(whole(variant))
    ours, expected = final_state(tmp_path), final_state(whole(variant))
    assert expected["step"] == 18
    assert (expected["favor"] == {}) == (variant == "transformer_xl")
    assert all(np.any(leaf) for leaf in jax.tree.leaves(expected["memory"]))
    assert_same_bits(ours, expected)


def test_loss_falls(whole):
    first, *_, last, valid = losses(whole("fast_weight"))
    assert max(last, valid) < first - 0.2


def test_quick_validation_is_the_mean_over_rows_with_memory(place, whole):
    """Against the evaluator of one chain of segments, on each of the rows."""
    config = settings(place, "fast_weight")
    corpus = data.load("text", dir=str(place), cache_dir=config.data.cache_dir, splits=("valid",))
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
    assert Checkpoints(tmp_path / "checkpoints").steps() == []


def poison(monkeypatch, bad):
    """Make loss and gradients of some steps NaN, `bad` a condition on the updates before."""
    plain = train.train_step

    def step(model, optimizer, schedule, state, batch, *, average=lambda tree: tree, **options):
        def poisoned(tree):
            return jax.tree.map(lambda x: jnp.where(bad(state.step), jnp.nan, x), average(tree))

        return plain(model, optimizer, schedule, state, batch, average=poisoned, **options)

    monkeypatch.setattr(train, "train_step", step)


def test_a_dropped_update_changes_nothing_but_the_count(monkeypatch):
    poison(monkeypatch, lambda step: (step == 1) | (step == 2))
    config = default.defaults()
    config.update_from_flattened_dict(BASE | FAST_WEIGHT | {"model.n_layer": 1})
    model = LanguageModel(build_config(config.model.to_dict(), 20))
    schedule = train.learning_rate("cosine", 0.01, 0, 10)
    optimizer = train.adam(schedule, 0.25)
    step = jax.jit(functools.partial(train.train_step, model, optimizer, schedule, skip=True))
    states = [jax.jit(functools.partial(init_state, model, optimizer, 1, 2))()]
    tokens = np.arange(16, dtype=np.int32).reshape(2, 8)
    batch = Batch(tokens, tokens, np.zeros(2, bool), np.arange(2))
    rates = []
    for _ in range(4):
        state, metrics = step(states[-1], batch)
        states.append(jax.device_get(state))
        rates.append(float(metrics["learning_rate"]))
    assert [state.skipped.tolist() for state in states] == [[0, 0], [0, 0], [1, 1], [2, 2], [2, 0]]
    assert [int(state.step) for state in states] == [0, 1, 2, 3, 4]
    kept = lambda state: (state.params, state.opt_state, state.memory)
    for dropped in states[2:4]:
        assert_same_bits(kept(dropped), kept(states[1]))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(states[4]))
    # Rates count the updates made, as Adam does.
    np.testing.assert_allclose(rates, [schedule(jnp.float32(t)) for t in (1, 2, 2, 2)], rtol=1e-6)


def test_numbers_that_are_not_finite(place, monkeypatch, tmp_path, capsys):
    """They stop a run; a resumed one may drop such updates instead, but not ten in a row."""
    poison(monkeypatch, lambda step: step >= 10)
    run = lambda **changes: train.run(settings(place, "fast_weight", **changes), tmp_path)
    numbers = r"loss nan, gradient norm nan, learning rate 0\.00\d+; the checkpoints"
    with pytest.raises(UserError, match=rf"diverged at step 11: {numbers}"):
        run(**{"train.max_step": 30})
    good = final_state(tmp_path)
    assert good["step"] == 9
    with monkeypatch.context() as patch:
        stop_after(patch, 14)
        assert run(**{"train.max_step": 30, "train.nan_policy": "skip"}) == 143
    assert "the update of step 12 was dropped" in capsys.readouterr().out
    now = final_state(tmp_path)
    assert now["step"] == 15
    assert now["skipped"].tolist() == [5, 5]
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(now))
    last = rf"diverged at step 20: the last of 10 dropped updates in a row: {numbers}"
    with pytest.raises(UserError, match=last):
        run(**{"train.max_step": 30, "train.nan_policy": "skip"})
    assert final_state(tmp_path)["step"] == 18
    assert [int(row["step"]) for row in log(tmp_path) if row["split"] == "train"] == [*range(1, 20)]


# Orbax leaves what was waiting for a write that failed.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_checkpoints_that_cannot_be_written(place, whole, monkeypatch, tmp_path, capsys):
    """Two in a row cost warnings, the third stops the run; what was saved is kept."""
    whole("fast_weight")  # Nothing is compiled while files must be small.
    plain, (_, hard) = Checkpoints.save, resource.getrlimit(resource.RLIMIT_FSIZE)
    failing = (4, 6, 10, 12, 14)

    def save(self, step, state, *, valid_loss):
        limit = 2000 if step in failing else hard
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            plain(self, step, state, valid_loss=valid_loss)
            self.wait()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))

    monkeypatch.setattr(Checkpoints, "save", save)
    config = settings(place, "fast_weight", **{"train.eval_interval": 2})
    with pytest.raises(UserError, match=r"step 14 .* 3 failures in a row: make room .* step 8\."):
        train.run(config, tmp_path)
    out = capsys.readouterr().out
    for step in failing[:-1]:
        assert f"Warning: the checkpoint of step {step} could not be written" in out
    assert final_state(tmp_path)["step"] == 8
    monkeypatch.undo()
    assert train.run(config, tmp_path) == 0
    assert_same_bits(final_state(tmp_path), final_state(whole("fast_weight")))


def use_devices(monkeypatch, number):
    """Train on the first ones alone; test_distributed.py has processes with one device each."""
    devices = jax.local_devices()[:number]
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    monkeypatch.setattr(jax, "device_count", lambda: number)
    monkeypatch.setattr(jax, "local_device_count", lambda: number)


def test_another_number_of_devices_on_the_way(place, whole, monkeypatch, tmp_path):
    """Two devices, then one, then two: the same losses."""
    config = settings(place, "fast_weight")
    for number, stop in ((2, 5), (1, 12), (2, None)):
        with monkeypatch.context() as patch:
            use_devices(patch, number)
            if stop:
                stop_after(patch, stop)
            assert train.run(config, tmp_path) == (143 if stop else 0)
    np.testing.assert_allclose(losses(tmp_path), losses(whole("fast_weight")), rtol=0, atol=1e-5)


def test_computing_in_bfloat16_from_some_step_on(place, whole, monkeypatch, tmp_path):
    """The memory of Transformer-XL has the dtype of computing; the checkpoint has float32."""
    with monkeypatch.context() as patch:
        stop_after(patch, 9)
        assert train.run(settings(place, "transformer_xl"), tmp_path) == 143
    low = settings(place, "transformer_xl", **{"model.dtype": "bfloat16"})
    with monkeypatch.context() as patch:
        stop_after(patch, 14)
        assert train.run(low, tmp_path) == 143
    assert all(x.dtype != jnp.bfloat16 for x in jax.tree.leaves(final_state(tmp_path)))
    assert train.run(settings(place, "transformer_xl"), tmp_path) == 0
    ours, expected = losses(tmp_path), losses(whole("transformer_xl"))
    np.testing.assert_array_equal(ours[:9], expected[:9])
    assert (ours[10:] != expected[10:]).any()
    np.testing.assert_allclose(ours, expected, rtol=0, atol=0.02)


@pytest.mark.parametrize("changes", [{}, {"train.batch_chunk": 4}], ids=["whole", "accumulated"])
def test_one_device_and_parts_of_a_batch_give_the_same_losses(
    place, whole, monkeypatch, tmp_path, changes
):
    """Rows of the batch are spread over 2 devices, or 1, or taken one after another."""
    expected = log(whole("fast_weight"))
    use_devices(monkeypatch, 1)
    assert train.run(settings(place, "fast_weight", **changes), tmp_path) == 0
    ours = log(tmp_path)
    for column, tolerance in (("loss", 1e-5), ("grad_norm", 1e-4), ("learning_rate", 0)):
        a, b = ([float(row[column] or 0) for row in rows] for rows in (ours, expected))
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance, err_msg=column)
