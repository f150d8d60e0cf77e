"""The synthetic retrieval experiments: their data, models, runs and what they refuse."""

import json
import math
import re
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags

import main
from configs import retrieval as config
from fwm import ops
from fwm.errors import UserError
from fwm.files import lock_workdir
from fwm.retrieval import experiment, report
from fwm.retrieval import model as retrieval

KEY = jax.random.key(0)
TINY = {
    "models": ("linear_delta",),
    "sizes": (10,),
    "seeds": (0,),
    "max_step": 300,
}
evaluation_batch = jax.jit(retrieval.evaluation_batch, static_argnums=(1, 2))
training_batch = jax.jit(retrieval.training_batch, static_argnums=(1, 2, 3))
init = jax.jit(retrieval.init, static_argnums=(1, 2))
answers = jax.jit(retrieval.answers, static_argnums=(0, 3))


def options(**fields):
    return config.get_config("update_rule").to_dict() | TINY | fields


def last_value(keys, values, query):
    return values[np.flatnonzero(keys == query)[-1]]


@pytest.mark.parametrize("setting", retrieval.SETTINGS)
def test_data(setting):
    batch = jax.device_get(training_batch(KEY, setting, 30, 200))
    assert batch.keys.shape == batch.values.shape == (200, 30 if setting == "capacity" else 60)
    for keys, values, query, target in zip(*batch[:2], *batch[2:4], strict=True):
        assert target == last_value(keys, values, query)
        if setting == "capacity":
            assert set(keys) == set(values) == set(range(30))
    if setting == "update_rule":  # uniform, and a query is the likelier the more often it stands
        counts = np.bincount(batch.keys.ravel(), minlength=30)
        assert abs(counts - 400).max() < 5 * 20
        assert np.mean([np.mean(k == q) for k, q in zip(*batch[::2][:2], strict=True)]) > 2.5 / 60

    batch = jax.device_get(evaluation_batch(KEY, setting, 30))
    assert batch.keys.shape == (20, 30)
    for keys, values, queries, targets, counts in zip(*batch, strict=True):
        assert sorted(queries[counts]) == sorted(set(keys))
        for query, target in zip(queries[counts], targets[counts], strict=True):
            assert target == last_value(keys, values, query)


def test_at_most_200_queries():
    batch = evaluation_batch(KEY, "capacity", 210)
    assert batch.counts.shape == (20, 200)
    assert bool(batch.counts.all())
    assert int(batch.queries.max()) < 200  # the lowest, not the first


@pytest.mark.parametrize(
    "name", ["softmax", "dpfp2_sum", "linear_delta", "favor8_delta", "tanh_fwm"]
)
def test_one_query_and_many_read_the_same(name):
    model = retrieval.Model.of(name)
    params = init(KEY, model, 10)
    many = jax.device_get(evaluation_batch(KEY, "update_rule", 10))
    out = answers(model, params, many, 10, KEY)
    one = many._replace(queries=many.queries[:, 3:4])
    found = answers(model, params, one, 10, KEY)
    np.testing.assert_allclose(found, np.asarray(out)[:, 3:4], atol=2e-6)


