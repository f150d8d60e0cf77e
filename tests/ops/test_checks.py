"""What does not fit is refused at the door, in a sentence that names both shapes."""

import inspect

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import float32, make_inputs

from fwm import ops
from fwm.errors import UserError
from fwm.model import LanguageModel, ModelConfig
from fwm.ops import chunks
from fwm.ops.adaptive_softmax import Cluster, nll, take
from fwm.ops.checks import checked_ids, nan_where_invalid
from fwm.ops.feed_forward import feed_forward

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
    out, state = ops.fast_weight_attention(
        x, x, v, None, None, update_rule="sum", attn_normalization="output"
    )
    assert (out.dtype, state.weights.dtype, state.key_sum.dtype) == (dtype, *["float32"] * 2)
    np.testing.assert_allclose(np.asarray(out, np.float64), 1.0, rtol=1e-2)
    np.testing.assert_allclose(state.key_sum, 32000.0, rtol=1e-6)
    large = jnp.full((4,), 3e4, dtype)
    np.testing.assert_allclose(np.asarray(ops.sum_normalize(large), np.float64), 0.25, rtol=1e-2)


@pytest.mark.parametrize(
    ("rule", "platform"),
    [(ops.delta_rule, "cpu"), (ops.delta_rule, "gpu"), (ops.recurrent.delta_rule, "cpu")],
    ids=["chunks", "whole", "tokens"],
)
def test_shard_map_with_its_default_checks(rule, platform, monkeypatch):
    """Rows on two devices, the state on both: values and gradients as on one."""
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    tokens = float32(make_inputs("simplex", 2, 5, 2, 64, 3))[:4]
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
    expected = gradients(lambda y: y, *tokens, state)
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
    found, expected = jax.jit(split)(variables, ids), jax.jit(gradients)(variables, ids)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    for leaf in jax.tree.leaves(jax.jit(gradients)(variables, ids[:0])):
        np.testing.assert_array_equal(leaf, 0.0)


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_gradients_of_bfloat16_parameters(platform, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    x = jnp.ones((3000, 4), jnp.float32)
    half = lambda *shape: jnp.full(shape, 0.5, jnp.bfloat16)
    d_bias = jax.grad(
        lambda b: jnp.sum(feed_forward(1.0, x, None, half(4, 3), half(3), half(3, 4), b))
    )
    found = d_bias(half(4))
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(found, np.float64), 3000, rtol=2**-8)
    clusters = (Cluster(0, 0, 0, 3), Cluster(0, 0, 3, 2))
    arguments = (x,), (half(5, 4),), (half(5),), half(1, 4), half(1)
    loss = lambda *arguments: jnp.sum(nll(clusters, *arguments, jnp.full(3000, 4)))
    for got, given in zip(
        jax.tree.leaves(jax.grad(loss, argnums=tuple(range(5)))(*arguments)),
        jax.tree.leaves(arguments),
        strict=True,
    ):
        assert got.dtype == given.dtype
    # All 3000 tokens read the same row.
    d_table = jax.grad(lambda t: jnp.sum(take(t, jnp.zeros(3000, int))[0]))(half(2, 4))
    np.testing.assert_allclose(np.asarray(d_table[0], np.float64), 3000, rtol=2**-8)
