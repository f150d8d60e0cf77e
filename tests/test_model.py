"""Every variant of the model: causality, memory, parts of the output, dropout, dtypes."""

import dataclasses
import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fwm.errors import UserError
from fwm.model import (
    LanguageModel,
    ModelConfig,
    build_config,
    empty_memory,
    make_block,
    redraw_projections,
)
from fwm.ops.dropout import Dropout

B, T, SPLIT, N_TOKEN = 2, 11, 7, 40
VARIANTS = {
    "transformer": "",
    "transformer_xl": "",
    "linear_sum": "no_pos",
    "linear_delta": "clamp_len=3",
    "performer_sum": "clamp_len=3",
    "performer_delta": "no_pos",
    "dpfp_sum": "no_pos,attn_normalization=none,scale_output=False",
    "dpfp_delta": "no_pos",
    "transformer, no_pos": "no_pos",
    "linear_delta, output": "no_pos,attn_normalization=output",
    "dpfp_delta, output_and_key": "no_pos,attn_normalization=output_and_key",
    "hybrid": "no_pos",
    "linear_sum, pre": "no_pos,norm=pre,feature_map=silu,key_norm=l2,attn_normalization=none",
}
# Of each kind of mixer; what is tried on these only is the same for the others.
ONE_OF_EACH = (
    "hybrid",
    "transformer",
    "transformer_xl",
    "performer_delta",
    "dpfp_delta, output_and_key",
)
SIZES = {
    "d_model": 16, "n_head": 2, "d_head": 4, "d_inner": 32, "n_layer": 2, "dropout": 0.25,
    "performer_proj_dim": 4,
}  # fmt: skip


@functools.cache
def make(variant):
    """Config and variables; the matrices are large enough for the model to have opinions."""
    name, options = variant.split(",")[0], VARIANTS[variant]
    config = importlib.import_module(f"configs.{name}").get_config(f"tiny,{options}".rstrip(","))
    fields = config.model.to_dict() | SIZES
    if name == "transformer_xl":
        fields |= {"mem_len": T + 1, "dropatt": 0.25}
    if name == "hybrid":
        fields |= {"mixer": ("fast_weight", "softmax"), "attention_window": 4, "n_layer": 4}
        fields |= {"feature_map": "favor", "norm": "pre_lnorm"}
    if variant == "dpfp_delta":
        fields |= {"cutoffs": (10, 20)}
    config = build_config(fields, N_TOKEN)
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    shapes = jax.eval_shape(LanguageModel(config).init, jax.random.key(0), tokens, tokens)
    rng = np.random.default_rng(0)

    def fill(path, leaf):
        size = 0.7 if path[0].key == "favor" else 0.2
        return jnp.asarray(rng.normal(path[-1].key == "scale", size, leaf.shape), jnp.float32)

    return config, jax.tree_util.tree_map_with_path(fill, shapes)


def draw(seed=0):
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(rng.integers(0, N_TOKEN, (2, B, T)), jnp.int32))


@pytest.mark.parametrize("variant", VARIANTS)
def test_variant(variant):
    config, variables = make(variant)
    model = LanguageModel(config)
    half = LanguageModel(dataclasses.replace(config, dtype="bfloat16"))
    continues = config.no_pos or config.mixer == "transformer_xl"

    @jax.jit
    def everything(tokens, targets):
        call = lambda *arguments: model.apply(variables, *arguments)
        cut = lambda part: (tokens[:, part], targets[:, part])
        out = {
            "whole": call(tokens, targets),
            "log_probs": model.apply(variables, tokens, method="log_probs")[0],
        }
        if continues:
            first, memory = call(*cut(slice(0, SPLIT)), empty_memory(config, B))
            second, memory = call(*cut(slice(SPLIT, T)), memory)
            out["parts"] = (jnp.concatenate([first, second], axis=1), memory)
        if variant in ONE_OF_EACH:
            out["last"] = call(tokens, targets[:, -3:])[0]
            out["half"] = half.apply(variables, tokens, targets)[0]
        return out

    tokens, targets = draw()
    out = everything(tokens, targets)
    nll, memory = out["whole"]
    assert nll.shape == (B, T)
    assert nll.dtype == jnp.float32
    assert np.ptp(nll) > 0.5  # it has opinions
    close = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-5)
    close(jnp.exp(out["log_probs"]).sum(-1), jnp.ones(B))
    close(-jnp.take_along_axis(out["log_probs"], targets[:, -1:], axis=1), nll[:, -1:])
    if variant in ONE_OF_EACH:
        close(out["last"], nll[:, -3:])
        np.testing.assert_allclose(out["half"], nll, rtol=0, atol=0.1)
        assert out["half"].dtype == jnp.float32
        assert np.any(out["half"] != nll)

    # Later tokens change nothing before them, not one bit; and something after them.
    changed = everything(tokens.at[:, SPLIT:].set((tokens[:, SPLIT:] + 1) % N_TOKEN), targets)
    np.testing.assert_array_equal(changed["whole"][0][:, :SPLIT], nll[:, :SPLIT])
    assert np.all(changed["whole"][0][:, SPLIT:] != nll[:, SPLIT:])

    # Carried from an empty memory over two segments: as one call, unless positions restart.
    assert (memory is None) == (not config.carries_memory)
    if continues:
        parts, parts_memory = out["parts"]
        if config.carries_memory:
            close(parts, nll)
        else:
            assert np.all(parts[:, SPLIT:] != nll[:, SPLIT:])
        same = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=1e-5)
        jax.tree.map(same, memory, parts_memory)
    shapes = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)
    assert shapes(memory) == shapes(empty_memory(config, B))


