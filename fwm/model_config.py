"""What a model is made of: every key of the group `model` with its default, meaning and limits.

What a mixer alone needs is declared, with its default and limits, where the mixer is.
"""

import dataclasses
import itertools
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import jax

from fwm.errors import UserError
from fwm.layers import MIXERS, Mixer
from fwm.layers.blocks import NORMS
from fwm.layers.mixer import COMMON
from fwm.limits import SIZE, TEXT, Kind, of_type, one_of, several, whole

DTYPES = ("float32", "bfloat16")
PRECISIONS = ("default", "float32")


# What a key may be, where the type of its default does not say it all. A mixer has those of its own
# keys, and names in a table (of mixers, rules, ...) are looked up there.
LIMITS: dict[str, Kind] = {
    "n_token": SIZE,
    "mixer": Kind(
        "a name, such as 'fast_weight', or names that are repeated over the layers, such as "
        "('fast_weight', 'softmax')",
        lambda x: TEXT.fits(x) or (several(TEXT, "names").fits(x) and len(x) > 0),
    ),
    "norm": one_of(NORMS),
    "d_model": SIZE,
    "d_inner": SIZE,
    "n_layer": whole(1, 10_000),
    "d_embed": whole(0),
    "cutoffs": several(SIZE, "ranks of words"),
    "div_val": SIZE,
    "tie_projs": several(of_type(bool), "True and False"),
    "dtype": one_of(DTYPES),
    "matmul_precision": one_of(PRECISIONS),
}


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
        for name, kind in model_limits().items():
            kind.check(name, values[name])
        for name in ("cutoffs", "tie_projs"):
            values[name] = tuple(values[name])
        pattern = mixer_pattern(values["mixer"])
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
        if self.d_embed < self.div_val ** len(self.cutoffs):
            raise UserError(
                f"div_val {self.div_val} leaves no width of d_embed {self.d_embed} for the last of "
                f"{len(self.cutoffs) + 1} clusters: make d_embed larger or div_val smaller."
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
        read = {name for mixer in self.pattern for name in mixer_fields(MIXERS[mixer])}
        for name, default in mixer_keys().items():
            # A key that switches something on, and nothing that would read it. Two that variants
            # set themselves may stay where only the mixer is changed.
            off = default in ("", "none", 0, 1)
            off = off and name not in ("attn_normalization", "scale_output")
            if off and values[name] != default and name not in read:
                owners = ", ".join(mixer for mixer, k in MIXERS.items() if name in mixer_fields(k))
                raise UserError(
                    f"{name} has no meaning for {mixed}, it is a key of {owners}: leave it at "
                    f"{default!r}."
                )

    def precision(self) -> AbstractContextManager[None]:
        """Within it what is traced has the matmuls of `matmul_precision`."""
        if self.matmul_precision == "default":
            return nullcontext()
        return jax.default_matmul_precision(self.matmul_precision)

    @property
    def pattern(self) -> tuple[str, ...]:
        """The names of the mixers of the first layers, which all others repeat."""
        return mixer_pattern(self.mixer)

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

    def check_packs(self) -> None:
        """Raise `UserError` where a mixer does not keep packed documents apart."""
        for name, mixer in zip(self.pattern, self.make_mixers(), strict=True):
            if not mixer.packs:
                raise UserError(
                    f"documents cannot be packed into rows of the mixer {name}, which does not "
                    "keep them apart (Mixer.packs): leave config.data.documents at False."
                )
            mixer.check_packs()

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
    return kind(**{field: keys[field] for field in mixer_fields(kind)}, parent=None)


def mixer_pattern(mixer: Any) -> tuple[str, ...]:
    """The names of the mixers that are repeated; of one and the same mixer its name once."""
    names = (mixer,) if isinstance(mixer, str) else mixer
    return tuple(names) if len(set(names)) > 1 else (names[0],)


def mixer_fields(kind: type) -> dict[str, Any]:
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
        for key, default in mixer_fields(kind).items():
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


def model_limits() -> dict[str, Kind]:
    """What every key of the group `model`, and `n_token`, may be."""
    own = {name: kind for mixer in MIXERS.values() for name, kind in mixer.limits.items()}
    typed = {
        name: COMMON.get(name) or of_type(type(default)) for name, default in model_keys().items()
    }
    return typed | own | LIMITS


def build_config(fields: Mapping[str, Any], n_token: int) -> ModelConfig:
    """`ModelConfig` of a config's `model` group for a vocabulary of `n_token` words.

    Cutoffs beyond the vocabulary have no words to cut and are left out, so that a preset made
    for WikiText-103 also runs on a smaller text.
    """
    LIMITS["cutoffs"].check("cutoffs", fields.get("cutoffs", ()))
    cutoffs = tuple(c for c in fields.get("cutoffs", ()) if c < n_token)
    return ModelConfig(n_token, **{**fields, "cutoffs": cutoffs})
