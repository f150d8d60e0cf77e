"""The adaptive softmax against a dense log-softmax, for every arrangement of its parameters."""

from functools import cache
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fwm.errors import UserError
from fwm.layers.vocabulary import AdaptiveEmbedding, AdaptiveSoftmax
from fwm.ops import adaptive_softmax as adaptive

N_TOKEN, D_MODEL, CUTOFFS, SHAPE = 300, 16, (50, 100, 200), (3, 29)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Many blocks, a rest of tokens in each cluster and a word block that overlaps the last."""
    monkeypatch.setattr(adaptive, "_CPU", adaptive._Blocks((16, 3), (8, 2), 21, 33))


def dense(params, hidden, tables, projs, *, cutoffs, div_val, tie_weight, tie_projs):
    """log p of every word, as REFERENCE defines it: every token against every cluster."""
    log_probs, head = [], None
    for i, (low, high) in enumerate(pairwise((0, *cutoffs, N_TOKEN))):
        j, rows = (0, slice(low, high)) if div_val == 1 else (i, slice(None))
        table = (tables[j] if tie_weight else params[f"table_{j}"])[rows]
        bias = params[f"bias_{j}"][rows]
        h = hidden
        if projs and tie_projs[i]:
            h = h @ projs[j].T
        elif projs:
            h = h @ params[f"proj_{i}"]
        if i == 0 and cutoffs:
            table = jnp.concatenate([table, params["cluster_weight"]])
            bias = jnp.concatenate([bias, params["cluster_bias"]])
        part = jax.nn.log_softmax(h @ table.T + bias[None, None, :])
        if i == 0:
            head, part = part, part[..., :high]
        else:
            part = part + head[..., -i][..., None]
        log_probs.append(part)
    return jnp.concatenate(log_probs, axis=-1)


def dense_nll(params, hidden, targets, tables, projs, **options):
    log_probs = dense(params, hidden, tables, projs, **options)
    return -jnp.take_along_axis(log_probs, targets[..., None], axis=-1)[..., 0]


def make(d_embed=D_MODEL, cutoffs=CUTOFFS, div_val=1, tie_weight=True, tie_projs=None):
    """The modules' parameters at random, large enough for a sharp softmax."""
    tie_projs = (False, *(True for _ in cutoffs)) if tie_projs is None else tie_projs
    sizes = dict(n_token=N_TOKEN, d_embed=d_embed, d_model=D_MODEL)
    sizes |= dict(cutoffs=cutoffs, div_val=div_val)
    embed = AdaptiveEmbedding(**sizes)
    softmax = AdaptiveSoftmax(**sizes, tie_weight=tie_weight, tie_projs=tie_projs)
    rng = np.random.default_rng(0)
    targets = jnp.array(rng.integers(0, N_TOKEN, SHAPE), jnp.int32)
    hidden = jnp.array(rng.normal(size=(*SHAPE, D_MODEL)), jnp.float32)

    def init():
        emb = embed.init(jax.random.key(0), targets)
        bound = embed.bind(emb)
        own = softmax.init(jax.random.key(1), hidden, targets, bound.tables, bound.projs)
        return own["params"], bound.tables, bound.projs

    params, tables, projs = jax.tree.map(
        lambda x: jnp.asarray((rng.normal(size=x.shape) * 0.4).astype(np.float32)),
        jax.eval_shape(init),
    )
    options = dict(cutoffs=cutoffs, div_val=div_val, tie_weight=tie_weight, tie_projs=tie_projs)
    return softmax, options, (params, hidden, targets, tables, projs)


def close(a, b, rel=1e-5):
    assert a.shape == b.shape
    assert a.dtype == b.dtype
    scale = np.max(np.abs(b)) if b.size else 0.0
    np.testing.assert_allclose(a, b, rtol=rel, atol=rel * scale)


def with_gradients(nll_of):
    """nll, and gradients under a cotangent that differs by token and is zero for some."""

    def run(params, hidden, targets, tables, projs):
        weight = np.random.default_rng(5).normal(size=targets.shape)
        weight[0, 1::3] = 0
        nll, pull = jax.vjp(
            lambda p, h, t, j: nll_of(p, h, targets, t, j), params, hidden, tables, projs
        )
        return nll, pull(jnp.array(weight, jnp.float32))

    return jax.jit(run)


