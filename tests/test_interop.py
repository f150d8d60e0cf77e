"""Official arguments and weights: what is refused, and the exact way there and back.

The numbers themselves are compared with the official ones in test_golden_models.py.
"""

import dataclasses
import itertools
import json

import jax
import numpy as np
import pytest

from fwm.errors import UserError
from fwm.interop import (
    ATTN_TYPES,
    arguments_to_lmtool,
    config_from_lmtool,
    from_lmtool,
    to_lmtool,
)

BASE = dict(
    attn_type=24, n_token=60, n_layer=2, n_head=2, d_model=12, d_head=4, d_inner=20, proj_dim=5,
    n_roll=2, cutoffs=[20, 30], tie_projs=[False, True, True],
)  # fmt: skip


def state_dict(arguments, seed=0):
    """Random tensors under the official names, shapes as the official constructor makes them."""
    a = dict(d_embed=None, div_val=1, tie_weight=True) | BASE | arguments
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
    n, h, d, f = a["n_head"], a["d_head"], a["d_model"], a["d_inner"]
    width, kind, out = a["d_embed"] or d, a["attn_type"], {}
    bounds = [0, *a["cutoffs"], a["n_token"]]
    projected = a["div_val"] > 1 or width != d
    tables = range(len(bounds) - 1) if a["div_val"] > 1 else [0]
    for i in tables:
        rows = bounds[i + 1] - bounds[i] if a["div_val"] > 1 else a["n_token"]
        own = width // a["div_val"] ** i
        out[f"word_emb.emb_layers.{i}.weight"] = draw(rows, own)
        tied = out[f"word_emb.emb_layers.{i}.weight"]
        out[f"crit.out_layers.{i}.weight"] = tied if a["tie_weight"] else draw(rows, own)
        out[f"crit.out_layers.{i}.bias"] = draw(rows)
        if projected:
            out[f"word_emb.emb_projs.{i}"] = draw(d, own)
    if projected:
        for i in range(len(bounds) - 1):
            source = out[f"word_emb.emb_projs.{i if a['div_val'] > 1 else 0}"]
            tie = a["tie_projs"][i]
            own = width // a["div_val"] ** i
            out[f"crit.out_projs.{i}"] = source if tie else draw(d, own)
    if len(bounds) > 2:
        out["crit.cluster_weight"] = draw(len(bounds) - 2, width)
        out["crit.cluster_bias"] = draw(len(bounds) - 2)
    if kind == 0:
        out |= {"r_w_bias": draw(n, h), "r_r_bias": draw(n, h)}
    out["pos_emb.inv_freq"] = (1 / 10000 ** (np.arange(0, d, 2, dtype=np.float32) / d)).astype(
        np.float32
    )
    for layer in (f"layers.{i}" for i in range(a["n_layer"])):
        if kind == 0:
            rows = {"qkv_net": 3 * h, "r_net": h}
        elif kind < 10:
            rows = {"q_net": h, "kv_net": 2 * h}
        else:
            rows = {"qkv_net": 3 * h} if 30 <= kind < 40 else {"qkvb_net": 3 * h + 1}
        for name, size in rows.items():
            out[f"{layer}.dec_attn.{name}.weight"] = draw(n * size, d)
        out[f"{layer}.dec_attn.o_net.weight"] = draw(d, n * h)
        for part in ("dec_attn", "pos_ff"):
            out[f"{layer}.{part}.layer_norm.weight"] = draw(d)
            out[f"{layer}.{part}.layer_norm.bias"] = draw(d)
        out[f"{layer}.pos_ff.CoreNet.0.weight"] = draw(f, d)
        out[f"{layer}.pos_ff.CoreNet.0.bias"] = draw(f)
        out[f"{layer}.pos_ff.CoreNet.3.weight"] = draw(d, f)
        out[f"{layer}.pos_ff.CoreNet.3.bias"] = draw(d)
    return out


