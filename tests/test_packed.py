"""Documents packed into rows: as each by itself, in the model, its memory and its scores."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_score import make

from fwm.errors import UserError
from fwm.layers import MIXERS, FastWeightAttention, Mixer
from fwm.model import LanguageModel, ModelConfig, empty_memory
from fwm.ops import UPDATE_RULES
from fwm.score import CarryOver, finish, sliding_window

T = 16
# An id may come again, and the first document of a row with the id 0 goes on with the memory.
IDS = np.array([[0] * 4 + [3] + [1] * 6 + [0] * 5, [4] * 12 + [5] * 4], np.int32)
# (row, begin, end) of each document.
DOCUMENTS = [(0, 0, 4), (0, 4, 5), (0, 5, 11), (0, 11, 16), (1, 0, 12), (1, 12, 16)]
TOKENS = np.random.default_rng(3).integers(0, 30, (2, T + 1)).astype(np.int32)
SUM = dict(update_rule="sum", attn_normalization="output")
MODELS = {
    "positions": dict(mixer="softmax", clamp_len=7, n_layer=1),
    "switches": dict(
        key_norm="l2", decay="channel", n_step=2, short_conv=3, no_pos=True, n_layer=1
    ),
    "transformer_xl": dict(mixer="transformer_xl", mem_len=T, n_layer=1),
    "hybrid": dict(mixer=("fast_weight", "softmax"), attention_window=5, no_pos=True),
    "16 bits": dict(
        mixer=("fast_weight", "softmax"), attention_window=5, no_pos=True, decay="head",
        short_conv=3, dtype="bfloat16",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_packed_equals_apart(name):
    model, variables = make(**MODELS[name])
    # In 16 bits sums that differ in their last bit may round to neighbours, 2^-8 apart near 1; and
    # a program without a gradient may round at other places than one with.
    once, twice = (2**-8, 2**-7) if name == "16 bits" else (2e-5, 2e-5)
    x, y, ids = (jnp.asarray(of) for of in (TOKENS[:, :-1], TOKENS[:, 1:], IDS))
    rng = np.random.default_rng(4)
    weights = rng.normal(size=(2, T)).astype(np.float32)

    def fill(leaf):
        """Something to go on from; three tokens, where what is carried says how many."""
        if jnp.issubdtype(leaf.dtype, jnp.integer):
            return jnp.full_like(leaf, 3)
        return jnp.asarray(rng.random(leaf.shape) / 3, leaf.dtype)

    memory = jax.tree.map(fill, empty_memory(model.config, 2))
    # Each document at the beginning of a row of its own, of which only the first goes on.
    own = lambda of: jnp.asarray(
        np.stack([np.pad(of[r, begin:end], (0, T - end + begin)) for r, begin, end in DOCUMENTS])
    )
    empty = empty_memory(model.config, len(DOCUMENTS))
    rows = jax.tree.map(lambda none, leaf: none.at[0].set(leaf[0]), empty, memory)

    def scored(variables, x, y, weights, memory, ids=None):
        nll, after = model.apply(variables, x, y, memory, segment_ids=ids)
        return jnp.sum(nll * weights), (nll, after)

    scored = jax.jit(jax.value_and_grad(scored, has_aux=True))
    (_, (nll, after)), grads = scored(variables, x, y, weights, memory, ids)
    (_, (apart, _)), own_grads = scored(
        variables, own(TOKENS[:, :-1]), own(TOKENS[:, 1:]), own(weights), rows
    )
    for (row, begin, end), alone in zip(DOCUMENTS, apart, strict=True):
        np.testing.assert_allclose(nll[row, begin:end], alone[: end - begin], rtol=0, atol=once)
    for ours, theirs in zip(jax.tree.leaves(grads), jax.tree.leaves(own_grads), strict=True):
        atol = once * (0.5 + 5 * np.abs(theirs).max())
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=atol)
    if name == "positions":  # they begin anew with every call
        return
    # In two parts, of which the second goes on with the id 0.
    part = jax.jit(lambda x, y, ids, memory: model.apply(variables, x, y, memory, segment_ids=ids))
    first, half = part(x[:, :8], y[:, :8], ids[:, :8], memory)
    second, at_end = part(x[:, 8:], y[:, 8:], ids[:, 8:] - ids[:, 7:8], half)
    np.testing.assert_allclose(jnp.concatenate([first, second], 1), nll, rtol=0, atol=twice)
    # Of a window only what its length says is of the last document.
    if name == "switches":
        for ours, theirs in zip(*map(jax.tree.leaves, (after, at_end)), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=2e-5)


def test_a_stream_is_scored_by_documents():
    model, variables = make(**SUM, no_pos=True, n_layer=1)
    stream, n = TOKENS.reshape(-1), 2 * T + 1
    ids = np.repeat([0, 1, 2], [9, 10, 15])

    @jax.jit
    def expected(window):
        """Of each token what the window and its document show, at the beginning of a row."""
        begin = jnp.maximum(np.searchsorted(ids, ids[:n]), np.arange(n) + 1 - window)
        place = begin[:, None] + np.arange(n)[None]
        x, y = (jnp.asarray(stream)[jnp.minimum(place + i, n)] for i in (0, 1))
        nll = model.apply(variables, x, y)[0]
        return jnp.take_along_axis(nll, (np.arange(n) - begin)[:, None], axis=1).sum()

    options = dict(segment_ids=ids)
    found = sliding_window(model, variables, stream, window=6, batch_size=8, **options)
    assert found.count == n
    assert found.total_nll == pytest.approx(float(expected(6)), rel=1e-5)
    protocol = CarryOver(model, variables, stream, 11, **options)
    partials = list(protocol.partials())
    assert finish(partials).total_nll == pytest.approx(float(expected(n)), rel=1e-5)
    assert finish([partials[0], *protocol.partials(partials[0])]) == finish(partials)
    assert protocol.key() != CarryOver(model, variables, stream, 11).key()
    for wrong in (ids[1:], ids / 2):
        object.__setattr__(protocol, "segment_ids", wrong)  # tests check what is made themselves
        with pytest.raises(UserError, match=r"segment_ids must be one integer for each .*\(34,\)"):
            list(protocol.partials())


def test_what_cannot_be_packed(monkeypatch):
    class Blind(FastWeightAttention):
        packs = False

    monkeypatch.setitem(MIXERS, "blind", Blind)
    config = ModelConfig(30, mixer=("softmax", "blind"), n_layer=2)
    x = jnp.zeros((1, 4), jnp.int32)
    pack = lambda: LanguageModel(config).init(jax.random.key(0), x, x, segment_ids=x)
    with pytest.raises(UserError, match="rows of the mixer blind, which does not keep them"):
        jax.eval_shape(pack)
    assert not Mixer.packs
    rule = UPDATE_RULES["delta"]._replace(key_sums=lambda k, before, *rest, last=False: k)
    monkeypatch.setitem(UPDATE_RULES, "own", rule)
    config = ModelConfig(30, update_rule="own", attn_normalization="output")
    with pytest.raises(UserError, match="anew with each document, and update_rule own makes its"):
        config.check_packs()
    dataclasses.replace(config, attn_normalization="none").check_packs()
