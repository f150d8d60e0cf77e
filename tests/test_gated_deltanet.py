"""The Gated DeltaNet layer of Qwen3-Next, against numbers of the original, and ours against it."""

import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fwm.errors import UserError
from fwm.interop import from_gated_deltanet
from fwm.interop.gated_deltanet import ARGUMENTS
from fwm.layers import FastWeightAttention

HERE = Path(__file__).parent / "ops" / "golden_rules"
ASIDE = Path(__file__).parents[2] / "shared" / "golden_rules"  # where they lie beside the project
FILES = {path.name: path for folder in (ASIDE, HERE) for path in folder.glob("layer*.npz")}


def read(path):
    """The file's arrays, the arguments, the state_dict."""
    file = dict(np.load(path))
    config = json.loads(str(file.pop("config")))
    params = {n.removeprefix("param/"): x for n, x in file.items() if n.startswith("param/")}
    return file, {name: config[name] for name in ARGUMENTS}, params


def close(actual, wanted, tolerance):
    assert np.max(np.abs(actual - wanted)) <= tolerance * np.max(np.abs(wanted))


@pytest.mark.parametrize("path", FILES.values(), ids=FILES)
def test_golden_layer(path):
    file, arguments, params = read(path)
    module, _ = from_gated_deltanet(arguments, params)

    @jax.jit
    def everything(params, x, g_out):
        def whole(params, x):
            return module.apply(from_gated_deltanet(arguments, params)[1], x)

        def token(state, x):
            y, state = module.apply({"params": params}, x[:, None], state)
            return state, y[:, 0]

        (y, state), pull = jax.vjp(whole, params, x)
        carried, ys = jax.lax.scan(token, module.empty(len(x)), x.swapaxes(0, 1))
        grads = pull((g_out, jax.tree.map(jnp.zeros_like, state)))
        return (y, state), (ys.swapaxes(0, 1), carried), grads

    arrays = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), (params, file["x"], file["g_out"]))
    whole, tokens, (grads, d_x) = everything(*arrays)
    for y, _ in (whole, tokens):
        close(y, file["out"], 2e-5)
    jax.tree.map(partial(close, tolerance=2e-5), tokens[1], whole[1])
    close(d_x, file["d_x"], 1e-4)
    for name in params:
        close(grads[name], file[f"grad/{name}"], 1e-4)


def test_our_own_layer_is_the_same():
    """With one value head a key head and V = K, `configs/gated_deltanet.py` composes it."""
    file, arguments, params = read(HERE / "layer_gated_deltanet_T1_k2_v2.npz")
    module, variables = from_gated_deltanet(arguments, params)
    ours = FastWeightAttention(
        n_head=2, d_head=8, feature_map="silu", key_norm="l2", decay="head", short_conv=4,
        output_gate=True, parent=None,
    )  # fmt: skip
    d_model = file["x"].shape[-1]
    qkvz = params["in_proj_qkvz.weight"].reshape(2, 4, 8, d_model)
    ba = params["in_proj_ba.weight"].reshape(2, 2, d_model)
    # A head's columns: q, k, v, beta, decay, gate.
    kernel = np.concatenate([qkvz[:, :3].reshape(2, 24, d_model), ba, qkvz[:, 3]], axis=1)
    params = {
        "qkv": {"kernel": kernel.transpose(2, 0, 1)},
        "taps": params["conv1d.weight"].reshape(3, 2, 8, 4).transpose(3, 1, 0, 2).reshape(4, 2, 24),
        "decay_rate": params["A_log"],
        "decay_bias": params["dt_bias"][:, None],
        "out_scale": params["norm.weight"],
        "out": {"kernel": params["out_proj.weight"].reshape(d_model, 2, 8).transpose(1, 2, 0)},
    }
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
    x = jax.random.normal(jax.random.key(0), (2, 6, d_model))
    shapes = jax.eval_shape(ours.init, jax.random.key(0), x)["params"]
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, params)
    both = jax.jit(lambda x: (ours.apply({"params": params}, x)[0], module.apply(variables, x)[0]))
    y, wanted = both(x)
    close(y, wanted, 2e-5)


@pytest.mark.parametrize(
    ("arguments", "arrays", "message"),
    [
        ({"n_value_head": 3}, {}, "a multiple of n_key_head as n_value_head, got"),
        ({"conv_kernel": 0}, {}, "sizes of at least 1"),
        ({"hidden_size": 20}, {}, r"takes the arguments n_key_head, .*, got n_key_head, .*hidden"),
        ({"activation": "relu"}, {}, "if it is silu.* with activation 'relu'"),
        ({"conv_kernel": 3}, {}, r"conv1d.weight must have the shape \(48, 1, 3\) by .* \(48, 1"),
        ({}, {"A_log": np.zeros(3)}, r"A_log must have the shape \(2,\) by .*, got \(3,\)"),
        ({}, {"A": np.zeros(2)}, r"needs the arrays in_proj_qkvz.weight, .*, got .*, A\."),
    ],
)  # fmt: skip
def test_what_is_refused(arguments, arrays, message):
    _, given, params = read(HERE / "layer_gated_deltanet_T1_k2_v2.npz")
    with pytest.raises(UserError, match=message):
        from_gated_deltanet(given | arguments, params | arrays)
