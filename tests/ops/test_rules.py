"""Rules as values: own ones with and without a chunked form, gradients of everything they read."""

import importlib.util
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import exact, float32, make_inputs, relative_error, results
from jax.tree_util import Partial

from fwm import registry
from fwm.errors import UserError
from fwm.ops import UPDATE_RULES, Chunked, Input, Rule, chunks, fast_weight_attention, recurrent

EXAMPLE = Path(__file__).parents[2] / "examples" / "own_rule.py"


@pytest.fixture(scope="module")
def decayed():
    """The rule of examples/own_rule.py."""
    spec = importlib.util.spec_from_file_location("own_rule", EXAMPLE)
    with registry.recording() as entries:
        spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    assert "update_rule=decayed_sum" in entries
    yield UPDATE_RULES["decayed_sum"], module
    del UPDATE_RULES["decayed_sum"]


def decays(shape):
    return -np.random.default_rng(3).exponential(0.2, shape)


def decayed_inputs(length, n_key=8, n_value=6):
    q, k, v, beta, weights = make_inputs("simplex", 2, length, 2, n_key, n_value)
    return q, k, v, decays(beta.shape), weights


def by(rule, q, k, v, g, weights=None, **options):
    return chunks.run(rule, q, k, v, (g,), weights, **options)


def definition(step, q, k, v, g, weights=None):
    return recurrent.scan_tokens(step, q, k, v, (g,), weights)


def test_rules_of_the_table_equal_their_equations():
    """By chunks, token by token and as written in the papers; a key of zeros writes nothing."""
    q, k, v, beta, weights = make_inputs("simplex", 2, 37, 2, 8, 6)
    k[:, 5], rng = 0, np.random.default_rng(0)
    k[:, 6] *= 5
    c, erase, write = (rng.random(shape) for shape in (beta.shape, k.shape, v.shape))
    square = np.sum(k * k, axis=-1)
    safe = np.where(square == 0, 1, square)
    strength = np.where(square == 0, beta, (1 - np.exp(-beta * safe)) / safe)
    plain = {
        "error_free": ((beta,), (v, strength, k)),
        "comba": ((beta, c), (v, beta, c[..., None] * k)),
        "gated_delta2": ((erase, write), (write * v, np.ones_like(beta), erase * k)),
    }

    @jax.jit
    def everything(q, k, v, weights, inputs):
        def run(name, chunked):
            rule = UPDATE_RULES[name]
            rule = rule if chunked else rule._replace(chunked=None)
            loss = lambda *x: jnp.sum(chunks.run(rule, q, *x[:2], x[2:], weights)[0])
            grads = jax.grad(loss, argnums=tuple(range(2 + len(inputs[name]))))
            found = chunks.run(rule, q, k, v, inputs[name], weights)
            return [*found, *grads(k, v, *inputs[name])]

        return [[run(name, chunked) for chunked in (True, False)] for name in plain]

    given = {name: inputs for name, (inputs, _) in plain.items()}
    found = everything(*float32((q, k, v, weights, given)))
    for (name, (_, (value, strength, p))), both in zip(plain.items(), found, strict=True):
        w, outs = weights, []
        for t in range(37):
            wrong = value[:, t] - np.einsum("bnk,bnkv->bnv", p[:, t], w)
            w = w + np.einsum("bnk,bnv->bnkv", k[:, t], strength[:, t, :, None] * wrong)
            outs.append(np.einsum("bnk,bnkv->bnv", q[:, t], w))
        for values in both:
            assert relative_error(values[0], np.stack(outs, 1)) < 1e-5, name
            assert relative_error(values[1], w) < 1e-5, name
        for a, b in zip(*both, strict=True):
            assert np.isfinite(a).all(), name
            assert relative_error(a, np.float64(b)) < 2e-5, name


@pytest.mark.parametrize("length", [1, 7, 37, 100])
@pytest.mark.parametrize("form", ["chunks", "tokens", "chunks, no fill neutral"])
def test_own_rule_equals_its_definition(decayed, length, form):
    rule, _ = decayed
    step, inputs = rule.step, decayed_inputs(length)
    if form == "tokens":
        rule = rule._replace(chunked=None)
    elif form == "chunks, no fill neutral":
        # The decay as a factor: the token that changes nothing has 1, not 0.
        factor = Input("factor", jax.nn.sigmoid, neutral=1.0)
        forward = lambda m, q, k, v, f: decayed[0].chunked.forward(m, q, k, v, jnp.log(f))
        step = lambda w, k, v, f: decayed[0].step(w, k, v, jnp.log(f))
        rule = Rule(step, (factor,), chunked=Chunked(forward))
        inputs = (*inputs[:3], np.exp(inputs[3]), inputs[4])
    expected = exact(partial(definition, step), inputs)
    for actual, wanted in zip(results(partial(by, rule), inputs), expected, strict=True):
        assert relative_error(actual, wanted) < 1e-5


