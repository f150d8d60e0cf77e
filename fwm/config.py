"""Every key there is, with its default, unit and meaning; and the presets tiny, small, medium.

A variant is `build(options, **model)`: the defaults, a preset, what the variant changes of the
group `model`, and options, in that order. `options` is the text after the colon in
`--config=configs/dpfp_delta.py:small,no_pos`: first a preset, then any of `no_pos`,
`skip_attn_normalization`, `carry_over_fast_weight` or `key=value` for a key of `model`.

The keys of `model` are those of `ModelConfig` and of every mixer in the table: what a mixer alone
needs is declared, with its default, where the mixer is.
"""

import ast
import contextlib
import re
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict, FieldReference

from fwm.errors import UserError
from fwm.files import flatten
from fwm.limits import (
    CHECKPOINT,
    CHECKPOINTS,
    INT32,
    NOT_NEGATIVE,
    RATE,
    SEED,
    SIZE,
    STEPS,
    Kind,
    number,
    of_type,
    one_of,
    whole,
)

from fwm.model_config import (  # isort: skip
    ModelConfig, build_config, make_mixer, mixer_pattern, model_keys, model_limits,
)  # fmt: skip
from fwm.optimizer import SCHEDULES

__all__ = ["ModelConfig", "build", "build_config", "check", "defaults", "model_keys"]


def defaults() -> ConfigDict:
    """All keys. Tuples, not lists, so that a whole value can be overridden."""
    c = ConfigDict()
    c.task = "text"  # what the model is trained on
    c.registered_in = ""  # the config file that a run needs for what it registers; set by itself
    c.init_from = ""  # the workdir of a run whose weights are the first ones; "": they are drawn
    c.init_checkpoint = "best"  # of that run: best, latest, or a step
    c.seed = 1111  # of everything random: initial parameters, dropout, FAVOR+ projections

    c.data = ConfigDict()
    c.data.name = "embedded"  # embedded, wikitext103, wikitext2, enwik8, text8, ptb, lm1b, tfds:...
    c.data.dir = ""  # folder: train.txt ..., wiki.train.tokens ..., or files of documents
    c.data.file = ""  # or one file with the text, to be split 90/5/5 by place
    c.data.tokenizer = ""  # words, characters, bpe; "": words, in enwik8 and text8 characters
    c.data.vocab_size = 0  # of bpe, subwords, its 256 bytes among them; 0: 8192
    c.data.field = "text"  # of .jsonl, .parquet and saved data sets: which has the text
    c.data.cache_dir = "~/.cache/fwm"  # where the encoded text is kept
    c.data.documents = False  # records, or what begins at headings or blank lines, know no others
    c.data.download = False  # fetch a known dataset that is not there (asks TFDS)

    # Of any type: a name or a tuple of them.
    c.model = ConfigDict(model_keys() | {"mixer": FieldReference("fast_weight", field_type=object)})

    c.train = ConfigDict()
    c.train.batch_size = 96  # rows, over all devices
    c.train.tgt_len = 256  # tokens of a segment: the training context
    c.train.max_step = 500_000  # updates
    c.train.lr = 0.00025
    c.train.warmup_step = 2000  # updates of linear warmup
    c.train.scheduler = "cosine"  # cosine, inv_sqrt, constant, wsd (warmup, stable, decay)
    c.train.decay_step = 0  # wsd: updates of linear decay to 0 at the end; 0: a tenth of max_step
    c.train.weight_decay = 0.0  # AdamW's, of matrices; not of norms, biases and tables of words
    c.train.clip = 0.25  # global gradient norm; 0: no clipping
    c.train.carry_over_fast_weight = False  # the next segment starts from the last one's memory
    c.train.batch_chunk = 1  # gradient accumulation: parts that a batch is computed in
    c.train.eval_interval = 4000  # updates between validations, each with a checkpoint
    c.train.save_minutes = 10.0  # between checkpoints beside those; 0: none
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


# What a value may be, where the type of its default does not say it all.
LIMITS: dict[str, Kind] = {
    "seed": SEED,
    "init_checkpoint": CHECKPOINT,
    "data.vocab_size": whole(0),
    "train.batch_size": SIZE,
    "train.tgt_len": SIZE,
    "train.max_step": SIZE,
    "train.lr": RATE,
    "train.warmup_step": whole(0),
    "train.scheduler": one_of(SCHEDULES),
    "train.decay_step": whole(0),
    "train.weight_decay": NOT_NEGATIVE,
    "train.clip": NOT_NEGATIVE,
    "train.batch_chunk": SIZE,
    "train.eval_interval": SIZE,
    "train.save_minutes": NOT_NEGATIVE,
    "train.eval_batch_size": SIZE,
    "train.log_interval": SIZE,
    "train.nan_policy": one_of(("stop", "skip")),
    "train.profile_steps": STEPS,
    "eval.batch_size": whole(0),
    "eval.tgt_len": whole(0),
    "eval.stride": SIZE,
    "eval.checkpoint": CHECKPOINTS,
    "eval.mem_len": whole(0),
    "eval.clamp_len": whole(0),
    "generate.checkpoint": CHECKPOINT,
    "generate.max_new_tokens": whole(0),
    "generate.temperature": NOT_NEGATIVE,
    "generate.top_k": whole(0),
    "generate.top_p": number("above 0 and at most 1 (all words)", lambda x: 0 < x <= 1),
    "generate.seed": SEED,
}


