"""Every gradient of every public op against finite differences, in every form that it can take."""

from functools import partial
from itertools import starmap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_inputs
from jax.tree_util import Partial

from fwm import ops
from fwm.ops import chunks, dropout, feed_forward, softmax
from fwm.ops import feature_maps as maps
from fwm.ops.adaptive_softmax import Cluster, log_probs, nll, take

pytestmark = pytest.mark.quick  # see .ci/run

Q, K, V, BETA, WEIGHTS = make_inputs("simplex", 2, 7, 2, 3, 2)
RNG = np.random.default_rng(3)
LONG = [np.concatenate([x] * 6, axis=1) for x in (Q, K, V, BETA)]  # 42 tokens: several chunks
WIDE = RNG.normal(size=(3, 12)) / 2


def normal(*shape):
    return RNG.normal(size=shape)


def normalised(update_rule, attn_normalization, wide=None):
    """`fast_weight_attention`; wide: with a map to so many features inside."""
    names = ["q", "k", "v", "weights", "key_sum"]
    arrays = dict(zip(names, (*LONG[:3], np.abs(WEIGHTS), np.abs(WEIGHTS[..., 0])), strict=True))
    if update_rule == "delta":
        arrays["beta"] = LONG[3]
    if wide:
        arrays["map"] = WIDE[:, :wide]
        for name in ("weights", "key_sum"):
            arrays[name] = np.concatenate([arrays[name]] * 4, axis=2)[:, :, :wide]

    def attend(*given):
        a = dict(zip(arrays, given, strict=True))
        return ops.fast_weight_attention(
            a["q"], a["k"], a["v"], a.get("beta"), ops.FastWeightState(a["weights"], a["key_sum"]),
            update_rule=update_rule, attn_normalization=attn_normalization,
            features=Partial(lambda w, x: jax.nn.softplus(x @ w) / 4, a["map"]) if wide else None,
        )  # fmt: skip

    return attend, tuple(arrays.values())


def rules():
    """(function, arrays) of the update rules: plain, and as the one algebra."""
    head, channel = -RNG.exponential(size=(2, 7, 2)), -RNG.exponential(size=(2, 7, 2, 3))
    k2, v2, beta2 = (np.concatenate([x, x[:, ::-1]], axis=1) for x in (K, V, BETA))
    for form, module in (("chunks", ops), ("tokens", ops.recurrent)):
        delta, sums = module.delta_rule, module.sum_rule
        yield f"sum {form}", sums, (Q, K, V, WEIGHTS)
        yield f"delta {form}", delta, (Q, K, V, BETA, WEIGHTS)
        for name, g in (("head", head), ("channel", channel)):
            decayed = lambda q, k, v, w, g, f=sums: f(q, k, v, w, log_decay=g)
            yield f"sum {name} {form}", decayed, (Q, K, V, WEIGHTS, g)
            several = lambda q, k, v, b, w, g, p, f=delta: f(
                q, k, v, b, w, log_decay=g, erase_key=p
            )
            erased = normal(*k2.shape) / 2
            yield f"delta {name} {form}", several, (Q, k2, v2, beta2, WEIGHTS, g, erased)
    yield "delta, long", ops.delta_rule, (*LONG, WEIGHTS)
    yield "sum, long", ops.sum_rule, (*LONG[:3], WEIGHTS)
    yield "delta, one chunk each", partial(ops.delta_rule, chunk_size=1), (Q, K, V, BETA, WEIGHTS)
    yield "delta head at once", at_once, (*LONG, WEIGHTS, np.concatenate([head] * 6, axis=1))
    yield "delta, rows", in_rows(partial(ops.delta_rule, chunk_size=4)), (Q, K, V, BETA, WEIGHTS)
    yield "no chunks", own_rule, (Q, K, V, BETA, WEIGHTS)


def own_rule(q, k, v, beta, weights):
    """A rule without a chunked form, over more tokens than are kept."""
    rule = ops.Rule(ops.recurrent.delta_step, (ops.Input("beta", jax.nn.sigmoid),))
    q, k, v, beta = (jnp.concatenate([x] * 3, axis=1) for x in (q, k, v, beta))
    return chunks.run(rule, q, k, v, (beta,), weights)


def at_once(q, k, v, beta, weights, log_decay):
    """As on a GPU."""
    on_cpu = chunks.on_cpu
    chunks.on_cpu = lambda: False
    try:
        return ops.delta_rule(q, k, v, beta, weights, log_decay=log_decay)
    finally:
        chunks.on_cpu = on_cpu


def in_rows(rule):
    """As where a memory is so large that rows are taken in blocks."""

    def run(*arguments):
        plan = chunks._plan
        chunks._plan = lambda *a: plan(*a)._replace(n_row=1)
        try:
            return rule(*arguments)
        finally:
            chunks._plan = plan

    return run


