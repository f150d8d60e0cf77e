"""fwm's parts in other people's code: the examples, and which derivatives there are."""

import functools
import runpy
import shutil
from pathlib import Path

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

import fwm.workdir
from fwm import ops
from fwm.model import LanguageModel, ModelConfig
from fwm.ops.adaptive_softmax import Cluster, nll, take
from fwm.ops.feed_forward import feed_forward

ROOT = Path(__file__).parents[1]
PARTS = {"plain_jax", "linen_model", "nnx_model", "training_loop", "decoding", "export_model"}


def run(name):
    """The names of an example that was run as a user runs it."""
    return runpy.run_module(f"examples.{name}", run_name="__main__")


def close(found, expected, tolerance=1e-5):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def test_every_example_is_tested():
    found = {path.stem for path in (ROOT / "examples").glob("*.py")}
    assert {name for name in found if not name.startswith("own_")} == PARTS


def test_an_op_in_plain_jax(capsys):
    x = run("plain_jax")
    assert x["batch"] == 4  # two devices
    close(x["recomputed"], x["whole"], 1e-7)
    close([g[:, 0] / 4 for g in x["per_row"]], x["whole"], 1e-7)
    close(x["on_devices"], x["whole"], 1e-7)
    ahead, behind = (x["gradient"](*(a + s * 1e-2 for a in x["arrays"])) for s in (1, -1))
    along = [(a - b) / 2e-2 for a, b in zip(ahead, behind, strict=True)]
    close(x["hessian_product"], along, 1e-3)
    assert capsys.readouterr().out.count("the same gradients, off by") == 3


def test_a_layer_in_a_linen_model():
    x = run("linen_model")
    close(jnp.concatenate([x["first"], x["second"]], axis=1), x["logits"])
    close(x["end"], x["memory"])


def test_a_layer_in_an_nnx_model():
    with jax.numpy_dtype_promotion("standard"):  # optax's own needs it
        losses = run("nnx_model")["losses"]
    assert losses[-1] < 0.7 * losses[0]


def test_the_model_in_a_loop_by_hand():
    with jax.numpy_dtype_promotion("standard"):  # optax's own needs it
        losses = run("training_loop")["losses"]
    assert 5.3 < losses[0] < 5.8  # log 256
    assert np.mean(losses[-5:]) < 3.6


def test_decoding_token_by_token():
    x = run("decoding")
    close(x["by_token"].swapaxes(0, 1), x["whole"])
    text = jnp.concatenate([x["prompt"][0], x["written"]])
    log_probs, _ = x["model"].apply(x["variables"], text[None, :-1], method="all_log_probs")
    assert (jnp.argmax(log_probs[0, 3:], axis=-1) == x["written"]).all()


