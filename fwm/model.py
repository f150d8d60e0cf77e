"""The language model: `ModelConfig` says what it is made of, `LanguageModel` computes it.

    nll, memory = LanguageModel(config).apply(variables, tokens, targets, memory)

Every model of the paper is one composition of the keys of `ModelConfig`; there are no classes per
variant. Layers are stacked along a leading axis of their parameters and scanned.
"""

import functools
from collections.abc import Callable, Mapping
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
    SITES,
    countdown,
    matrix_init,
    sinusoid,
)
from fwm.ops.checks import check
from fwm.ops.dropout import Dropout, drop, site_words
from fwm.ops.segments import numbered, since_begin

__all__ = [
    "LanguageModel", "ModelConfig", "build_config", "empty_memory", "layer_of", "make_block",
    "redraw_projections",
]  # fmt: skip


def make_block(config: ModelConfig, place: int = 0) -> Block:
    """A layer of the pattern, without a parent: `apply` computes it with any such one's parameters.

    Args:
        config: of the model.
        place: in the pattern of mixers.
    """
    c = config
    return Block(c.make_mixers()[place], c.d_inner, c.dropout, c.norm, c.dtype, parent=None)


def layer_of(config: ModelConfig, variables: Any, number: int) -> tuple[Block, dict[str, Any]]:
    """Layer `number`, from 0, of a model and its own variables, to be run by itself."""
    repeat, place = divmod(number, len(config.pattern))
    own = {
        name: jax.tree.map(lambda leaf: leaf[repeat], _places(config, collection["layers"])[place])
        for name, collection in variables.items()
    }
    return make_block(config, place), own