def by_the_equations(name, p, keys, values, query, directions):
    """The answer [S] to one query after the pairs of one sequence, pair by pair in numpy."""
    size = len(p["embedding"])
    feature_map, _, rule = name.partition("_")
    layer = lambda name, x: x @ p[name]["kernel"] + p[name]["bias"]

    def features(x):
        if feature_map == "dpfp1":
            z = np.maximum(np.concatenate([x, -x]), 0)
            return z * np.roll(z, 1)
        if feature_map == "favor128":
            u = np.concatenate([x @ directions, -x @ directions])
            return (2 * 128) ** -0.5 * np.exp(u - x @ x / 2)
        return np.tanh(x) if feature_map == "tanh" else np.where(x > 0, x + 1, np.exp(x))

    q = layer("q", p["embedding"][query])
    inputs = [
        np.concatenate([np.eye(size)[v], p["embedding"][k]])
        for k, v in zip(keys, values, strict=True)
    ]
    if name == "softmax":
        scores = np.exp([layer("k", x) @ q / 8 for x in inputs])
        return scores @ np.eye(size)[values] / scores.sum()
    q = features(q)
    w, z = np.zeros((size, len(q))), np.zeros(len(q))
    for x, v in zip(inputs, np.eye(size)[values], strict=True):
        k = features(layer("k", x))
        if rule == "sum":
            w, z = w + np.outer(v, k), z + k
            continue
        beta = 1 / (1 + np.exp(-layer("beta", x)))
        k = k / k.sum() if rule == "delta" else k
        w = w + beta * np.outer(v - w @ k, k)
        w = w / max(np.linalg.norm(w), 1) if rule == "fwm" else w
    y = w @ q
    if rule == "fwm":
        return (y - y.mean()) / np.sqrt(y.var() + 1e-5)
    return y / ((z @ q if rule == "sum" else q.sum()) + 1e-6)


@pytest.mark.parametrize(
    "name", ["softmax", "elu_sum", "favor128_sum", "dpfp1_delta", "dpfp1_fwm", "tanh_fwm"]
)
def test_a_model_by_the_equations(name):
    model, size = retrieval.Model.of(name), 24  # in setting 2, two blocks of 24 pairs
    params = init(KEY, model, size)
    batch = jax.device_get(training_batch(KEY, "update_rule", size, 3))
    actual = np.asarray(answers(model, params, batch, size, KEY))
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    assert p["embedding"].shape == (24, 52)
    directions = np.asarray(ops.favor_projection(KEY, 128, 64).T, np.float64)
    for b in range(3):
        sequence = batch.keys[b], batch.values[b], batch.queries[b, 0]
        expected = by_the_equations(name, p, *sequence, directions)
        np.testing.assert_allclose(actual[b, 0], expected, atol=1e-5)


OWN = """
import jax
import jax.numpy as jnp

from configs.retrieval import get_config
from fwm.ops import FEATURE_MAPS, UPDATE_RULES, FeatureMap, Input, Rule

WIDTH = 24
FEATURE_MAPS["learned"] = FeatureMap(
    lambda options: lambda x, w, shift: jax.nn.relu(x @ w) + shift,
    parameters={"w": lambda key, o: jax.random.normal(key, (o.d_head, WIDTH)) / o.d_head**0.5},
    draws={"shift": lambda key, o: 1e-3 * jax.random.uniform(key)},
)


def step(w, k, v, gate, decay):
    return decay[..., None] * w + (gate[..., None] * k)[..., :, None] * v[..., None, :]


def key_sums(k, before, gate, decay, *, last):
    return jax.lax.fori_loop(
        0, k.shape[1], lambda t, z: decay[:, t] * z + gate[:, t, :, None] * k[:, t], before
    )


GATE = Input("gate", jax.nn.sigmoid)
DECAY = Input("decay", lambda x: jax.nn.sigmoid(x + 5), per_key=True)
UPDATE_RULES["gated_sum"] = Rule(step, (GATE, DECAY), key_sums=key_sums)
"""


@pytest.fixture
def own(tmp_path):
    """A config file that has registered a map and a rule."""
    path = tmp_path / "own.py"
    path.write_text(OWN)
    runpy.run_path(path)
    yield path
    del ops.FEATURE_MAPS["learned"], ops.UPDATE_RULES["gated_sum"]


def test_an_own_map_and_an_own_rule_train(own, tmp_path):
    name = "learned_gated_sum"
    params = init(KEY, retrieval.Model.of(name), 10)
    assert params["decay"]["kernel"].shape == (32, 24)
    batch = training_batch(KEY, "capacity", 10, 4)
    loss = lambda params: retrieval.loss(retrieval.Model.of(name), params, batch, 10, KEY)
    for path, gradient in jax.tree.leaves_with_path(jax.jit(jax.grad(loss))(params)):
        assert np.any(gradient), path
    models = (name, "learned_delta")  # in processes of their own, which run the file, too
    fields = {"models": models, "max_step": 200, "workers": 2, "registered_in": str(own)}
    experiment.run(options(**fields), tmp_path)
    losses = {}
    for row in experiment.read_log(tmp_path / "evaluations.csv"):
        losses.setdefault(row.model, []).append(row.train_loss)
    assert set(losses) == set(models)
    assert all(late < early < 0.6 for early, late in losses.values())


