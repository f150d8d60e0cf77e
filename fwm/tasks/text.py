"""Language modelling: the next token of a text, in consecutive segments."""

import functools
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fwm import data
from fwm.errors import UserError
from fwm.model import LanguageModel
from fwm.score import CarryOver, SlidingWindow
from fwm.step import Batch
from fwm.tasks.task import Task


class Text(Task):
    """A corpus (`config.data`); every target counts."""

    writes = True

    def __init__(self, config: Any, splits: Sequence[str], vocab: data.Vocabulary | None = None):
        self._train, self._seed = config.train, config.seed
        d = config.data
        keys = ("dir", "file", "cache_dir", "download", "tokenizer", "vocab_size", "field")
        settings = {key: d[key] for key in (*keys, "documents")}
        self.corpus = data.load(d.name, vocab=vocab, splits=splits, **settings)
        self.vocab, self.unit = self.corpus.vocab, self.corpus.unit
        self.warnings, self.texts = self.corpus.warnings, self.corpus.texts
        self.size = len(self.corpus.streams["train"]) if "train" in splits else 0
        for split in set(splits) - {"train"}:
            if len(self.corpus.streams[split]) < 2:
                raise UserError(
                    f"the {split} split of {self.corpus.name} is a single {self.unit}, which "
                    "nothing stands before: give it more."
                )

    def summary(self) -> str:
        """Name, lengths and vocabulary of the text."""
        text, apart = self.texts["train"], ""
        if "documents" in text:
            apart = f" in {text['documents']:,} documents ({text['begin_at']})"
        return (
            f"Data: {self.corpus.name}, {self.size:,} training tokens{apart}, "
            f"{len(self.corpus.streams['valid']):,} validation tokens, "
            f"{len(self.vocab):,} {self.unit}s."
        )

    def identity(self) -> Any:
        """The streams of one text lie under one name everywhere."""
        streams: Any = [*self.corpus.streams.values(), *self.corpus.documents.values()]
        return [[Path(stream.filename).parent.name for stream in streams], self.vocab.text()]

    def batch(self, step: int, rows: slice) -> Batch:
        """Consecutive segments of equal rows; `first` where an epoch begins."""
        t = self._train
        numbers = np.arange(t.batch_size, dtype=np.int32)[rows]
        tokens, targets, first = self.corpus.train_batch(
            step, t.batch_size, t.tgt_len, self._seed, rows
        )
        ids = self.corpus.train_segment_ids(step, t.batch_size, t.tgt_len, rows)
        return Batch(tokens, targets, np.full(len(numbers), first), numbers, segment_ids=ids)

    def batches(self, split: str, rows: slice) -> Iterator[Batch]:
        """Consecutive segments of a split in `eval_batch_size` rows.

        Quick, and approximate: unlike in a sliding window, the first tokens of a segment see less
        context than a window would show them, and rows begin in the middle of the text.
        """
        n_row, stream = self._train.eval_batch_size, self.corpus.streams[split]
        numbers = np.arange(n_row, dtype=np.int32)[rows]
        first = np.ones(len(numbers), bool)
        cut = functools.partial(
            data.eval_segments, batch_size=n_row, tgt_len=self._train.tgt_len, rows=rows
        )
        ids: Iterator[Any] = itertools.repeat(None)
        if self.corpus.documents:
            begun = cut(self.corpus.documents[split][:-1])
            ids = (within - before[:, :1] for before, within, _ in begun)
        for (tokens, targets, mask), documents in zip(cut(stream), ids, strict=False):
            yield Batch(tokens, targets, first, numbers, mask, documents)
            first = np.zeros(len(numbers), bool)

    def protocol(self, config: Any, model: LanguageModel, variables: Any, split: str) -> Any:
        """A window that slides along, or segment after segment where a memory is carried."""
        c, e, stream = config, config.eval, self.corpus.streams[split]
        length = e.tgt_len or c.train.tgt_len
        documents = self.corpus.documents[split][1:] if self.corpus.documents else None
        rest = {"split_stream": e.split_stream, "segment_ids": documents}
        if model.config.carries(c.train.carry_over_fast_weight):
            return CarryOver(model, variables, stream, length, e.batch_size, **rest)
        return SlidingWindow(model, variables, stream, length, e.batch_size, e.stride, **rest)
