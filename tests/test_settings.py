"""Every key of every config: what it may be, and one sentence that names it for all else."""

import json
import math

import jax.numpy as jnp
import numpy as np
import pytest

from configs import default, retrieval
from fwm import layers, workdir
from fwm.config import build_config, check, limits
from fwm.errors import UserError
from fwm.files import flatten
from fwm.generate import Decoder, generate
from fwm.model_config import ModelConfig
from fwm.optimizer import adam, learning_rate
from fwm.retrieval import experiment

KINDS = limits()
DEFAULTS = flatten(default.defaults().to_dict())
RETRIEVAL = retrieval.get_config("capacity").to_dict()
NAN, INF = math.nan, math.inf
# What no key may be, as a program of one's own may give it.
OTHERS = [None, object(), jnp.zeros(2), b"1"]
WRONG = {
    bool: [0, 1, "yes", "True", 1.0, (), *OTHERS],
    int: [-(2**31) - 1, 2**64, 1.5, 1.0, "3", True, (), NAN, INF, *OTHERS],
    float: [NAN, INF, -INF, -1.0, "3e-4", True, (), *OTHERS],
    str: [0, 1.5, True, (), "a\0b", *OTHERS],
    tuple: [0, 1.5, "1", True, (0,), (-1,), (1.5,), ("1",), (None,), [True, 2], *OTHERS],
}
# Beside these, what is out of a key's own range.
OUTSIDE = {
    "seed": [-1, 2**32],
    "data.vocab_size": [-1],
    "model.norm": ["", "batch"],
    "model.dtype": ["", "int8", "float16"],
    "model.mixer": [(), ("softmax", 3)],
    "model.attention_window": [1, -1],
    "model.dropout": [1.0, 1, 0.99999],
    "model.dropatt": [1.0],
    "model.n_layer": [0, 10**6],
    "model.clamp_len": [-2],
    "model.mem_len": [-1],
    "model.d_embed": [-1],
    "model.dpfp_n_roll": [0, 10**6],
    "model.performer_proj_dim": [0],
    "train.lr": [0, 0.0, 10**400],
    "train.scheduler": ["", "linear"],
    "train.nan_policy": ["", "ignore"],
    "train.warmup_step": [-1],
    "train.profile_steps": [(1,), (1, 2, 3), (3, 2), (0, 1), ("1", "2")],
    "eval.checkpoint": ["", "bset", "best,", "1.5", "-1", "best, latest", "²"],
    "eval.batch_size": [-1],
    "eval.tgt_len": [-1],
    "eval.mem_len": [-1],
    "eval.clamp_len": [-1],
    "eval.stride": [0],
    "generate.checkpoint": ["", "bset", "best,latest"],
    "generate.max_new_tokens": [-1],
    "generate.temperature": [-0.5],
    "generate.top_k": [-1],
    "generate.top_p": [0, 0.0, 1.5, 2],
    "generate.seed": [-1, 2**32],
}  # fmt: skip
OUTSIDE |= {
    key: [0, -1]
    for key in DEFAULTS
    if key.split(".")[-1] in (
        "batch_size", "tgt_len", "max_step", "batch_chunk", "eval_interval", "log_interval",
        "eval_batch_size", "d_model", "n_head", "d_head", "d_inner", "div_val",
    ) and not key.startswith("eval.")
}  # fmt: skip
# Values at the edge, and others that are meant all the same.
RIGHT = {
    "seed": [0, 2**32 - 1, np.int64(3)],
    "data.name": ["x"],
    "model.dropout": [0, 0.9999],
    "model.clamp_len": [-1, 0, 2**31 - 1],
    "model.cutoffs": [(), [5], (5, 7)],
    "model.tie_projs": [(), [False], (True,)],
    "model.d_embed": [0, 1],
    "model.n_layer": [1, 10_000],
    "train.lr": [1, 1e-30, 1e30, np.float32(0.1)],
    "train.warmup_step": [0, 2**31 - 1],
    "train.clip": [0, 0.0, 1e30],
    "train.max_step": [1, 2**31 - 1],
    "train.profile_steps": [(), [], (1, 1), [3, 10]],
    "eval.checkpoint": ["latest", "12", "best,latest,3"],
    "eval.clamp_len": [0, 5],
    "generate.temperature": [0, 1e-30, 1e30],
    "generate.top_p": [1, 1e-30],
}


