"""Every key there is, with its default, unit and meaning; and the presets tiny, small, medium.

A variant is `build(options, **model)`: the defaults, a preset, what the variant changes of the
group `model`, and options, in that order. `options` is the text after the colon in
`--config=configs/dpfp_delta.py:small,no_pos`: first a preset, then any of `no_pos`,
`skip_attn_normalization`, `carry_over_fast_weight` or `key=value` for a key of `model`.

The keys of `model` are those of `ModelConfig` and of every mixer in the table: what a mixer alone
needs is declared, with its default, where the mixer is.
"""

import ast
import dataclasses
import itertools
import re
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from fwm.errors import UserError
from fwm.layers import MIXERS, Mixer
from fwm.layers.blocks import NORMS

DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True, init=False)
class ModelConfig:
    """What a model is made of: `ModelConfig(n_token=1000, mixer="softmax", d_model=64)`.

    The official toolkit's option names where it has them. Keys of mixers are given, and read, like
    all others: `ModelConfig(n_token=1000, dpfp_n_roll=3).dpfp_n_roll`.

    Raises:
        UserError: an unknown key or name, a value of another type or out of range, or a
            combination without meaning.
    """

    n_token: int
    mixer: str = "fast_weight"  # fast_weight, softmax, transformer_xl
    norm: str = "post"  # post, pre, pre_lnorm (the official toolkit's)
    no_pos: bool = False  # leave the absolute positions out
    d_model: int = 128  # width of the residual stream
    n_head: int = 8
    d_head: int = 16  # width of a head, before the feature map
    d_inner: int = 2048  # width inside the feed-forward part
    n_layer: int = 16
    d_embed: int = 0  # width of the word embedding; 0: d_model
    dropout: float = 0.0  # probability
    clamp_len: int = -1  # largest position; -1: none
    cutoffs: tuple[int, ...] = ()  # word ranks where the clusters of the adaptive softmax begin
    div_val: int = 1  # each cluster's embedding is narrower by this factor
    tie_weight: bool = True  # one table for embedding and softmax
    tie_projs: tuple[bool, ...] = ()  # by cluster; (): all but the first
    dtype: str = "float32"  # float32, bfloat16: of computing; parameters stay float32
    mixer_keys: tuple[tuple[str, Any], ...] = ()  # those of the mixers, as pairs

    def __init__(self, n_token: int, **keys: Any):
        own = mixer_keys()
        keys = dict(keys.pop("mixer_keys", ())) | keys
        unknown = sorted(keys.keys() - model_keys().keys())
        if unknown:
            raise UserError(
                f"unknown key {', '.join(unknown)} of a model: expected some of "
                f"{', '.join(model_keys())}."
            )
        values = model_keys() | keys | {"n_token": n_token}
        for name in ("cutoffs", "tie_projs"):
            values[name] = tuple(values[name])
        if values["d_embed"] == 0:
            values["d_embed"] = values["d_model"]
        if not values["tie_projs"]:
            values["tie_projs"] = (False, *(True for _ in values["cutoffs"]))
        for name, value in values.items():
            if name not in own:
                object.__setattr__(self, name, value)
        object.__setattr__(self, "mixer_keys", tuple((name, values[name]) for name in own))
        self._check(values)

    def __getattr__(self, name: str) -> Any:
        pairs = dict(self.__dict__.get("mixer_keys", ()))
        if name not in pairs:
            raise AttributeError(f"ModelConfig has no key {name!r}.")
        return pairs[name]

    def _check(self, values: Mapping[str, Any]) -> None:
        for name, default in model_keys().items():
            value, kind = values[name], type(default)
            if not (type(value) is kind or (kind is float and type(value) is int)):
                raise UserError(f"{name} must be {kind.__name__}, as {default!r}, got {value!r}.")
        for name, valid in (("mixer", MIXERS), ("norm", NORMS), ("dtype", DTYPES)):
            if values[name] not in valid:
                raise UserError(
                    f"unknown {name} {values[name]!r}: expected one of {', '.join(valid)}."
                )
        for name in ("n_token", "d_model", "n_head", "d_head", "d_inner", "n_layer", "d_embed",
                     "div_val"):  # fmt: skip
            if values[name] < 1:
                raise UserError(f"{name} must be at least 1, got {values[name]}.")
        for name in ("dropout", "dropatt"):
            if not 0.0 <= values[name] < 1.0:
                raise UserError(f"{name} must be at least 0 and below 1, got {values[name]}.")
        if not all(type(c) is int for c in self.cutoffs):
            raise UserError(f"cutoffs must be integers, got {self.cutoffs}.")
        if any(a >= b for a, b in itertools.pairwise((0, *self.cutoffs, self.n_token))):
            raise UserError(
                f"cutoffs {self.cutoffs} must rise from above 0 and stay below the vocabulary's "
                f"{self.n_token} entries."
            )
        if len(self.tie_projs) != len(self.cutoffs) + 1:
            raise UserError(
                f"tie_projs needs one entry for each of the {len(self.cutoffs) + 1} clusters, "
                f"got {len(self.tie_projs)}."
            )
        if self.d_model % 2:
            raise UserError(f"d_model must be even for sinusoidal positions, got {self.d_model}.")
        kind = MIXERS[self.mixer]
        if self.no_pos and not kind.adds_positions:
            raise UserError(f"no_pos has no meaning for {self.mixer}, which has its own positions.")
        read = _fields(kind)
        for name, default in mixer_keys().items():
            # A key that switches something on, and nothing that would read it.
            if not default and values[name] and name not in read:
                owners = ", ".join(mixer for mixer, k in MIXERS.items() if name in _fields(k))
                raise UserError(
                    f"{name} has no meaning for {self.mixer}, it is a key of {owners}: leave it at "
                    f"{default!r}."
                )
        self.make_mixer().check()

    def make_mixer(self) -> Mixer:
        """The mixer of a layer, with the keys that it declares."""
        kind = MIXERS[self.mixer]
        return kind(**{name: getattr(self, name) for name in _fields(kind)}, parent=None)

    def carries(self, asked: bool) -> bool:
        """Whether a run takes the memory from segment to segment.

        Args:
            asked: `train.carry_over_fast_weight`.

        Raises:
            UserError: it is asked for and has no meaning for the mixer.
        """
        carries = MIXERS[self.mixer].carries
        if asked and carries != "asked":
            raise UserError(f"carry_over_fast_weight has no meaning for {self.mixer}.")
        return carries == "always" or asked

    @property
    def carries_memory(self) -> bool:
        """Whether `LanguageModel` returns a memory that the next segment can start from."""
        return MIXERS[self.mixer].carries != "never"