def test_token_by_token_keeps_few_states(decayed):
    rule, _ = decayed
    q, k, v, g, weights = float32(decayed_inputs(160))
    slow = rule._replace(chunked=None)
    _, pull = jax.vjp(lambda *tokens: by(slow, *tokens), q, k, v, g, weights)
    states = [x for x in jax.tree.leaves(pull) if x.ndim == 5 and x.shape[-2:] == (8, 6)]
    assert sum(len(x) for x in states) <= 160 // recurrent.KEPT_EVERY


@pytest.mark.quick
def test_inputs_of_every_key_feature():
    """Gated linear attention: a decay for each row of the memory."""
    step = lambda w, k, v, g: jnp.exp(g)[..., None] * w + k[..., :, None] * v[..., None, :]

    def forward(m, q, k, v, g):
        def token(m, x):
            q, k, v, g = (y[:, None] for y in x)
            m = m * jnp.exp(g) + v.mT * k
            return m, (q @ m.mT)[:, 0]

        def chunk(m, tokens):
            m, out = jax.lax.scan(token, m, jax.tree.map(lambda x: x.swapaxes(0, 1), tokens))
            return m, out.swapaxes(0, 1)

        return *jax.lax.scan(chunk, m, (q, k, v, g)), None

    rule = Rule(step, (Input("g", jax.nn.log_sigmoid, per_key=True),), chunked=Chunked(forward))
    q, k, v, _, weights = make_inputs("simplex", 2, 37, 2, 8, 6)
    inputs = (q, k, v, decays(k.shape), weights)
    expected = exact(partial(definition, step), inputs)
    for actual, wanted in zip(results(partial(by, rule), inputs), expected, strict=True):
        assert relative_error(actual, wanted) < 1e-5


def test_tokens_that_only_fill_up_change_nothing():
    """Also where a rule has no input that could say so, and a map makes something of zeros."""
    step = lambda w, k, v: (
        w + k[..., :, None] * (v - jnp.einsum("bnk,bnkv->bnv", k, w))[..., None, :]
    )

    def forward(m, q, k, v):
        def token(m, x):
            q, k, v = (y[:, None] for y in x)
            m = m + (v - k @ m.mT).mT * k
            return m, (q @ m.mT)[:, 0]

        def chunk(m, tokens):
            m, out = jax.lax.scan(token, m, jax.tree.map(lambda x: x.swapaxes(0, 1), tokens))
            return m, out.swapaxes(0, 1)

        return *jax.lax.scan(chunk, m, (q, k, v)), None

    q, k, v, _, weights = make_inputs("simplex", 2, 37, 2, 4, 6)
    weights = np.concatenate([weights] * 4, axis=2)
    w = np.random.default_rng(1).normal(size=(4, 16))
    softplus = lambda w, x: jax.nn.softplus(x @ w) / 16  # of 0 not 0

    def run(rule, q, k, v, w, weights):
        return chunks.run(rule, q, k, v, (), weights, Partial(softplus, w), chunk_size=16)

    expected = exact(partial(run, Rule(step)), (q, k, v, w, weights))
    actual = results(partial(run, Rule(step, chunked=Chunked(forward))), (q, k, v, w, weights))
    for a, b in zip(actual, expected, strict=True):
        assert relative_error(a, b) < 1e-5