def wrong(key):
    values = WRONG[type(DEFAULTS[key])]
    if key == "model.mixer":  # A tuple of names is one, too.
        values = [value for value in values if not isinstance(value, tuple)]
    return [*values, *OUTSIDE.get(key, [])]


def said(function, *arguments, **keys):
    """The one sentence that a call is refused with."""
    with pytest.raises(UserError) as caught:
        function(*arguments, **keys)
    text = str(caught.value)
    assert "\n" not in text
    assert 20 < len(text) < 600
    assert text.endswith(".")
    return text


def test_a_key_of_another_type_or_out_of_range():
    assert KINDS.keys() == DEFAULTS.keys()
    for key, kind in KINDS.items():
        for value in wrong(key):
            assert said(kind.check, f"config.{key}", value).startswith(f"config.{key} must be ")
        for value in [DEFAULTS[key], *RIGHT.get(key, [])]:
            kind.check(key, value)
        value = wrong(key)[-1]
        assert said(check, DEFAULTS | {key: value}).startswith(f"config.{key} must be ")
    for key in ("seed", "model.clamp_len", "train.lr", "train.profile_steps", "eval.checkpoint"):
        check(DEFAULTS | {key: RIGHT[key][-1]})


def test_every_number_has_limits():
    """A new key too: what its type alone allows is never all that it may be."""
    for key, value in DEFAULTS.items():
        if type(value) in (int, float):
            assert not KINDS[key].fits(type(value)(-(2**31))), key


def test_a_model_in_python():
    for key in DEFAULTS:
        group, _, name = key.rpartition(".")
        if group == "model":
            value = wrong(key)[-1]
            assert f"{name} must be " in said(ModelConfig, 10, **{name: value})
    for value in (0, -1, 2**31):
        assert "n_token must be a whole number" in said(ModelConfig, value)
    assert "unknown key n_heads" in said(ModelConfig, 10, n_heads=3)
    fields = default.defaults().model.to_dict()
    del fields["cutoffs"]
    assert build_config(fields, 10).cutoffs == ()


@pytest.mark.parametrize("settings", [
    {"model.div_val": 64, "model.cutoffs": (5, 7), "model.d_embed": 128},  # no width is left
    {"model.d_model": 15},
    {"model.cutoffs": (7, 5)},
    {"model.tie_projs": (True, True)},
    {"model.mem_len": 3},
    {"model.no_pos": True, "model.mixer": "transformer_xl"},
    {"model.feature_map": "relu"},
    {"model.update_rule": "hebb"},
    {"model.attn_normalization": "key"},
    {"model.key_norm": "max"},
    {"model.mixer": "lstm"},
    {"model.mixer": ("fast_weight", "lstm")},
    {"train.carry_over_fast_weight": True, "model.mixer": "softmax"},
    {"eval.mem_len": 5},  # Else a run is trained that cannot be evaluated.
    {"eval.split_stream": True},
    {"eval.stride": 257},
    {"eval.stride": 9, "eval.tgt_len": 8},
])  # fmt: skip
def test_settings_without_meaning_together_are_refused_before_training(settings):
    said(check, DEFAULTS | settings)


def test_keys_that_are_missing_or_unknown():
    settings = {k: v for k, v in DEFAULTS.items() if k != "train.lr"}
    assert "a config lacks train.lr: expected every key" in said(check, settings)
    assert "has unknown keys: train.lrr: " in said(check, DEFAULTS | {"train.lrr": 1})
    assert "lacks data.cache_dir, data.dir, " in said(check, {})


