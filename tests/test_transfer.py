"""Weights on another vocabulary: each word's rows go where the word is now."""

import itertools

import jax
import numpy as np
import pytest

from fwm.config import ModelConfig
from fwm.data import Vocabulary
from fwm.errors import UserError
from fwm.model import LanguageModel
from fwm.transfer import transfer
from fwm.workdir import OpenedRun

SIZES = dict(mixer="softmax", d_model=4, n_head=1, d_head=2, d_inner=3, n_layer=2)
OLD = ("<eos>", "a", "b", "c", "d", "e", "f", "g")


def model(symbols, seed, **keys):
    """Config, vocabulary and parameters, each number of which is there once."""
    config = ModelConfig(len(symbols), **SIZES | keys)
    tokens = np.zeros((1, 1), np.int32)
    like = jax.eval_shape(LanguageModel(config).init, jax.random.key(0), tokens, tokens)["params"]
    count = itertools.count(1000 * seed, 1)
    fill = lambda x: np.reshape([next(count) for _ in range(x.size)], x.shape).astype(np.float32)
    return config, Vocabulary(tuple(symbols)), jax.tree.map(fill, like)


def run(symbols, **keys):
    config, vocab, params = model(symbols, 1, **keys)
    return OpenedRun(None, vocab, LanguageModel(config), {"params": params}, 5)


def rows(config, params, kind):
    """By the number of a word, its row of the table of a kind."""
    group, name = kind.split("/")
    if config.div_val == 1:
        return list(params[group][f"{name}_0"])
    tables = range(len(config.cutoffs) + 1)
    return list(itertools.chain(*(params[group][f"{name}_{i}"] for i in tables)))


@pytest.mark.parametrize(
    ("old", "new", "moved"),
    [
        # b, d leave; x, y are new; all others have other numbers.
        ({}, {}, ""),
        ({"cutoffs": (3, 5)}, {"cutoffs": (2,)}, ""),
        ({}, {"cutoffs": (2, 4)}, ""),
        ({"cutoffs": (3, 5), "tie_weight": False}, {"cutoffs": (4,), "tie_weight": False}, ""),
        ({"cutoffs": (3, 5), "d_embed": 2}, {"cutoffs": (4,), "d_embed": 2}, ""),
        # e, f were in clusters of other widths; c, g and <eos> were not.
        ({"cutoffs": (4, 7), "div_val": 2}, {"cutoffs": (6,), "div_val": 2}, ("e", "f", "g")),
    ],
)
def test_words_take_their_rows_along(old, new, moved):
    symbols = ("<eos>", "f", "x", "e", "c", "a", "y", "g")
    source = run(OLD, **old)
    config, vocab, drawn = model(symbols, 9, **new)
    params, line = transfer(drawn, config, vocab, source)
    text = "6 of 8 words are matched, 2 are new"
    text += (
        f", {len(moved)} are in a cluster of another width and are drawn anew too."
        if moved
        else "."
    )
    assert line == text
    learnt = source.variables["params"]
    kinds = ["embedding/table", "softmax/bias", *["softmax/table"] * (not config.tie_weight)]
    for kind in kinds:
        ours, fresh = rows(config, params, kind), rows(config, drawn, kind)
        theirs = rows(source.model.config, learnt, kind)
        for number, symbol in enumerate(symbols):
            known = symbol in OLD and symbol not in moved
            expected = theirs[OLD.index(symbol)] if known else fresh[number]
            np.testing.assert_array_equal(ours[number], expected, err_msg=f"{kind} of {symbol}")
    jax.tree.map(np.testing.assert_array_equal, params["layers"], learnt["layers"])
    softmax, before = params["softmax"], learnt["softmax"]
    if config.cutoffs and source.model.config.cutoffs:  # The first cluster has the last row.
        for name in ("cluster_weight", "cluster_bias"):
            np.testing.assert_array_equal(softmax[name][-1], before[name][-1])
    for name in (n for n in softmax if n.startswith("proj")):
        np.testing.assert_array_equal(softmax[name], before[name])
    # What was given is left as it was.
    jax.tree.map(np.testing.assert_array_equal, drawn, model(symbols, 9, **new)[2])


def test_the_same_words_in_another_order_have_the_same_probabilities():
    order = [0, 5, 2, 7, 1, 3, 6, 4]
    source = run(OLD)
    small = jax.tree.map(lambda x: np.sin(x), source.variables["params"])
    source = source._replace(variables={"params": small})
    config, vocab, drawn = model([OLD[i] for i in order], 9)
    params, _ = transfer(drawn, config, vocab, source)
    log_probs = jax.jit(
        lambda params, tokens: LanguageModel(config).apply(
            {"params": params}, tokens, method="log_probs"
        )[0]
    )
    tokens = np.array([[1, 3, 3, 7, 0]], np.int32)
    now, then = log_probs(params, tokens), log_probs(small, np.array(order, np.int32)[tokens])
    np.testing.assert_allclose(now, np.asarray(then)[..., order], rtol=0, atol=1e-6)


def test_what_does_not_fit_is_refused_and_what_differs_is_said():
    source = run(OLD, cutoffs=(4,))
    for keys, message in (
        ({"n_layer": 1}, r"do not fit this model: n_layer is 2 there and 1 here; give"),
        ({"d_embed": 2}, "d_embed is 4 there and 2 here"),
        ({"div_val": 2, "cutoffs": (4,)}, "div_val is 1 there and 2 here"),
        ({"tie_weight": False}, "tie_weight is True there and False here"),
    ):
        config, vocab, params = model(OLD, 9, **keys)
        with pytest.raises(UserError, match=message):
            transfer(params, config, vocab, source)
    config, vocab, params = model(OLD, 9, cutoffs=(4,), dropout=0.5)
    assert transfer(params, config, vocab, source)[1] == (
        "8 of 8 words are matched, 0 are new; of the model dropout is 0.0 there and 0.5 here."
    )
