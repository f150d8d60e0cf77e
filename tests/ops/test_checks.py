"""What does not fit is refused at the door, in a sentence that names both shapes."""

import inspect

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

from fwm import ops
from fwm.errors import UserError
from fwm.ops import chunks
from fwm.ops.checks import checked_ids, nan_where_invalid

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