def both(softmax, options):
    fast = with_gradients(lambda p, *rest: softmax.apply({"params": p}, *rest))
    return fast, with_gradients(lambda *a: dense_nll(*a, **options))


@cache
def one_table():
    """The commonest arrangement, compiled once per shape for all tests."""
    softmax, options, arguments = make()
    return both(softmax, options), arguments


ARRANGEMENTS = {
    "one table": {},
    "no cutoffs": dict(cutoffs=()),
    "no cutoffs, projected": dict(cutoffs=(), d_embed=12),
    "untied": dict(tie_weight=False),
    "projected": dict(d_embed=12),
    "projected, all tied": dict(d_embed=12, tie_projs=(True,) * 4),
    "projected, mixed": dict(d_embed=12, tie_projs=(True, False, True, False), tie_weight=False),
    "div_val 2": dict(div_val=2),
    "div_val 2, no cutoffs": dict(cutoffs=(), div_val=2),
    "div_val 2, untied": dict(div_val=2, tie_weight=False, tie_projs=(False,) * 2, cutoffs=(7,)),
    "div_val 4, last width 0": dict(div_val=4, cutoffs=(50, 200), d_embed=12),
}


@pytest.mark.parametrize("name", ARRANGEMENTS)
def test_equals_dense_in_value_and_every_gradient(name):
    softmax, options, arguments = make(**ARRANGEMENTS[name])
    fast, slow = both(softmax, options)
    got, expected = fast(*arguments), slow(*arguments)
    params, hidden, _, tables, projs = arguments
    assert got[0].dtype == jnp.float32
    jax.tree.map(close, got, expected)

    @jax.jit
    def distributions(params, *rest):
        fast = softmax.apply({"params": params}, *rest, method="log_probs")
        return fast, dense(params, *rest, **options)

    close(*distributions(params, hidden, tables, projs))


def test_every_distribution_of_targets():
    (fast, slow), (params, hidden, _, tables, projs) = one_table()
    head = jnp.arange(hidden[..., 0].size, dtype=jnp.int32).reshape(SHAPE) % 50
    borders = jnp.array([0, 49, 50, 99, 100, 199, 200, 299], jnp.int32)
    cases = {
        "none in a tail": head,
        "all in the last": 200 + head * 2,
        "all in the first": 50 + head,
        "all the same word": jnp.full(SHAPE, 199, jnp.int32),
        "one in the middle": head.at[1, 5].set(130),
        "borders": borders[head % 8],
    }
    for targets in cases.values():
        arguments = params, hidden, targets, tables, projs
        jax.tree.map(close, fast(*arguments), slow(*arguments))


@pytest.mark.parametrize("usual", [0, 7, 1000])
def test_the_blocks_of_a_gpu_give_the_same(usual, monkeypatch):
    """Whether a tail has far more tokens than expected, a few more, or none too many."""
    monkeypatch.setattr(adaptive, "_CPU", adaptive._Blocks((40,), None, 21, 33))
    if usual:
        monkeypatch.setattr(adaptive, "_usual_tokens", lambda n, low, high: min(n, usual))
    else:
        monkeypatch.setattr(adaptive, "_CPU", adaptive._GPU)
    softmax, options, (params, hidden, _, tables, projs) = make()
    fast, slow = both(softmax, options)  # not those of `one_table`, compiled with other sizes
    head = jnp.arange(hidden[..., 0].size, dtype=jnp.int32).reshape(SHAPE) % 50
    for targets in (head, 200 + head * 2, head * 6):
        arguments = params, hidden, targets, tables, projs
        jax.tree.map(close, fast(*arguments), slow(*arguments))


def test_a_single_token():
    (fast, slow), (params, hidden, _, tables, projs) = one_table()
    for word in (0, 50, 299):
        arguments = params, hidden[:1, :1], jnp.full((1, 1), word, jnp.int32), tables, projs
        jax.tree.map(close, fast(*arguments), slow(*arguments))