def test_retrieval(tmp_path):
    for key, right in RETRIEVAL.items():
        values = list(WRONG[type(right)])
        if isinstance(right, tuple):
            values += [(), (1, 1), ("a", "a")]
        values = [v for v in values if not (isinstance(v, tuple) and v in ((0,), ("1",)))]
        for value in values:
            text = said(experiment.run, RETRIEVAL | {key: value}, tmp_path)
            assert text.startswith(f"config.{key} must be ")
        rest = {k: v for k, v in RETRIEVAL.items() if k != key}
        assert f"lacks {key}" in said(experiment.run, rest, tmp_path)
    assert "has unknown other" in said(experiment.run, RETRIEVAL | {"other": 1}, tmp_path)
    assert not list(tmp_path.iterdir())


# --- in Python ------------------------------------------------------------------------------------

LAYERS = {
    layers.FastWeightAttention: {"feature_map": "relu", "update_rule": "hebb", "dpfp_n_roll": 0,
                                 "attn_normalization": "all", "key_norm": "max"},
    layers.SoftmaxAttention: {"dropatt": 1.0, "attention_window": 1},
    layers.RelativeAttention: {"mem_len": -1, "clamp_len": -2, "same_length": True, "dropout": 1.0},
}  # fmt: skip
OF_ALL = {"n_head": [0, -1, 2**31], "d_head": [0], "dtype": ["int8", "x"]}


@pytest.mark.parametrize("layer", LAYERS)
def test_a_layer_by_itself_is_checked_where_it_is_made(layer):
    for name, value in LAYERS[layer].items():
        assert name in said(layer, n_head=2, d_head=4, **{name: value})
    for name, values in OF_ALL.items():
        for value in values:
            text = said(layer, **{"n_head": 2, "d_head": 4, name: value})
            assert text.startswith(f"{name} must be ")
    layer(n_head=2, d_head=4, dtype=jnp.bfloat16)


def test_the_optimizer():
    for schedule in ("cosine", "inv_sqrt", "constant", "wsd"):
        for name, values in {
            "lr": (0.0, -1.0, NAN, INF),
            "warmup_step": (-1,),
            "max_step": (0, -5),
        }.items():
            for value in values:
                keys = {"lr": 0.1, "warmup_step": 1, "max_step": 100, name: value}
                assert f"{name} must be " in said(learning_rate, schedule, **keys)
    for clip in (-1.0, NAN, INF):
        assert "clip must be " in said(adam, lambda t: 1.0, clip)
    for decay in (-1.0, NAN):
        assert "weight_decay must be " in said(adam, lambda t: 1.0, 0.0, decay)


def test_generation():
    decoder = Decoder(None, None, 8, False)
    for key, values in OUTSIDE.items():
        group, _, name = key.rpartition(".")
        for value in values if group == "generate" and name != "checkpoint" else ():
            if type(value) is type(DEFAULTS[key]):
                assert f"{name} must be " in said(generate, decoder, [1], **{name: value})


# --- a run's config.json, edited by hand ----------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A workdir of settings alone."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "config.json").write_text(default.get_config().to_json())
    return folder


def test_a_config_that_was_edited_by_hand(saved, tmp_path):
    settings = json.loads((saved / "config.json").read_text())
    for key in DEFAULTS:
        group, _, name = key.rpartition(".")
        within = settings[group] if group else settings
        right = within[name]
        within[name] = None if group != "train" else [{}]
        (tmp_path / "config.json").write_text(json.dumps(settings))
        assert f"config.json, {key} must be " in said(workdir.config_of_run, tmp_path, {})
        within[name] = right


@pytest.mark.parametrize(
    "content", ["", "{", "[1]", "3", "null", '{"model": null}', '{"model": 3}', '{"train": []}',
                '{"seed": {"a": 1}}', "\0", "\ufeff{}"]
)  # fmt: skip
def test_a_config_that_is_none(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    assert "config.json" in said(workdir.config_of_run, tmp_path, {})
