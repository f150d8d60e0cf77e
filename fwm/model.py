"""The language model: `ModelConfig` says what it is made of, `LanguageModel` computes it.

    nll, memory = LanguageModel(config).apply(variables, tokens, targets, memory)

Every model of the paper is one composition of the keys of `ModelConfig`; there are no classes per
variant. Layers are stacked along a leading axis of their parameters and scanned.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from fwm.config import ModelConfig, build_config
from fwm.errors import UserError
from fwm.layers import AdaptiveEmbedding, AdaptiveSoftmax, Block, Norm, Shared
from fwm.layers.parts import (
    EMBEDDING_SITE,
    HIDDEN_SITE,
    KEPT,
    countdown,
    matrix_init,
    sinusoid,
)
from fwm.ops.checks import check
from fwm.ops.dropout import Dropout, drop

__all__ = [
    "LanguageModel", "ModelConfig", "build_config", "empty_memory", "make_block",
    "redraw_projections",
]  # fmt: skip


def make_block(config: ModelConfig) -> Block:
    """One layer, without a parent: `apply` computes it with the parameters of any layer."""
    c = config
    return Block(c.make_mixer(), c.d_inner, c.dropout, c.norm, c.dtype, parent=None)


def empty_memory(config: ModelConfig, batch_size: int) -> Any:
    """The memory before the first token: what `memory=None` stands for; None: there is none."""
    mixer = config.make_mixer()
    carried = mixer.empty(batch_size, config.d_model)
    return None if carried is None else mixer.join((carried,) * config.n_layer)


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
        if c.norm == "pre":
            self.final_norm = Norm(c.dtype)
        self.shared_params = {
            name: self.param(name, matrix_init, shape)
            for name, shape in c.make_mixer().shared_shapes().items()
        }
        self.layer_params = self.param("layers", lambda key: self._init_layers(key)["params"])
        self.layer_draws = {}
        if jax.eval_shape(c.make_mixer().draw, jax.random.key(0)):
            make = lambda: self._init_layers(self.make_rng("params"))["favor"]
            self.layer_draws = {"favor": self.variable("favor", "layers", make).value}

    def _init_layers(self, key: Key[Array, ""]) -> Any:
        c = self.config
        x = jnp.zeros((1, 1, c.d_model), c.dtype)
        shared = Shared(self.shared_params, None)
        init = lambda k: make_block(c).init(k, x, None, shared)
        return jax.vmap(init)(jax.random.split(key, c.n_layer))

    def hidden(
        self,
        tokens: Int[Array, "B T"],
        memory: Any = None,
        dropout: Dropout | None = None,
        last: int | None = None,
    ) -> tuple[Float[Array, "B _ D"], Any]:
        """Output of the last layer, [B, T, D] (its last `last` positions if given), and memory."""
        x, memory, _ = self._hidden(tokens, memory, dropout, last)
        return x, memory

    def _hidden(
        self, tokens: Array, memory: Any, dropout: Dropout | None, last: int | None
    ) -> tuple[Array, Any, tuple[Array, ...]]:
        """As `hidden`, and the embedding's tables for a tied softmax.

        Handed on this way, the gradients of their two uses share one buffer.
        """
        c = self.config
        check("LanguageModel", tokens=(tokens, "B T", jnp.integer))
        _check_memory(c, memory, tokens.shape[0])
        # Layers have keys of their own; the last one is for what is not in a layer.
        keys, own = None, None
        if dropout is not None:
            keys = jax.random.split(dropout.key, c.n_layer + 1)
            own = Dropout(keys[-1], dropout.rows)
            keys = keys[:-1]
        x, tables = self.embedding.with_tables(tokens)
        x = x * c.d_model**0.5
        if c.make_mixer().adds_positions and not c.no_pos:
            positions = sinusoid(countdown(tokens.shape[1], c.clamp_len), c.d_model)
            x = x + positions[None].astype(x.dtype)
        x = drop(x, own, EMBEDDING_SITE, c.dropout).astype(c.dtype)
        x, memory = self._layers(x, memory, keys, own, last)
        if c.norm == "pre":
            x = self.final_norm(x)
        return drop(x, own, HIDDEN_SITE, c.dropout), memory, tables

    def _layers(
        self, x: Array, memory: Any, keys: Any, own: Dropout | None, last: int | None
    ) -> tuple[Array, Any]:
        """All layers, one scan: `keys` of their dropout, `own` of what they share."""
        c = self.config
        block, mixer = make_block(c), c.make_mixer()
        shared = Shared(self.shared_params, None if own is None else own.key)
        variables = {"params": self.layer_params, **self.layer_draws}
        carried = None if memory is None else _stack(mixer.split(memory))

        def layer(x, inputs, last=None):
            variables, carried, key = inputs
            source = None if own is None else Dropout(key, own.rows)
            return block.apply(variables, x, carried, shared, source, last)

        inputs = (variables, carried, keys)
        if last is None:
            keep = jax.checkpoint_policies.save_only_these_names(*KEPT)
            # In a scan nothing can merge the second computation with the first (prevent_cse).
            kept = jax.checkpoint(layer, policy=keep, prevent_cse=False)
            x, carried = jax.lax.scan(kept, x, inputs)
        else:
            # The last layer computes what its last positions need and nothing more.
            x, carried = jax.lax.scan(layer, x, jax.tree.map(lambda leaf: leaf[:-1], inputs))
            x, top = layer(x, jax.tree.map(lambda leaf: leaf[-1], inputs), last)
            carried = jax.tree.map(lambda a, b: jnp.concatenate([a, b[None]]), carried, top)
        return x, None if carried is None else mixer.join(_unstack(carried, c.n_layer))

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

        An id outside the vocabulary makes NaN of its own loss and of all that depend on it.

        Raises:
            UserError: tokens or targets that are no integers or do not fit each other.
        """
        check(
            "LanguageModel",
            tokens=(tokens, "B T", jnp.integer),
            targets=(targets, "B S", jnp.integer),
        )
        if targets.shape[1] > tokens.shape[1]:
            raise UserError(
                f"LanguageModel: targets of shape {targets.shape} are more than the tokens, of "
                f"shape {tokens.shape}: give one for each, or for the last ones only."
            )
        last = None if targets.shape == tokens.shape else targets.shape[1]
        hidden, memory, tables = self._hidden(tokens, memory, dropout, last)
        return self.softmax(hidden, targets, tables, self.embedding.projs), memory

    def log_probs(
        self, tokens: Int[Array, "B T"], memory: Any = None
    ) -> tuple[Float[Array, "B V"], Any]:
        """log p(next token) after the last position, [B, n_token] float32, and the new memory."""
        hidden, memory, tables = self._hidden(tokens, memory, None, 1)
        return self.softmax.log_probs(hidden[:, 0], tables, self.embedding.projs), memory

    def all_log_probs(
        self, tokens: Int[Array, "B T"], memory: Any = None
    ) -> tuple[Float[Array, "B T V"], Any]:
        """log p(next token) after every position, and the new memory: for small vocabularies."""
        hidden, memory, tables = self._hidden(tokens, memory, None, None)
        return self.softmax.log_probs(hidden, tables, self.embedding.projs), memory