def test_a_name_is_read_by_the_tables():
    assert retrieval.Model.of("favor12_delta")[1:5] == ("favor", "delta", 12, 12)
    elu, linear = (retrieval.Model.of(f"{name}_sum") for name in ("elu", "linear"))
    assert retrieval.MAPS[elu.feature_map] is retrieval.MAPS[linear.feature_map]


def test_initial_parameters():
    params = retrieval.init(KEY, retrieval.Model.of("linear_delta"), 40)
    bounds = {("k", "kernel"): 1 / 8, ("q", "kernel"): 1 / 8, ("k", "bias"): 128**-0.5}
    bounds |= {("q", "bias"): 88**-0.5, ("beta", "kernel"): 128**-0.5}
    for (layer, part), bound in bounds.items():
        assert 0.9 * bound < jnp.abs(params[layer][part]).max() <= bound
    assert abs(params["embedding"].std() - 1) < 0.05
    params = retrieval.init(KEY, retrieval.Model.of("softmax"), 40)
    assert jnp.abs(params["q"]["kernel"]).max() == pytest.approx((6 / 152) ** 0.5, rel=0.02)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("retrieval")
    assert experiment.run(options(), workdir) == 0
    return workdir


def test_a_run(trained):
    header = (trained / "evaluations.csv").read_text().split("\n")[0]
    assert header == "setting,model,size,seed,step,train_loss,eval_loss,seconds"
    rows = experiment.read_log(trained / "evaluations.csv")
    assert [row[:5] for row in rows] == [
        ("update_rule", "linear_delta", 10, 0, 100 * (i + 1)) for i in range(3)
    ]
    assert rows[2].train_loss < rows[1].train_loss < rows[0].train_loss
    assert rows[2].eval_loss < 0.45  # answering zero costs 0.5
    assert {"results.csv", "results.md", "results.png"} <= {p.name for p in trained.iterdir()}


def without_seconds(rows):
    return [row[:-1] for row in rows]


