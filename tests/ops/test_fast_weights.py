"""The fast rules against the official numbers and against the definition, one token at a time."""

from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import exact, float32, make_inputs, relative_error, results
from jax.tree_util import Partial

from fwm.errors import UserError
from fwm.ops import (
    FastWeightState,
    delta_rule,
    dpfp,
    fast_weight_attention,
    favor,
    favor_projection,
    recurrent,
    sum_normalize,
    sum_rule,
)

GOLDEN = Path(__file__).parents[1] / "golden"
FILES = [
    pytest.param(path, id=path.stem, marks=[pytest.mark.quick] * (number == 0))
    for kind in ("sum", "delta")
    for number, path in enumerate(sorted(GOLDEN.glob(f"op_{kind}_*.npz")))
]
FAST = {"sum": sum_rule, "delta": delta_rule}
ORACLE = {"sum": recurrent.sum_rule, "delta": recurrent.delta_rule}


@cache
def fast(name, chunk_size):
    """One object per rule and chunk size, so that tests share what jit compiled."""
    return partial(FAST[name], chunk_size=chunk_size)


def for_rule(name, inputs):
    """The inputs that this rule takes: the sum rule has no beta."""
    q, k, v, beta, weights = inputs
    return (q, k, v, weights) if name == "sum" else (q, k, v, beta, weights)


@pytest.mark.parametrize("golden", FILES, indirect=True)
def test_rule_equals_official(golden):
    name = "delta" if "beta" in golden else "sum"
    heads_last = {key: np.swapaxes(x, 1, 2) for key, x in golden.items() if x.ndim == 4}
    inputs = [heads_last["q"], heads_last["k"], heads_last["v"]]
    gradients = ["dq", "dk", "dv"]
    if name == "delta":
        inputs.append(heads_last["beta"][..., 0])
        gradients.append("dbeta")
    inputs.append(golden["initial_state"])
    expected = [heads_last["out"], golden["final_state"], *(heads_last[x] for x in gradients)]
    if name == "delta":
        expected[-1] = expected[-1][..., 0]
    expected.append(golden["dinitial_state"])
    cotangents = {"dout": heads_last["g_out"], "dweights": golden["g_final_state"]}
    for actual, wanted in zip(results(FAST[name], inputs, **cotangents), expected, strict=True):
        assert relative_error(actual, wanted) < 3e-6
    for actual, wanted in zip(exact(ORACLE[name], inputs, **cotangents), expected, strict=True):
        assert relative_error(actual, wanted) < 1e-12


SIZES = [  # length, K, V, chunk size
    (1, 8, 8, None),
    (7, 5, 3, 4),
    (63, 16, 16, 24),
    (100, 8, 64, None),
    (257, 96, 16, None),
]


@pytest.mark.parametrize(("length", "n_key", "n_value", "chunk_size"), SIZES)
@pytest.mark.parametrize("keys", ["simplex", "nearly_equal", "rescaled", "unnormalised"])
def test_fast_equals_definition(length, n_key, n_value, chunk_size, keys):
    name = "sum" if keys == "unnormalised" else "delta"
    inputs = for_rule(name, make_inputs(keys, 1, length, 2, n_key, n_value))
    expected = exact(ORACLE[name], inputs)
    actual = results(fast(name, chunk_size), inputs)
    errors = [relative_error(a, b) for a, b in zip(actual, expected, strict=True)]
    assert max(errors) < 1e-5, errors


@pytest.mark.parametrize("keys", ["simplex", "nearly_equal", "rescaled"])
def test_long_sequence_equals_definition(keys):
    inputs = make_inputs(keys, 1, 4096, 1, 16, 8)
    expected = exact(recurrent.delta_rule, inputs)
    errors = [
        relative_error(a, b) for a, b in zip(results(delta_rule, inputs), expected, strict=True)
    ]
    assert max(errors) < 1e-5, errors


