"""A trained run from inside, beside what the model itself carries."""

import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from program import call

from fwm import look
from fwm.model import LanguageModel, ModelConfig
from fwm.ops import FastWeightState

OLD = Path(__file__).parent / "old_runs"


def test_the_memories_are_those_of_the_model():
    sizes = dict(d_model=8, n_head=2, d_head=4, d_inner=8, n_layer=2, performer_proj_dim=3)
    mixers = dict(mixer=("fast_weight", "softmax"), attention_window=3, short_conv=2)
    model = LanguageModel(ModelConfig(n_token=9, feature_map="favor", **sizes, **mixers))
    tokens = np.array([1, 2, 3, 1, 0, 2], np.int32)
    row = jnp.asarray(tokens)[None]
    variables = jax.jit(model.init)(jax.random.key(0), row, row)
    fast, softmax = look.memories(model, variables, tokens)
    assert (fast.name, softmax.name, softmax.weights) == ("fast_weight", "softmax", None)
    _, memory = jax.jit(lambda v: model.apply(v, row, method="hidden"))(variables)
    is_state = lambda x: isinstance(x, FastWeightState)
    (state,) = filter(is_state, jax.tree.leaves(memory, is_leaf=is_state))
    np.testing.assert_allclose(fast.weights, state.weights[0], rtol=1e-4, atol=1e-6)
    assert fast.changed.shape == (6, 6)
    assert (np.tril(fast.changed) == 0).all()
    assert (fast.changed[np.triu_indices(6, 1)] > 0).all()


def test_changes_of_what_a_key_reads():
    """Two keys at right angles, the first one written again with half of its value."""
    keys = np.array([[[1.0, 0.0]], [[0.0, 1.0]], [[1.0, 0.0]]], np.float32)
    first = np.array([[2.0, 0.0], [0.0, 0.0]])
    both = np.array([[2.0, 0.0], [3.0, 3.0]])
    again = np.array([[1.0, 0.0], [3.0, 3.0]])
    weights = np.stack([first, both, again]).astype(np.float32)[:, None]
    expected = [[0.0, 0.0, 0.5], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
    np.testing.assert_allclose(look.changes(weights, keys), expected, atol=1e-7)


def test_a_report_of_runs_of_an_earlier_version(tmp_path):
    for name in ("dpfp_delta", "transformer_xl"):
        shutil.copytree(OLD / name, tmp_path / name)
    (tmp_path / "dpfp_delta" / "expected_log.csv").rename(tmp_path / "dpfp_delta/train_log.csv")
    shutil.rmtree(tmp_path / "transformer_xl" / "checkpoints")
    both = f"--workdir={tmp_path / 'dpfp_delta'},{tmp_path / 'transformer_xl'}"
    status, out, err = call("--mode=report", both)
    assert (status, err) == (0, "")
    page = tmp_path / "dpfp_delta" / "report.html"
    assert out == f"Report: {page}\n"
    text = page.read_text()
    assert "layer 2, fast_weight" in text
    assert text.count("effective rank") == 2
    assert "transformer_xl/checkpoints" in text  # why there is neither a sample nor a memory
