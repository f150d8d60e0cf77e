"""Every variant, preset and option: the values of the paper, and what is refused."""

import importlib
import itertools
import json
from pathlib import Path

import pytest

from configs import default
from fwm.errors import UserError
from fwm.model import build_config

VARIANTS = {
    # mixer, feature_map, update_rule, attn_normalization
    "transformer": ("softmax", None, None, None),
    "transformer_xl": ("transformer_xl", None, None, None),
    "linear_sum": ("fast_weight", "elu", "sum", "output"),
    "linear_delta": ("fast_weight", "elu", "delta", "none"),
    "performer_sum": ("fast_weight", "favor", "sum", "output"),
    "performer_delta": ("fast_weight", "favor", "delta", "none"),
    "dpfp_sum": ("fast_weight", "dpfp", "sum", "output"),
    "dpfp_delta": ("fast_weight", "dpfp", "delta", "none"),
    "hybrid": (("fast_weight",) * 3 + ("softmax",), "silu", "delta", "none"),
}
# The rows of the wider family: rule, map, key_norm, decay, beta_max, n_step, short_conv, gate.
WIDER = {
    "retnet": ("sum", "identity", "", "constant", 1, 1, 0, True),
    "mamba2": ("sum", "silu", "", "head", 1, 1, 4, True),
    "gla": ("sum", "identity", "", "channel", 1, 1, 0, True),
    "deltanet": ("delta", "silu", "l2", "none", 1, 1, 4, False),
    "gated_deltanet": ("delta", "silu", "l2", "head", 1, 1, 4, True),
    "kimi_delta": ("delta", "silu", "l2", "channel", 1, 1, 4, True),
    "delta_product": ("delta", "silu", "l2", "none", 2, 2, 4, True),
    "gated_deltanet2": ("gated_delta2", "silu", "l2", "channel", 1, 1, 4, True),
    "comba": ("comba", "silu", "l2", "head", 1, 1, 4, True),
    "efla": ("error_free", "silu", "none", "none", 1, 1, 4, False),
}
VARIANTS |= {name: ("fast_weight", row[1], row[0], "none") for name, row in WIDER.items()}
PRESETS = {
    # d_model, n_head, d_head, d_inner, n_layer; tgt_len, batch_size, max_step, warmup_step
    "tiny": ((128, 4, 16, 512, 2), None),  # not the paper's: to be tried quickly
    "small": ((128, 8, 16, 2048, 16), (256, 96, 500_000, 2000)),
    "medium": ((256, 8, 32, 2048, 16), (384, 56, 400_000, 2000)),
}


def build(variant, options=""):
    return importlib.import_module(f"configs.{variant}").get_config(options)


def test_these_are_all_variants():
    names = {path.stem for path in Path(default.__file__).parent.glob("*.py")}
    assert names - {"default", "retrieval", "__init__"} == set(VARIANTS)


@pytest.mark.parametrize(("variant", "preset"), list(itertools.product(VARIANTS, PRESETS)))
def test_values_of_the_paper(variant, preset):
    mixer, *parts = VARIANTS[variant]
    c = build(variant, preset)
    sizes, training = PRESETS[preset]
    if variant == "hybrid" and preset == "tiny":
        sizes = (*sizes[:-1], 4)
    if variant == "transformer_xl" and preset == "medium":
        training = (384, 56, 200_000, 1000)
    m, t = c.model, c.train
    assert (m.d_model, m.n_head, m.d_head, m.d_inner, m.n_layer) == sizes
    if training is not None:
        assert (t.tgt_len, t.batch_size, t.max_step, t.warmup_step) == training
    assert m.mixer == mixer
    if "fast_weight" in mixer:
        assert [m.feature_map, m.update_rule, m.attn_normalization] == parts
    assert (m.performer_proj_dim, m.dpfp_n_roll) == (16, 2)
    assert (m.dropout, m.dropatt, t.clip, t.scheduler) == (0.1, 0.0, 0.25, "cosine")
    no_pos = variant in WIDER  # decays and convolutions know the order
    assert (m.tie_weight, m.div_val, m.no_pos, t.carry_over_fast_weight) == (True, 1, no_pos, False)
    switches = (m.decay, m.beta_max, m.n_step, m.short_conv, m.output_gate)
    assert switches == WIDER.get(variant, (*[""] * 3, "none", 1, 1, 0, False))[3:]
    own = "l2" if variant == "hybrid" else ""
    assert m.key_norm == WIDER.get(variant, [own] * 3)[2]
    if preset != "tiny":
        assert t.lr == 0.00025
        assert m.cutoffs == (20_000, 40_000, 200_000)
        assert c.data.name == "wikitext103"
    assert m.mem_len == (t.tgt_len if variant == "transformer_xl" else 0)

    options = ["clamp_len=100", "dtype=bfloat16", "dropout=0.2"]
    if "fast_weight" in mixer:
        options += ["no_pos", "skip_attn_normalization", "carry_over_fast_weight"]
    elif mixer == "softmax":
        options += ["no_pos"]
    for option in ["", *options]:
        c = build(variant, f"{preset},{option}" if option else preset)
        model = build_config(c.model.to_dict(), 300_000)
        assert model.n_token == 300_000
        assert model.d_embed == model.d_model
        assert model.no_pos == (no_pos or option in ("no_pos", "carry_over_fast_weight"))
        assert c.train.carry_over_fast_weight == (option == "carry_over_fast_weight")
        assert model.dropout == (0.2 if option == "dropout=0.2" else 0.1)
        assert model.dtype == ("bfloat16" if option == "dtype=bfloat16" else "float32")
        assert model.clamp_len == (100 if option == "clamp_len=100" else -1)
        if option == "skip_attn_normalization":
            assert model.attn_normalization == "none"


