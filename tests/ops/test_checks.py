"""What does not fit is refused at the door, in a sentence that names both shapes."""

import functools
import inspect
from functools import partial

import jax
import jax.export
import jax.numpy as jnp
import jaxtyping
import numpy as np
import optax
import pytest
from conftest import float32, make_inputs

from fwm import layers, ops
from fwm.errors import UserError
from fwm.layers.parts import FeedForward
from fwm.model import LanguageModel, ModelConfig, empty_memory
from fwm.ops import chunks
from fwm.ops.adaptive_softmax import Cluster, nll, take
from fwm.ops.checks import checked_ids, nan_where_invalid
from fwm.ops.feed_forward import feed_forward
from fwm.ops.softmax import causal_attention, relative_attention

pytestmark = pytest.mark.quick  # see .ci/run

SHAPES = {"q": (2, 6, 2, 3), "k": (2, 6, 2, 3), "v": (2, 6, 2, 4), "beta": (2, 6, 2)}


def arrays(*names, **changed):
    return {name: np.ones(changed.get(name, SHAPES[name]), np.float32) for name in names}


def rule_of_layer(q, k, v, beta, weights=None):
    state = None if weights is None else ops.FastWeightState(weights, jnp.ones((2, 2, 3)))
    attention = inspect.unwrap(ops.fast_weight_attention)
    return attention(q, k, v, beta, state, update_rule="delta", attn_normalization="none")


# Without what the tests themselves check at every call: users have only these doors.
DELTA = {
    "chunked": inspect.unwrap(ops.delta_rule),
    "token by token": inspect.unwrap(ops.recurrent.delta_rule),
    "layer": rule_of_layer,
}


@pytest.mark.parametrize("name", DELTA)
@pytest.mark.parametrize(
    "changed",
    [
        {"beta": (2, 5, 2)}, {"beta": (2, 6, 1)}, {"k": (2, 5, 2, 3)}, {"k": (2, 6, 1, 3)},
        {"k": (2, 6, 2, 4)}, {"v": (2, 5, 2, 4)}, {"v": (1, 6, 2, 4)}, {"q": (6, 2, 3)},
        {"q": (2, 0, 2, 3), "k": (2, 0, 2, 3), "v": (2, 0, 2, 4), "beta": (2, 0, 2)},
    ],
)  # fmt: skip
def test_shapes_that_do_not_fit(name, changed):
    with pytest.raises(UserError) as caught:
        DELTA[name](**arrays("q", "k", "v", "beta", **changed))
    message = str(caught.value)
    assert message.count(". ") == 0
    assert any(str(shape) in message for shape in changed.values())
    assert len(changed) > 1 or "q" in changed or message.count("shape (") == 2


@pytest.mark.parametrize("name", DELTA)
def test_states_dtypes_and_what_is_missing(name):
    fit, rule = arrays("q", "k", "v", "beta"), DELTA[name]
    for weights in ((1, 2, 3, 4), (2, 2, 3, 3), (2, 3, 4)):
        with pytest.raises(UserError, match="weights"):
            rule(**fit, weights=jnp.ones(weights))
    for field in fit:
        for dtype in (np.int32, bool, np.complex64):
            with pytest.raises(UserError, match=f"{field} must be a floating point array"):
                rule(**fit | {field: fit[field].astype(dtype)})
    if name != "layer":
        with pytest.raises(UserError, match=r"beta must be a floating point array .*NoneType"):
            rule(**fit | {"beta": None})


@pytest.mark.parametrize("size", [0, -1, 1.5, True, "8"])
def test_chunk_sizes(size):
    with pytest.raises(UserError, match="chunk_size"):
        inspect.unwrap(chunks.run)(
            ops.UPDATE_RULES["sum"], *arrays("q", "k", "v").values(), chunk_size=size
        )


def test_rules_that_only_read_or_write():
    for changed in ({"v": (2, 5, 2, 4)}, {"beta": (2, 5, 2)}, {"v": (2, 6, 1, 4)}):
        with pytest.raises(UserError, match="does not fit"):
            inspect.unwrap(ops.bounded_delta_rule)(**arrays("k", "v", "beta", **changed))
    with pytest.raises(UserError, match="does not fit"):
        inspect.unwrap(ops.read_weights)(np.ones((2, 1, 3)), arrays("k")["k"])


