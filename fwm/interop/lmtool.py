"""The official toolkit's arguments and weights <-> ours.

`from_lmtool` takes the arguments of the official `MemTransformerLM` by their names and its
`state_dict` as numpy arrays; `to_lmtool` is the exact way back. Matrices only change their layout
(PyTorch's Linear weight is [out, in]), so both ways are exact to the bit and linear: gradients
travel the same way.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fwm.config import ModelConfig, model_keys
from fwm.errors import UserError
from fwm.model import LanguageModel, redraw_projections
from fwm.model_config import mixer_keys
from fwm.ops import UPDATE_RULES
from fwm.registry import remembered

# attn_type: (mixer, feature map, update rule, attention normalisation unless skipped, scale_output)
ATTN_TYPES = {
    0: ("transformer_xl", "dpfp", "delta", "none", True),
    2: ("softmax", "dpfp", "delta", "none", True),
    4: ("fast_weight", "elu", "sum", "output", False),
    5: ("fast_weight", "favor", "sum", "output", False),
    6: ("fast_weight", "dpfp", "sum", "output", False),
    34: ("fast_weight", "elu", "sum", "output", True),
    35: ("fast_weight", "favor", "sum", "output", True),
    36: ("fast_weight", "dpfp", "sum", "output", True),
    24: ("fast_weight", "elu", "delta", "output", True),
    25: ("fast_weight", "favor", "delta", "output", True),
    26: ("fast_weight", "dpfp", "delta", "output", True),
    44: ("fast_weight", "elu", "delta", "output_and_key", True),
    45: ("fast_weight", "favor", "delta", "output_and_key", True),
    46: ("fast_weight", "dpfp", "delta", "output_and_key", True),
}

# The official constructor's defaults (its train.py passes 16 and 2 for proj_dim and n_roll).
DEFAULTS: dict[str, Any] = dict(
    attn_type=0, clamp_len=-1, cutoffs=(), d_embed=None, div_val=1, dropatt=0.0, dropout=0.0,
    ext_len=0, mem_len=0, n_roll=3, no_pos=False, pre_lnorm=False, proj_dim=256, same_length=False,
    sample_softmax=-1, skip_attn_normalization=False, tie_projs=(False,), tie_weight=True,
)  # fmt: skip
REQUIRED = ("n_token", "n_layer", "n_head", "d_model", "d_head", "d_inner")
# Say where or how the official model runs, not what it computes.
WITHOUT_EFFECT = ("carry_over_fast_weight", "d_res", "device", "remove_ff", "remove_res", "tgt_len")


def config_from_lmtool(arguments: Mapping[str, Any]) -> ModelConfig:
    """The `ModelConfig` of an official model, from its constructor's arguments.

    Raises:
        UserError: an unknown or missing argument, or one that asks for what the paper has not.
    """
    unknown = set(arguments) - {*DEFAULTS, *REQUIRED, *WITHOUT_EFFECT}
    if unknown:
        raise UserError(
            f"unknown arguments of the official model: {', '.join(sorted(unknown))}; "
            f"expected some of {', '.join(sorted({*DEFAULTS, *REQUIRED, *WITHOUT_EFFECT}))}."
        )
    missing = [name for name in REQUIRED if name not in arguments]
    if missing:
        raise UserError(f"missing arguments of the official model: {', '.join(missing)}.")
    a = DEFAULTS | dict(arguments)
    for name, only, why in (
        ("ext_len", (0,), "the extended context is no part of the paper"),
        ("sample_softmax", (-1, 0), "the sampled softmax is no part of the paper"),
        ("d_res", (None, a["d_model"]), "the residual stream has the width d_model"),
        ("remove_ff", (None, False), "every layer of the paper has a feed-forward part"),
        ("remove_res", (None, False), "every layer of the paper has its residuals"),
    ):
        if a.get(name) not in only:
            raise UserError(f"{name}={a[name]} is not supported: {why}.")
    if a["attn_type"] not in ATTN_TYPES:
        known = ", ".join(map(str, sorted(ATTN_TYPES)))
        raise UserError(f"unknown attn_type {a['attn_type']}: expected one of {known}.")
    mixer, feature_map, update_rule, normalization, scale_output = ATTN_TYPES[a["attn_type"]]
    # Types 4, 5, 6 always normalise; the softmax types have nothing to skip.
    if a["skip_attn_normalization"] and scale_output:
        normalization = "none"
    if a["attn_type"] in (4, 5, 6) and a["dropatt"] > 0:
        raise UserError(
            f"dropatt={a['dropatt']} with attn_type {a['attn_type']} is not supported: "
            "the recurrent form has no attention matrix to drop from."
        )
    cutoffs = tuple(a["cutoffs"])
    tie_projs = tuple(bool(tie) for tie in a["tie_projs"])[: len(cutoffs) + 1]
    tie_projs += (False,) * (len(cutoffs) + 1 - len(tie_projs))
    xl = mixer == "transformer_xl"
    return ModelConfig(
        n_token=a["n_token"],
        mixer=mixer,
        norm="pre_lnorm" if a["pre_lnorm"] else "post",
        feature_map=feature_map,
        update_rule=update_rule,
        attn_normalization=normalization,
        scale_output=scale_output,
        no_pos=bool(a["no_pos"]) and not xl,  # type 0 ignores it
        d_model=a["d_model"],
        n_head=a["n_head"],
        d_head=a["d_head"],
        d_inner=a["d_inner"],
        n_layer=a["n_layer"],
        d_embed=a["d_embed"] or 0,
        dropout=a["dropout"],
        dropatt=a["dropatt"] if mixer != "fast_weight" else 0.0,  # those layers never read it
        mem_len=a["mem_len"],
        clamp_len=a["clamp_len"],
        # The fast weight layers build the mask and never use it.
        same_length=bool(a["same_length"]) and mixer != "fast_weight",
        cutoffs=cutoffs,
        div_val=a["div_val"],
        tie_weight=bool(a["tie_weight"]),
        tie_projs=tie_projs,
        performer_proj_dim=a["proj_dim"],
        dpfp_n_roll=a["n_roll"],
    )


def arguments_to_lmtool(config: ModelConfig) -> dict[str, Any]:
    """The official constructor's arguments for a model: the inverse of `config_from_lmtool`.

    Raises:
        UserError: the official toolkit has no such model.
    """
    c, mixer = config, config.make_mixers()[0]
    if c.key_norm == UPDATE_RULES[c.update_rule].key_norm:  # The rule's own, by its name.
        plain: dict[str, Any] = {"key_norm": ""}
        c = dataclasses.replace(c, **plain)
    # The keys that say what is computed: not the dtype, nor those of mixers that it has not.
    read = [
        n for n in model_keys() if n != "dtype" and (n not in mixer_keys() or hasattr(mixer, n))
    ]
    common = dict(
        n_token=c.n_token, n_layer=c.n_layer, n_head=c.n_head, d_model=c.d_model, d_head=c.d_head,
        d_inner=c.d_inner, d_embed=c.d_embed, dropout=c.dropout, dropatt=c.dropatt,
        mem_len=c.mem_len, clamp_len=c.clamp_len, same_length=c.same_length,
        cutoffs=list(c.cutoffs), div_val=c.div_val, tie_weight=c.tie_weight,
        tie_projs=list(c.tie_projs), no_pos=c.no_pos, pre_lnorm=c.norm == "pre_lnorm",
        proj_dim=c.performer_proj_dim, n_roll=c.dpfp_n_roll,
    )  # fmt: skip
    for kind, skip in itertools.product(ATTN_TYPES, (False, True)):
        arguments = common | {"attn_type": kind, "skip_attn_normalization": skip}
        if ATTN_TYPES[kind][0] != c.mixer or (kind in (4, 5, 6) and c.dropatt > 0):
            continue
        back = config_from_lmtool(arguments)
        if all(getattr(back, name) == getattr(c, name) for name in read):
            return arguments
    raise UserError(
        f"the official toolkit has no model of mixer={c.mixer}, norm={c.norm}"
        + "".join(f", {name}={getattr(mixer, name)!r}" for name in read if name in mixer_keys())
        + ": ATTN_TYPES has those that there are."
    )


class Entry(NamedTuple):
    """Some official tensors and the one array of ours that holds them."""

    names: tuple[str, ...]
    path: tuple[str, ...]
    to_ours: Callable[..., np.ndarray]
    to_theirs: Callable[[np.ndarray], tuple[np.ndarray, ...]]


def _same(name: str, *path: str) -> Entry:
    return Entry((name,), path, lambda x: x, lambda x: (x,))


def _transposed(name: str, *path: str) -> Entry:
    return Entry((name,), path, lambda x: x.T, lambda x: (x.T,))


def _by_heads(name: str, c: ModelConfig) -> Entry:
    """[q | k | v] or [q | k | v | beta] of one head, then of the next."""
    return Entry(
        (name,),
        ("mixer", "qkv", "kernel"),
        lambda w: w.reshape(c.n_head, -1, c.d_model).transpose(2, 0, 1),
        lambda w: (w.transpose(1, 2, 0).reshape(-1, c.d_model),),
    )


def _by_kinds(names: tuple[str, ...], c: ModelConfig) -> Entry:
    """All heads' q, all heads' k, all heads' v; in one matrix or as q and kv."""
    n, h, d = c.n_head, c.d_head, c.d_model

    def to_theirs(w: np.ndarray) -> tuple[np.ndarray, ...]:
        rows = w.reshape(d, n, 3, h).transpose(2, 1, 3, 0).reshape(3 * n * h, d)
        return (rows,) if len(names) == 1 else (rows[: n * h], rows[n * h :])

    return Entry(
        names,
        ("mixer", "qkv", "kernel"),
        lambda *w: np.concatenate(w).reshape(3, n, h, d).transpose(3, 1, 0, 2).reshape(d, n, 3 * h),
        to_theirs,
    )


