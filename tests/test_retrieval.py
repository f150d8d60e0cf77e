"""The synthetic retrieval experiments: their data, models, runs and what they refuse."""

import json
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags

import main
from configs import retrieval as config
from fwm.checkpoint import lock_workdir
from fwm.errors import UserError
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
answers = jax.jit(retrieval.answers, static_argnums=(0, 3))


def options(**fields):
    return config.get_config("update_rule").to_dict() | TINY | fields


def last_value(keys, values, query):
    return values[np.flatnonzero(keys == query)[-1]]


@pytest.mark.parametrize("setting", retrieval.SETTINGS)
def test_data(setting):
    draw = jax.jit(retrieval.training_batch, static_argnums=(1, 2, 3))
    batch = jax.device_get(draw(KEY, setting, 30, 200))
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


@pytest.mark.parametrize(
    "name", ["softmax", "dpfp2_sum", "linear_delta", "favor8_delta", "tanh_fwm"]
)
def test_one_query_and_many_read_the_same(name):
    model = retrieval.Model.of(name)
    params = retrieval.init(KEY, model, 10)
    many = evaluation_batch(KEY, "update_rule", 10)
    out = answers(model, params, many, 10, KEY)
    one = many._replace(queries=many.queries[:, 3:4])
    np.testing.assert_allclose(answers(model, params, one, 10, KEY), out[:, 3:4], atol=2e-6)


def test_delta_model_by_the_equations():
    model, size = retrieval.Model.of("dpfp1_delta"), 8
    params = retrieval.init(KEY, model, size)
    batch = retrieval.training_batch(KEY, "update_rule", size, 3)
    actual = answers(model, params, batch, size, KEY)
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    assert p["embedding"].shape == (8, 17)

    def dpfp(x):
        z = np.maximum(np.concatenate([x, -x]), 0)
        return z * np.roll(z, 1)

    for b in range(3):
        w = np.zeros((size, 128))
        for key, value in zip(batch.keys[b], batch.values[b], strict=True):
            x = np.concatenate([np.eye(size)[value], p["embedding"][key]])
            k = dpfp(x @ p["k"]["kernel"] + p["k"]["bias"])
            k /= k.sum()
            beta = 1 / (1 + np.exp(-(x @ p["beta"]["kernel"] + p["beta"]["bias"])))
            w += beta * np.outer(np.eye(size)[value] - w @ k, k)
        q = dpfp(p["embedding"][batch.queries[b, 0]] @ p["q"]["kernel"] + p["q"]["bias"])
        np.testing.assert_allclose(actual[b, 0], w @ q / (q.sum() + 1e-6), atol=2e-6)


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


def test_what_is_there_is_not_run_again_and_what_was_cut_off_comes_out_the_same(trained, tmp_path):
    log = tmp_path / "evaluations.csv"
    before = experiment.read_log(trained / "evaluations.csv")
    for part in ("config.json", "evaluations.csv"):
        (tmp_path / part).write_text((trained / part).read_text())
    text = log.read_text()
    experiment.run(options(), tmp_path)
    assert log.read_text() == text
    log.write_text(text[: text.rindex(",300,") + 3])  # killed within the last row
    experiment.run(options(), tmp_path)
    assert without_seconds(experiment.read_log(log)) == without_seconds(before)


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


def test_a_worker_whose_caller_is_gone_stops(tmp_path, monkeypatch):
    monkeypatch.setattr(
        experiment.multiprocessing,
        "parent_process",
        lambda: types.SimpleNamespace(is_alive=lambda: False),
    )
    experiment.run(options(), tmp_path)
    assert experiment.read_log(tmp_path / "evaluations.csv") == []


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
        ({"models": ()}, r"models=\(\) has no meaning: expected a tuple of different names"),
        ({"sizes": (1,)}, r"sizes=\(1,\) has no meaning: .* whole numbers from 2 on"),
        ({"seeds": (0, 0)}, "seeds.* expected a tuple of different whole numbers from 0 on"),
        ({"workers": 0}, "workers=0 has no meaning: expected 1 or more"),
        ({"lr": 0.0}, "lr=0.0 has no meaning: expected a number above 0"),
        ({"max_step": 0}, "max_step=0 has no meaning: expected 1 or more"),
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
        assert set(c.models) == set(models)
        assert (c.batch_size, c.lr, c.max_step) == (32, 1e-3, 100_000)
        assert json.dumps(c.sizes) == json.dumps(
            list(range(20, 601 if setting == "capacity" else 201, 20))
        )
        assert all(len(losses) == len(report.SIZES[setting]) for losses in models.values())


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
def test_mode_and_config_belong_together():
    for argv in (["--mode=retrieval"], ["--config=configs/retrieval.py:capacity"]):
        flags.FLAGS.unparse_flags()
        with pytest.raises(UserError, match="belong together"):
            main.parse(["main.py", *argv])