@pytest.mark.parametrize(
    ("ids", "said"),
    [
        ([0, 5], "id 5 at place 1"), ([-1, 0], "id -1 at place 0"), ([0, 2**32 + 3], "4294967299"),
        ([0.0, 1.5], "float64"), ([[0, 1]], r"\(1, 2\)"), ([True, False], "bool"),
    ],
)  # fmt: skip
def test_ids_outside_the_vocabulary(ids, said):
    with pytest.raises(UserError, match=said):
        checked_ids("the text", ids, 5)
    assert checked_ids("the text", [0, 4], 5).dtype == np.int32


def test_an_id_that_only_a_device_knows_makes_nan():
    x, ids = jnp.ones((1, 4, 2)), jnp.array([[0, 5, -1, 4]])
    found = jax.jit(nan_where_invalid, static_argnums=2)(x, ids, 5)
    np.testing.assert_array_equal(np.isnan(found[0, :, 0]), [False, True, True, False])


@pytest.fixture
def undecorated():
    """Users have only these doors, not the decorators that tests put on every signature."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


LAYERS = {
    "FastWeightAttention": layers.FastWeightAttention(n_head=2, d_head=4),
    "SoftmaxAttention": layers.SoftmaxAttention(n_head=2, d_head=4),
    "RelativeAttention": layers.RelativeAttention(n_head=2, d_head=4),
    "FeedForward": FeedForward(d_inner=8),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_by_themselves(name, undecorated):
    x = jnp.ones((2, 5, 8))
    for wrong in (x[0], x[:, :0], x.astype(int), [1.0]):
        with pytest.raises(UserError, match=f"{name}: .*x "):
            LAYERS[name].init(jax.random.key(0), wrong)


def test_vocabularies_by_themselves(undecorated):
    sizes = dict(n_token=6, d_embed=4, d_model=4, cutoffs=(3,))
    embedding = layers.AdaptiveEmbedding(**sizes)
    ids = jnp.array([[1, 6, -1, 5]])
    variables = embedding.init(jax.random.key(0), ids)
    x = embedding.apply(variables, ids)
    np.testing.assert_array_equal(np.isnan(x[0, :, 0]), [False, True, True, False])
    with pytest.raises(UserError, match="AdaptiveEmbedding: tokens must be an integer array"):
        embedding.apply(variables, ids / 2)
    softmax = layers.AdaptiveSoftmax(**sizes, tie_weight=False, tie_projs=(False, True))
    x = jnp.ones((1, 4, 4))
    nll, variables = softmax.init_with_output(jax.random.key(0), x, ids)
    np.testing.assert_array_equal(np.isnan(nll[0]), [False, True, True, False])
    with pytest.raises(UserError, match=r"targets of shape .1, 3. does not fit hidden of shape"):
        softmax.apply(variables, x, ids[:, :3])


def test_softmax_attention(undecorated):
    q, r, bias = jnp.ones((2, 5, 2, 3)), jnp.ones((5, 2, 3)), jnp.ones((2, 3))
    relative = partial(relative_attention, mem_len=0, scale=1.0, length=jnp.array([0, 0]))
    with pytest.raises(UserError, match=r"causal_attention: q of shape .* more tokens than k"):
        causal_attention(q, q[:, :3], q[:, :3], scale=1.0)
    with pytest.raises(UserError, match=r"relative_attention: q of shape .* more tokens than k"):
        relative(q, q[:, :3], q[:, :3], r[:3], bias, bias)
    with pytest.raises(UserError, match=r"relative_attention: r of .* does not fit k of"):
        relative(q, q, q, r[:3], bias, bias)
    with pytest.raises(UserError, match=r"causal_attention: v of shape .* does not fit"):
        causal_attention(q, q, q[:1], scale=1.0)


@pytest.mark.parametrize("mixer", ["fast_weight", "softmax", "transformer_xl"])
def test_the_memory_of_another_model(mixer):
    sizes = dict(d_model=8, n_head=2, d_head=4, d_inner=8, n_layer=2)
    config = ModelConfig(n_token=9, mixer=mixer, **sizes)
    model, ids = LanguageModel(config), jnp.array([[1, 2], [3, 4]])
    variables = jax.eval_shape(model.init, jax.random.key(0), ids, ids)
    call = lambda memory: jax.eval_shape(model.apply, variables, ids, ids, memory)
    other_rows = empty_memory(config, 3)
    for wrong in (jnp.ones(3), {"a": jnp.ones(3)}, (jnp.ones(3),) * 2, other_rows or jnp.ones(2)):
        with pytest.raises(UserError, match="the memory must be None or what a call with 2 rows"):
            call(wrong)
    call(empty_memory(config, 2))


def test_export_with_symbolic_sizes_is_refused_in_a_sentence():
    batch = jax.export.symbolic_shape("b, 6, 2, 3")
    function = jax.jit(lambda x: DELTA["chunked"](x, x, x, x[..., 0])[0])
    with pytest.raises(UserError, match=r"q has the symbolic shape .*b, 6, 2, 3.* once for every"):
        jax.export.export(function)(jax.ShapeDtypeStruct(batch, np.float32))


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_sums_over_many_tokens_in_16_bits(dtype):
    """The normalised output of values near 1 is near 1, however many tokens have come."""
    x = jnp.full((1, 4000, 1, 4), 8, dtype)
    v = jnp.ones((1, 4000, 1, 2), dtype)
    attend = jax.jit(
        ops.fast_weight_attention, static_argnames=("update_rule", "attn_normalization")
    )
    out, state = attend(x, x, v, None, None, update_rule="sum", attn_normalization="output")
    assert (out.dtype, state.weights.dtype, state.key_sum.dtype) == (dtype, *["float32"] * 2)
    np.testing.assert_allclose(np.asarray(out, np.float64), 1.0, rtol=1e-2)
    np.testing.assert_allclose(state.key_sum, 32000.0, rtol=1e-6)
    large = jnp.full((4,), 3e4, dtype)
    shares = jax.jit(ops.sum_normalize)(large)
    np.testing.assert_allclose(np.asarray(shares, np.float64), 0.25, rtol=1e-2)


def decayed_delta_rule(q, k, v, beta, weights):
    """Two writes a token, and a decay of its own for every feature."""
    return ops.delta_rule(q[:, ::2], k, v, beta, weights, log_decay=-q[:, ::2])


@pytest.mark.parametrize(
    ("rule", "platform"),
    [
        (ops.delta_rule, "cpu"),
        (ops.delta_rule, "gpu"),
        (ops.recurrent.delta_rule, "cpu"),
        (decayed_delta_rule, "cpu"),
    ],
    ids=["chunks", "whole", "tokens", "decay"],
)
def test_shard_map_with_its_default_checks(rule, platform, monkeypatch):
    """Rows on two devices, the state on both: values and gradients as on one."""
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    tokens = float32(make_inputs("simplex", 2, 6, 2, 64, 3))[:4]
    state = jnp.ones((1, 2, 64, 3))

    def gradients(rows, *arguments):
        """Of all rows; the state is the same for each."""

        def loss(*tokens_and_state):
            *tokens, state = tokens_and_state
            n = tokens[0].shape[0]
            out, last = rule(*tokens, jnp.broadcast_to(state, (n, *state.shape[1:])))
            return rows(jnp.sum(out**2) + jnp.sum(last**2))

        return jax.value_and_grad(loss, argnums=tuple(range(5)))(*arguments)

    spec, whole = jax.sharding.PartitionSpec("rows"), jax.sharding.PartitionSpec()
    mesh = jax.make_mesh((2,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.shard_map(
        lambda *x: gradients(lambda y: jax.lax.psum(y, "rows"), *x),
        mesh=mesh,
        in_specs=(*[spec] * 4, whole),
        out_specs=(whole, (*[spec] * 4, whole)),
    )
    found = jax.jit(split)(*tokens, state)
    expected = jax.jit(functools.partial(gradients, lambda y: y))(*tokens, state)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_shard_map_of_a_model_without_and_with_rows(platform, monkeypatch):
    """With the forms of either platform."""
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    sizes = dict(d_model=8, n_head=2, d_head=4, d_inner=8, n_layer=2, cutoffs=(4,))
    model = LanguageModel(ModelConfig(n_token=9, no_pos=True, **sizes))
    ids = jnp.array([[1, 2, 8], [3, 7, 2]])
    variables = jax.jit(model.init)(jax.random.key(0), ids, ids)

    def gradients(variables, ids):
        return jax.grad(lambda v: jnp.sum(model.apply(v, ids, ids)[0]))(variables)

    mesh = jax.make_mesh((2,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
    whole, rows = jax.sharding.PartitionSpec(), jax.sharding.PartitionSpec("rows")
    split = jax.shard_map(gradients, mesh=mesh, in_specs=(whole, rows), out_specs=whole)
    gradients = jax.jit(gradients)
    found, expected = jax.jit(split)(variables, ids), gradients(variables, ids)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    for leaf in jax.tree.leaves(gradients(variables, ids[:0])):
        np.testing.assert_array_equal(leaf, 0.0)


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_second_derivatives_of_a_model(platform, monkeypatch):
    """Forward over reverse, against differences of gradients; plain forward mode is refused."""
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    sizes = dict(d_model=8, n_head=2, d_head=4, d_inner=8, n_layer=2, cutoffs=(4,))
    model = LanguageModel(ModelConfig(n_token=9, feature_map="elu", **sizes))
    ids = jnp.array([[1, 2, 8], [3, 7, 2]])
    variables = jax.jit(model.init)(jax.random.key(0), ids, ids)
    variables = jax.tree.map(lambda x: 5 * x, variables)  # from where it is nearly linear
    loss = lambda v: jnp.sum(model.apply(v, ids, ids)[0])
    direction = jax.tree.map(jnp.cos, variables)
    move = lambda step: jax.tree.map(lambda v, d: v + step * d, variables, direction)

    @jax.jit
    def both(variables):
        return jax.jvp(jax.grad(loss), (variables,), (direction,))

    found = jnp.concatenate([x.ravel() for x in jax.tree.leaves(both(variables)[1])])
    low, high = (
        jnp.concatenate([x.ravel() for x in jax.tree.leaves(both(move(step))[0])])
        for step in (-1e-3, 1e-3)
    )
    expected = (high - low) / 2e-3
    assert jnp.linalg.norm(found - expected) < 1e-2 * jnp.linalg.norm(expected)
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(loss, (variables,), (direction,))
    slope = lambda v: optax.tree.norm(jax.grad(loss)(v))
    with pytest.raises(
        UserError, match=r"no reverse mode over reverse .*jax\.jvp\(jax\.grad\(loss\)"
    ):
        jax.eval_shape(jax.grad(slope), variables)


@pytest.mark.parametrize(
    ("rule", "platform"), [("sum_rule", "cpu"), ("delta_rule", "cpu"), ("delta_rule", "gpu")]
)
def test_forward_mode_names_what_has_it(rule, platform, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    q, k, v, beta, weights = float32(make_inputs("simplex", 1, 3, 1, 40, 2))
    arrays = (q, k, v, beta, weights) if rule == "delta_rule" else (q, k, v, weights)
    with pytest.raises(TypeError, match="forward-mode") as raised:
        jax.jvp(getattr(ops, rule), arrays, arrays)
    assert chunks.FORWARD_MODE in raised.value.__notes__
    tangent = jax.jvp(getattr(ops.recurrent, rule), arrays, arrays)[1]
    assert jnp.isfinite(tangent[0]).all()


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_gradients_of_bfloat16_parameters(platform, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    x = jnp.ones((3000, 4), jnp.float32)
    half = lambda *shape: jnp.full(shape, 0.5, jnp.bfloat16)
    d_bias = jax.jit(
        jax.grad(lambda b: jnp.sum(feed_forward(1.0, x, None, half(4, 3), half(3), half(3, 4), b)))
    )
    found = d_bias(half(4))
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(found, np.float64), 3000, rtol=2**-8)
    clusters = (Cluster(0, 0, 0, 3), Cluster(0, 0, 3, 2))
    arguments = (x,), (half(5, 4),), (half(5),), half(1, 4), half(1)
    loss = lambda *arguments: jnp.sum(nll(clusters, *arguments, jnp.full(3000, 4)))
    shapes = jax.eval_shape(jax.grad(loss, argnums=tuple(range(5))), *arguments)
    for got, given in zip(jax.tree.leaves(shapes), jax.tree.leaves(arguments), strict=True):
        assert got.dtype == given.dtype
    # All 3000 tokens read the same row.
    d_table = jax.jit(jax.grad(lambda t: jnp.sum(take(t, jnp.zeros(3000, int))[0])))(half(2, 4))
    np.testing.assert_allclose(np.asarray(d_table[0], np.float64), 3000, rtol=2**-8)
