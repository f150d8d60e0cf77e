"""Schedules at their corners, and the optimizer against Adam written out in float64.

Whole trajectories are compared with the official ones in test_golden_training.py.
"""

import jax.numpy as jnp
import numpy as np
import pytest

from fwm.errors import UserError
from fwm.optimizer import SCHEDULES, adam, learning_rate


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
    with pytest.raises(UserError, match="'linear': expected one of cosine, inv_sqrt, constant"):
        learning_rate("linear", 0.1, 10, 100)


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