def test_what_is_there_is_not_run_again_and_what_was_cut_off_comes_out_the_same(
    trained, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(experiment, "SAID_EVERY", 0.0)
    log = tmp_path / "evaluations.csv"
    before = experiment.read_log(trained / "evaluations.csv")
    for part in ("config.json", "evaluations.csv"):
        (tmp_path / part).write_text((trained / part).read_text())
    text = log.read_text()
    experiment.run(options(), tmp_path)
    assert log.read_text() == text
    log.write_text(text[: text.rindex(",300,") + 3])  # killed within the last row
    capsys.readouterr()
    experiment.run(options(), tmp_path)
    assert without_seconds(experiment.read_log(log)) == without_seconds(before)
    said = capsys.readouterr().out.splitlines()
    assert re.match(
        r"linear_delta S=10 seed 0: step 200 of at most 300, loss 0\.\d+, best ", said[1]
    )


def test_workers_give_the_same(trained, tmp_path):
    experiment.run(options(workers=2, max_step=100, seeds=(0, 1)), tmp_path)
    rows = experiment.read_log(tmp_path / "evaluations.csv")
    assert [row.seed for row in rows] == [0, 1]
    assert rows[0].eval_loss == pytest.approx(
        experiment.read_log(trained / "evaluations.csv")[0].eval_loss, rel=1e-4
    )
    with pytest.raises(UserError, match=r"holds runs with .*give another --workdir"):
        experiment.run(options(lr=0.1), tmp_path)
    experiment.run(options(setting="capacity", max_step=100), tmp_path)  # beside the other one
    rows = experiment.read_log(tmp_path / "evaluations.csv")
    assert [row.setting for row in rows] == ["update_rule", "update_rule", "capacity"]


def test_one_call_at_a_time(tmp_path):
    with lock_workdir(tmp_path), pytest.raises(UserError, match="in use by another run"):
        experiment.run(options(), tmp_path)


def start(*command):
    """A process whose standard output ends when its workers have ended, too."""
    root = Path(main.__file__).parent
    return subprocess.Popen([sys.executable, *command], cwd=root, stdout=subprocess.PIPE, text=True)


def test_a_worker_ends_with_a_killed_caller():
    caller = start(
        "-c",
        "import concurrent.futures, multiprocessing, os, time\n"
        "from fwm.retrieval.experiment import begin_worker\n"
        "spawn = multiprocessing.get_context('spawn')\n"
        "pool = concurrent.futures.ProcessPoolExecutor(1, spawn, begin_worker, (1,))\n"
        "print(pool.submit(os.getpid).result(), flush=True)\n"
        "pool.submit(time.sleep, 600).result()\n",
    )
    assert int(caller.stdout.readline())
    caller.kill()
    caller.communicate(timeout=30)


def test_an_interrupt_does_not_wait_for_what_has_begun(tmp_path):
    options = [
        "--config.workers=2",
        "--config.sizes=(100,110,120)",
        "--config.models=('linear_sum',)",  # more than it holds: each goes on for long
        "--config.batch_size=4",
    ]
    config = "--config=configs/retrieval.py:capacity"
    caller = start("main.py", "--mode=retrieval", config, f"--workdir={tmp_path}", *options)
    log = tmp_path / "evaluations.csv"
    while not log.exists() or len(experiment.read_log(log)) < 1:
        assert caller.poll() is None
        time.sleep(0.1)
    caller.send_signal(signal.SIGINT)
    out, _ = caller.communicate(timeout=30)
    assert caller.returncode == 130
    assert "stopped at" not in out


def test_finished_runs_that_a_call_does_not_ask_for_are_kept_and_others_not(trained, tmp_path):
    log = tmp_path / "evaluations.csv"
    text = (trained / "evaluations.csv").read_text()
    log.write_text(text + text.split("\n")[1].replace(",10,0,100,", ",20,0,100,") + "\n")
    (tmp_path / "config.json").write_text((trained / "config.json").read_text())
    with pytest.raises(UserError, match=r"holds runs with .*max_step.*give another --workdir"):
        experiment.run(options(max_step=400), tmp_path)
    experiment.run(options(seeds=(1,)), tmp_path)
    runs = {(row.size, row.seed) for row in experiment.read_log(log)}
    assert runs == {(10, 0), (10, 1)}  # without the interrupted (20, 0)


def test_the_one_model_that_is_trained_otherwise(tmp_path, monkeypatch):
    used = []

    def train(model, setting, size, n_batch, lr, state, key):
        used.append((n_batch, lr))
        return state, 0.0, 0.0

    monkeypatch.setattr(experiment, "train_and_evaluate", train)
    experiment.run(options(models=("tanh_fwm", "dpfp1_fwm")), tmp_path)
    assert used == [(128, 1e-4), (32, 1e-3)]


@pytest.mark.parametrize(
    ("losses", "steps"),
    [
        ([0.5, 0.01, 0.001], 300),
        ([0.5] * 12, 1200),
        ([math.nan] * 11, 1100),
        ([0.5, 0.4] + [0.45] * 11, 1300),
        ([1 - i / 100 for i in range(20)], 2000),
    ],
)
def test_when_a_run_stops(losses, steps):
    rows = [
        experiment.Row("capacity", "softmax", 20, 0, 100 * i, 0.0, x, 0.0)
        for i, x in enumerate(losses, 1)
    ]
    stops = [experiment._stopped(rows[: i + 1], 2000) for i in range(len(rows))]
    assert stops.index(True) == len(rows) - 1
    assert rows[-1].step == steps


def test_table_and_agreement():
    results = [
        report.Result("capacity", "linear_sum", 100, seed, loss, 900, 1.0)
        for seed, loss in enumerate((0.1, 0.2))
    ]
    row = report.table(results).splitlines()[-1]
    assert row == "| capacity | linear_sum | 100 | 2 | 0.1500 | 0.1000-0.2000 | 0.1642 | yes |"
    # One's own: other sizes and other models.
    own = [report.Result("capacity", name, 24, 0, 0.1, 900, 1.0) for name in ("own_sum", "softmax")]
    *_, first, last = report.table(own).splitlines()
    assert first == "| capacity | softmax | 24 | 1 | 0.1000 | - | - | - |"
    assert last == "| capacity | own_sum | 24 | 1 | 0.1000 | - | - | - |"
    assert report.agrees(0.1, 0.15)
    assert not report.agrees(0.0999, 0.15)
    assert report.agrees(0.02, 0.0)
    assert not report.agrees(0.5, math.nan)


def test_where_a_curve_leaves_the_floor():
    losses = {"dpfp1_sum": (0.0, 0.02, 0.03), "favor64_sum": (0.5, 0.5, 0.5), "softmax": (0, 0, 0)}
    results = [
        report.Result("capacity", model, size, 0, loss, 900, 1.0)
        for model, by_size in losses.items()
        for size, loss in zip((20, 120, 140), by_size, strict=True)
    ]
    assert report.capacities(results).splitlines()[2:] == [
        "| capacity | softmax | 140 |  | 500- |",
        "| capacity | dpfp1_sum | 120 | 140 | 100-160 |",
        "| capacity | favor64_sum |  | 20 | -40 |",
    ]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"models": ("dpfp_delta",)}, "unknown retrieval model 'dpfp_delta': expected softmax, or"),
        ({"models": ("linear2_sum",)}, "unknown retrieval model 'linear2_sum'"),
        ({"models": ("linear_hebb",)}, "unknown retrieval model 'linear_hebb'"),
    ],
)
def test_what_is_refused(fields, message, tmp_path):
    with pytest.raises(UserError, match=message):
        experiment.run(options(**fields), tmp_path)


