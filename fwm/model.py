"""The language model: `ModelConfig` says what it is made of, `LanguageModel` computes it.

    nll, memory = LanguageModel(config).apply(variables, tokens, targets, memory)

Every model of the paper is one composition of the fields of `ModelConfig`; there are no classes
per variant. Layers are stacked along a leading axis of their parameters and scanned.
"""

import dataclasses
import functools
import itertools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from fwm import layers, ops
from fwm.adaptive import AdaptiveEmbedding, AdaptiveSoftmax
from fwm.errors import UserError
from fwm.layers import Dropout
from fwm.ops.fast_weights import ATTN_NORMALIZATIONS, UPDATE_RULES

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """What a model is made of; the official toolkit's option names where it has them.

    Raises:
        UserError: an unknown name, a size out of range, or a combination without meaning.
    """

    n_token: int
    mixer: str = "fast_weight"
    feature_map: str = "dpfp"
    update_rule: str = "delta"
    attn_normalization: str = "none"
    no_pos: bool = False
    scale_output: bool = True
    d_model: int = 128
    n_head: int = 8
    d_head: int = 16
    d_inner: int = 2048
    n_layer: int = 16
    d_embed: int = 0  # 0: d_model
    dropout: float = 0.0
    dropatt: float = 0.0
    mem_len: int = 0
    clamp_len: int = -1
    same_length: bool = False
    cutoffs: tuple[int, ...] = ()
    div_val: int = 1
    tie_weight: bool = True
    tie_projs: tuple[bool, ...] = ()  # (): all but the first, as the official train.py
    performer_proj_dim: int = 16
    dpfp_n_roll: int = 2
    dtype: str = "float32"

    def __post_init__(self):
        """Check the fields and fill in those that stand for a default."""
        for name in ("cutoffs", "tie_projs"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.d_embed == 0:
            object.__setattr__(self, "d_embed", self.d_model)
        if not self.tie_projs:
            object.__setattr__(self, "tie_projs", (False, *(True for _ in self.cutoffs)))
        for field, valid in (
            ("mixer", MIXERS),
            ("feature_map", layers.FEATURE_MAPS),
            ("update_rule", UPDATE_RULES),
            ("attn_normalization", ATTN_NORMALIZATIONS),
            ("dtype", DTYPES),
        ):
            if getattr(self, field) not in valid:
                raise UserError(
                    f"unknown {field} {getattr(self, field)!r}: expected one of {', '.join(valid)}."
                )
        for field in SIZES:
            if getattr(self, field) < 1:
                raise UserError(f"{field} must be at least 1, got {getattr(self, field)}.")
        for field in ("dropout", "dropatt"):
            if not 0.0 <= getattr(self, field) < 1.0:
                raise UserError(
                    f"{field} must be at least 0 and below 1, got {getattr(self, field)}."
                )
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
        for wrong, why in self._without_meaning():
            if wrong:
                raise UserError(why)

    def _without_meaning(self) -> list[tuple[bool, str]]:
        fast, recurrent = self.mixer == "fast_weight", self.mixer == "transformer_xl"
        return [
            (
                fast and self.update_rule == "sum" and self.attn_normalization == "output_and_key",
                "attn_normalization=output_and_key rescales what the delta rule removes, "
                "and the sum rule removes nothing: use output or none.",
            ),
            (
                fast and self.dropatt > 0,
                "dropatt has no meaning for a fast weight memory, which has no attention matrix: "
                "leave it at 0.",
            ),
            (
                recurrent and self.no_pos,
                "no_pos has no meaning for transformer_xl, whose positions are relative.",
            ),
            (
                self.mem_len < 0 or (self.mem_len > 0 and not recurrent),
                f"mem_len is the memory of transformer_xl, got {self.mem_len} for {self.mixer}.",
            ),
            (
                self.same_length and self.mem_len == 0,
                "same_length needs transformer_xl with mem_len > 0: otherwise it masks everything.",
            ),
        ]

    @property
    def carries_memory(self) -> bool:
        """Whether `LanguageModel` returns a memory that the next segment can start from."""
        return self.mixer != "softmax"

    def carries(self, asked: bool) -> bool:
        """Whether a run carries memory over; `asked`: train.carry_over_fast_weight."""
        return self.mixer != "softmax" and (asked or self.mixer == "transformer_xl")

    @property
    def n_feature(self) -> int:
        """K, the width of keys and queries after the feature map."""
        return {
            "elu": self.d_head,
            "favor": 2 * self.performer_proj_dim,
            "dpfp": 2 * self.d_head * self.dpfp_n_roll,
        }[self.feature_map]


SIZES = (
    "n_token", "d_model", "n_head", "d_head", "d_inner", "n_layer", "d_embed", "div_val",
    "performer_proj_dim", "dpfp_n_roll",
)  # fmt: skip


class SegmentMemory(NamedTuple):
    """Transformer-XL's memory: for each layer its inputs at the last `mem_len` positions.

    Fields:
        inputs: n_layer arrays [B, mem_len, D], the newest position last.
        length: how many positions, counted from the newest, are filled, [B] int32.
    """

    inputs: tuple[Float[Array, "B M D"], ...]
    length: Int[Array, " B"]


def empty_memory(config: ModelConfig, batch_size: int) -> Any:
    """The memory before the first token: what `memory=None` stands for, as arrays."""
    c = config
    if c.mixer == "softmax":
        return None
    if c.mixer == "transformer_xl":
        inputs = jnp.zeros((batch_size, c.mem_len, c.d_model), DTYPES[c.dtype])
        return SegmentMemory((inputs,) * c.n_layer, jnp.zeros((batch_size,), jnp.int32))
    state = ops.FastWeightState(
        jnp.zeros((batch_size, c.n_head, c.n_feature, c.d_head)),
        jnp.zeros((batch_size, c.n_head, c.n_feature)),
    )
    return (state,) * c.n_layer


class Shared(NamedTuple):
    """What all layers of Transformer-XL read: how much memory there is, biases, dropout key."""

    length: Int[Array, " B"]
    r_w_bias: Float[Array, "N H"]
    r_r_bias: Float[Array, "N H"]
    key: Key[Array, ""] | None


def _fast_weight(config: ModelConfig, x, carried, shared, source, last):
    names = (
        "n_head", "d_head", "feature_map", "update_rule", "attn_normalization",
        "dpfp_n_roll", "performer_proj_dim", "scale_output",
    )  # fmt: skip
    fields = {name: getattr(config, name) for name in names}
    mixer = layers.FastWeightAttention(**fields, dtype=DTYPES[config.dtype], name="mixer")
    return mixer(x, carried, last)


def _softmax(config: ModelConfig, x, carried, shared, source, last):
    mixer = layers.SoftmaxAttention(
        config.n_head, config.d_head, config.dropatt, DTYPES[config.dtype], name="mixer"
    )
    return mixer(x, source, last), None


def _transformer_xl(config: ModelConfig, x, carried, shared, source, last):
    names = ("n_head", "d_head", "mem_len", "clamp_len", "same_length", "dropout", "dropatt")
    fields = {name: getattr(config, name) for name in names}
    mixer = layers.RelativeAttention(**fields, dtype=DTYPES[config.dtype], name="mixer")
    out = mixer(x, carried, shared.length, shared.r_w_bias, shared.r_r_bias, source, shared.key)
    # The memory is the past: no gradient flows into earlier segments, and none is kept for it.
    new = jax.lax.stop_gradient(jnp.concatenate([carried, x], axis=1))
    return out if last is None else out[:, -last:], new[:, new.shape[1] - config.mem_len :]


MIXERS = {
    "fast_weight": _fast_weight,
    "softmax": _softmax,
    "transformer_xl": _transformer_xl,
}


class Block(nn.Module):
    """One layer: mixer and feed-forward, each in a post-norm residual branch."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        carried: Any,
        shared: Shared | None,
        source: Dropout | None,
        last: int | None = None,
    ) -> tuple[Float[Array, "B _ D"], Any]:
        """`[B, T, D]` and what this layer carries -> the same after the segment."""
        c, dtype = self.config, DTYPES[self.config.dtype]
        out, carried = MIXERS[c.mixer](c, x, carried, shared, source, last)
        out = layers.dropout(out, source, layers.MIXER_SITE, c.dropout)
        x = layers.AddAndNorm(dtype, name="mixer_norm")(x if last is None else x[:, -last:], out)
        out = layers.FeedForward(c.d_inner, c.dropout, dtype, name="ff")(x, source)
        return layers.AddAndNorm(dtype, name="ff_norm")(x, out), carried


class LanguageModel(nn.Module):
    """Word embedding, `n_layer` blocks, adaptive softmax (paper section 6.3).

    Call: see `__call__`; `method="hidden"` gives the softmax's input, `method="log_probs"` the
    whole distribution over the next token.
    """

    config: ModelConfig

    def setup(self):
        """Declare the parameters."""
        c = self.config
        sizes = (c.n_token, c.d_embed, c.d_model, c.cutoffs, c.div_val)
        self.embedding = AdaptiveEmbedding(*sizes)
        self.softmax = AdaptiveSoftmax(*sizes, c.tie_weight, c.tie_projs)
        if c.mixer == "transformer_xl":
            bias = functools.partial(self.param, init_fn=layers.matrix_init)
            self.r_w_bias = bias("r_w_bias", shape=(c.n_head, c.d_head))
            self.r_r_bias = bias("r_r_bias", shape=(c.n_head, c.d_head))
        self.layer_params = self.param("layers", lambda key: self._init_layers(key)["params"])
        if c.mixer == "fast_weight" and c.feature_map == "favor":
            self.layer_favor = self.variable(
                "favor", "layers", lambda: self._init_layers(self.make_rng("params"))["favor"]
            )

    def _init_layers(self, key: Key[Array, ""]) -> Any:
        c = self.config
        x = jnp.zeros((1, 1, c.d_model), DTYPES[c.dtype])
        carried, shared = self._unpack(empty_memory(c, 1), None)
        first = None if carried is None else jax.tree.map(lambda leaf: leaf[0], carried)
        init = lambda k: Block(c, parent=None).init(k, x, first, shared, None)
        return jax.vmap(init)(jax.random.split(key, c.n_layer))

    def _unpack(self, memory: Any, key: Key[Array, ""] | None) -> tuple[Any, Shared | None]:
        """A memory as (what each layer carries, stacked by layer; what all of them read)."""
        stack = lambda per_layer: jax.tree.map(lambda *leaves: jnp.stack(leaves), *per_layer)
        if self.config.mixer == "transformer_xl":
            shared = Shared(memory.length, self.r_w_bias, self.r_r_bias, key)
            return stack(memory.inputs), shared
        return (None if memory is None else stack(memory)), None

    def hidden(
        self,
        tokens: Int[Array, "B T"],
        memory: Any = None,
        dropout: Dropout | None = None,
        last: int | None = None,
    ) -> tuple[Float[Array, "B _ D"], Any]:
        """Output of the last layer, [B, T, D] (its last `last` positions if given), and memory."""
        return self._hidden(tokens, memory, dropout, last)[:2]

    def _hidden(
        self, tokens: Array, memory: Any, dropout: Dropout | None, last: int | None
    ) -> tuple[Array, Any, tuple[Array, ...]]:
        """As `hidden`, and the embedding's tables for a tied softmax.

        Handed on this way, the gradients of their two uses share one buffer.
        """
        c = self.config
        batch, length = tokens.shape
        if memory is None and c.mixer == "transformer_xl":
            memory = empty_memory(c, batch)
        # Layers have keys of their own; the last one is for what is not in a layer.
        keys, own = None, None
        if dropout is not None:
            keys = jax.random.split(dropout.key, c.n_layer + 1)
            own = Dropout(keys[-1], dropout.rows)

        x, tables = self.embedding.with_tables(tokens)
        x = x * c.d_model**0.5
        if c.mixer != "transformer_xl" and not c.no_pos:
            positions = layers.sinusoid(layers.countdown(length, c.clamp_len), c.d_model)
            x = x + positions[None].astype(x.dtype)
        x = layers.dropout(x, own, layers.EMBEDDING_SITE, c.dropout).astype(DTYPES[c.dtype])

        carried, shared = self._unpack(memory, None if own is None else own.key)
        favor = {"favor": self.layer_favor.value} if hasattr(self, "layer_favor") else {}
        stacked = (
            {"params": self.layer_params, **favor},
            carried,
            keys if keys is None else keys[:-1],
        )

        def layer(x, inputs, last=None):
            variables, carried, key = inputs
            source = None if own is None else Dropout(key, own.rows)
            return Block(c, parent=None).apply(variables, x, carried, shared, source, last)

        if last is None:
            keep = jax.checkpoint_policies.save_only_these_names(*layers.KEPT)
            # In a scan nothing can merge the second computation with the first (prevent_cse).
            kept = jax.checkpoint(layer, policy=keep, prevent_cse=False)
            x, carried = jax.lax.scan(kept, x, stacked)
        else:
            # The last layer computes what its last positions need and nothing more.
            x, carried = jax.lax.scan(layer, x, jax.tree.map(lambda leaf: leaf[:-1], stacked))
            x, top = layer(x, jax.tree.map(lambda leaf: leaf[-1], stacked), last)
            carried = jax.tree.map(lambda a, b: jnp.concatenate([a, b[None]]), carried, top)
        x = layers.dropout(x, own, layers.HIDDEN_SITE, c.dropout)
        return x, self._pack(carried, memory, length), tables

    def _pack(self, carried: Any, memory: Any, length: int) -> Any:
        if carried is None:
            return None
        c = self.config
        per_layer = tuple(
            jax.tree.map(lambda leaf, i=i: leaf[i], carried) for i in range(c.n_layer)
        )
        if c.mixer == "transformer_xl":
            return SegmentMemory(per_layer, jnp.minimum(memory.length + length, c.mem_len))
        return per_layer

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        targets: Int[Array, "B S"],
        memory: Any = None,
        dropout: Dropout | None = None,
    ) -> tuple[Float[Array, "B S"], Any]:
        """-log p(target | tokens so far, memory) in nats, [B, S] float32, and the new memory.

        Args:
            tokens: inputs, [B, T].
            targets: the next token of each position, [B, T]; or, [B, S] with S < T, of the last S
                positions only, which saves the work that the others would need.
            memory: None, or what an earlier call returned. Gradients flow through fast weights;
                a training loop that must not backpropagate into earlier segments passes it
                as data (as ours does).
            dropout: masks of a training pass; None evaluates.
        """
        last = None if targets.shape == tokens.shape else targets.shape[1]
        hidden, memory, tables = self._hidden(tokens, memory, dropout, last)
        return self.softmax(hidden, targets, tables, self.embedding.projs), memory

    def log_probs(
        self, tokens: Int[Array, "B T"], memory: Any = None
    ) -> tuple[Float[Array, "B V"], Any]:
        """log p(next token) after the last position, [B, n_token] float32, and the new memory."""
        hidden, memory, tables = self._hidden(tokens, memory, None, 1)
        return self.softmax.log_probs(hidden[:, 0], tables, self.embedding.projs), memory


def redraw_projections(config: ModelConfig, key: Key[Array, ""]) -> dict:
    """Fresh FAVOR+ projections for every layer as variables, `{}` for models without.

    The official toolkit draws one at every forward pass in training and keeps the last for
    evaluation; here the training step draws and stores it.
    """
    if config.mixer != "fast_weight" or config.feature_map != "favor":
        return {}
    draw = lambda k: ops.favor_projection(k, config.d_head, config.performer_proj_dim)
    projections = jax.vmap(draw)(jax.random.split(key, config.n_layer))
    return {"favor": {"layers": {"mixer": {"projection": projections}}}}


def build_config(fields: dict[str, Any], n_token: int) -> ModelConfig:
    """`ModelConfig` of a config's `model` group for a vocabulary of `n_token` words.

    Cutoffs beyond the vocabulary have no words to cut and are left out, so that a preset made
    for WikiText-103 also runs on a smaller text.
    """
    cutoffs = tuple(c for c in fields["cutoffs"] if type(c) is not int or c < n_token)
    return ModelConfig(n_token=n_token, **{**fields, "cutoffs": cutoffs})