def limits() -> dict[str, Kind]:
    """What every key may be, by its dotted name."""
    model = {f"model.{name}": kind for name, kind in model_limits().items() if name != "n_token"}
    typed = {key: of_type(type(x)) for key, x in flatten(defaults().to_dict()).items()}
    return typed | model | LIMITS


def check(settings: Mapping[str, Any], where: str = "config.") -> None:
    """Refuse settings that training or evaluation could not use, each by itself and together.

    Args:
        settings: all keys with their values, in groups or dotted.
        where: what a sentence has before a key: who reads it must know where to look.

    Raises:
        UserError: a key is missing, unknown, of another type or out of range, or some have no
            meaning together.
    """
    flat, kinds = flatten(settings), limits()
    for what, keys in (("lacks", kinds.keys() - flat), ("has unknown keys:", flat.keys() - kinds)):
        if keys:
            raise UserError(
                f"a config {what} {', '.join(sorted(keys)[:5])}{', ...' * (len(keys) > 5)}: "
                "expected every key of fwm/config.py and no other, so begin with "
                "fwm.config.build() and change values."
            )
    for key, kind in kinds.items():
        kind.check(where + key, flat[key])
    group = lambda name: {k.removeprefix(name): v for k, v in flat.items() if k.startswith(name)}
    model = evaluated(group("model."), group("eval."), INT32)
    model.carries(flat["train.carry_over_fast_weight"])
    if flat["eval.stride"] > (window := flat["eval.tgt_len"] or flat["train.tgt_len"]):
        raise UserError(
            f"{where}eval.stride must lie between 1 and the window of {window}, got "
            f"{flat['eval.stride']}."
        )
    if flat["eval.split_stream"] and not flat["eval.batch_size"]:
        raise UserError(
            f"{where}eval.split_stream needs {where}eval.batch_size, the number of rows: set it to "
            "1 or more."
        )


def evaluated(model: Mapping[str, Any], eval: Mapping[str, Any], n_token: int) -> ModelConfig:
    """`build_config` of a model as it reads after training, where the group `eval` changes it."""
    build_config(model, n_token)
    changes = {name: eval[name] for name in ("mem_len", "clamp_len") if eval[name] > 0}
    return build_config({**model, **changes}, n_token)


# What the presets change. `small` and `medium` are the paper's (WikiText-103); `tiny` trains in
# a few minutes on two CPU cores.
PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "tiny": {
        "model": {
            "d_model": 128, "n_head": 4, "d_head": 16, "d_inner": 512, "n_layer": 2, "dropout": 0.1,
        },
        "train": {
            "batch_size": 16, "tgt_len": 64, "max_step": 1000, "warmup_step": 100, "lr": 0.003,
            "eval_interval": 250, "eval_batch_size": 16, "log_interval": 50,
        },
    },
    "small": {
        "data": {"name": "wikitext103"},
        "model": {"cutoffs": (20_000, 40_000, 200_000), "dropout": 0.1},
    },
    "medium": {
        "data": {"name": "wikitext103"},
        "model": {
            "d_model": 256, "d_head": 32, "cutoffs": (20_000, 40_000, 200_000), "dropout": 0.1,
        },
        "train": {"batch_size": 56, "tgt_len": 384, "max_step": 400_000},
    },
}  # fmt: skip


def build(
    options: str = "", *, presets: Mapping[str, Mapping[str, Any]] | None = None, **model: Any
) -> ConfigDict:
    """The default config with a preset, a variant's fields of `model`, and options, in that order.

    Args:
        options: a preset, then options, as above; empty: tiny.
        presets: what the variant adds to each preset.
        model: keys of the group `model`.

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
    config.update((presets or {}).get(preset, {}))
    for option in rest:
        _apply(config, option)
    config.lock()
    return config


def _apply(config: ConfigDict, option: str) -> None:
    name, equals, value = option.partition("=")
    if equals:
        if name not in config.model:
            raise UserError(
                f"unknown option {name!r}: expected a key of model ({', '.join(config.model)})."
            )
        default, new = model_keys()[name], value
        if not isinstance(default, str) or value.startswith("("):
            with contextlib.suppress(ValueError, SyntaxError, TypeError):  # The check says it best.
                new = ast.literal_eval(value)
        model_limits()[name].check(f"model.{name}", new)
        config.model[name] = tuple(new) if isinstance(new, list) else new
        return
    pattern, keys = mixer_pattern(config.model.mixer), config.model.to_dict()
    mixers = [make_mixer(mixer, keys) for mixer in pattern]
    # What each option is for: whether it has a meaning.
    meaning = {
        "no_pos": all(mixer.adds_positions for mixer in mixers),
        "skip_attn_normalization": any(hasattr(m, "attn_normalization") for m in mixers),
        "carry_over_fast_weight": all(mixer.carries == "asked" for mixer in mixers),
    }
    if name not in meaning:
        raise UserError(
            f"unknown option {name!r}: expected no_pos, skip_attn_normalization, "
            "carry_over_fast_weight or key=value for a key of model."
        )
    if not meaning[name]:
        raise UserError(f"{name} has no meaning for {' and '.join(dict.fromkeys(pattern))}.")
    if name == "skip_attn_normalization":
        config.model.attn_normalization = "none"
    else:
        # Positions restart in every segment, so the paper carries weights over without them.
        config.model.no_pos = True
        config.train.carry_over_fast_weight |= name == "carry_over_fast_weight"