def attentions():
    q, k, v = normal(3, 2, 5, 2, 3)
    yield "softmax", partial(softmax.causal_attention, scale=0.5), (q, k, v)
    yield "softmax, last", partial(softmax.causal_attention, scale=0.5), (q[:, -2:], k, v)
    long = [np.concatenate([x] * 14, axis=1) for x in (q, k, v)]
    yield "softmax, blocks", partial(softmax.causal_attention, scale=0.5), long
    source = dropout.Dropout(jax.random.key(0), jnp.arange(2))
    drop = lambda x: dropout.drop(x, source, 0, 0.3)
    yield "softmax, dropout", partial(softmax.causal_attention, scale=0.5, dropout=drop), (q, k, v)
    yield "dropout", drop, (q,)
    relative = lambda *a, **options: softmax.relative_attention(
        *a, length=jnp.array([1, 2]), mem_len=2, scale=0.5, **options
    )
    arrays = (q[:, -3:], k, v, normal(5, 2, 3), *normal(2, 2, 3))
    yield "relative", relative, arrays
    yield "relative, same length", partial(relative, same_length=True), arrays
    yield "relative, dropout", partial(relative, dropout=drop), arrays

    def rows(*arguments):
        limit = softmax._CPU_SCORES
        softmax._CPU_SCORES = 1
        try:
            return relative(*arguments)
        finally:
            softmax._CPU_SCORES = limit

    yield "relative, rows", rows, arrays


def others():
    x = normal(6, 4)
    for name, f in (
        ("elu", maps.elu_plus_one), ("dpfp", partial(maps.dpfp, n_roll=2)),
        ("l2", maps.l2_normalize), ("sum", lambda x: maps.sum_normalize(jnp.exp(x))),
    ):  # fmt: skip
        yield name, f, (x,)
    yield "favor", maps.favor, (x, normal(4, 3))
    weights = normal(4, 5), normal(5), normal(5, 4), normal(4)
    keep = jnp.asarray(RNG.random((6, 5)) < 0.7)
    for name, tokens, mask in (
        ("feed-forward", x, None), ("feed-forward, dropout", x, keep),
        ("feed-forward, parts", np.concatenate([x] * 700), None),
    ):  # fmt: skip
        yield (
            name,
            lambda x, *w, m=mask: feed_forward.feed_forward(1.25, x, m, *w),
            (tokens, *weights),
        )
    yield "read sum", ops.read_weights, (Q[:, 0], K)
    yield "read delta", ops.read_weights, (Q[:, 0], K, BETA)
    yield "bounded", ops.bounded_delta_rule, (4 * K, V, BETA)
    yield "take", lambda t: take(t, jnp.array([1, 1, 0])), (normal(3, 4),)


def of_the_softmax():
    """It computes in float32."""
    x = normal(6, 4)
    clusters = Cluster(0, 0, 0, 3), Cluster(0, 0, 3, 2), Cluster(1, 1, 0, 4)
    targets = jnp.array([0, 2, 3, 4, 5, 8])

    def unpacked(f, *last):
        def of(h, h_1, t, t_1, b, b_1, cluster_weight, cluster_bias):
            return f(clusters, (h, h_1), (t, t_1), (b, b_1), cluster_weight, cluster_bias, *last)

        return of

    arrays = x, x[:, :2], *starmap(normal, [(5, 4), (4, 2), (5,), (4,), (2, 4), (2,)])
    yield "nll", unpacked(nll, targets), [a * 0.5 for a in arrays]
    yield "log_probs", unpacked(log_probs), [a * 0.5 for a in arrays]


def normalisations():
    for rule, norm in (("sum", "output"), ("delta", "output"), ("delta", "output_and_key")):
        yield f"{rule} {norm}", *normalised(rule, norm)
        yield f"{rule} {norm}, map inside", *normalised(rule, norm, 12)
    for rule in ("sum", "delta"):
        yield f"{rule} none, narrow map inside", *normalised(rule, "none", 6)
        yield f"{rule} none, wide map inside", *normalised(rule, "none", 12)


@pytest.mark.parametrize("cases", [rules, attentions, others, normalisations, of_the_softmax])
def test_gradients_equal_finite_differences(cases):
    """All of a kind in one program: argument i of every op is moved at once, then i + 1."""
    single = cases is of_the_softmax
    dtype, step, tolerance = (np.float32, 1e-2, 2e-3) if single else (np.float64, 1e-5, 1e-6)
    functions, arrays = {}, {}
    with jax.enable_x64(not single):
        for name, function, given in cases():
            functions[name], arrays[name] = function, [np.asarray(x, dtype) for x in given]

        def losses(arrays):
            found = {}
            for name, function in functions.items():
                outputs = jax.tree.leaves(function(*arrays[name]))
                # A different weight for every number, the same at every call.
                found[name] = sum(jnp.sum(x * np.cos(_numbers(x))) for x in outputs)
            return sum(found.values()), found

        def moved(i, step):
            """The losses with argument i of every op moved."""
            changed = {name: list(a) for name, a in arrays.items()}
            for a in changed.values():
                if i < len(a):
                    a[i] = a[i] + step * _direction(a[i])
            return jax.device_get(both(changed)[0][1])

        both = jax.jit(jax.value_and_grad(losses, has_aux=True))
        found = jax.device_get(both(arrays)[1])
        for i in range(max(map(len, arrays.values()))):
            low, high = moved(i, -step), moved(i, step)
            for name, gradient in found.items():
                if i < len(gradient):
                    slope = np.sum(gradient[i] * _direction(gradient[i]))
                    expected, says = (high[name] - low[name]) / (2 * step), f"{name}, argument {i}"
                    assert abs(slope) > 1e-4, says
                    np.testing.assert_allclose(slope, expected, rtol=tolerance, err_msg=says)


# In numpy, where a new shape compiles nothing.


def _numbers(x):
    return np.arange(x.size, dtype=x.dtype).reshape(x.shape)


def _direction(x):
    return np.sin(1 + _numbers(x))
