"""The weights of a trained run as the beginning of another one, whose text has other words.

Words are matched by what they are, not by their numbers: a word's rows of the embedding and of the
softmax go where the word is now. Everything else is taken as it is.
"""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Int

from fwm import workdir as workdirs
from fwm.config import ModelConfig, model_keys
from fwm.data import Vocabulary
from fwm.errors import UserError
from fwm.files import expanded
from fwm.workdir import OpenedRun

VOCABULARY = ("embedding", "softmax")  # the groups of arrays that depend on it
# What decides the shape of a row, or what it is multiplied with, but for the number of words.
OF_ROWS = ("d_model", "d_embed", "div_val", "tie_weight")


class Borrowed(NamedTuple):
    """The first parameters of a run that begins with another one's."""

    params: Any
    line: str  # that says so
    origin: dict[str, Any]  # to be remembered: `run`, its folder, and `step`


def borrow(
    settings: Any, drawn: Any, config: ModelConfig, vocab: Vocabulary, unit: str
) -> Borrowed:
    """What a run with `settings.init_from` begins with.

    Args:
        settings: all of its.
        drawn: its parameters, for what the other run has not.
        config: of its model.
        vocab: of its text.
        unit: what that consists of: word, character, subword.

    Raises:
        UserError: as `transfer`, or there is no such run or checkpoint.
    """
    folder = expanded(settings.init_from).absolute()
    source = workdirs.open(folder, settings.init_checkpoint)
    params, sentence = transfer(drawn, config, vocab, source, unit)
    line = f"Weights of {folder}, step {source.step}: {sentence}"
    return Borrowed(params, line, {"run": str(folder), "step": source.step})


def subwords(settings: Any, workdir: Path, begun: bool) -> Vocabulary | None:
    """Those of the run whose weights the first ones are, or were; None: the text's own.

    Words and characters can be matched with those of another text, but a text has to be cut into
    subwords as it was for the weights.

    Args:
        settings: of the run.
        workdir: its folder.
        begun: whether it has a checkpoint, and needs the other run no more.

    Raises:
        UserError: there is no such run.
    """
    if begun:
        folder = workdir if workdirs.saved_config(workdir)["init_from"] else None
    else:
        folder = expanded(settings.init_from) if settings.init_from else None
    if folder is None:
        return None
    workdirs.check_holds_run(folder)
    vocab = Vocabulary.load(folder / "vocab.txt")
    return vocab if vocab.bpe else None


def transfer(
    params: Any, config: ModelConfig, vocab: Vocabulary, source: OpenedRun, unit: str = "word"
) -> tuple[Any, str]:
    """`params` with what `source` has learnt, and a sentence on how many words that is of.

    The rows of words that `source` does not know stay as they were drawn. With `div_val` above 1 a
    cluster's rows have a width of their own, so those of a word that has gone to another cluster
    stay as drawn too. Clusters keep their numbers: what `source` has of the first one (its weight
    in the head, its projection) goes to the first one, wherever it is cut now.

    Raises:
        UserError: the two models differ in the shape of what they would have in common.
    """
    drawn = flatten_dict(jax.tree.map(np.array, params), sep="/")
    learnt = flatten_dict(jax.device_get(source.variables["params"]), sep="/")
    _check_fits(drawn, config, learnt, source.model.config)
    number = np.array([source.vocab.index.get(symbol, -1) for symbol in vocab.symbols])
    table, row = _places(config)
    old_table, old_row = _places(source.model.config)
    known = number >= 0
    kept = known & (old_table[number] == table)
    for name, array in drawn.items():
        last = name.rpartition("/")[2]
        kind, _, which = last.rpartition("_")
        if _is_vocabulary(name) and kind in ("table", "bias") and which.isdecimal():
            words = np.flatnonzero(kept & (table == int(which)))
            if len(words):
                array[row[words]] = learnt[name][old_row[number[words]]]
        elif _is_vocabulary(name) and last in ("cluster_weight", "cluster_bias"):
            # The first cluster has the last row.
            both = min(len(array), len(learnt.get(name, ())))
            if both:
                array[-both:] = learnt[name][-both:]
        elif name in learnt:
            array[...] = learnt[name]
    told = f"{known.sum():,} of {len(vocab):,} {unit}s are matched, {(~known).sum():,} are new"
    if moved := int((known & ~kept).sum()):
        told += f", {moved:,} are in a cluster of another width and are drawn anew too"
    others = _differences(config, source.model.config)
    return unflatten_dict(drawn, sep="/"), f"{told}{f'; of the model {others}' * bool(others)}."


def _places(config: ModelConfig) -> tuple[Int[np.ndarray, " V"], Int[np.ndarray, " V"]]:
    """Of each word, which table it is in and which row there."""
    words = np.arange(config.n_token)
    if config.div_val == 1:  # One table, wherever the clusters are cut.
        return np.zeros_like(words), words
    starts = np.array([0, *config.cutoffs])
    table = np.searchsorted(starts, words, side="right") - 1
    return table, words - starts[table]


def _is_vocabulary(name: str) -> bool:
    return name.startswith(VOCABULARY)


def _differences(here: ModelConfig, there: ModelConfig) -> str:
    """The settings of two models that differ, but for how the vocabulary is cut."""
    names = [n for n in model_keys() if n not in ("cutoffs", "tie_projs")]
    pairs = [(n, getattr(there, n), getattr(here, n)) for n in names]
    return ", ".join(f"{n} is {a!r} there and {b!r} here" for n, a, b in pairs if a != b)


def _check_fits(drawn: dict, here: ModelConfig, learnt: dict, there: ModelConfig) -> None:
    shapes = lambda arrays: {n: x.shape for n, x in arrays.items() if not _is_vocabulary(n)}
    clusters = min(len(here.tie_projs), len(there.tie_projs))
    rows = lambda c: [*(getattr(c, name) for name in OF_ROWS), c.tie_projs[:clusters]]
    if shapes(drawn) != shapes(learnt) or rows(here) != rows(there):
        raise UserError(
            "the weights of config.init_from do not fit this model: "
            f"{_differences(here, there) or 'their arrays have other names or shapes'}; give "
            "config.model the same sizes, or another run."
        )
