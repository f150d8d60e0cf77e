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
from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import jax
from ml_collections import ConfigDict, FieldReference

from fwm.errors import UserError
from fwm.layers import MIXERS, Mixer
from fwm.layers.blocks import NORMS

DTYPES = ("float32", "bfloat16")
PRECISIONS = ("default", "float32")


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
    # fast_weight, softmax, transformer_xl; several in parentheses, as in
    # ("fast_weight", "softmax"): a pattern that is repeated over the layers
    mixer: str | tuple[str, ...] = "fast_weight"
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
    # of float32 matmuls: default (TF32, 10 bits of 23, on a GPU that has it), float32
    matmul_precision: str = "default"
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
        pattern = _pattern(values["mixer"])
        values["mixer"] = pattern if len(pattern) > 1 else pattern[0]
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
            if name == "mixer":  # a name or several: `_pattern` has seen to it
                continue
            if not (type(value) is kind or (kind is float and type(value) is int)):
                raise UserError(f"{name} must be {kind.__name__}, as {default!r}, got {value!r}.")
        names: list[tuple[str, str, Collection[str]]]
        names = [("mixer", mixer, MIXERS) for mixer in self.pattern]
        names += [("norm", self.norm, NORMS), ("dtype", self.dtype, DTYPES)]
        names += [("matmul_precision", self.matmul_precision, PRECISIONS)]
        for name, value, valid in names:
            if value not in valid:
                raise UserError(f"unknown {name} {value!r}: expected one of {', '.join(valid)}.")
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
        self._check_mixers(values)

    def _check_mixers(self, values: Mapping[str, Any]) -> None:
        mixers, mixed = self.make_mixers(), " and ".join(dict.fromkeys(self.pattern))
        if self.n_layer % len(self.pattern):
            raise UserError(
                f"n_layer={self.n_layer} is no multiple of the {len(self.pattern)} layers of the "
                f"pattern mixer={self.pattern}: choose one that is."
            )
        if len({mixer.adds_positions for mixer in mixers}) > 1:
            raise UserError(
                f"{mixed} cannot be mixed: some have positions of their own, others need those "
                "that a model adds to the embedding."
            )
        if len({mixer.carries == "always" for mixer in mixers}) > 1:
            raise UserError(
                f"{mixed} cannot be mixed: some always carry a memory from segment to segment, "
                "others never or where it is asked for."
            )
        if self.no_pos and not mixers[0].adds_positions:
            raise UserError(f"no_pos has no meaning for {mixed}, which has its own positions.")
        read = {name for mixer in self.pattern for name in _fields(MIXERS[mixer])}
        for name, default in mixer_keys().items():
            # A key that switches something on, and nothing that would read it.
            if not default and values[name] and name not in read:
                owners = ", ".join(mixer for mixer, k in MIXERS.items() if name in _fields(k))
                raise UserError(
                    f"{name} has no meaning for {mixed}, it is a key of {owners}: leave it at "
                    f"{default!r}."
                )
        for mixer in mixers:
            mixer.check()

    def precision(self) -> AbstractContextManager[None]:
        """Within it what is traced has the matmuls of `matmul_precision`."""
        if self.matmul_precision == "default":
            return nullcontext()
        return jax.default_matmul_precision(self.matmul_precision)

    @property
    def pattern(self) -> tuple[str, ...]:
        """The names of the mixers of the first layers, which all others repeat."""
        return _pattern(self.mixer)

    def make_mixers(self) -> tuple[Mixer, ...]:
        """The mixers of the pattern, with the keys that they declare."""
        keys = {name: getattr(self, name) for name in model_keys()}
        return tuple(make_mixer(name, keys) for name in self.pattern)

    def carries(self, asked: bool) -> bool:
        """Whether a run takes the memory from segment to segment.

        Args:
            asked: `train.carry_over_fast_weight`.

        Raises:
            UserError: it is asked for and has no meaning for one of the mixers.
        """
        mixers = self.make_mixers()
        for name, mixer in zip(self.pattern, mixers, strict=True):
            if asked and mixer.carries != "asked":
                raise UserError(
                    f"carry_over_fast_weight has no meaning for {name}, which carries "
                    + (
                        "its memory anyway."
                        if mixer.carries == "always"
                        else "nothing (softmax does where attention_window is set)."
                    )
                )
        return asked or mixers[0].carries == "always"

    @property
    def carries_memory(self) -> bool:
        """Whether `LanguageModel` returns a memory that the next segment can start from."""
        return all(mixer.carries != "never" for mixer in self.make_mixers())

    def name_parts(self) -> list[str]:
        """What a run's name says of the mixers: of each what it says itself, and how often."""
        mixers, parts = dict(zip(self.pattern, self.make_mixers(), strict=True)), []
        for name, run in itertools.groupby(self.pattern):
            times = len(list(run))
            parts += mixers[name].name_parts(name) + [f"x{times}"] * (times > 1)
        return parts


def make_mixer(name: str, keys: Mapping[str, Any]) -> Mixer:
    """A mixer by its name, with those of `keys` that it declares."""
    kind = MIXERS[name]
    return kind(**{field: keys[field] for field in _fields(kind)}, parent=None)


def _pattern(mixer: Any) -> tuple[str, ...]:
    """The names of the mixers that are repeated; of one and the same mixer its name once."""
    names = (mixer,) if isinstance(mixer, str) else mixer
    if not (
        isinstance(names, tuple | list) and names and all(isinstance(name, str) for name in names)
    ):
        raise UserError(
            "mixer must be a name, such as 'fast_weight', or names that are repeated over the "
            f"layers, such as ('fast_weight', 'softmax'), got {mixer!r}."
        )
    return tuple(names) if len(set(names)) > 1 else (names[0],)


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
    c.seed = 1111  # of everything random: initial parameters, dropout, FAVOR+ projections

    c.data = ConfigDict()
    c.data.name = "embedded"  # embedded, wikitext103, wikitext2, enwik8, text8, ptb, lm1b, tfds:...
    c.data.dir = (
        ""  # folder with the text: train.txt ..., wiki.train.tokens ..., files of documents
    )
    c.data.file = ""  # or one file with the text, to be split 90/5/5 by place
    c.data.tokenizer = ""  # words, characters, bpe; "": words, in enwik8 and text8 characters
    c.data.vocab_size = 0  # of bpe, subwords, its 256 bytes among them; 0: 8192
    c.data.field = "text"  # of .jsonl, .parquet and saved data sets: which has the text
    c.data.cache_dir = "~/.cache/fwm"  # where the encoded text is kept
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
    name, equals, value = option.partition("=")
    if equals:
        if name not in config.model:
            raise UserError(
                f"unknown option {name!r}: expected a key of model ({', '.join(config.model)})."
            )
        default = model_keys()[name]
        text = isinstance(default, str) and not value.startswith("(")
        try:
            config.model[name] = value if text else ast.literal_eval(value)
        except (ValueError, SyntaxError, TypeError):
            old = config.model[name]
            raise UserError(
                f"option {option!r}: expected a {type(old).__name__} such as {old!r}."
            ) from None
        return
    pattern, keys = _pattern(config.model.mixer), config.model.to_dict()
    mixers = [make_mixer(mixer, keys) for mixer in pattern]
    # What each option is for: whether it has a meaning.
    meaning = {
        "no_pos": all(mixer.adds_positions for mixer in mixers),
        "skip_attn_normalization": any("attn_normalization" in _fields(type(m)) for m in mixers),
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