@pytest.mark.parametrize(
    # K < 4 H: all features at once; from K = 4 H on by chunks; a large memory: by blocks of rows
    ("width", "rows", "n_value"),
    [(8, 2, 6), (16, 2, 6), (24, 2, 6), (16, 6, 1024)],
)
@pytest.mark.parametrize("update_rule", ["sum", "delta", "decayed_sum"])
def test_arrays_of_a_feature_map_have_gradients(update_rule, width, rows, n_value, decayed):
    """Against finite differences: they were silently zero where K >= 4 H."""
    rng = np.random.default_rng(0)
    shape = (rows, 21, 2)
    arrays = [rng.normal(size=(*shape, n)) for n in (4, 4, n_value, n_value)]
    w, direction = rng.normal(size=(2, 4, width)) / 2
    reads = {"sum": {}, "delta": {"beta": 0.5}, "decayed_sum": {"decay": -0.1}}[update_rule]

    def loss(w, q, k, v, cotangent):
        inputs = {name: jnp.full(shape, value) for name, value in reads.items()}
        out, state = fast_weight_attention(
            q, k, v, inputs.pop("beta", None), None, update_rule=update_rule,
            attn_normalization="none", inputs=inputs,
            features=Partial(lambda w, x: jax.nn.softplus(x @ w) / width, w),
        )  # fmt: skip
        return jnp.sum(out * cotangent) + jnp.sum(state.weights)

    with jax.enable_x64(True):
        value, gradient = jax.jit(loss), jax.jit(jax.grad(loss))
        slope = jnp.sum(gradient(w, *arrays) * direction)
        low, high = (value(w + sign * 1e-5 * direction, *arrays) for sign in (-1, 1))
        assert abs(slope) > 1e-3
        np.testing.assert_allclose(slope, (high - low) / 2e-5, rtol=1e-6)


def test_normalisation_is_refused_where_the_key_sum_would_not_decay(decayed):
    q, k, v, g, _ = float32(decayed_inputs(5))
    attend = partial(fast_weight_attention, q, k, v, None, None, update_rule="decayed_sum")
    with pytest.raises(UserError, match="does not say how its own is made"):
        attend(attn_normalization="output", inputs={"decay": g})
    with pytest.raises(UserError, match="reads decay besides q, k and v, and was given nothing"):
        attend(attn_normalization="none")
    out, state = attend(attn_normalization="none", inputs={"decay": g})
    np.testing.assert_array_equal(state.key_sum, 0.0)
    expected, _ = definition(decayed[0].step, q, k, v, g)
    assert relative_error(out, np.float64(expected)) < 1e-5
    with pytest.raises(UserError, match="has a decay of its own: give it no other"):
        attend(attn_normalization="none", inputs={"decay": g}, log_decay=g)
    UPDATE_RULES["decayed_sum"] = decayed[0]._replace(update=None)
    with pytest.raises(UserError, match="decayed_sum says its step only: make it with"):
        attend(attn_normalization="none", inputs={"decay": g}, log_decay=g)
    UPDATE_RULES["decayed_sum"] = decayed[0]


def test_a_key_sum_decays_where_the_memory_does():
    """With values of one and `output`, what is read is one, at any split."""
    q, k, v, _, _ = float32(make_inputs("simplex", length=12))
    by_head = jnp.asarray(decays(k.shape[:3]), jnp.float32)
    attend = jax.jit(partial(fast_weight_attention, update_rule="sum", eps=0.0,
                             attn_normalization="output"))  # fmt: skip
    for g in (by_head, jnp.repeat(by_head[..., None], 8, axis=-1)):
        outs, state = [], None
        for part in (slice(0, 5), slice(5, 12)):
            cut = [x[:, part] for x in (q, k, jnp.ones_like(v))]
            out, state = attend(*cut, None, state, log_decay=g[:, part])
            outs.append(out)
        np.testing.assert_allclose(jnp.concatenate(outs, axis=1), 1.0, rtol=1e-5)


@pytest.mark.quick
def test_a_rule_may_bring_its_own_key_sum(decayed):
    """With it `output` divides by what the memory holds of ones."""
    rule, _ = decayed

    def key_sums(k, before, g, last=False):
        step = lambda z, x: ((z := jnp.exp(x[1])[..., None] * z + x[0]), z)
        z, every = jax.lax.scan(step, before, (k.swapaxes(0, 1), g.swapaxes(0, 1)))
        return z if last else every.swapaxes(0, 1)

    UPDATE_RULES["decayed_sum"] = rule._replace(key_sums=key_sums)
    q, k, v, g, _ = float32(decayed_inputs(12))
    out, _ = fast_weight_attention(
        q, k, jnp.ones_like(v), None, None, update_rule="decayed_sum",
        attn_normalization="output", inputs={"decay": g}, eps=0.0,
    )  # fmt: skip
    np.testing.assert_allclose(out, 1.0, rtol=1e-5)
    UPDATE_RULES["decayed_sum"] = rule