def test_a_foreign_log_is_refused(tmp_path):
    (tmp_path / "evaluations.csv").write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match=r"is not a log of retrieval runs .*remove it or give"):
        experiment.run(options(), tmp_path)


def test_configs_are_the_paper_s():
    with pytest.raises(UserError, match="unknown retrieval setting 'a': expected configs/retr"):
        config.get_config("a")
    for setting, models in report.PUBLISHED.items():
        c = config.get_config(setting)
        assert c.models == tuple(models)
        assert (c.batch_size, c.lr, c.max_step) == (32, 1e-3, 100_000)
        assert json.dumps(c.sizes) == json.dumps(
            list(range(20, 601 if setting == "capacity" else 201, 20))
        )
        assert all(len(losses) == len(report.SIZES[setting]) for losses in models.values())


def test_mode_and_config_belong_together():
    for argv in (["--mode=retrieval"], ["--config=configs/retrieval.py:capacity"]):
        flags.FLAGS.unparse_flags()
        with pytest.raises(UserError, match="belong together"):
            main.parse(["main.py", *argv])


MODELS_DRAWN = {model for by_model in report.PUBLISHED.values() for model in by_model}


def test_the_figure_is_told_apart_without_its_colours():
    committed = Path(__file__).parents[1] / "benchmarks" / "results" / "retrieval" / "results.csv"
    figure = report.draw(report.read(committed))
    figure.draw_without_rendering()
    assert len(figure.axes) == 2
    for axes in figure.axes:
        lines = [x for x in axes.lines if x.get_label() in MODELS_DRAWN]
        assert len(lines) == 8
        assert len({(x.get_marker(), x.get_linestyle()) for x in lines}) == len(lines)
        assert [text.get_text() for text in axes.texts] == ["0.5: answers nothing"]
        assert axes.get_legend().get_window_extent().x0 >= axes.get_window_extent().x1