def test_tiny_is_the_default_and_runs_anywhere():
    for variant in VARIANTS:
        assert build(variant).to_dict() == build(variant, "tiny").to_dict()
        assert build(variant).data.name == "embedded"
    assert default.get_config().to_dict() == build("dpfp_delta").to_dict()


def test_a_config_is_locked():
    with pytest.raises(AttributeError):
        build("dpfp_delta").model.d_modell = 3


@pytest.mark.parametrize(
    ("variant", "options", "message"),
    [
        ("hybrid", "tiny,attention_window=0,carry_over_fast_weight", "for fast_weight and softmax"),
        ("dpfp_delta", "tiny,mixer=('softmax',", "unknown mixer"),
        ("dpfp_delta", "large", "'large': expected one of tiny, small, medium"),
        ("dpfp_delta", "no_pos", "'no_pos': expected one of tiny, small, medium"),
        ("dpfp_delta", "tiny,", "unknown option ''.*no_pos, skip_attn_normalization, carry_over"),
        ("dpfp_delta", "tiny,nopos", "unknown option 'nopos'.*no_pos, skip_attn_normalization"),
        ("dpfp_delta", "tiny,d_modell=3", r"'d_modell'.*\(att.*, attn_normalization, .*d_model, "),
        (
            "dpfp_delta",
            "tiny,d_model=abc",
            "d_model must be a whole number .* 'abc'",
        ),
        ("dpfp_delta", "tiny,d_model=1.5", "d_model must be a whole .* got 1.5"),
        ("dpfp_delta", "tiny,no_pos=maybe", "no_pos must be True or False, got 'maybe'"),
        ("transformer", "tiny,carry_over_fast_weight", "has no meaning for softmax"),
        ("transformer", "tiny,skip_attn_normalization", "has no meaning for softmax"),
        ("transformer_xl", "tiny,carry_over_fast_weight", "has no meaning for transformer_xl"),
        ("transformer_xl", "tiny,no_pos", "no_pos has no meaning for transformer_xl"),
    ],
)
def test_what_is_refused(variant, options, message):
    with pytest.raises(UserError, match=message):
        build(variant, options)


