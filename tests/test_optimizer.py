"""Schedules at their corners, and the optimizer against Adam written out in float64.

Whole trajectories are compared with the official ones in test_golden_training.py.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fwm.checkpoint import Checkpoints
from fwm.errors import UserError
from fwm.optimizer import SCHEDULES, adam, decays, learning_rate


def test_schedules():
    rate = {n: learning_rate(n, 0.1, 10, 100) for n in SCHEDULES}
    at = lambda name, t: float(rate[name](jnp.float32(t)))
    for name in ("cosine", "constant"):
        assert at(name, 1) == pytest.approx(0.01)
        assert at(name, 9) == pytest.approx(0.09)
    assert at("cosine", 10) == pytest.approx(0.05 * (1 + np.cos(np.pi * 0.1)))
    assert at("cosine", 50) == pytest.approx(0.05)
    assert at("cosine", 99) == pytest.approx(0.05 * (1 + np.cos(np.pi * 0.99)), rel=1e-5)
    assert at("cosine", 100) == at("cosine", 101) == 0.0
    assert at("constant", 10) == at("constant", 1000) == pytest.approx(0.1)
    assert at("inv_sqrt", 5) == pytest.approx(0.1 * 5 / 10**1.5)
    assert at("inv_sqrt", 10) == pytest.approx(0.1 / 10**0.5)
    assert at("inv_sqrt", 40) == pytest.approx(0.1 / 40**0.5)
    for name in SCHEDULES:  # without warmup
        assert 0.0 < float(learning_rate(name, 0.1, 0, 100)(jnp.float32(1))) <= np.float32(0.1)
    with pytest.raises(UserError, match="'linear': expected one of cosine, inv_sqrt, constant, w"):
        learning_rate("linear", 0.1, 10, 100)


def test_warmup_stable_decay():
    rate = learning_rate("wsd", 0.1, 10, 100, 20)
    found = [float(rate(jnp.float32(t))) for t in (1, 10, 50, 80, 90, 99, 100, 101)]
    expected = [0.01, 0.1, 0.1, 0.1, 0.05, 0.005, 0.0, 0.0]
    np.testing.assert_allclose(found, expected, rtol=2e-6, atol=1e-9)
    # A tenth of the steps unless said.
    assert float(learning_rate("wsd", 0.1, 0, 100)(jnp.float32(95))) == pytest.approx(0.05)
    with pytest.raises(UserError, match=r"warmup_step=90 and 20 steps .* than config.train.max_st"):
        learning_rate("wsd", 0.1, 90, 100, 20)
    with pytest.raises(UserError, match="decay_step=20 has no meaning for the scheduler cosine"):
        learning_rate("cosine", 0.1, 10, 100, 20)


@pytest.mark.parametrize("clip", [0.0, 0.25])
def test_adam_on_clipped_gradients(clip):
    rng = np.random.default_rng(0)
    grads = rng.normal(size=(5, 7)) * np.array([1.0, 1e-3, 10.0, 1e-5, 1.0])[:, None]
    optimizer = adam(learning_rate("constant", 0.1, 3, 100), clip)
    state = optimizer.init({"x": jnp.zeros(7)})
    m = v = np.zeros(7)
    for t, grad in enumerate(grads, 1):
        updates, state = optimizer.update({"x": jnp.asarray(grad, jnp.float32)}, state)
        norm = np.linalg.norm(grad)
        grad = grad * clip / norm if clip and norm > clip else grad
        m, v = 0.9 * m + 0.1 * grad, 0.999 * v + 0.001 * grad**2
        step = m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
        np.testing.assert_allclose(updates["x"], -0.1 * min(t / 3, 1) * step, rtol=2e-6, atol=1e-9)


PARAMS = {
    "embedding": {"table_0": np.ones((4, 2), np.float32), "proj_0": np.ones((2, 3), np.float32)},
    "softmax": {"bias_0": np.ones(4, np.float32), "cluster_weight": np.ones((1, 2), np.float32)},
    "layers": {
        "ff": {"kernel": np.ones((2, 3, 5), np.float32), "bias": np.ones((2, 5), np.float32)},
        "norm": {"scale": np.ones((2, 3), np.float32)},
    },
    "r_w_bias": np.ones((2, 2), np.float32),
}


def test_what_weight_decay_acts_on():
    assert decays(PARAMS) == {
        "embedding": {"table_0": False, "proj_0": True},
        "softmax": {"bias_0": False, "cluster_weight": True},
        "layers": {"ff": {"kernel": True, "bias": False}, "norm": {"scale": False}},
        "r_w_bias": False,
    }


def test_weight_decay(tmp_path):
    """Beside Adam's step, decoupled from it; what it keeps can be saved."""
    optimizer = adam(learning_rate("constant", 0.1, 0, 100), 0.25, weight_decay=0.5)
    params = jax.tree.map(jnp.asarray, PARAMS)
    zeros, state = jax.tree.map(jnp.zeros_like, params), optimizer.init(params)
    updates, state = optimizer.update(zeros, state, params)
    expected = jax.tree.map(lambda p, yes: -0.1 * 0.5 * p if yes else 0 * p, params, decays(params))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), updates, expected)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(1, {"opt_state": state}, valid_loss=None)
        _, restored = checkpoints.restore({"opt_state": state})
    jax.tree.map(np.testing.assert_array_equal, restored["opt_state"], state)
    plain = lambda *decay: jax.tree.structure(adam(lambda t: t, 0.25, *decay).init(params))
    assert plain() == plain(0.0)  # without it nothing is kept that was not kept before