@pytest.mark.parametrize("shift", [100.0, -100.0])
def test_exponentials_neither_overflow_nor_vanish(shift):
    (fast, slow), (params, *rest) = one_table()
    params = {k: v + shift if "bias" in k else v for k, v in params.items()}
    jax.tree.map(close, fast(params, *rest), slow(params, *rest))


def test_pmap_on_two_devices_equals_one():
    softmax, options, (params, hidden, targets, tables, projs) = make()
    hidden, targets = (jnp.stack([x, x[::-1]]) for x in (hidden, targets))

    def loss(params, hidden, targets, tables, projs):
        return softmax.apply({"params": params}, hidden, targets, tables, projs).mean()

    def step(*arguments):
        gradients = jax.grad(loss, (0, 3))(*arguments)
        return jax.lax.pmean(gradients, "devices")

    got = jax.pmap(step, "devices", in_axes=(None, 0, 0, None, None))(
        params, hidden, targets, tables, projs
    )
    slow = lambda p, h, y, t, j: dense_nll(p, h, y, t, j, **options).mean()
    flat = params, hidden.reshape(6, 29, -1), targets.reshape(6, 29), tables, projs
    expected = jax.jit(jax.grad(slow, (0, 3)))(*flat)
    jax.tree.map(lambda a, b: close(a[0], b), got, expected)
    jax.tree.map(lambda a: np.testing.assert_array_equal(a[0], a[1]), got)


def test_bfloat16_hidden_states():
    softmax, options, (params, hidden, targets, tables, projs) = make(d_embed=12)
    fast, slow = both(softmax, options)
    nll, gradients = fast(params, hidden.astype(jnp.bfloat16), targets, tables, projs)
    nll_slow, gradients_slow = slow(params, hidden, targets, tables, projs)
    assert nll.dtype == jnp.float32
    assert gradients[1].dtype == jnp.bfloat16
    assert {x.dtype for x in jax.tree.leaves((gradients[0], *gradients[2:]))} == {
        jnp.dtype("float32")
    }
    close(nll, nll_slow, 2e-2)
    for a, b in zip(jax.tree.leaves(gradients), jax.tree.leaves(gradients_slow), strict=True):
        error = np.linalg.norm((np.asarray(a, np.float32) - np.asarray(b)).ravel())
        assert error < 2e-2 * np.linalg.norm(np.ravel(b))


def test_no_logits_of_the_whole_batch_in_memory(monkeypatch):
    monkeypatch.undo()
    n, d, cutoffs, n_token = 4096, 32, (20000, 40000, 200000), 267735
    softmax = AdaptiveSoftmax(n_token, d, d, cutoffs, tie_projs=(False, True, True, True))
    shape = lambda *s, dtype=jnp.float32: jax.ShapeDtypeStruct(s, dtype)
    arguments = shape(1, n, d), shape(1, n, dtype=jnp.int32), (shape(n_token, d),), ()
    params = jax.eval_shape(softmax.init, jax.random.key(0), *arguments)
    step = jax.jit(jax.grad(lambda p, *a: softmax.apply(p, *a).mean(), (0, 1, 3)))
    memory = step.lower(params, *arguments).compile().memory_analysis()
    # The logits of the head alone would be 328 MB.
    assert memory.temp_size_in_bytes < 20e6


