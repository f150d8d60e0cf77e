"""Decays, erase keys and several writes a token, against numbers computed in float64."""

import json
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import exact, float32, relative_error, results

from fwm import ops

HERE = Path(__file__).parent / "golden_rules"
# All of them, where they lie beside the project; a clone has the small ones of each kind.
ASIDE = Path(__file__).parents[3] / "shared" / "golden_rules"
FEW = sorted(p for p in HERE.glob("*.npz") if not p.name.startswith("layer"))
MORE = sorted(p for p in ASIDE.glob("*.npz") if not (HERE / p.name).exists())
MORE = [p for p in MORE if not p.name.startswith("layer")]


def by_names(rule, names, *arrays, **options):
    given = dict(zip(names, arrays, strict=True))
    return rule(weights=given.pop("initial_state"), **given, **options)


@pytest.mark.parametrize(
    ("form", "path"),
    [(form, path) for path in FEW for form in (ops, ops.recurrent)]
    + [(ops, p) for p in MORE]
    + [("at_once", p) for p in (*FEW, *MORE) if p.name.startswith("delta_decay-head")],
    ids=lambda x: x.stem if isinstance(x, Path) else getattr(x, "__name__", x),
)
def test_golden_rules(form, path, monkeypatch):
    if form == "at_once":  # as on a GPU
        monkeypatch.setattr("fwm.ops.chunks.on_cpu", lambda: False)
        form = ops
    file = np.load(path)
    rule = getattr(form, json.loads(str(file["config"]))["rule"] + "_rule")
    every = ("q", "k", "v", "beta", "log_decay", "erase_key", "initial_state")
    names = [name for name in every if name in file]
    cotangents = {"dout": file["g_out"], "dweights": file["g_final_state"]}
    actual = results(partial(by_names, rule, names), [file[n] for n in names], **cotangents)
    wanted = [file[name] for name in ("out", "final_state", *(f"d_{name}" for name in names))]
    for i, (a, b) in enumerate(zip(actual, wanted, strict=True)):
        scale = np.max(np.abs(b))
        assert np.max(np.abs(a - b)) <= (1e-5 if i < 2 else 5e-5) * (scale or 1), (path.name, i)


NAMES = ("q", "k", "v", "beta", "log_decay", "erase_key", "initial_state")


def make(decay, length=21, n=2, n_key=4, n_value=3):
    rng = np.random.default_rng(0)
    q = rng.normal(size=(2, length, 2, n_key))
    k, erase = rng.normal(size=(2, 2, length * n, 2, n_key)) / 2
    v = rng.normal(size=(2, length * n, 2, n_value))
    beta = 2 * rng.random(size=v.shape[:3])
    log_decay = -rng.exponential(size=q.shape if decay == "channel" else q.shape[:3])
    return q, k, v, beta, log_decay, erase, rng.normal(size=(2, 2, n_key, n_value))