@pytest.mark.parametrize(
    ("name", "keys", "length", "n_key", "n_value", "chunk_size"),
    [
        # There all chunks form one group, more of them than are unrolled.
        ("sum", "simplex", 150, 8, 6, 16),
        ("delta", "simplex", 1, 8, 8, None),
        ("delta", "simplex", 70, 5, 3, 24),
        ("delta", "rescaled", 150, 8, 64, 16),
        ("delta", "nearly_equal", 100, 16, 16, None),
    ],
)
def test_form_for_accelerators(name, keys, length, n_key, n_value, chunk_size, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    inputs = for_rule(name, make_inputs(keys, 1, length, 2, n_key, n_value))
    rule = partial(FAST[name], chunk_size=chunk_size)
    errors = [
        relative_error(a, b)
        for a, b in zip(results(rule, inputs), exact(ORACLE[name], inputs), strict=True)
    ]
    assert max(errors) < 1e-5, errors


def test_form_for_accelerators_in_bfloat16_and_without_rows(monkeypatch):
    """Factors of matmuls are rounded, no more: the error does not grow with the tokens."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    rule = partial(delta_rule, chunk_size=16)
    for length in (16, 160):
        inputs = make_inputs("simplex", 1, length, 2, 8, 6)
        actual, expected = results(rule, inputs, dtype=jnp.bfloat16), exact(ORACLE["delta"], inputs)
        for a, b in zip(actual, expected, strict=True):
            assert relative_error(a, b) < 3e-2
    empty = [x[:0] for x in float32(make_inputs("simplex"))]
    assert [x.shape for x in rule(*empty)] == [(0, 20, 2, 6), (0, 2, 8, 6)]


@pytest.mark.parametrize("name", FAST)
def test_large_batches_are_taken_by_blocks_of_rows(name):
    inputs = for_rule(name, make_inputs("simplex", 12, 40, 8, 64, 64))
    expected = exact(ORACLE[name], inputs)
    actual = results(FAST[name], inputs)
    assert max(relative_error(a, b) for a, b in zip(actual, expected, strict=True)) < 1e-5
    text = jax.jit(FAST[name]).lower(*float32(inputs)).as_text()
    assert "tensor<3x4x40x8x64xf32>" in text  # 3 blocks of 4 rows


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("chunk_size", [None, 8])
def test_without_gradient_gives_the_same_values(name, chunk_size):
    inputs = float32(for_rule(name, make_inputs("simplex")))
    rules = jax.jit(fast(name, chunk_size)), jax.jit(ORACLE[name])
    for actual, expected in zip(*(rule(*inputs) for rule in rules), strict=True):
        assert relative_error(actual, np.float64(expected)) < 1e-6


@pytest.mark.parametrize("name", FAST)
def test_no_state_means_zeros(name):
    *inputs, weights = float32(for_rule(name, make_inputs("simplex")))
    for rule in (jax.jit(FAST[name]), jax.jit(ORACLE[name])):
        for a, b in zip(rule(*inputs), rule(*inputs, jnp.zeros_like(weights)), strict=True):
            assert relative_error(a, np.float64(b)) < 1e-6


@pytest.mark.quick
@pytest.mark.parametrize("name", FAST)
def test_bfloat16_accumulates_in_float32(name):
    inputs = [jnp.asarray(x, jnp.bfloat16) for x in for_rule(name, make_inputs("simplex"))]
    inputs[-1] = inputs[-1].astype(jnp.float32)
    rounded = [np.asarray(x, np.float64) for x in inputs]
    out, weights = jax.jit(FAST[name])(*inputs)
    assert (out.dtype, weights.dtype) == (jnp.bfloat16, jnp.float32)
    expected_out, expected_weights = exact(ORACLE[name], rounded)[:2]
    assert relative_error(weights, expected_weights) < 1e-6
    assert relative_error(out, expected_out) < 2**-8
    gradients = jax.grad(lambda *x: jnp.sum(FAST[name](*x)[1]), argnums=tuple(range(len(inputs))))
    found = jax.eval_shape(gradients, *inputs)
    assert [g.dtype for g in found] == [x.dtype for x in inputs]


@pytest.mark.parametrize("name", FAST)
def test_causal(name):
    inputs = float32(for_rule(name, make_inputs("simplex")))
    past = jax.jit(
        jax.grad(
            lambda *x: jnp.sum(FAST[name](*x, chunk_size=4)[0][:, :9] ** 2),
            argnums=tuple(range(len(inputs) - 1)),
        )
    )(*inputs)
    for gradient in past:
        np.testing.assert_array_equal(gradient[:, 9:], 0.0)
        assert np.abs(gradient[:, :9]).max() > 0


@pytest.mark.parametrize("name", FAST)
def test_there_must_be_a_token(name):
    *tokens, weights = float32(for_rule(name, make_inputs("simplex")))
    with pytest.raises(UserError, match="at least one token"):
        FAST[name](*(x[:, :0] for x in tokens), weights)


def test_no_rows_is_no_crash():
    tokens = float32(make_inputs("simplex"))[:4]
    out, weights = jax.jit(delta_rule)(*(x[:0] for x in tokens))
    assert (out.shape, weights.shape) == ((0, 20, 2, 6), (0, 2, 8, 6))


def test_chunk_size_must_be_positive():
    inputs = float32(make_inputs("simplex"))
    with pytest.raises(UserError, match="chunk_size=0"):
        delta_rule(*inputs, chunk_size=0)


attend = jax.jit(fast_weight_attention, static_argnames=("update_rule", "attn_normalization"))
COMPOSITIONS = [
    ("sum", "none"),
    ("sum", "output"),
    ("delta", "none"),
    ("delta", "output"),
    ("delta", "output_and_key"),
]


def by_definition(q, k, v, beta, state, *, update_rule, attn_normalization, eps=1e-5):
    """The equations of the normalisations, token by token, in float64 numpy."""
    if state is None:
        w = np.zeros((q.shape[0], q.shape[2], q.shape[3], v.shape[3]))
        z = np.zeros(w.shape[:3])
    else:
        w, z = state
    outs = []
    for t in range(q.shape[1]):
        key, value = k[:, t], v[:, t]
        strength = np.ones(key.shape[:-1]) if beta is None else beta[:, t]
        if attn_normalization == "output_and_key":
            d = np.sum(z * key, -1)
            if t == 0 and state is None:
                d = np.ones_like(d)
            strength, key = strength * d, key / (d + eps)[..., None]
        old = np.einsum("bnk,bnkv->bnv", key, w) if update_rule == "delta" else 0.0
        w = w + np.einsum("bnk,bnv->bnkv", key, strength[..., None] * (value - old))
        z = z + k[:, t]
        out = np.einsum("bnk,bnkv->bnv", q[:, t], w)
        if attn_normalization != "none":
            out = out / (np.sum(z * q[:, t], -1) + eps)[..., None]
        outs.append(out)
    return np.stack(outs, 1), FastWeightState(w, z)


@pytest.mark.parametrize(("update_rule", "attn_normalization"), COMPOSITIONS)
@pytest.mark.parametrize("carried", [False, True])
def test_attention_equals_definition(update_rule, attn_normalization, carried):
    q, k, v, beta, weights = make_inputs("simplex", length=37)
    beta = None if update_rule == "sum" else beta
    state = FastWeightState(weights, 1 + k[:, 0]) if carried else None
    names = {"update_rule": update_rule, "attn_normalization": attn_normalization}
    expected = by_definition(q, k, v, beta, state, **names)
    actual = attend(*float32((q, k, v, beta, state)), **names)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert relative_error(a, b) < 2e-6


@pytest.mark.parametrize(("update_rule", "attn_normalization"), COMPOSITIONS)
@pytest.mark.parametrize("split", [1, 16])
def test_split_and_resume_equals_one_call(update_rule, attn_normalization, split):
    q, k, v, beta, _ = float32(make_inputs("simplex", length=37))
    names = {"update_rule": update_rule, "attn_normalization": attn_normalization}

    def run(bounds):
        outs, state = [], None
        for start, stop in bounds:
            part = [x[:, start:stop] for x in (q, k, v, beta)]
            if update_rule == "sum":
                part[3] = None
            out, state = attend(*part, state, **names)
            outs.append(out)
        return np.concatenate(outs, axis=1), *state

    whole, parts = run([(0, 37)]), run([(0, split), (split, 37)])
    for a, b in zip(parts, whole, strict=True):
        assert relative_error(a, np.float64(b)) < 2e-6


@pytest.mark.parametrize(("update_rule", "attn_normalization"), COMPOSITIONS)
def test_zero_features_stay_finite(update_rule, attn_normalization):
    q, k, v, beta, _ = make_inputs("simplex", length=9)
    q[:, :2] = k[:, :2] = 0  # as sum_normalize leaves an all-zero DPFP feature
    k[:, 5] = 0
    q, k, v, beta = float32((q, k, v, beta))
    beta = None if update_rule == "sum" else beta

    def loss(q, k, v):
        out, state = fast_weight_attention(
            q, k, v, beta, None, update_rule=update_rule, attn_normalization=attn_normalization
        )
        return jnp.sum(out**2) + jnp.sum(state.weights)

    value, gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(q, k, v)
    assert all(np.isfinite(x).all() for x in (value, *gradients))


@pytest.mark.parametrize(
    ("name", "update_rule", "attn_normalization"),
    # By chunks, by chunks, at once; normalisations take all features at once.
    [(name, rule, "none") for name in ("dpfp", "wide favor", "favor") for rule in FAST]
    + [("dpfp", "sum", "output"), ("dpfp", "delta", "output_and_key")],
)
def test_features_inside_equal_features_outside(name, update_rule, attn_normalization):
    *_, v, beta, _ = float32(make_inputs("simplex", length=37))
    q, k = float32(np.random.default_rng(0).normal(size=(2, *v.shape[:3], 4)))
    if name == "dpfp":
        features = Partial(partial(dpfp, n_roll=2))
    else:
        width = 8 if name == "wide favor" else 4
        features = Partial(favor, projection=favor_projection(jax.random.key(1), 4, width))
    features = Partial(lambda f, x: sum_normalize(f(x)), features)
    beta = beta if update_rule == "delta" else None

    @partial(jax.jit, static_argnums=0)
    def run(inside, q, k, v, beta):
        def rule(q, k, v, beta):
            q, k = (q, k) if inside else (features(q), features(k))
            names = {"update_rule": update_rule, "attn_normalization": attn_normalization}
            return fast_weight_attention(
                q, k, v, beta, None, features=features if inside else None, **names
            )

        values, pull = jax.vjp(rule, q, k, v, beta)
        return values, pull(jax.tree.map(jnp.cos, values))

    pairs = [jax.tree.leaves(run(inside, q, k, v, beta)) for inside in (True, False)]
    for a, b in zip(*pairs, strict=True):
        assert relative_error(a, np.float64(b)) < 2e-6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"update_rule": "hebb"}, "unknown update_rule 'hebb': expected one of sum, delta"),
        ({"attn_normalization": "l2"}, "expected one of none, output, output_and_key"),
        ({"beta": None}, "besides q, k and v, and was given"),
        ({"update_rule": "sum"}, "besides q, k and v, and was given"),
        ({"update_rule": "sum", "beta": None, "attn_normalization": "output_and_key"}, "rescales"),
    ],
)
def test_attention_refuses(change, message):
    q, k, v, beta, _ = float32(make_inputs("simplex"))
    arguments = {"beta": beta, "update_rule": "delta", "attn_normalization": "none"} | change
    with pytest.raises(UserError, match=message):
        fast_weight_attention(q, k, v, arguments.pop("beta"), None, **arguments)
