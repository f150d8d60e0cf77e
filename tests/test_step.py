"""The pure step: masks, parts of a batch and devices make no difference to what is counted."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from real_runs import assert_same_bits

from configs import default
from fwm import parallel, step
from fwm.config import build_config
from fwm.model import LanguageModel
from fwm.optimizer import adam, learning_rate
from fwm.step import Batch, init_state, train_step, valid_step
from fwm.tasks import Synthetic, Task

ROWS, LENGTH = 4, 6
FIELDS = {
    "d_model": 16, "n_head": 2, "d_head": 4, "d_inner": 32, "n_layer": 1, "dropout": 0.2,
    "feature_map": "elu", "no_pos": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def parts():
    """A model, its optimizer and schedule, and a state that carries a memory."""
    config = default.defaults()
    config.model.update(FIELDS)
    model = LanguageModel(build_config(config.model.to_dict(), 20))
    schedule = learning_rate("constant", 0.01, 0, 10)
    optimizer = adam(schedule, 0.0)
    init = functools.partial(init_state, model, optimizer, 1, ROWS)
    return model, optimizer, schedule, jax.jit(init)()


@pytest.fixture(scope="module")
def update(parts):
    """The step on one device, compiled once for all tests."""
    return jax.jit(functools.partial(train_step, *parts[:3]))


def batch(mask=None):
    tokens = np.arange(ROWS * (LENGTH + 1), dtype=np.int32).reshape(ROWS, LENGTH + 1) * 7 % 20
    first, rows = np.zeros(ROWS, bool), np.arange(ROWS, dtype=np.int32)
    return Batch(tokens[:, :-1], tokens[:, 1:], first, rows, mask)


UNEVEN = np.arange(ROWS * LENGTH).reshape(ROWS, LENGTH) >= 15  # Two rows count nothing at all.


def test_a_mask_of_all_is_none(parts, update):
    state = parts[-1]
    (plain, a), (masked, b) = (update(state, batch(m)) for m in (None, np.ones_like(UNEVEN)))
    np.testing.assert_allclose(a["loss"], b["loss"], rtol=1e-6)
    np.testing.assert_allclose(a["grad_norm"], b["grad_norm"], rtol=1e-5)
    assert_same_bits(jax.device_get(plain.memory), jax.device_get(masked.memory))


def test_what_is_masked_has_no_influence(parts, update):
    state = parts[-1]
    one = batch(UNEVEN)
    other = one._replace(targets=np.where(UNEVEN, one.targets, 3).astype(np.int32))
    assert_same_bits(*(jax.device_get(update(state, x)) for x in (one, other)))


def test_the_masked_loss_is_that_of_the_whole_batch_however_it_is_divided(parts, update):
    """On one device at once, in parts, and over two devices whose shares of the mask differ."""
    model, optimizer, schedule, state = parts
    bound = functools.partial(train_step, model, optimizer, schedule)
    whole, metrics = update(state, batch(UNEVEN))
    in_parts, others = jax.jit(functools.partial(bound, batch_chunk=2))(state, batch(UNEVEN))
    on_two = parallel.pmap(functools.partial(bound, average=parallel.mean))
    spread, devices = on_two(step.to_devices(state, model, ROWS), parallel.split(batch(UNEVEN)))
    spread, devices = parallel.first(spread._replace(memory=None)), parallel.first(devices)
    # By hand: the mean over what counts.
    source = step.Dropout(dropout_key(state), batch().rows)
    inputs = {"params": state.params}, batch().tokens, batch().targets, state.memory, source
    nll, _ = jax.jit(model.apply)(*inputs)
    np.testing.assert_allclose(metrics["loss"], np.asarray(nll)[UNEVEN].mean(), rtol=1e-5)
    for found in (others, devices):
        for name in metrics:
            np.testing.assert_allclose(found[name], metrics[name], rtol=2e-5, err_msg=name)
    # Adam's first moment is a tenth of the gradient.
    moments = lambda state: jax.tree.leaves(state.opt_state[1].mu)
    for found in (in_parts, spread):
        for ours, expected in zip(moments(found), moments(whole), strict=True):
            np.testing.assert_allclose(ours, expected, rtol=0, atol=2e-6)


def test_the_step_and_the_score_keep_documents_apart(parts):
    model, optimizer, schedule, state = parts
    ids = np.array([[0, 0, 1, 1, 2, 2]] * 2 + [[0] * 6, [3, 3, 3, 4, 4, 4]], np.int32)

    @jax.jit
    def everything(state, packed):
        variables = {"params": state.params}
        apply = lambda source: model.apply(
            variables, packed.tokens, packed.targets, state.memory, source, packed.segment_ids
        )[0]
        step = functools.partial(train_step, model, optimizer, schedule, batch_chunk=2)
        return {
            "loss": step(state, packed)[1]["loss"],
            "its own": apply(step_source(state)).mean(),
            "nll": Copy().score(model, variables, packed, state.memory)[0]["nll"],
            "its own nll": apply(None).sum(),
            "of one document": model.apply(variables, packed.tokens, packed.targets)[0].sum(),
        }

    # Matrices that are large enough for the model to have opinions.
    state = state._replace(params=jax.tree.map(lambda x: 5 * x, state.params))
    packed = batch()._replace(segment_ids=ids)
    found = {name: float(value) for name, value in everything(state, packed).items()}
    assert found["loss"] == pytest.approx(found["its own"], rel=1e-5)
    assert found["nll"] == pytest.approx(found["its own nll"], rel=1e-5)
    assert found["nll"] != pytest.approx(found["of one document"], rel=1e-5)


def step_source(state):
    return step.Dropout(dropout_key(state), batch().rows)


def dropout_key(state):
    key = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
    return jax.random.split(key)[1]


def test_a_batch_of_which_nothing_counts_changes_no_parameter(parts, update):
    state = parts[-1]
    after, metrics = update(state, batch(np.zeros_like(UNEVEN)))
    assert (float(metrics["loss"]), float(metrics["grad_norm"])) == (0.0, 0.0)
    assert_same_bits(jax.device_get(after.params), jax.device_get(state.params))


class Copy(Synthetic):
    """No more of a task than its score."""

    def __init__(self):
        pass

    def draw(self, rng, length):
        raise AssertionError("nothing is drawn")

    def measures(self, nll, batch):
        return {"sure": (nll < 3.0).astype(jnp.float32)}


def test_what_a_task_lacks_is_named_where_it_is_opened():
    class Half(Task):
        def summary(self):
            return ""

    with pytest.raises(TypeError, match=r"__init__.*batch.*batches.*protocol"):
        Half()


def test_the_score_is_summed_over_what_counts_and_over_devices(parts):
    model, _, _, state = parts
    bound = functools.partial(valid_step, Copy().score, model)
    score = jax.jit(bound)
    sums, memory = score(state.params, state.favor, batch(UNEVEN), state.memory)
    on_two = parallel.pmap(functools.partial(bound, total=parallel.total))
    spread = step.to_devices(state, model, ROWS)
    there, _ = on_two(
        spread.params, spread.favor, parallel.split(batch(UNEVEN)), parallel.split(state.memory)
    )
    for name in ("nll", "count", "sure"):
        np.testing.assert_allclose(parallel.first(there)[name], sums[name], rtol=1e-6)
    assert float(sums["count"]) == UNEVEN.sum()
    metrics = Copy().metrics({name: float(value) for name, value in sums.items()})
    assert list(metrics) == ["loss", "sure"]
    assert metrics["loss"] == float(sums["nll"]) / UNEVEN.sum()
    # Rows that begin anew forget what was carried into them.
    anew = batch(UNEVEN)._replace(first=np.array([True, False, True, False]))
    forgotten, _ = score(state.params, state.favor, anew, memory)
    carried, _ = score(state.params, state.favor, batch(UNEVEN), memory)
    emptied = jax.tree.map(lambda x: x.at[np.array([0, 2])].set(0), memory)
    by_hand, _ = score(state.params, state.favor, batch(UNEVEN), emptied)
    assert float(forgotten["nll"]) == float(by_hand["nll"]) != float(carried["nll"])


@pytest.mark.parametrize("precision", ["default", "float32"])
def test_matmul_precision_holds_forward_and_backward(precision):
    config = default.defaults()
    config.model.update(FIELDS | {"matmul_precision": precision})
    model = LanguageModel(build_config(config.model.to_dict(), 20))
    optimizer, schedule = adam(lambda step: 0.1, 0.0), learning_rate("constant", 0.01, 0, 10)
    state = jax.eval_shape(functools.partial(init_state, model, optimizer, 1, 0))
    update = functools.partial(train_step, model, optimizer, schedule)
    text = str(jax.make_jaxpr(update)(state, batch()))
    products, exact = text.count("dot_general["), text.count("(Precision.HIGHEST")
    assert products > 10
    assert (exact == products) == (precision == "float32")