def _fast_weight(c: ModelConfig, prefix: str) -> Iterator[Entry]:
    if not c.scale_output:
        yield from _softmax(c, prefix)
    elif c.update_rule == "sum":
        yield _by_heads(f"{prefix}qkv_net.weight", c)
    else:
        yield _by_heads(f"{prefix}qkvb_net.weight", c)


def _softmax(c: ModelConfig, prefix: str) -> Iterator[Entry]:
    yield _by_kinds((f"{prefix}q_net.weight", f"{prefix}kv_net.weight"), c)


def _transformer_xl(c: ModelConfig, prefix: str) -> Iterator[Entry]:
    n, h, d = c.n_head, c.d_head, c.d_model
    yield _by_kinds((f"{prefix}qkv_net.weight",), c)
    yield Entry(
        (f"{prefix}r_net.weight",),
        ("mixer", "r", "kernel"),
        lambda w: w.T.reshape(d, n, h),
        lambda w: (w.reshape(d, n * h).T,),
    )


# By mixer: the layouts of its projections in the official toolkit.
MIXERS = {"fast_weight": _fast_weight, "softmax": _softmax, "transformer_xl": _transformer_xl}


def _attention(c: ModelConfig, layer: str) -> Iterator[Entry]:
    n, h, d = c.n_head, c.d_head, c.d_model
    prefix = f"{layer}.dec_attn."
    yield from MIXERS[c.pattern[0]](c, prefix)
    yield Entry(
        (f"{prefix}o_net.weight",),
        ("mixer", "out", "kernel"),
        lambda w: w.T.reshape(n, h, d),
        lambda w: (w.reshape(n * h, d).T,),
    )