def _check_memory(config: ModelConfig, memory: Any, batch_size: int) -> None:
    """Raise `UserError` where the memory is not one of this model for so many rows."""
    if memory is None:
        return
    shapes = lambda tree: jax.tree.map(jnp.shape, tree)
    expected = shapes(jax.eval_shape(lambda: empty_memory(config, batch_size)))
    got = shapes(memory)
    if got != expected:
        raise UserError(
            "LanguageModel: the memory must be None or what a call with "
            f"{batch_size} rows returned, {_short(expected)}, got {_short(got)}."
        )


def _short(shapes: Any) -> str:
    text = str(shapes)
    return text if len(text) <= 200 else f"{text[:200]} ..."


def _stack(per_layer: tuple[Any, ...]) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *per_layer)


def _unstack(carried: Any, n_layer: int) -> tuple[Any, ...]:
    return tuple(jax.tree.map(lambda leaf, i=i: leaf[i], carried) for i in range(n_layer))


def redraw_projections(config: ModelConfig, key: Key[Array, ""]) -> dict:
    """Fresh FAVOR+ projections for every layer as variables, `{}` for models without draws.

    The official toolkit draws one at every forward pass in training and keeps the last for
    evaluation; here the training step draws and stores it.
    """
    drawn = jax.vmap(config.make_mixer().draw)(jax.random.split(key, config.n_layer))
    return {"favor": {"layers": {"mixer": drawn}}} if drawn else {}