VOCABULARIES = {
    "plain": dict(cutoffs=[], tie_projs=[False]),
    "one table": {},
    "projected": dict(d_embed=8),
    "projected, none tied": dict(d_embed=8, tie_projs=[False] * 3, tie_weight=False),
    "projected, all tied": dict(d_embed=8, tie_projs=[True] * 3),
    "div_val 2": dict(div_val=2),
    "div_val 2, mixed": dict(div_val=2, d_embed=8, tie_projs=[True, False, True]),
    "div_val 2, untied": dict(div_val=2, tie_projs=[False] * 3, tie_weight=False),
}
# Every attention type once, and every kind of vocabulary once.
CASES = list(itertools.zip_longest(ATTN_TYPES, VOCABULARIES, fillvalue="one table"))


@pytest.mark.parametrize(("attn_type", "vocabulary"), CASES)
def test_there_and_back_is_exact(attn_type, vocabulary):
    arguments = BASE | VOCABULARIES[vocabulary] | {"attn_type": attn_type}
    theirs = state_dict(arguments)
    config, variables = from_lmtool(arguments, theirs)
    back = to_lmtool(config, variables)
    assert back.keys() == theirs.keys()
    for name, value in theirs.items():
        assert back[name].dtype == value.dtype
        np.testing.assert_array_equal(back[name], value, err_msg=name)
    # Nothing is lost on the way: other tensors make other variables.
    others = from_lmtool(arguments, state_dict(arguments, seed=1))[1]["params"]
    assert all(
        np.all(a != b)
        for a, b in zip(jax.tree.leaves(variables["params"]), jax.tree.leaves(others), strict=True)
    )


def test_a_tied_tensor_may_stand_once_or_twice_but_not_differ():
    arguments = BASE | VOCABULARIES["projected, all tied"]
    theirs = state_dict(arguments)
    expected = from_lmtool(arguments, theirs)[1]
    once = {k: v for k, v in theirs.items() if "out_projs" not in k and k[-6:] != "weight"}
    once |= {k: v for k, v in theirs.items() if k[-6:] == "weight" and "out_layers" not in k}
    jax.tree.map(np.testing.assert_array_equal, from_lmtool(arguments, once)[1], expected)
    for name in ("crit.out_layers.0.weight", "crit.out_projs.1"):
        with pytest.raises(UserError, match=f"{name} is tied in the arguments, but its values"):
            from_lmtool(arguments, theirs | {name: theirs[name] + 1})


def test_favor_projections_are_taken_or_drawn():
    arguments = BASE | {"attn_type": 25}
    theirs = state_dict(arguments)
    given = np.random.default_rng(0).normal(size=(2, 4, 5)).astype(np.float32)
    take = lambda x: np.asarray(
        from_lmtool(arguments, theirs, x)[1]["favor"]["layers"]["mixer"]["projection"]
    )
    for form in (given, list(given), {0: given[0], 1: given[1]}, {"1": given[1], "0": given[0]}):
        np.testing.assert_array_equal(take(form), given)
    drawn = take(None)
    assert drawn.shape == given.shape
    assert np.all(drawn[0] != drawn[1])
    for wrong in (given[:1], {0: given[0]}, {}):
        with pytest.raises(UserError, match="favor_projections needs 2 layers"):
            take(wrong)
    with pytest.raises(UserError, match=r"\[d_head, proj_dim\] = \[4, 5\] .* got \[5, 4\]"):
        take(given.transpose(0, 2, 1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(attn_typ=2), "unknown arguments of the official model: attn_typ; expected some of"),
        (dict(n_layer=...), "missing arguments of the official model: n_layer"),
        (dict(ext_len=3), "ext_len=3 is not supported"),
        (dict(sample_softmax=5), "sample_softmax=5 is not supported"),
        (dict(d_res=5), "d_res=5 is not supported"),
        (dict(remove_ff=True), "remove_ff=True is not supported"),
        (dict(remove_res=True), "remove_res=True is not supported"),
        (dict(attn_type=7), "unknown attn_type 7: expected one of 0, 2, 4, 5, 6, 24, .*46"),
        (dict(attn_type=4, dropatt=0.1), "dropatt=0.1 with attn_type 4 is not supported"),
        (dict(mem_len=5), "mem_len has no meaning for fast_weight, it is a key of transformer_xl"),
        (dict(cutoffs=[30, 20]), "must rise"),
    ],
)
def test_arguments_that_are_refused(change, message):
    arguments = {k: v for k, v in (BASE | change).items() if v is not ...}
    with pytest.raises(UserError, match=message):
        config_from_lmtool(arguments)