def _fields(kind: type) -> dict[str, Any]:
    """The fields that a mixer declares, with their defaults."""
    return {f.name: f.default for f in dataclasses.fields(kind) if f.name not in ("parent", "name")}


def mixer_keys() -> dict[str, Any]:
    """The keys that mixers declare beside those of every model, with their defaults.

    Raises:
        UserError: one has no default, or two mixers give it different ones.
    """
    common = {f.name for f in dataclasses.fields(ModelConfig)}
    keys: dict[str, Any] = {}
    for name, kind in MIXERS.items():
        for key, default in _fields(kind).items():
            if key in common:
                continue
            if default is dataclasses.MISSING:
                raise UserError(f"the mixer {name} declares {key} without a default: give it one.")
            if keys.setdefault(key, default) != default:
                raise UserError(
                    f"the mixer {name} declares {key} with the default {default!r}, and another "
                    f"one with {keys[key]!r}: choose another name or the same default."
                )
    return keys


def model_keys() -> dict[str, Any]:
    """All keys of the group `model`, with their defaults."""
    common = dataclasses.fields(ModelConfig)
    keys = {f.name: f.default for f in common if f.name not in ("n_token", "mixer_keys")}
    return keys | mixer_keys()


def build_config(fields: Mapping[str, Any], n_token: int) -> ModelConfig:
    """`ModelConfig` of a config's `model` group for a vocabulary of `n_token` words.

    Cutoffs beyond the vocabulary have no words to cut and are left out, so that a preset made
    for WikiText-103 also runs on a smaller text.
    """
    cutoffs = tuple(c for c in fields["cutoffs"] if type(c) is not int or c < n_token)
    return ModelConfig(n_token, **{**fields, "cutoffs": cutoffs})


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
    c.data.dir = ""  # folder with the text: train.txt ... or wiki.train.tokens ...
    c.data.cache_dir = "~/.cache/fwm"  # where the encoded text is kept
    c.data.download = False  # fetch a known dataset that is not there (asks TFDS)

    c.model = ConfigDict(model_keys())

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
    mixer = MIXERS[config.model.mixer]
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
    # What each option is for: whether it has a meaning.
    meaning = {
        "no_pos": mixer.adds_positions,
        "skip_attn_normalization": "attn_normalization" in _fields(mixer),
        "carry_over_fast_weight": mixer.carries == "asked",
    }
    if name not in meaning:
        raise UserError(
            f"unknown option {name!r}: expected no_pos, skip_attn_normalization, "
            "carry_over_fast_weight or key=value for a key of model."
        )
    if not meaning[name]:
        raise UserError(f"{name} has no meaning for {config.model.mixer}.")
    if name == "skip_attn_normalization":
        config.model.attn_normalization = "none"
    else:
        # Positions restart in every segment, so the paper carries weights over without them.
        config.model.no_pos = True
        config.train.carry_over_fast_weight |= name == "carry_over_fast_weight"