def test_a_trained_model_is_exported(tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(ROOT / "tests" / "old_runs" / "dpfp_delta", workdir)
    exported = runpy.run_module("examples.export_model")["export"](workdir, 2, 6)
    assert exported.platforms == ("cpu", "cuda", "tpu")
    ids = jnp.array([[1, 2, 3, 1, 0, 2], [4, 3, 3, 2, 1, 1]], jnp.int32)
    opened = fwm.workdir.open(workdir)
    expected, _ = opened.model.apply(opened.variables, ids, method="log_probs")
    close(exported.call(ids), expected)
    pytest.importorskip("flatbuffers", reason="jax.export's files need flatbuffers")
    loaded = jax.export.deserialize(bytearray(exported.serialize()))
    close(loaded.call(ids), expected)


# Derivatives beyond gradients. Of each op with a gradient by hand: the op, the same in plain jax,
# and what it is of.


def plain_nll(x, w, b, cluster_w, cluster_b):
    head = jnp.concatenate([x @ w[:3].T + b[None, :3], x @ cluster_w.T + cluster_b[None]], axis=1)
    head, tail = jax.nn.log_softmax(head), jax.nn.log_softmax(x @ w[3:].T + b[None, 3:])
    log_p = jnp.concatenate([head[:, :3], head[:, 3:] + tail], axis=1)
    return -log_p[jnp.arange(len(x)), IDS]


def plain_feed_forward(x, w, b, out, out_b):
    return jax.nn.relu(x @ w + b[None]) @ out + out_b[None]


IDS = np.array([0, 1, 4, 3])
CLUSTERS = (Cluster(0, 0, 0, 3), Cluster(0, 0, 3, 2))
TOKENS = [(1, 5, 2, 3), (1, 5, 2, 3), (1, 5, 2, 2)]
OPS = {
    "delta_rule": (ops.delta_rule, ops.recurrent.delta_rule, [*TOKENS, (1, 5, 2), (1, 2, 3, 2)]),
    "sum_rule": (ops.sum_rule, ops.recurrent.sum_rule, [*TOKENS, (1, 2, 3, 2)]),
    "feed_forward": (
        lambda x, *rest: feed_forward(1.0, x, None, *rest), plain_feed_forward,
        [(4, 3), (3, 5), (5,), (5, 2), (2,)],
    ),
    "adaptive_softmax": (
        lambda x, w, b, *rest: nll(CLUSTERS, (x,), (w,), (b,), *rest, jnp.asarray(IDS)), plain_nll,
        [(4, 3), (5, 3), (5,), (1, 3), (1,)],
    ),
    "take": (lambda t: take(t, jnp.asarray(IDS))[0], lambda t: t[IDS], [(5, 2)]),
}  # fmt: skip


def drawn(shapes, seed):
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    return tuple(jax.random.normal(key, shape) / 2 for key, shape in zip(keys, shapes, strict=True))


def squares(op, arrays):
    return sum(jnp.sum(y**2) for y in jax.tree.leaves(op(*arrays)))


@pytest.mark.parametrize("name", OPS)
def test_products_with_the_hessian_and_gradients_of_each(name):
    op, plain, shapes = OPS[name]
    arrays, direction = drawn(shapes, 0), drawn(shapes, 1)

    @functools.partial(jax.jit, static_argnums=0)
    def derivatives(op, arrays):
        gradient = jax.grad(functools.partial(squares, op))
        both = jax.tree.map(lambda a, b: jnp.stack([a, b]), arrays, direction)
        return jax.jvp(gradient, (arrays,), (direction,))[1], jax.vmap(gradient)(both)

    close(derivatives(op, arrays), derivatives(plain, arrays), 2e-5)


@pytest.mark.parametrize("name", OPS)
def test_forward_mode_is_refused_in_a_sentence(name):
    op, plain, shapes = OPS[name]
    arrays = drawn(shapes, 0)
    forward = lambda op: jax.jit(
        lambda x: jax.jvp(functools.partial(squares, op), (x,), (x,))
    ).lower(arrays)
    with pytest.raises(TypeError, match=r"can't apply forward-mode .*\(jvp\) to a custom_vjp"):
        forward(op)
    forward(plain)


def test_second_derivatives_of_a_model_and_several_at_once():
    sizes = dict(d_model=4, n_head=1, d_head=2, d_inner=4, n_layer=1, feature_map="elu")
    model = LanguageModel(ModelConfig(n_token=5, **sizes))
    ids = jnp.array([[1, 2, 4], [3, 0, 2]])
    loss = lambda variables: jnp.sum(model.apply(variables, ids, ids)[0])
    variables = jax.jit(model.init)(jax.random.key(0), ids, ids)
    direction = jax.tree.map(jnp.sin, variables)

    @jax.jit
    def derivatives(v):
        """The loss, its gradient, and how that changes along the direction."""
        (value, gradient), (_, product) = jax.jvp(jax.value_and_grad(loss), (v,), (direction,))
        return value, gradient, product

    moved = [jax.tree.map(lambda v, d, s=s: v + s * d, variables, direction) for s in (-0.01, 0.01)]
    (one, behind, _), (other, ahead, _) = map(derivatives, moved)
    along = jax.tree.map(lambda a, b: (a - b) / 0.02, ahead, behind)
    close(derivatives(variables)[2], along, 2e-3)
    both = jax.tree.map(lambda *leaves: jnp.stack(leaves), *moved)
    close(jax.jit(jax.vmap(loss))(both), jnp.stack([one, other]))


def test_reverse_over_reverse_stops_at_clusters():
    op, plain, shapes = OPS["adaptive_softmax"]
    arrays = drawn(shapes, 0)

    def twice(op):
        gradient = jax.grad(functools.partial(squares, op))
        return jax.eval_shape(jax.grad(lambda x: jnp.sum(gradient(x)[0])), arrays)

    with pytest.raises(ValueError, match="Reverse-mode differentiation does not work for"):
        twice(op)
    assert jax.tree.structure(twice(plain)) == jax.tree.structure(arrays)