@pytest.mark.parametrize(
    ("variant", "option", "message"),
    [
        (
            "dpfp_sum",
            "attn_normalization=output_and_key",
            "update_rule sum has none: use output",
        ),
        (
            "dpfp_delta",
            "dropatt=0.1",
            "no meaning for fast_weight, it is a key of softmax",
        ),
        (
            "dpfp_delta",
            "mem_len=5",
            "no meaning for fast_weight, it is a key of trans",
        ),
        ("transformer_xl", "no_pos=True", "no_pos has no meaning for transformer_xl"),
        ("dpfp_delta", "feature_map=exp", "'exp': expected one of elu, favor, dpfp"),
        ("dpfp_delta", "update_rule=hebb", "'hebb': expected one of sum, delta"),
        ("dpfp_delta", "attn_normalization=key", "expected one of none, output, output_and_key"),
        ("dpfp_delta", "mixer=lstm", "'lstm': expected one of fast_weight, softmax, transformer_"),
        ("dpfp_delta", "dtype=float16", "dtype must be one of float32, bfloat16, got 'float16'"),
        ("dpfp_delta", "d_model=15", "d_model must be even"),
        (
            "performer_sum",
            "performer_proj_dim=0",
            "proj_dim must be a whole number of",
        ),
        ("dpfp_delta", "norm=rms", "norm must be one of post, pre, pre_lnorm, got 'rms'"),
        ("dpfp_delta", "key_norm=max", "'max': expected one of none, sum, l2"),
        ("dpfp_delta", "n_layer=0", "n_layer must be a whole number of at least 1"),
        (
            "dpfp_delta",
            "dropout=1.0",
            "of at least 0 and at most 0.9999, got 1.0",
        ),
        ("dpfp_delta", "dropout=-0.1", "dropout must be a number of at least 0"),
        (
            "dpfp_delta",
            "decay=token",
            "decay must be one of none, constant, head, channel, got 'token'",
        ),
        ("dpfp_delta", "beta_max=3", "beta_max must be a number above 0 and at most 2, got 3"),
        ("dpfp_delta", "n_step=0", "n_step must be a whole number of at least 1"),
        ("dpfp_delta", "short_conv=1", "or at least 2 tokens .*, got 1"),
        ("linear_sum", "beta_max=2", "beta_max=2 has no meaning for update_rule sum, which reads"),
        (
            "gated_deltanet2",
            "beta_max=2",
            "no meaning for update_rule gated_delta2, which reads",
        ),
        ("gla", "n_step=2", "n_step=2 has no meaning for update_rule sum"),
        ("linear_delta", "n_step=2,attn_normalization=output", "meaning with several writes a tok"),
        ("linear_delta", "decay=head,attn_normalization=output_and_key", "meaning with a decay"),
        (
            "dpfp_sum",
            "scale_output=False,decay=head",
            "the official quadratic layers, which have no",
        ),
        ("transformer", "decay=head", "decay has no meaning for softmax, it is a key of fast_w"),
        ("transformer", "output_gate=True", "output_gate has no meaning for softmax"),
        ("transformer_xl", "n_step=2", "n_step has no meaning for transformer_xl"),
        ("transformer", "same_length=True", "same_length has no meaning for softmax"),
        ("dpfp_delta", "attention_window=4", "no meaning for fast_weight, it is a key of softmax"),
        ("transformer", "attention_window=1", r"must be 0 \(a token sees all .* at least 2"),
        ("transformer", "attention_window=-1", r"must be 0 \(a token sees all .* got -1"),
        ("hybrid", "n_layer=6", "n_layer=6 is no multiple of the 4 layers of the pattern mixer="),
        ("hybrid", "mixer=('softmax', 'lstm')", "'lstm': expected one of fast_weight, softmax, tr"),
        ("hybrid", "mixer=()", r"names .* such as \('fast_weight', 'softmax'\), got \(\)"),
        ("hybrid", "mixer=('softmax', 3)", r"got \('softmax', 3\)"),
        (
            "hybrid",
            "same_length=True",
            "no meaning for fast_weight and softmax, it is a key of tra",
        ),
        (
            "hybrid",
            "mixer=('softmax', 'transformer_xl')",
            "softmax and transformer_xl cannot be mi",
        ),
    ],
)
def test_what_the_model_refuses(variant, option, message):
    with pytest.raises(UserError, match=message):
        build_config(build(variant, f"tiny,{option}").model.to_dict(), 1000)


@pytest.mark.parametrize(
    ("cutoffs", "tie_projs", "message"),
    [
        ((30, 20), (), "must rise from above 0"),
        ((0, 20), (), "must be a tuple of ranks of words"),
        ((10, 20), (True,), "one entry for each of the 3 clusters, got 1"),
    ],
)
def test_clusters_that_do_not_fit(cutoffs, tie_projs, message):
    fields = default.defaults().model.to_dict() | {"cutoffs": cutoffs, "tie_projs": tie_projs}
    with pytest.raises(UserError, match=message):
        build_config(fields, 1000)


def test_a_pattern_of_mixers():
    patterns = {
        "tiny": ("fast_weight",) * 3 + ("softmax",),
        "tiny,mixer=softmax,key_norm=": ("softmax",),
        "tiny,mixer=('softmax', 'fast_weight')": ("softmax", "fast_weight"),
        "tiny,n_layer=3,key_norm=,mixer=('softmax', 'softmax')": (
            "softmax",
        ),  # of one mixer there is none
    }
    for options, pattern in patterns.items():
        model = build_config(build("hybrid", options).model.to_dict(), 100)
        assert model.pattern == pattern
        assert model.mixer == (pattern if len(pattern) > 1 else pattern[0])
        saved = json.loads(json.dumps(build("hybrid", options).to_dict()))
        assert build_config(saved["model"], 100) == model
    config = build("hybrid")
    config.model.mixer = ("softmax", "fast_weight")  # a config file may, and back to a name
    config.model.mixer = "softmax"
    model = build_config(build("hybrid").model.to_dict(), 100)
    assert (model.carries(False), model.carries(True), model.carries_memory) == (False, True, True)
    assert model.name_parts() == [
        "silu", "delta", "none", "l2", "x3", "softmax", "window32"
    ]  # fmt: skip
    blind = build_config(build("hybrid", "tiny,attention_window=0").model.to_dict(), 100)
    assert (blind.carries(False), blind.carries_memory) == (False, False)
    with pytest.raises(UserError, match="no meaning for softmax, which carries nothing"):
        blind.carries(True)


def test_cutoffs_beyond_the_vocabulary_are_left_out():
    fields = default.build("small").model.to_dict()
    assert build_config(fields, 30_000).cutoffs == (20_000,)
    assert build_config(fields, 100).cutoffs == ()