def test_a_hybrid_is_its_layers_one_after_the_other():
    config, variables = make("hybrid")
    model, (tokens, _) = LanguageModel(config), draw()

    @jax.jit
    def both():
        x = variables["params"]["embedding"]["table_0"][tokens] * config.d_model**0.5
        for layer in range(config.n_layer):
            number, place = divmod(layer, 2)
            name = f"{place}_{config.pattern[place]}"
            own = {
                of: jax.tree.map(lambda leaf, i=number: leaf[i], tree["layers"].get(name, {}))
                for of, tree in variables.items()
            }
            x, _ = make_block(config, place).apply(own, x)
        return x, model.apply(variables, tokens, method="hidden")[0]

    one, other = both()
    np.testing.assert_allclose(one, other, rtol=0, atol=1e-4)
    # The keys of a layer are those of its number, whatever its mixer.
    plain = dataclasses.replace(config, mixer="fast_weight", attention_window=0)
    drawn, all_alike = (redraw_projections(c, jax.random.key(0)) for c in (config, plain))
    np.testing.assert_array_equal(
        drawn["favor"]["layers"]["0_fast_weight"]["mixer"]["projection"],
        all_alike["favor"]["layers"]["mixer"]["projection"][::2],
    )


@pytest.mark.parametrize("variant", ["transformer_xl", "performer_delta"])
def test_dropout_of_a_row_depends_on_its_place_alone(variant):
    config, variables = make(variant)
    model = LanguageModel(config)
    tokens, targets = (jnp.concatenate([x, x]) for x in draw())

    @jax.jit
    def nll(tokens, targets, seed, rows):
        source = Dropout(jax.random.key(seed), rows)
        return model.apply(variables, tokens, targets, None, source)[0]

    rows = jnp.arange(2 * B)
    whole = nll(tokens, targets, 0, rows)
    np.testing.assert_array_equal(nll(tokens, targets, 0, rows), whole)
    assert np.all(nll(tokens, targets, 1, rows) != whole)
    assert np.all(whole[:B] != whole[B:])  # the same text in other rows
    part = nll(tokens[B - 1 : B + 1], targets[B - 1 : B + 1], 0, rows[B - 1 : B + 1])
    np.testing.assert_allclose(part, whole[B - 1 : B + 1], rtol=0, atol=1e-5)


def test_redrawn_projections_fit_and_change():
    config, variables = make("performer_sum")
    drawn = [redraw_projections(config, jax.random.key(seed)) for seed in (0, 0, 1)]
    shapes = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)
    assert shapes(drawn[0]["favor"]) == shapes(variables["favor"])
    first, again, other = (np.asarray(jax.tree.leaves(d)[0]) for d in drawn)
    np.testing.assert_array_equal(first, again)
    assert np.all(first != other)
    assert np.all(first[0] != first[1])  # each layer has its own
    assert redraw_projections(make("linear_sum")[0], jax.random.key(0)) == {}


def test_second_derivatives():
    """Forward over reverse, through the adaptive softmax and the embedding that it is tied to.

    Finite differences meet the kinks of relu; but a Hessian is symmetric, u H v = v H u.
    """
    config, variables = make("dpfp_delta")
    model = LanguageModel(config)
    tokens, targets = draw()
    rng = np.random.default_rng(1)
    u, v = (
        jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), variables)
        for _ in range(2)
    )

    @jax.jit
    def along(direction):
        loss = lambda variables: model.apply(variables, tokens, targets)[0].mean()
        return jax.jvp(jax.grad(loss), (variables,), (direction,))[1]

    def dot(a, b):
        return sum(
            float(jnp.sum(x * y)) for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True)
        )

    one, other = dot(u, along(v)), dot(v, along(u))
    assert abs(one) > 0.1
    assert one == pytest.approx(other, rel=1e-3)


def test_an_id_outside_the_vocabulary_is_never_a_number():
    model = LanguageModel(ModelConfig(n_token=7, d_model=8, n_head=1, d_head=8, d_inner=8,
                                      n_layer=1, dropout=0.0))  # fmt: skip
    tokens = jnp.array([[1, 2, 3, 4]])
    variables = model.init(jax.random.key(0), tokens, tokens)
    loss = jax.jit(lambda tokens, targets: model.apply(variables, tokens, targets)[0])
    for bad in (7, -1):
        # A token makes all that come after it unknown, a target only its own loss.
        nan = np.isnan(loss(tokens.at[0, 2].set(bad), tokens))
        np.testing.assert_array_equal(nan[0, 2:], [True, True])
        nan = np.isnan(loss(tokens, tokens.at[0, 2].set(bad)))
        np.testing.assert_array_equal(nan, [[False, False, True, False]])
    with pytest.raises(UserError, match=r"targets of shape \(1, 5\) .* tokens, of shape \(1, 4\)"):
        model.apply(variables, tokens, jnp.ones((1, 5), int))