def test_arguments_without_effect():
    plain = config_from_lmtool(BASE)
    harmless = dict(
        carry_over_fast_weight=True, d_res=12, device="cuda", remove_ff=False, remove_res=None,
        tgt_len=9, dropatt=0.3, same_length=True, d_embed=12, sample_softmax=0,
    )  # fmt: skip
    assert config_from_lmtool(BASE | harmless) == plain
    # Type 0 ignores no_pos, the quadratic types always normalise.
    xl, quadratic = BASE | {"attn_type": 0}, BASE | {"attn_type": 4}
    assert config_from_lmtool(xl | {"no_pos": True}) == config_from_lmtool(xl)
    skipped = config_from_lmtool(quadratic | {"skip_attn_normalization": True})
    assert skipped == config_from_lmtool(quadratic)
    assert skipped.attn_normalization == "output"
    for kind in (24, 34, 44):
        arguments = BASE | {"attn_type": kind, "skip_attn_normalization": True}
        assert config_from_lmtool(arguments).attn_normalization == "none"


@pytest.mark.parametrize("attn_type", ATTN_TYPES)
def test_arguments_there_and_back(attn_type):
    for vocabulary, skip in itertools.product(VOCABULARIES.values(), (False, True)):
        own = {"attn_type": attn_type, "skip_attn_normalization": skip, "dropout": 0.1}
        own |= {"pre_lnorm": skip, "clamp_len": 7, "mem_len": 5 * (attn_type == 0)}
        config = config_from_lmtool(BASE | vocabulary | own)
        back = arguments_to_lmtool(config)
        assert config_from_lmtool(back) == config
        assert config_from_lmtool(json.loads(json.dumps(back))) == config
    if ATTN_TYPES[attn_type][0] == "fast_weight" and ATTN_TYPES[attn_type][2] == "delta":
        named = dataclasses.replace(config, key_norm="sum")
        assert arguments_to_lmtool(named) == back


@pytest.mark.parametrize("kind", [0, 24])
def test_tensors_that_are_refused(kind):
    arguments = BASE | {"attn_type": kind}
    theirs = state_dict(arguments)
    with pytest.raises(UserError, match=r"that this model has not: a, layers\.2\.b"):
        from_lmtool(arguments, theirs | {"layers.2.b": np.zeros(2), "a": np.zeros(3)})
    for name in (n for n in theirs if "layers.0" not in n and "layer_norm" not in n):
        rest = {k: v for k, v in theirs.items() if k != name}
        if name in ("pos_emb.inv_freq", "crit.out_layers.0.weight"):
            from_lmtool(arguments, rest)  # a constant, and a tied name
        else:
            with pytest.raises(UserError, match=f"the state_dict lacks {name}"):
                from_lmtool(arguments, rest)
        larger = {k: np.concatenate([v, v]) if k == name else v for k, v in theirs.items()}
        with pytest.raises(UserError, match=f"{name} should have the shape"):
            from_lmtool(arguments, larger)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(norm="pre"), "no model of mixer=fast_weight and norm=pre"),
        (dict(feature_map="tanh"), "no layer of feature_map=tanh"),
        (dict(key_norm="l2"), "key_norm='l2'"),
        (dict(scale_output=False), "update_rule=delta, .*scale_output=False"),
    ],
)
def test_models_that_the_toolkit_has_not(change, message):
    arguments = BASE | {"attn_type": 24}
    config, variables = from_lmtool(arguments, state_dict(arguments))
    other = dataclasses.replace(config, **change)
    with pytest.raises(UserError, match=message):
        to_lmtool(other, variables)
    with pytest.raises(UserError, match="the official toolkit has no model of mixer=fast_weight"):
        arguments_to_lmtool(other)
