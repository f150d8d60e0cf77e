"""Training trajectories of the official code: 25 updates, losses, norms and final parameters."""

import jax
import numpy as np
import pytest
from golden_files import files, load, part

from fwm import data
from fwm.interop import to_lmtool
from fwm.optimizer import adam, learning_rate
from fwm.step import Batch, TrainState, train_step


@pytest.mark.parametrize("name", files("train"))
def test_trajectory(name):
    arrays, config, model, variables = load(name)
    rows, length = config["batch_size"], config["bptt"]
    warmup = int(np.argmax(arrays["learning_rates"])) + 1
    schedule = learning_rate("cosine", config["lr"], warmup, config["max_step"])
    optimizer = adam(schedule, config["clip_grad_norm"])
    params = variables["params"]
    state = TrainState(
        np.int32(0),
        jax.random.key_data(jax.random.key(0)),
        params,
        optimizer.init(params),
        {},
        None,
    )
    step = jax.jit(lambda state, batch: train_step(model, optimizer, schedule, state, batch))
    for i in range(config["steps"]):
        tokens, targets, first = data.train_batch(arrays["stream"], i, rows, length)
        np.testing.assert_array_equal(tokens, arrays["tokens"][i].T)
        np.testing.assert_array_equal(targets, arrays["targets"][i].T)
        batch = Batch(tokens, targets, np.full(rows, first), np.arange(rows))
        state, metrics = step(state, batch)
        np.testing.assert_allclose(metrics["loss"], arrays["losses"][i], rtol=0, atol=1e-5)
        np.testing.assert_allclose(metrics["grad_norm"], arrays["grad_norms"][i], rtol=1e-5)
        np.testing.assert_allclose(
            metrics["learning_rate"], arrays["learning_rates"][i], rtol=1e-6, atol=1e-12
        )
    final = to_lmtool(model.config, {"params": state.params})
    for key, value in part(arrays, "final_param/").items():
        np.testing.assert_allclose(final[key], value, rtol=0, atol=1e-4, err_msg=key)