@pytest.mark.parametrize("decay", ["head", "channel"])
def test_a_decay_of_minus_infinity_forgets(decay):
    """The tokens from there on equal those of a run of their own, gradients too."""
    arrays, start = list(make(decay)), 10
    arrays[4][:, start] = -np.inf
    rule = partial(by_names, ops.delta_rule, NAMES)
    dout = np.random.default_rng(1).normal(size=(2, 21, 2, 3))
    dout[:, :start] = 0
    dweights = np.ones((2, 2, 4, 3))
    whole = results(rule, arrays, dout=dout, dweights=dweights)
    later = [x[:, start * (x.shape[1] // 21) :] for x in arrays[:-1]] + [0 * arrays[-1]]
    later[4][:, 0] = 0
    alone = results(rule, later, dout=dout[:, start:], dweights=dweights)
    np.testing.assert_allclose(whole[0][:, start:], alone[0], atol=1e-5)
    np.testing.assert_allclose(whole[1], alone[1], atol=1e-5)
    for name, a, b in zip(NAMES[:-1], whole[2:], alone[2:], strict=False):
        cut = start * (a.shape[1] // 21)
        assert np.all(a[:, :cut] == 0), name
        if name != "log_decay":  # at the boundary itself it is 0 in one of the two only
            assert relative_error(a[:, cut:], b) < 2e-6, name
    assert np.all(whole[2 + NAMES.index("log_decay")][:, start] == 0)
    assert np.all(whole[-1] == 0)


@pytest.mark.parametrize("decay", ["head", "channel"])
def test_any_chunks_and_any_split_give_the_definition(decay):
    arrays = make(decay)
    rule = partial(by_names, ops.delta_rule, NAMES)
    wanted = exact(partial(by_names, ops.recurrent.delta_rule, NAMES), arrays)
    for chunk_size in (1, 9, 64):
        sized = partial(rule, chunk_size=chunk_size)
        for a, b in zip(results(sized, arrays), wanted, strict=True):
            assert relative_error(a, b) < 1e-5
    *tokens, weights = arrays
    outs = []
    for part in (slice(0, 8), slice(8, 21)):
        cut = [x[:, part.start * (x.shape[1] // 21) : part.stop * (x.shape[1] // 21)]
               for x in tokens]  # fmt: skip
        out, weights = jax.jit(rule)(*float32([*cut, weights]))
        outs.append(out)
    assert relative_error(np.concatenate(outs, axis=1), wanted[0]) < 1e-5
    assert relative_error(weights, wanted[1]) < 1e-5


@pytest.mark.parametrize("length", [1, 37])
@pytest.mark.parametrize("cpu", [True, False])
def test_decays_of_any_strength_give_the_definition(length, cpu, monkeypatch):
    """By either form: none, weak ones, exp(-100), of which gradients vanish, and exp(-inf)."""
    q, k, v, beta, log_decay, _, weights = make("head", length, n=1)
    log_decay /= 10
    if length > 1:
        log_decay[:, 12:20], log_decay[0, 20:24] = 0, -100
        log_decay[:, [4, 33]], log_decay[1, 5] = -np.inf, -100
    arrays, at = (q, k, v, beta, log_decay, weights), [*NAMES[:5], NAMES[6]]
    monkeypatch.setattr("fwm.ops.chunks.on_cpu", lambda: cpu)
    found = results(rule := partial(by_names, ops.delta_rule, at), arrays)
    wanted = exact(partial(by_names, ops.recurrent.delta_rule, at), arrays)
    for name, a, b in zip(["out", "last", *at], found, wanted, strict=True):
        assert relative_error(a, b) < 2e-6, name
    assert (found[2 + at.index("log_decay")][log_decay <= -100] == 0).all()
    for a, b in zip(jax.jit(rule)(*float32(arrays)), wanted[:2], strict=True):
        assert relative_error(a, b) < 2e-6  # in other chunks, where there is no gradient
    half = results(rule, arrays, dtype="bfloat16")
    for name, a, b in zip(["out", "last", *at], half, wanted, strict=True):
        assert relative_error(a, b) < 0.1, name


@pytest.mark.parametrize("form", [ops, ops.recurrent])
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"log_decay": (2, 21, 1)}, r"\(2, 21, 1\) does not fit q of shape \(2, 21, 2, 4\)"),
        ({"erase_key": (2, 21, 2, 4)}, r"\(2, 21, 2, 4\) does not fit k of shape \(2, 42, 2, 4"),
        ({"k": (2, 22, 2, 4), "v": (2, 22, 2, 3), "beta": (2, 22, 2), "erase_key": (2, 22, 2, 4)},
         r"k of shape \(2, 22, 2, 4\) must have a whole number of writes"),
    ],
)  # fmt: skip
def test_shapes_that_do_not_belong_together(form, changed, message):
    arrays = dict(zip(NAMES, make("head"), strict=True))
    arrays |= {name: np.zeros(shape) for name, shape in changed.items()}
    with pytest.raises(ValueError, match=message):
        by_names(form.delta_rule, NAMES, *float32([arrays[name] for name in NAMES]))
