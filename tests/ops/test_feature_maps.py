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

    @jax.jit
    def out_and_gradient(x, cotangent):
        out, pull = jax.vjp(features, x)
        return out, pull(cotangent)[0]

    def run(dtype):
        return out_and_gradient(*(jnp.asarray(golden[name], dtype) for name in ("x", "g_out")))

    for actual, name in zip(run(jnp.float32), ("out", "dx"), strict=True):
        assert relative_error(actual, golden[name]) < 1e-6
    with jax.enable_x64(True):
        for actual, name in zip(run(jnp.float64), ("out", "dx"), strict=True):
            assert relative_error(actual, golden[name]) < 1e-12


def test_elu_gradient_stays_finite_far_from_zero():
    gradient = jax.jit(jax.grad(lambda x: elu_plus_one(x).sum()))(jnp.array([-1e4, 1e4]))
    np.testing.assert_array_equal(gradient, [0.0, 1.0])


def test_all_zero_dpfp_gives_zeros():
    x = jnp.array([[1.0, -1.0, 1.0], [1.0, 1.0, 1.0]])  # odd size, alternating signs; ordinary

    @jax.jit
    def out_and_gradient(x):
        out, pull = jax.vjp(lambda x: sum_normalize(dpfp(x, 1)), x)
        return out, pull(jnp.ones_like(out))[0]

    out, gradient = map(np.asarray, out_and_gradient(x))
    np.testing.assert_array_equal(out[0], 0.0)
    np.testing.assert_allclose(out[1].sum(), 1.0, rtol=1e-6)
    assert np.isfinite(gradient).all()
    np.testing.assert_array_equal(gradient[0], 0.0)


def test_dpfp_rolls_more_than_once_around():
    # The official code runs with n_roll = 9 and d_head = 4 (eight places to roll over).
    x = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    z = np.maximum(np.concatenate([x, -x], axis=-1), 0)
    expected = [[row[j] * row[(j - i) % 8] for i in range(1, 10) for j in range(8)] for row in z]
    actual = jax.jit(dpfp, static_argnums=1)(x, 9)
    np.testing.assert_allclose(actual, expected, rtol=1e-6)


@pytest.mark.parametrize("n_roll", [0, -1])
def test_dpfp_refuses_n_roll(n_roll):
    with pytest.raises(UserError, match="choose 1 or more"):
        dpfp(jnp.ones((2, 4)), n_roll)


@pytest.mark.parametrize(("d_head", "proj_dim"), [(8, 8), (8, 24), (16, 6)])
def test_favor_projection_has_orthogonal_rows(d_head, proj_dim):
    draw = jax.vmap(lambda key: favor_projection(key, d_head, proj_dim))
    draws = np.asarray(jax.jit(lambda: draw(jax.random.split(jax.random.key(0), 300)))())
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
    x, y = jnp.asarray(np.random.default_rng(1).normal(size=(2, 4)) / 2, jnp.float32)

    @jax.jit
    @jax.vmap
    def product(seed):
        projection = favor_projection(jax.random.key(seed), 4, 8)
        return favor(x, projection) @ favor(y, projection)

    products = np.asarray(product(np.arange(4000)))
    error = 5 * products.std() / np.sqrt(len(products)) + 1e-3
    assert abs(products.mean() - np.exp(np.dot(x, y))) < error