def _layer(c: ModelConfig, layer: str) -> Iterator[Entry]:
    yield from _attention(c, layer)
    for theirs, ours in (("dec_attn", "mixer_norm"), ("pos_ff", "ff_norm")):
        yield _same(f"{layer}.{theirs}.layer_norm.weight", ours, "LayerNorm_0", "scale")
        yield _same(f"{layer}.{theirs}.layer_norm.bias", ours, "LayerNorm_0", "bias")
    for theirs, ours in (("CoreNet.0", "inner"), ("CoreNet.3", "outer")):
        yield _transposed(f"{layer}.pos_ff.{theirs}.weight", "ff", ours, "kernel")
        yield _same(f"{layer}.pos_ff.{theirs}.bias", "ff", ours, "bias")


def _vocabulary(c: ModelConfig) -> Iterator[Entry]:
    """Embedding and softmax; a tied tensor appears once for each of its official names."""
    # One table for all clusters with div_val 1, one for each otherwise.
    tables = range(len(c.cutoffs) + 1 if c.div_val > 1 else 1)
    projected = c.div_val > 1 or c.d_embed != c.d_model
    for i in tables:
        yield _same(f"word_emb.emb_layers.{i}.weight", "embedding", f"table_{i}")
        if projected:
            yield _transposed(f"word_emb.emb_projs.{i}", "embedding", f"proj_{i}")
        owner = "embedding" if c.tie_weight else "softmax"
        yield _same(f"crit.out_layers.{i}.weight", owner, f"table_{i}")
        yield _same(f"crit.out_layers.{i}.bias", "softmax", f"bias_{i}")
    if c.cutoffs:
        yield _same("crit.cluster_weight", "softmax", "cluster_weight")
        yield _same("crit.cluster_bias", "softmax", "cluster_bias")
    if projected:
        for i, tied in enumerate(c.tie_projs):
            if tied:
                source = i if c.div_val > 1 else 0
                yield _transposed(f"crit.out_projs.{i}", "embedding", f"proj_{source}")
            else:
                yield _same(f"crit.out_projs.{i}", "softmax", f"proj_{i}")


