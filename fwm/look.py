"""A trained run from inside: a sample of what it writes, what the memory of each layer holds."""

import functools
import itertools
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from fwm import generate
from fwm.layers import Block, Shared
from fwm.model import LanguageModel, layer_of
from fwm.ops import FastWeightState
from fwm.tasks import TASKS

SAMPLE, READ = 60, 16  # tokens that are written, and of these so many read by the memories


class LayerMemory(NamedTuple):
    """What a layer's memory holds after some tokens.

    Fields:
        name: of the layer's mixer.
        weights: [N, K, V] after the last token; None: it keeps no fast weights.
        changed: [i, j], by how much token j has changed what the key of token i reads, as a share
            of what it read when it was written, mean over the heads; None: it names no keys.
    """

    name: str
    weights: Float[np.ndarray, "N K V"] | None
    changed: Float[np.ndarray, "T T"] | None


def inside(config: Any, workdir: Path) -> tuple[str, list[str], list[LayerMemory]]:
    """A sample of a run's text, the tokens that its memories have read, and these memories.

    The tokens are the first of the sample, or of a task that writes nothing those of a row.

    Raises:
        UserError: as `fwm.generate.load`.
    """
    decoder, vocab, _ = generate.load(config, workdir)
    text = ""
    if TASKS[config.task].writes:
        start = vocab.newline_id or 0
        drawn = generate.generate(decoder, [start], max_new_tokens=SAMPLE)
        ids = [token for token, _ in drawn]
        text = "".join(generate.text_pieces(vocab, ids))
    else:
        task = TASKS[config.task](config, ("train",), vocab)
        ids = task.batch(0, slice(0, 1)).tokens[0].tolist()
    ids = ids[:READ]
    words = [vocab.decode([i]).strip() or vocab.symbols[i] for i in ids]
    return text, words, memories(decoder.model, decoder.variables, np.array(ids, np.int32))


def memories(
    model: LanguageModel, variables: Any, tokens: Int[np.ndarray, " T"]
) -> list[LayerMemory]:
    """What the memory of each layer holds after these tokens, as one segment without a past."""
    config = model.config
    row = jnp.asarray(tokens)[None]
    x, _ = model.apply(variables, row, method="embedded")
    x, found = x.astype(config.dtype), []
    names = itertools.cycle(config.pattern)
    for number, name in zip(range(config.n_layer), names, strict=False):
        block, own = layer_of(config, variables, number)
        parameters = {shared: variables["params"][shared] for shared in block.mixer.shared_shapes()}
        x, weights, keys = _read(block, own, x, parameters)
        if weights is None:
            found.append(LayerMemory(name, None, None))
        else:
            weights = np.asarray(weights, np.float32)
            changed = None if keys is None else changes(weights, np.asarray(keys, np.float32))
            found.append(LayerMemory(name, weights[-1], changed))
    return found


@functools.partial(jax.jit, static_argnums=0)
def _read(block: Block, variables: Any, x: Array, parameters: Any) -> Any:
    """What a layer makes of x [1, T, D], its fast weights after every token and their keys."""
    shared = Shared(parameters, None)
    empty = block.mixer.empty(1, x.shape[-1])
    if _fast_weights(empty) is None:
        return block.apply(variables, x, None, shared)[0], None, None

    def read(carried: Any, token: Array) -> Any:
        (y, carried), sown = block.apply(
            variables, token[:, None], carried, shared, mutable=["intermediates"]
        )
        told = sown.get("intermediates", {}).get("mixer", {}).get("memory_inputs")
        key = None if told is None else told[0][1][0, -1]  # of several writes the last one's
        return carried, (y[:, 0], _fast_weights(carried)[0], key)

    _, (y, weights, keys) = jax.lax.scan(read, empty, x.swapaxes(0, 1))
    return y.swapaxes(0, 1), weights, keys


def _fast_weights(carried: Any) -> Any:
    """[B, N, K, V] of what a layer carries; None where that has no fast weights."""
    is_state = lambda x: isinstance(x, FastWeightState)
    states = [x for x in jax.tree.leaves(carried, is_leaf=is_state) if is_state(x)]
    return states[0].weights if states else None


def changes(
    weights: Float[np.ndarray, "T N K V"], keys: Float[np.ndarray, "T N K"]
) -> Float[np.ndarray, "T T"]:
    """`LayerMemory.changed` of the fast weights after every token."""
    reads = np.einsum("ink,jnkv->ijnv", keys, weights)
    here = np.arange(len(keys))
    written = np.linalg.norm(reads[here, here], axis=-1)  # [i, N]
    change = np.linalg.norm(np.diff(reads, axis=1), axis=-1)  # [i, j - 1, N]
    share = np.where(written[:, None] > 0, change / np.maximum(written[:, None], 1e-30), 0.0)
    found = np.zeros((len(keys), len(keys)), np.float32)
    found[:, 1:] = share.mean(axis=-1)
    return np.triu(found, 1)
