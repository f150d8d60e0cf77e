"""Feature maps against the official code's numbers, and what those do not cover."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import relative_error

from fwm.errors import UserError
from fwm.ops import dpfp, elu_plus_one, favor, favor_projection, sum_normalize

FILES = sorted((Path(__file__).parents[1] / "golden").glob("op_features_*.npz"))


@pytest.mark.parametrize("golden", FILES, indirect=True, ids=lambda path: path.stem)
def test_feature_map_equals_official(golden):
    flags = json.loads(str(golden["config"]))

    def features(x):
        match flags["feature"]:
            case "elu_p1":
                y = elu_plus_one(x)
            case "dpfp":
                y = dpfp(x, flags["n_roll"])
            case "favor_prime":
                y = favor(x, jnp.asarray(golden["proj_matrix"], x.dtype))
        return sum_normalize(y) if flags["sum_norm"] else y

    def run(dtype):
        out, pull = jax.vjp(features, jnp.asarray(golden["x"], dtype))
        return out, pull(jnp.asarray(golden["g_out"], dtype))[0]

    for actual, name in zip(run(jnp.float32), ("out", "dx"), strict=True):
        assert relative_error(actual, golden[name]) < 1e-6
    with jax.enable_x64(True):
        for actual, name in zip(run(jnp.float64), ("out", "dx"), strict=True):
            assert relative_error(actual, golden[name]) < 1e-12


def test_elu_gradient_stays_finite_far_from_zero():
    gradient = jax.grad(lambda x: elu_plus_one(x).sum())(jnp.array([-1e4, 1e4]))
    np.testing.assert_array_equal(gradient, [0.0, 1.0])


def test_all_zero_dpfp_gives_zeros():
    x = jnp.array([[1.0, -1.0, 1.0], [1.0, 1.0, 1.0]])  # odd size, alternating signs; ordinary
    out, pull = jax.vjp(lambda x: sum_normalize(dpfp(x, 1)), x)
    np.testing.assert_array_equal(out[0], 0.0)
    np.testing.assert_allclose(out[1].sum(), 1.0, rtol=1e-6)
    gradient = pull(jnp.ones_like(out))[0]
    assert np.isfinite(gradient).all()
    np.testing.assert_array_equal(gradient[0], 0.0)


def test_dpfp_rolls_more_than_once_around():
    # The official code runs with n_roll = 9 and d_head = 4 (eight places to roll over).
    x = jax.random.normal(jax.random.key(0), (3, 4))
    z = np.maximum(np.concatenate([x, -x], axis=-1), 0)
    expected = [[row[j] * row[(j - i) % 8] for i in range(1, 10) for j in range(8)] for row in z]
    np.testing.assert_allclose(dpfp(x, 9), expected, rtol=1e-6)


@pytest.mark.parametrize("n_roll", [0, -1])
def test_dpfp_refuses_n_roll(n_roll):
    with pytest.raises(UserError, match="choose 1 or more"):
        dpfp(jnp.ones((2, 4)), n_roll)


@pytest.mark.parametrize(("d_head", "proj_dim"), [(8, 8), (8, 24), (16, 6)])
def test_favor_projection_has_orthogonal_rows(d_head, proj_dim):
    keys = jax.random.split(jax.random.key(0), 300)
    draws = np.asarray(jax.vmap(lambda key: favor_projection(key, d_head, proj_dim))(keys))
    for start in range(0, d_head, proj_dim):
        rows = draws[:, start : start + proj_dim]
        gram = np.abs(rows @ rows.swapaxes(1, 2))
        diagonal = np.eye(rows.shape[1], dtype=bool)
        assert gram[:, ~diagonal].max(initial=0.0) < 1e-4
    # Lengths of Gaussian vectors: mean square proj_dim. Five standard errors, and some.
    mean_square = (draws**2).sum(-1).mean()
    assert abs(mean_square / proj_dim - 1) < 6 * np.sqrt(2 / proj_dim / draws.shape[0] / d_head)


def test_favor_estimates_the_softmax_kernel():
    # The mean over projections approaches exp(x y), to the 1e-4 that is added to each feature.
    x, y = jax.random.normal(jax.random.key(1), (2, 4)) / 2
    keys = jax.random.split(jax.random.key(0), 4000)
    products = jax.vmap(
        lambda key: favor(x, favor_projection(key, 4, 8)) @ favor(y, favor_projection(key, 4, 8))
    )(keys)
    error = 5 * products.std() / np.sqrt(len(keys)) + 1e-3
    assert abs(products.mean() - jnp.exp(x @ y)) < error