def _outside_layers(c: ModelConfig) -> Iterator[Entry]:
    yield from _vocabulary(c)
    for name in c.make_mixers()[0].shared_shapes():
        yield _same(name, name)


def _inverse_frequencies(c: ModelConfig) -> np.ndarray:
    """The official position buffer, a constant of d_model."""
    exponents = np.arange(0, c.d_model, 2, dtype=np.float32) / np.float32(c.d_model)
    return (1.0 / np.float32(10000.0) ** exponents).astype(np.float32)


BUFFER = "pos_emb.inv_freq"


def from_lmtool(
    arguments: Mapping[str, Any],
    state_dict: Mapping[str, Any],
    favor_projections: Sequence[Any] | Mapping[Any, Any] | np.ndarray | None = None,
) -> tuple[ModelConfig, dict]:
    """An official model as ours.

    Args:
        arguments: of the official `MemTransformerLM` (attn_type, n_token, n_layer, ...).
        state_dict: its tensors as arrays, by their official names. Tied ones may stand once.
        favor_projections: FAVOR+ only, one [d_head, proj_dim] per layer (a sequence, or a mapping
            from the layer's number); the official state_dict lacks them. None draws new ones, as
            the official code does at every forward pass in training.

    Returns:
        `ModelConfig` and the variables for `LanguageModel(config).apply`.

    Raises:
        UserError: arguments or tensors that are unknown, missing, of the wrong shape, or tied but
            different.
    """
    c = config_from_lmtool(arguments)
    tensors = {name: np.asarray(value) for name, value in state_dict.items()}
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), _abstract_variables(c))
    for name, zero in to_lmtool(c, zeros).items():
        if name in tensors and tensors[name].shape != zero.shape:
            raise UserError(
                f"{name} should have the shape {zero.shape}, the state_dict gives "
                f"{tensors[name].shape}."
            )
    used = {BUFFER}

    def take(tree: dict, entry: Entry) -> None:
        used.update(entry.names)
        present = [name for name in entry.names if name in tensors]
        parent = tree
        for key in entry.path[:-1]:
            parent = parent.setdefault(key, {})
        known = parent.get(entry.path[-1])
        if len(present) < len(entry.names):
            if known is None:
                absent = sorted(set(entry.names) - set(present))
                raise UserError(f"the state_dict lacks {', '.join(absent)}.")
            return  # the second name of a tied tensor
        value = entry.to_ours(*(tensors[name] for name in entry.names))
        if known is not None and not np.array_equal(known, value):
            raise UserError(f"{entry.names[0]} is tied in the arguments, but its values differ.")
        parent[entry.path[-1]] = np.ascontiguousarray(value)

    params: dict = {}
    for entry in _outside_layers(c):
        take(params, entry)
    per_layer: list[dict] = [{} for _ in range(c.n_layer)]
    for i, tree in enumerate(per_layer):
        for entry in _layer(c, f"layers.{i}"):
            take(tree, entry)
    params["layers"] = jax.tree.map(lambda *leaves: np.stack(leaves), *per_layer)
    extra = sorted(set(tensors) - used)
    if extra:
        raise UserError(f"the state_dict has tensors that this model has not: {', '.join(extra)}.")

    variables: dict = {"params": params}
    if "favor" in zeros:
        variables["favor"] = _projections(c, favor_projections)
    return c, jax.tree.map(jnp.asarray, variables)


