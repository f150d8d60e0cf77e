"""The adaptive softmax against a dense log-softmax, for every arrangement of its parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fwm.adaptive import AdaptiveEmbedding, AdaptiveSoftmax
from fwm.errors import UserError

N_TOKEN, D_MODEL, CUTOFFS = 300, 16, (50, 100, 200)


def dense_nll(params, hidden, targets, tables, projs, *, cutoffs, div_val, tie_weight, tie_projs):
    """The official definition, all of it: every token against every word of every cluster."""
    bounds = (0, *cutoffs, N_TOKEN)
    log_probs, head = [], None
    for i, (low, high) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        j, rows = (0, slice(low, high)) if div_val == 1 else (i, slice(None))
        table = (tables[j] if tie_weight else params[f"table_{j}"])[rows]
        bias = params[f"bias_{j}"][rows]
        h = hidden
        if f"proj_{i}" in params:
            h = h @ params[f"proj_{i}"]
        elif projs and tie_projs[i]:
            h = h @ projs[j].T
        if i == 0 and cutoffs:
            table = jnp.concatenate([table, params["cluster_weight"]])
            bias = jnp.concatenate([bias, params["cluster_bias"]])
        part = jax.nn.log_softmax(h @ table.T + bias[None, None, :])
        if i == 0:
            head, part = part, part[..., :high]
        else:
            part = part + head[..., -i][..., None]
        log_probs.append(part)
    every = jnp.concatenate(log_probs, axis=-1)
    return -jnp.take_along_axis(every, targets[..., None], axis=-1)[..., 0], every


def make(d_embed=D_MODEL, cutoffs=CUTOFFS, div_val=1, tie_weight=True, tie_projs=None, seed=0):
    tie_projs = (False, *(True for _ in cutoffs)) if tie_projs is None else tie_projs
    kwargs = dict(n_token=N_TOKEN, d_embed=d_embed, d_model=D_MODEL)
    kwargs |= dict(cutoffs=cutoffs, div_val=div_val)
    embed = AdaptiveEmbedding(**kwargs)
    softmax = AdaptiveSoftmax(**kwargs, tie_weight=tie_weight, tie_projs=tie_projs)
    rng = np.random.default_rng(seed)
    tokens = jnp.array(rng.integers(0, N_TOKEN, (3, 29)))
    emb = embed.init(jax.random.key(seed), tokens)["params"]
    tables = tuple(v for k, v in sorted(emb.items()) if k.startswith("table"))
    projs = tuple(v for k, v in sorted(emb.items()) if k.startswith("proj"))
    hidden = jnp.array(rng.normal(size=(3, 29, D_MODEL)), jnp.float32)
    own = softmax.init(jax.random.key(1), hidden, tokens, tables, projs)["params"]
    big = lambda tree: jax.tree.map(
        lambda x: jnp.array(rng.normal(size=x.shape) * 0.4, jnp.float32), tree
    )
    options = dict(cutoffs=cutoffs, div_val=div_val, tie_weight=tie_weight, tie_projs=tie_projs)
    return softmax, options, (big(own), hidden, tokens, big(tables), big(projs))


def close(a, b, rel=1e-5):
    assert a.shape == b.shape
    assert a.dtype == b.dtype
    scale = float(jnp.max(jnp.abs(b))) if b.size else 0.0
    np.testing.assert_allclose(a, b, rtol=rel, atol=rel * scale)


def compare(softmax, options, arguments, rel=1e-5):
    params, hidden, targets, tables, projs = arguments
    weight = jnp.array(np.random.default_rng(5).normal(size=targets.shape), jnp.float32)
    weight = weight.at[0, ::3].set(0.0)

    def fast(params, hidden, tables, projs):
        nll = softmax.apply({"params": params}, hidden, targets, tables, projs)
        return jnp.sum(nll * weight), nll

    def slow(params, hidden, tables, projs):
        nll, _ = dense_nll(params, hidden, targets, tables, projs, **options)
        return jnp.sum(nll * weight), nll

    run = lambda f: jax.jit(jax.value_and_grad(f, (0, 1, 2, 3), has_aux=True))(
        params, hidden, tables, projs
    )
    ((_, nll), grads), ((_, nll_slow), grads_slow) = run(fast), run(slow)
    close(nll, nll_slow, rel)
    assert jax.tree.structure(grads) == jax.tree.structure(grads_slow)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(grads_slow), strict=True):
        close(a, b, rel)


ARRANGEMENTS = {
    "one table": {},
    "plain softmax": dict(cutoffs=()),
    "plain, projected": dict(cutoffs=(), d_embed=12),
    "div_val 2 without cutoffs": dict(cutoffs=(), div_val=2),
    "untied": dict(tie_weight=False),
    "projected": dict(d_embed=12),
    "projected, all tied": dict(d_embed=12, tie_projs=(True,) * 4),
    "projected, none tied": dict(d_embed=12, tie_projs=(False,) * 4, tie_weight=False),
    "projected, mixed": dict(d_embed=12, tie_projs=(True, False, True, False)),
    "div_val 2": dict(div_val=2),
    "div_val 2, untied": dict(div_val=2, tie_weight=False, tie_projs=(False,) * 4),
    "div_val 4": dict(div_val=4),
    "div_val 4, width 0": dict(div_val=4, d_embed=12, tie_projs=(True, False, True, True)),
    "one cutoff": dict(cutoffs=(7,)),
}


@pytest.mark.parametrize("name", ARRANGEMENTS)
def test_equals_dense(name):
    compare(*make(**ARRANGEMENTS[name]))