def empty_memory(config: ModelConfig, batch_size: int) -> Any:
    """The memory before the first token: what `memory=None` stands for; None: there is none."""
    empty = [mixer.empty(batch_size, config.d_model) for mixer in config.make_mixers()]
    if not config.carries_memory:
        return None
    return _join(config, [(carried,) * (config.n_layer // len(empty)) for carried in empty])


def _in_precision(method: Callable[..., Any]) -> Callable[..., Any]:
    """The method with the matmuls that the config asks for."""

    @functools.wraps(method)
    def run(self: Any, *arguments: Any, **options: Any) -> Any:
        with self.config.precision():
            return method(self, *arguments, **options)

    return run


class LanguageModel(nn.Module):
    """Word embedding, `n_layer` blocks, adaptive softmax (paper section 6.3).

    Parameters and draws of the layers are stacked; in a pattern of several mixers those of each
    place by themselves, under the place and the mixer's name: `0_fast_weight`, `1_softmax`.

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
            for mixer in c.make_mixers()
            for name, shape in mixer.shared_shapes().items()
        }
        if self.has_variable("params", "layers"):
            # `param` would trace how they are drawn to compare shapes, as every layer does anyway.
            self.layer_params: Any = self.get_variable("params", "layers")
            self.layer_draws: Any = self.get_variable("favor", "layers", {})
            return
        self.layer_params = self.param("layers", lambda key: self._init_layers(key, "params"))
        self.layer_draws = {}
        if jax.eval_shape(lambda: redraw_projections(c, jax.random.key(0))):
            make = lambda: self._init_layers(self.make_rng("params"), "favor")
            self.layer_draws = self.variable("favor", "layers", make).value

    def _init_layers(self, key: Key[Array, ""], collection: str) -> Any:
        c = self.config
        x = jnp.zeros((1, 1, c.d_model), c.dtype)
        shared = Shared(self.shared_params, None)

        def init(place: int, keys: Array) -> Any:
            block = make_block(c, place)
            return jax.vmap(lambda key: block.init(key, x, None, shared))(keys).get(collection, {})

        return _by_place(c, key, init)

    @_in_precision
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
        self,
        tokens: Array,
        memory: Any,
        dropout: Dropout | None,
        last: int | None,
        documents: Array | None = None,
    ) -> tuple[Array, Any, tuple[Array, ...]]:
        """As `hidden`, and the embedding's tables for a tied softmax.

        Handed on this way, the gradients of their two uses share one buffer.
        """
        c = self.config
        check("LanguageModel", tokens=(tokens, "B T", jnp.integer))
        _check_memory(c, memory, tokens.shape[0])
        # Layers have keys of their own; the last one is for what is not in a layer.
        draws, own = None, None
        if dropout is not None:
            keys = jax.random.split(dropout.key, c.n_layer + 1)
            own = Dropout(keys[-1], dropout.rows)
            words = jax.vmap(jax.vmap(site_words, (None, 0)), (0, None))
            draws = keys[:-1], words(keys[:-1], jnp.array(SITES))
        x, tables = self.embedded(tokens, documents)
        x = drop(x, own, EMBEDDING_SITE, c.dropout).astype(c.dtype)
        shared = Shared(self.shared_params, None if own is None else own.key, documents)
        x, memory = self._layers(x, memory, draws, own, last, shared)
        if c.norm == "pre":
            x = self.final_norm(x)
        return drop(x, own, HIDDEN_SITE, c.dropout), memory, tables

    def embedded(
        self, tokens: Int[Array, "B T"], documents: Int[Array, "B T"] | None = None
    ) -> tuple[Float[Array, "B T D"], tuple[Array, ...]]:
        """What the first layer reads, but for dropout and dtype; the embedding's tables."""
        c = self.config
        x, tables = self.embedding.with_tables(tokens)
        x = x * c.d_model**0.5
        if c.make_mixers()[0].adds_positions and not c.no_pos:  # all mixers of a pattern agree
            positions = sinusoid(countdown(tokens.shape[1], c.clamp_len), c.d_model)[None]
            if documents is not None:  # each document's as at the beginning of a row
                positions = positions[0, since_begin(documents)]
            x = x + positions.astype(x.dtype)
        return x, tables

    def _layers(
        self,
        x: Array,
        memory: Any,
        draws: Any,
        own: Dropout | None,
        last: int | None,
        shared: Shared,
    ) -> tuple[Array, Any]:
        """All layers, one scan over repeats: `draws` of their dropout, `own` of what they share."""
        c = self.config
        n_place = len(c.pattern)
        carried: Any = (None,) * n_place
        if memory is not None:
            carried = tuple(map(_stack, _split(c, memory)))
        draws = jax.tree.map(lambda x: x.reshape(-1, n_place, *x.shape[1:]), draws)

        variables = tuple(
            {"params": params} | ({"favor": favor} if favor else {})
            for params, favor in zip(
                _places(c, self.layer_params), _places(c, self.layer_draws), strict=True
            )
        )

        def layer(place, last, x, variables, carried, draws):
            source = None if own is None else Dropout(draws[0], own.rows, draws[1])
            return make_block(c, place).apply(variables, x, carried, shared, source, last)

        def repeat(x, inputs, last=None, wrap=lambda layer: layer):
            variables, carried, draws = inputs
            after = []
            for place in range(n_place):
                top = last if place == n_place - 1 else None
                drawn = jax.tree.map(lambda x, place=place: x[place], draws)
                run = wrap(functools.partial(layer, place, top))
                x, state = run(x, variables[place], carried[place], drawn)
                after.append(state)
            return x, tuple(after)

        # In a scan nothing can merge the second computation with the first (prevent_cse).
        keep = jax.checkpoint_policies.save_only_these_names(*KEPT)
        kept = functools.partial(jax.checkpoint, policy=keep, prevent_cse=False)
        inputs = (variables, carried, draws)
        if last is None:
            x, carried = jax.lax.scan(functools.partial(repeat, wrap=kept), x, inputs)
        else:
            # The last layer computes what its last positions need and nothing more.
            x, carried = jax.lax.scan(repeat, x, jax.tree.map(lambda leaf: leaf[:-1], inputs))
            x, top = repeat(x, jax.tree.map(lambda leaf: leaf[-1], inputs), last)
            carried = jax.tree.map(lambda a, b: jnp.concatenate([a, b[None]]), carried, top)
        if not c.carries_memory:
            return x, None
        return x, _join(c, [_unstack(of, c.n_layer // n_place) for of in carried])

    @_in_precision
    def __call__(
        self,
        tokens: Int[Array, "B T"],
        targets: Int[Array, "B S"],
        memory: Any = None,
        dropout: Dropout | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
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
            segment_ids: documents that a row is packed with (`cu_seqlens` elsewhere): equal
                neighbours are of one document, and a token reads nothing of another one. The memory
                belongs to a document of the id 0, which a row that begins with it goes on with.
                Each is as by itself at the beginning of a row of T tokens, with its positions. The
                target of a document's last token may lie in the next one and counts as all do.

        An id outside the vocabulary makes NaN of its own loss and of all that depend on it.

        Raises:
            UserError: tokens, targets or segment_ids that are no integers or do not fit each other,
                segment_ids for a mixer that keeps no documents apart.
        """
        ids = {} if segment_ids is None else {"segment_ids": (segment_ids, "B T", jnp.integer)}
        check(
            "LanguageModel",
            tokens=(tokens, "B T", jnp.integer),
            targets=(targets, "B S", jnp.integer),
            **ids,
        )
        documents = None
        if segment_ids is not None:
            self.config.check_packs()
            documents = numbered(segment_ids)
        if targets.shape[1] > tokens.shape[1]:
            raise UserError(
                f"LanguageModel: targets of shape {targets.shape} are more than the tokens, of "
                f"shape {tokens.shape}: give one for each, or for the last ones only."
            )
        last = None if targets.shape == tokens.shape else targets.shape[1]
        hidden, memory, tables = self._hidden(tokens, memory, dropout, last, documents)
        return self.softmax(hidden, targets, tables, self.embedding.projs), memory

    @_in_precision
    def log_probs(
        self, tokens: Int[Array, "B T"], memory: Any = None
    ) -> tuple[Float[Array, "B V"], Any]:
        """log p(next token) after the last position, [B, n_token] float32, and the new memory."""
        hidden, memory, tables = self._hidden(tokens, memory, None, 1)
        return self.softmax.log_probs(hidden[:, 0], tables, self.embedding.projs), memory

    @_in_precision
    def all_log_probs(
        self, tokens: Int[Array, "B T"], memory: Any = None
    ) -> tuple[Float[Array, "B T V"], Any]:
        """log p(next token) after every position, and the new memory: for small vocabularies."""
        hidden, memory, tables = self._hidden(tokens, memory, None, None)
        return self.softmax.log_probs(hidden, tables, self.embedding.projs), memory


# A pattern of one mixer looks everywhere as if there were no patterns.


def _by_place(
    config: ModelConfig, key: Key[Array, ""], make: Callable[[int, Array], Any]
) -> dict[str, Any]:
    """`make(place, keys of its layers)` of every place of the pattern, empty ones left out."""
    n_place, keys = len(config.pattern), jax.random.split(key, config.n_layer)
    made = [make(place, keys[place::n_place]) for place in range(n_place)]
    if n_place == 1:
        return made[0]
    return {name: tree for name, tree in zip(_names(config), made, strict=True) if tree}


def _places(config: ModelConfig, tree: Mapping[str, Any]) -> tuple[Any, ...]:
    """What `_by_place` has put together: of every place its own, {} where it has nothing."""
    if len(config.pattern) == 1:
        return (tree,)
    return tuple(tree.get(name, {}) for name in _names(config))


def _names(config: ModelConfig) -> list[str]:
    return [f"{place}_{mixer}" for place, mixer in enumerate(config.pattern)]


def _join(config: ModelConfig, carried: list[tuple[Any, ...]]) -> Any:
    """What the layers of each place carry as the memory of a model."""
    mixers = config.make_mixers()
    joined = tuple(mixer.join(of) for mixer, of in zip(mixers, carried, strict=True))
    return joined if len(joined) > 1 else joined[0]


def _split(config: ModelConfig, memory: Any) -> list[tuple[Any, ...]]:
    """The inverse of `_join`."""
    mixers = config.make_mixers()
    joined = memory if len(mixers) > 1 else (memory,)
    return [mixer.split(of) for mixer, of in zip(mixers, joined, strict=True)]


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
    mixers = config.make_mixers()

    def draw(place: int, keys: Array) -> dict:
        drawn = jax.vmap(mixers[place].draw)(keys)
        return {"mixer": drawn} if drawn else {}

    drawn = _by_place(config, key, draw)
    return {"favor": {"layers": drawn}} if drawn else {}
