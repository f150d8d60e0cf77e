"""Every key there is, with its default, unit and meaning; and the presets tiny, small, medium.

A variant is this plus what differs: `build(options, **model)`. `options` is the text after the
colon in `--config=configs/dpfp_delta.py:small,no_pos`: first a preset, then any of `no_pos`,
`skip_attn_normalization`, `carry_over_fast_weight` or `key=value` for a key of `model`.
"""

import ast
import re
from typing import Any

from ml_collections import ConfigDict

from fwm.errors import UserError


def get_config(options: str = "") -> ConfigDict:
    """The default config itself: DPFP and delta rule at the preset `tiny`."""
    return build(options)


def defaults() -> ConfigDict:
    """All keys. Tuples, not lists, so that a whole value can be overridden."""
    c = ConfigDict()
    c.seed = 1111  # of everything random: initial parameters, dropout, FAVOR+ projections
    c.task = "text"  # what is learned: text (of `data`), or one that a config file registers
    c.registered_in = ""  # the config file that has registered something; set by main.py

    c.data = ConfigDict()
    c.data.name = "embedded"  # embedded, wikitext103, wikitext2, enwik8, text8, ptb, lm1b, tfds:...
    c.data.dir = ""  # folder with the text: train.txt ... or wiki.train.tokens ...
    c.data.cache_dir = "~/.cache/fwm"  # where the encoded text is kept
    c.data.download = False  # fetch a known dataset that is not there (asks TFDS)

    c.model = ConfigDict()
    c.model.mixer = "fast_weight"  # fast_weight, softmax, transformer_xl
    c.model.feature_map = "dpfp"  # elu, favor, dpfp (fast_weight only)
    c.model.update_rule = "delta"  # sum, delta (fast_weight only)
    c.model.attn_normalization = "none"  # none, output, output_and_key (fast_weight only)
    c.model.no_pos = False  # leave the absolute positions out
    c.model.scale_output = True  # False: the official quadratic layers' 1/sqrt(d_head)
    c.model.d_model = 128  # width of the residual stream
    c.model.n_head = 8
    c.model.d_head = 16  # width of a head, before the feature map
    c.model.d_inner = 2048  # width inside the feed-forward part
    c.model.n_layer = 16
    c.model.d_embed = 0  # width of the word embedding; 0: d_model
    c.model.dropout = 0.1  # probability
    c.model.dropatt = 0.0  # probability, on attention weights (softmax, transformer_xl)
    c.model.mem_len = 0  # positions that transformer_xl remembers
    c.model.clamp_len = -1  # largest position; -1: none
    c.model.same_length = False  # transformer_xl: every position sees as many others
    c.model.cutoffs = ()  # word ranks where the clusters of the adaptive softmax begin
    c.model.div_val = 1  # each cluster's embedding is narrower by this factor
    c.model.tie_weight = True  # one table for embedding and softmax
    c.model.tie_projs = ()  # by cluster; (): all but the first
    c.model.performer_proj_dim = 16  # random directions of FAVOR+; 2 x as many features
    c.model.dpfp_n_roll = 2  # nu of DPFP; 2 nu d_head features
    c.model.dtype = "float32"  # float32, bfloat16: of computing; parameters stay float32

    c.train = ConfigDict()
    c.train.batch_size = 96  # rows, over all devices
    c.train.tgt_len = 256  # tokens of a segment: the training context
    c.train.max_step = 500_000  # updates
    c.train.lr = 0.00025
    c.train.warmup_step = 2000  # updates of linear warmup
    c.train.scheduler = "cosine"  # cosine, inv_sqrt, constant
    c.train.clip = 0.25  # global gradient norm; 0: no clipping
    c.train.carry_over_fast_weight = False  # the next segment starts from the last one's memory
    c.train.batch_chunk = 1  # gradient accumulation: parts that a batch is computed in
    c.train.eval_interval = 4000  # updates between validations, each with a checkpoint
    c.train.eval_batch_size = 10  # rows of the quick validation
    c.train.log_interval = 200  # updates between lines of the log
    c.train.nan_policy = "stop"  # stop, skip: what a loss or gradient does that is not finite
    c.train.profile_steps = ()  # (10, 15): trace steps 10 to 15 into workdir/profile; (): none

    c.eval = ConfigDict()
    c.eval.batch_size = 0  # windows at once; 0: chosen from the memory they need
    c.eval.tgt_len = 0  # window or segment, tokens; 0: as in training
    c.eval.stride = 1  # positions that each window scores
    c.eval.checkpoint = "best"  # best, latest, or a step; several: best,latest,1000
    c.eval.split_stream = False  # cut the stream into batch_size rows, as the official evaluator
    c.eval.mem_len = 0  # transformer_xl: memory in evaluation; 0: as in training
    c.eval.clamp_len = 0  # in evaluation, where > 0

    c.generate = ConfigDict()
    c.generate.checkpoint = "best"  # best, latest, or a step
    c.generate.max_new_tokens = 100
    c.generate.temperature = 1.0  # below 1: safer words; 0: always the most probable one
    c.generate.top_k = 0  # draw from so many most probable words; 0: from all
    c.generate.top_p = 1.0  # of these from the fewest with this share of the probability; 1: all
    c.generate.seed = 0  # the same seed gives the same words

    c.report = ConfigDict()
    c.report.use_wandb = False
    c.report.project_name = "fwm"
    c.report.job_name = ""  # "": made from the hyper-parameters
    return c