@remembered
def _abstract_variables(c: ModelConfig) -> dict:
    tokens = jax.ShapeDtypeStruct((1, 1), np.int32)
    return jax.eval_shape(LanguageModel(c).init, jax.random.key(0), tokens, tokens)


def _projections(c: ModelConfig, given: Any) -> dict:
    if given is None:
        return redraw_projections(c, jax.random.key(0))["favor"]
    if isinstance(given, Mapping):
        by_number = {int(layer): value for layer, value in given.items()}
        given = [by_number[i] for i in range(c.n_layer) if i in by_number]
    if len(given) != c.n_layer:
        raise UserError(f"favor_projections needs {c.n_layer} layers, got {len(given)}.")
    layers = [np.asarray(value, np.float32) for value in given]
    for value in layers:
        if value.shape != (c.d_head, c.performer_proj_dim):
            raise UserError(
                f"favor_projections needs [d_head, proj_dim] = "
                f"{[c.d_head, c.performer_proj_dim]} for each layer, got {list(value.shape)}."
            )
    stacked = np.stack(layers)
    return {"layers": {"mixer": {"projection": stacked}}}


def to_lmtool(config: ModelConfig, variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The official state_dict of `variables`, a tied tensor under each of its official names.

    The map is linear, so it also takes `{"params": gradients}` to official gradients: for a tied
    tensor each name then holds the total one.

    Raises:
        UserError: a mixer, norm or composition of a fast weight layer that the official toolkit
            has not.
    """
    if config.mixer not in MIXERS or config.norm == "pre":
        raise UserError(
            f"the official toolkit has no model of mixer={config.mixer} and norm={config.norm}: "
            f"expected one of {', '.join(MIXERS)} with post or pre_lnorm."
        )
    if MIXERS[config.mixer] is _fast_weight:
        c = config
        known = {(kind[1], kind[2], kind[4]) for kind in ATTN_TYPES.values()}
        own = c.key_norm not in ("", UPDATE_RULES[c.update_rule].key_norm)
        own = own or c.make_mixers()[0].switched()
        if (c.feature_map, c.update_rule, c.scale_output) not in known or own:
            raise UserError(
                f"the official toolkit has no layer of feature_map={c.feature_map}, update_rule="
                f"{c.update_rule}, key_norm={c.key_norm!r}, scale_output={c.scale_output} and "
                f"{', '.join(c.make_mixers()[0].switched()) or 'nothing'} switched on: "
                "expected one of ATTN_TYPES."
            )
    params = variables["params"]
    state_dict: dict[str, np.ndarray] = {}

    def put(tree: Mapping, entry: Entry) -> None:
        value: Any = tree
        for key in entry.path:
            value = value[key]
        for name, array in zip(entry.names, entry.to_theirs(np.asarray(value)), strict=True):
            state_dict[name] = np.ascontiguousarray(array)

    for entry in _outside_layers(config):
        put(params, entry)
    for i in range(config.n_layer):
        layer = jax.tree.map(lambda leaf, i=i: np.asarray(leaf)[i], params["layers"])
        for entry in _layer(config, f"layers.{i}"):
            put(layer, entry)
    state_dict[BUFFER] = _inverse_frequencies(config)
    return state_dict