@pytest.mark.parametrize("kwargs", [{}, dict(d_embed=12), dict(div_val=2), dict(div_val=4)])
def test_embedding(kwargs):
    cutoffs, rng = CUTOFFS, np.random.default_rng(3)
    kwargs = dict(d_embed=D_MODEL, div_val=1) | kwargs
    embed = AdaptiveEmbedding(n_token=N_TOKEN, d_model=D_MODEL, cutoffs=cutoffs, **kwargs)
    tokens = jnp.array(rng.integers(0, N_TOKEN, SHAPE), jnp.int32).at[0, :2].set(7)
    variables = jax.jit(embed.init)(jax.random.key(0), tokens)
    params = variables["params"]
    bounds = (0, *cutoffs, N_TOKEN)
    if kwargs["div_val"] == 1:
        widths = [kwargs["d_embed"]]
        sizes = [N_TOKEN]
    else:
        widths = [D_MODEL // kwargs["div_val"] ** i for i in range(4)]
        sizes = [high - low for low, high in pairwise(bounds)]
    shapes = {f"table_{i}": s for i, s in enumerate(zip(sizes, widths, strict=True))}
    if kwargs["div_val"] > 1 or kwargs["d_embed"] != D_MODEL:
        shapes |= {f"proj_{i}": (w, D_MODEL) for i, w in enumerate(widths)}
    assert {k: v.shape for k, v in params.items()} == shapes
    assert abs(np.std(params["table_0"]) - 0.02) < 2e-3

    def slow(params):
        one_hot = jax.nn.one_hot(tokens, N_TOKEN)
        rows = [
            params[f"table_{i}"] @ params[f"proj_{i}"] if f"proj_{i}" in params
            else params[f"table_{i}"]
            for i in range(len(sizes))
        ]  # fmt: skip
        return one_hot @ jnp.concatenate(rows)

    weight = jnp.array(rng.normal(size=(*SHAPE, D_MODEL)), jnp.float32)

    # Both uses of the tables at once, as in a tied model.
    def tied(embed_fn):
        def loss(params):
            x, tables = embed_fn(params)
            return jnp.sum(x * weight) + sum(jnp.sum(t**2) for t in tables)

        return jax.jit(jax.value_and_grad(loss))(params)

    tables_of = lambda p: [p[f"table_{i}"] for i in range(len(sizes))]
    close(*jax.jit(lambda v: (embed.apply(v, tokens), slow(v["params"])))(variables))
    jax.tree.map(
        close,
        tied(lambda p: embed.apply({"params": p}, tokens, method="with_tables")),
        tied(lambda p: (slow(p), tables_of(p))),
    )


def test_parameter_names_and_initial_values():
    kwargs = dict(n_token=N_TOKEN, d_embed=D_MODEL, d_model=D_MODEL, cutoffs=CUTOFFS, div_val=2)
    softmax = AdaptiveSoftmax(**kwargs, tie_projs=(False, True, True, True))
    embed = AdaptiveEmbedding(**kwargs)
    tokens = jnp.zeros((1, 2), jnp.int32)

    @jax.jit
    def init():
        emb = embed.bind(embed.init(jax.random.key(0), tokens))
        hidden = jnp.zeros((1, 2, D_MODEL))
        return softmax.init(jax.random.key(0), hidden, tokens, emb.tables, emb.projs)["params"]

    params = init()
    assert {k: v.shape for k, v in params.items()} == {
        "bias_0": (50,), "bias_1": (50,), "bias_2": (100,), "bias_3": (100,),
        "cluster_weight": (3, 16), "cluster_bias": (3,), "proj_0": (16, 16),
    }  # fmt: skip
    assert not any(np.any(params[k]) for k in params if "bias" in k)
    assert 0.005 < np.std(params["cluster_weight"]) < 0.04
    assert abs(np.std(params["proj_0"]) - 0.01) < 2e-3


@pytest.mark.parametrize("cutoffs", [(50, 50), (100, 50), (0, 50), (50, 300), (400,)])
def test_cutoffs_that_do_not_ascend_are_refused(cutoffs):
    tokens = jnp.zeros((1, 2), jnp.int32)
    with pytest.raises(UserError, match="cutoffs"):
        AdaptiveEmbedding(N_TOKEN, 8, 8, cutoffs).init(jax.random.key(0), tokens)


def test_tie_projs_of_wrong_length_is_refused():
    softmax = AdaptiveSoftmax(N_TOKEN, 8, 8, CUTOFFS, tie_projs=(False, True))
    with pytest.raises(UserError, match="2 entries for 4 clusters"):
        softmax.init(jax.random.key(0), jnp.zeros((1, 2, 8)), jnp.zeros((1, 2), jnp.int32))