# What the presets change. `small` and `medium` are the paper's (WikiText-103); `tiny` trains in
# a few minutes on two CPU cores.
PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "tiny": {
        "model": {"d_model": 128, "n_head": 4, "d_head": 16, "d_inner": 512, "n_layer": 2},
        "train": {
            "batch_size": 16, "tgt_len": 64, "max_step": 1000, "warmup_step": 100, "lr": 0.003,
            "eval_interval": 250, "eval_batch_size": 16, "log_interval": 50,
        },
    },
    "small": {
        "data": {"name": "wikitext103"},
        "model": {"cutoffs": (20_000, 40_000, 200_000)},
    },
    "medium": {
        "data": {"name": "wikitext103"},
        "model": {"d_model": 256, "d_head": 32, "cutoffs": (20_000, 40_000, 200_000)},
        "train": {"batch_size": 56, "tgt_len": 384, "max_step": 400_000},
    },
}  # fmt: skip

# Transformer-XL remembers one segment.
XL_PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "tiny": {"model": {"mem_len": 64}},
    "small": {"model": {"mem_len": 256}},
    "medium": {
        "model": {"mem_len": 384},
        "train": {"max_step": 200_000, "warmup_step": 1000},
    },
}


def build(options: str = "", **model: Any) -> ConfigDict:
    """The default config with a preset, a variant's fields of `model`, and options, in that order.

    Raises:
        UserError: an unknown preset or option, or one without meaning for the variant.
    """
    config = defaults()
    preset, *rest = re.split(r",(?![^()]*\))", options) if options else ["tiny"]
    if preset not in PRESETS:
        raise UserError(
            f"unknown preset {preset!r}: expected one of {', '.join(PRESETS)} first, "
            "then options, as in configs/dpfp_delta.py:small,no_pos."
        )
    # `--config=file:small --config.data.dir=...`: a folder says where, the name says what.
    config.update(PRESETS[preset])
    config.model.update(model)
    if config.model.mixer == "transformer_xl":
        config.update(XL_PRESETS[preset])
    for option in rest:
        _apply(config, option)
    config.lock()
    return config


def _apply(config: ConfigDict, option: str) -> None:
    mixer = config.model.mixer
    name, equals, value = option.partition("=")
    if equals:
        if name not in config.model:
            raise UserError(
                f"unknown option {name!r}: expected a key of model ({', '.join(config.model)})."
            )
        old = config.model[name]
        try:
            new = value if isinstance(old, str) else ast.literal_eval(value)
            config.model[name] = new
        except (ValueError, SyntaxError, TypeError):
            raise UserError(
                f"option {option!r}: expected a {type(old).__name__} such as {old!r}."
            ) from None
        return
    if name not in ("no_pos", "skip_attn_normalization", "carry_over_fast_weight"):
        raise UserError(
            f"unknown option {name!r}: expected no_pos, skip_attn_normalization, "
            "carry_over_fast_weight or key=value for a key of model."
        )
    if name == "no_pos":
        if mixer == "transformer_xl":
            raise UserError("no_pos has no meaning for transformer_xl: its positions are relative.")
        config.model.no_pos = True
        return
    if mixer != "fast_weight":
        raise UserError(f"{name} has no meaning for {mixer}: it is an option of fast weights.")
    if name == "skip_attn_normalization":
        config.model.attn_normalization = "none"
    else:
        # Positions restart in every segment, so the paper carries weights over without them.
        config.train.carry_over_fast_weight = True
        config.model.no_pos = True
